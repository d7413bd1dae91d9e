"""From chats and texts to token ids, by a tokenizer of transformers.

Knows tokenizers and their chat templates; nothing of models, rewards or replies. What a person
typed or a model drafted is encoded as text, whatever control token it spells.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Chat: TypeAlias = Sequence[Mapping[str, Any]]


def vocabulary_of(tokenizer: Any) -> str:
    """Return a fingerprint of what the token ids of replies mean.

    It is equal for two tokenizers whose ordinary tokens have the same ids and decode alike, though
    their control tokens or chat templates differ: replies hold none of those.
    """
    special = set(tokenizer.all_special_ids)
    added = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if not token.special
    }
    special |= set(tokenizer.added_tokens_decoder) - set(added)
    vocabulary = sorted(
        (token_id, token)
        for token, token_id in tokenizer.get_vocab().items()
        if token_id not in special
    )
    decoder: Any = type(tokenizer).__name__
    if getattr(tokenizer, "is_fast", False):
        decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")
    cleaned = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    text = json.dumps([vocabulary, sorted(added.items()), decoder, cleaned], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_chat(
    tokenizer: Any,
    chat: Chat,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Return the token ids of a chat by the tokenizer's own template.

    Only the control tokens that the template writes are encoded as such. Those that messages and
    tools spell are text, in the keys of a call's arguments as well; so is what only looks like one
    because the template writes its own text right beside theirs, or takes something out of theirs.
    Where a template spells in ASCII what it is given, such as a dictionary by `string`, control
    tokens get a blank.
    """
    from transformers.utils.chat_template_utils import encode_marked_chat

    tokens = tuple(_control_tokens(tokenizer))
    controls = _any_of(tokens)

    def written(spell: Callable[[str], str]) -> str:
        text = tokenizer.apply_chat_template(
            [_respelled(message, spell) for message in chat],
            tools=[_respelled(tool, spell) for tool in tools] if tools else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
        )
        assert isinstance(text, str)
        return text

    spell: Callable[[str], str] = functools.partial(_marked, controls=controls)
    text = written(spell)
    if any(escaped in text for escaped in _ESCAPED_MARKS):  # its marks are text, the token is bare
        spell = _cutting(controls)
        text = written(spell)
    ids: list[int] = encode_marked_chat(tokenizer, text)
    if not any(_may_become(text, tokens) for text in _strings((chat, tools or ()))):
        return ids
    apart: list[int] = encode_marked_chat(tokenizer, written(_walling(spell, controls, tokens)))
    of_controls = set(tokenizer.convert_tokens_to_ids(list(tokens)))
    same = [each for each in ids if each in of_controls] == [
        each for each in apart if each in of_controls
    ]
    return ids if same else apart


def with_two_roles(chat: Chat) -> list[dict[str, Any]]:
    """Return a chat in which only user and assistant speak, in turns, the user first.

    It is for a template that refuses other roles; calls of tools are written as JSON.
    """
    told: list[dict[str, Any]] = [{"role": "user", "content": ""}]
    for message in chat:
        calls = (json.dumps(call["function"]) for call in message.get("tool_calls") or ())
        content = "\n".join(filter(None, (text_of(message.get("content")), *calls)))
        role = "assistant" if message.get("role") == "assistant" else "user"
        if told[-1]["role"] == role:
            told[-1]["content"] = "\n\n".join(filter(None, (told[-1]["content"], content)))
        else:
            told.append({"role": role, "content": content})
    return told


def text_of(content: Any) -> str:
    """Return the text of a message's content, which may be in parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(
        str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in parts
    )


# What transformers marks text by that spells control tokens: characters for private use.
_BEGIN_MARK, _END_MARK = "\U000f0000", "\U000f0001"
_ESCAPED_MARKS = tuple(
    escape(mark)[1:-1] for mark in (_BEGIN_MARK, _END_MARK) for escape in (repr, json.dumps)
)


def _respelled(value: Any, spell: Callable[[str], str]) -> Any:
    """Return a copy of messages or tools whose strings, keys among them, are spelled anew."""
    if isinstance(value, str):
        return spell(value)
    if isinstance(value, Mapping):
        return {_respelled(key, spell): _respelled(part, spell) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_respelled(part, spell) for part in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings of messages or tools, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _strings(key)
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)


def _marked(text: str, controls: "re.Pattern[str]") -> str:
    """Return a text in which control tokens are marked as text; marks in it are none of ours."""
    text = text.replace(_BEGIN_MARK, "").replace(_END_MARK, "")
    return controls.sub(f"{_BEGIN_MARK}\\g<0>{_END_MARK}", text)


def _cutting(controls: "re.Pattern[str]") -> Callable[[str], str]:
    """Return what puts a blank into control tokens, for templates that lose the marks."""

    def cut(text: str) -> str:
        text = text.replace(_BEGIN_MARK, "").replace(_END_MARK, "")
        return controls.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)

    return cut


def _walling(
    spell: Callable[[str], str], controls: "re.Pattern[str]", tokens: tuple[str, ...]
) -> Callable[[str], str]:
    """Return what also puts a mark where a text could become a token.

    That is at its ends, with what is beside it, and behind whatever a token may begin with: then
    none is left where a template takes out what is between the beginning and the rest of one.
    """
    begins = _edges(tokens).begins

    def walled(text: str) -> str:
        before, behind = _joins(text, tokens)
        text = text.replace(_BEGIN_MARK, "").replace(_END_MARK, "")
        pieces = controls.split(text)  # every other one is a token
        pieces[::2] = [begins.sub(f"\\g<0>{_BEGIN_MARK}", piece) for piece in pieces[::2]]
        pieces[1::2] = map(spell, pieces[1::2])
        return _BEGIN_MARK * before + "".join(pieces) + _END_MARK * behind

    return walled


def _may_become(text: str, tokens: tuple[str, ...]) -> bool:
    """Return whether a text could become a token, or a part of one, in a template's hands."""
    return bool(_edges(tokens).begins.search(text)) or any(_joins(text, tokens))


