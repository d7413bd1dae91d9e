"""The text of a reply in progress: what tokens decode to, where it ends, what of it may be shown.

Knows token ids, characters and stop strings; nothing of rewards or language models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

Decode: TypeAlias = Callable[[Sequence[int]], str]

_REPLACEMENT = "\ufffd"
_MAX_INCOMPLETE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The text of some tokens of a reply, from its first; a candidate extends it untouched.

    Decoding looks at a window of tokens, not at the whole reply, and the text only grows: a
    character of which only the first bytes are there is left out until it is complete.

    Attributes:
        token_ids: The tokens; those after a stop string are cut.
        text: Their decoding without an incomplete last character (at most 3 bytes of it), cut
            before the first stop string. What is judged.
        finished: Whether the reply ends here.
        stopped: Whether a stop string ended it.
        exact: Whether `token_ids` decode to `text` and nothing else.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finished: bool = False
    stopped: bool = False
    exact: bool = True
    _settled: str = ""
    _window: int = 0
    _read: int = 0

    def extended(
        self,
        token_ids: Sequence[int],
        *,
        decode: Decode,
        stop: Sequence[str] = (),
        finished: bool = False,
        final: bool = False,
    ) -> "Text":
        """Return the text with more tokens.

        Args:
            token_ids: The tokens to add.
            decode: Returns the text of token ids.
            stop: Stop strings, none of them empty; the one that is complete first ends the reply.
            finished: Whether the language model ended the reply after the tokens.
            final: Whether no token can follow (as after the last token allowed), so that
                an incomplete character is written as U+FFFD and judged with the rest.
        """
        longer = self._decoded(token_ids, decode, flush=finished or final)
        cut = _find_stop(longer.text, stop, start=len(self.text))
        if cut is None:
            return replace(longer, finished=finished)
        begin, end = cut
        count = next(
            count
            for count in range(len(token_ids) + 1)
            if len(self._decoded(token_ids[:count], decode, flush=count == len(token_ids)).text)
            >= end
            or count == len(token_ids)
        )
        return replace(
            longer,
            token_ids=self.token_ids + tuple(token_ids[:count]),
            text=longer.text[:begin],
            finished=True,
            stopped=True,
            exact=False,
        )

    def _decoded(self, token_ids: Sequence[int], decode: Decode, *, flush: bool) -> "Text":
        ids = self.token_ids + tuple(token_ids)
        settled, window, read = self._settled, self._window, self._read
        after = _behind(decode, ids, window, read)
        if after.endswith(_REPLACEMENT * 2):
            # A decoder may write a whole run of bytes as U+FFFD where only its last character is
            # incomplete: what is complete without the last bytes is settled first.
            for end in range(len(ids) - 1, max(read, len(ids) - 1 - _MAX_INCOMPLETE), -1):
                shorter = _behind(decode, ids[:end], window, read)
                if shorter and not shorter.endswith(_REPLACEMENT):
                    settled, window, read = settled + shorter, read, end
                    after = _behind(decode, ids, window, read)
                    break
        complete = after.rstrip(_REPLACEMENT)
        complete = after[: max(len(complete), len(after) - _MAX_INCOMPLETE)]
        if flush or len(complete) == len(after):
            settled += after
            return Text(
                token_ids=ids,
                text=settled,
                _settled=settled,
                _window=read if len(ids) > read else window,
                _read=len(ids),
            )
        return Text(
            token_ids=ids,
            text=settled + complete,
            exact=False,
            _settled=settled,
            _window=window,
            _read=read,
        )

    def showable(self, stop: Sequence[str] = ()) -> str:
        """Return what may be shown: all, but for a possible beginning of a stop string."""
        if self.finished:
            return self.text
        held = 0
        for string in stop:
            for length in range(min(len(string) - 1, len(self.text)), held, -1):
                if self.text.endswith(string[:length]):
                    held = length
                    break
        return self.text[: len(self.text) - held]


def _behind(decode: Decode, token_ids: tuple[int, ...], window: int, read: int) -> str:
    """Return the text of the tokens from `read` on, decoded with those from `window` before them."""
    before = decode(token_ids[window:read]) if read > window else ""
    whole = decode(token_ids[window:])
    return whole[len(before) :] if whole.startswith(before) else decode(token_ids[read:])


def _find_stop(text: str, stop: Sequence[str], *, start: int) -> tuple[int, int] | None:
    """Return where the stop string that is complete first begins and ends, after `start`."""
    found = [
        (position + len(string), position)
        for string in stop
        if (position := text.find(string, max(0, start - len(string) + 1))) >= 0
    ]
    if not found:
        return None
    end, begin = min(found)
    return begin, end