def _joins(text: str, tokens: tuple[str, ...]) -> tuple[bool, bool]:
    """Return whether a text could be part of a token with what stands before it, or behind it.

    Plain words could be, as the names of roles are in some templates; they are the application's.
    """
    if _WORD.fullmatch(text):
        return False, False
    edges = _edges(tokens)
    if any(text in token for token in tokens):
        return True, True
    sizes = range(1, min(edges.longest, len(text)) + 1)
    return (
        any(text[:size] in edges.endings for size in sizes),
        any(text[-size:] in edges.beginnings for size in sizes),
    )


_WORD = re.compile(r"\w*")


class _Edges(NamedTuple):
    """What tokens begin with and end with, in all lengths, the longest, and a first character."""

    beginnings: frozenset[str]
    endings: frozenset[str]
    longest: int
    begins: "re.Pattern[str]"


@functools.lru_cache(maxsize=32)
def _edges(tokens: tuple[str, ...]) -> _Edges:
    firsts = {token[:1] for token in tokens if not token[:1].isalnum()}
    return _Edges(
        frozenset(token[:size] for token in tokens for size in range(1, len(token))),
        frozenset(token[size:] for token in tokens for size in range(1, len(token))),
        max(map(len, tokens), default=0),
        _any_of(sorted(firsts)),
    )


class TextEncoder:
    """Encodes text that stands in the middle of a longer one.

    A tokenizer of the SentencePiece kind adds a space to what it is given; a piece of a reply
    must not get one, so that it is encoded behind a line break, which is then taken away.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._controls = _ordinary_controls(tokenizer)
        self._line_break: list[int] = []
        line_break, alone = self._encode(["\n", "a"], plain=True)
        if alone != self._encode(["\na"], plain=True)[0][len(line_break) :]:
            self._line_break = line_break

    @property
    def adds_space(self) -> bool:
        """Whether the tokenizer adds a space to the beginning of a text."""
        return bool(self._line_break)

    def encode(
        self, texts: Sequence[str], *, plain: bool = True, begins: bool = False
    ) -> list[list[int]]:
        """Return the token ids of each text.

        Args:
            texts: The texts.
            plain: Whether control tokens that occur in them are text; else they are tokens, as
                in what a template writes.
            begins: Whether each text begins a text of its own, after all.
        """
        if plain and self._controls is not None and any(map(self._controls.search, texts)):
            return [self._encode_broken(text, begins=begins) for text in texts]
        if begins or not self._line_break:
            return self._encode(texts, plain=plain)
        encoded = self._encode(["\n" + text for text in texts], plain=plain)
        begin = len(self._line_break)
        return [
            ids[begin:] if ids[:begin] == self._line_break else self._encode([text], plain=plain)[0]
            for ids, text in zip(encoded, texts, strict=True)
        ]

    def _encode_broken(self, text: str, *, begins: bool) -> list[int]:
        """Return the ids of a text of which each control token is encoded in two halves."""
        pieces = [""]
        for place, piece in enumerate(self._controls.split(text) if self._controls else [text]):
            if place % 2:
                pieces[-1] += piece[:1]
                pieces.append(piece[1:])
            else:
                pieces[-1] += piece
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            [more] = self.encode([piece], begins=begins and place == 0)
            ids += more
        return ids

    def _encode(self, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
        filled = [text for text in texts if text]
        if not filled:
            return [[] for _ in texts]
        encoded = iter(
            self._tokenizer(
                filled,
                add_special_tokens=False,
                split_special_tokens=plain,
                return_attention_mask=False,
                return_token_type_ids=False,
                padding=False,
                truncation=False,
                verbose=False,
            )["input_ids"]
        )
        return [list(next(encoded)) if text else [] for text in texts]


def _control_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens that text must not spell: special, or written by templates."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*special, *_written_by_templates(tokenizer)]


def _ordinary_controls(tokenizer: Any) -> "re.Pattern[str] | None":
    """Return what matches the tokens that a template writes and that are not marked as special.

    A tokenizer can be told to leave special tokens in a text alone, but not these.
    """
    controls = _written_by_templates(tokenizer)
    return _any_of(controls) if controls else None


def _written_by_templates(tokenizer: Any) -> list[str]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return []
    written = template if isinstance(template, str) else "".join(template.values())
    # Those that a template puts together from pieces, its tokenizer names.
    named = getattr(tokenizer, "chat_control_tokens", None) or ()
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special
        and len(token.content) > 1
        and (token.content in written or token.content in named)
        and not token.content.isspace()
    ]


def _any_of(tokens: Sequence[str]) -> "re.Pattern[str]":
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
