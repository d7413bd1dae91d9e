"""What the decoder asks of a language model: candidates for the next segment of some replies.

Knows tokens, prefixes and sampling; nothing of rewards, thresholds or LangChain.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Chat: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages for a chat template: dictionaries with `role` and `content` and what the role adds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the language model draws a token; names and meanings are those of transformers.

    Attributes:
        temperature: Divides the logits, at least 0; 0 takes the likeliest token.
        top_p: Share of probability kept, in (0, 1].
        top_k: Number of tokens kept, at least 1; None keeps all.
        min_p: Least probability kept, relative to the likeliest token, in [0, 1].
        repetition_penalty: Divides positive and multiplies negative logits of the tokens that
            prompt, reply so far and the candidate itself hold, above 0; 1 changes nothing.

    Raises:
        ValueError: A setting is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, holds, wanted in (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1 or None"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
        ):
            if not holds or (value is not None and not math.isfinite(value)):
                raise ValueError(f"`{name}` must be {wanted}, got {value}")


class Prefix:
    """Prompt and accepted tokens of one reply; the language model keeps its KV under it.

    One object a reply, compared by identity. The decoder appends what it keeps and cuts what it
    takes back; a language model makes what it has computed agree with the ids when it next draws.

    Attributes:
        prompt_ids: Token ids of the chat, templated, up to and with the opening of the reply.
        token_ids: Token ids accepted so far.
        lane: Rows of one lane are drawn together, and never with those of another.
        partition: Name under which prompts may share computed prefixes with other requests.
    """

    __slots__ = ("__weakref__", "lane", "partition", "prompt_ids", "token_ids")

    def __init__(
        self, prompt_ids: Sequence[int], *, lane: str = "interactive", partition: str = ""
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.token_ids: tuple[int, ...] = ()
        self.lane = lane
        self.partition = partition

    def __len__(self) -> int:
        """Return the number of tokens, prompt and accepted."""
        return len(self.prompt_ids) + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Asks for the attempts `first_attempt`, ..., `first_attempt + count - 1` of a segment.

    Attributes:
        prefix: What they continue.
        seed: Seed of the reply.
        segment: Index of the segment, from 0; with seed, attempt and position the key of the noise.
        first_attempt: Number of the first candidate, from 1.
        count: How many candidates, at least 1.
        size: Most tokens of a candidate, at least 1; the end of the reply counts as one.
        sampling: How tokens are drawn.
        streamed: Whether the tokens of the first candidate are wanted while they are drawn, as
            for a reply that nobody guards.
    """

    prefix: Prefix
    seed: int
    segment: int
    first_attempt: int
    count: int
    size: int
    sampling: Sampling
    streamed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A proposed run of tokens, unjudged.

    No tokens and not finished: the model had no finite logits, the reply fails.

    Attributes:
        attempt: Its number.
        token_ids: The tokens; the token that ends the reply is not among them.
        finished: Whether the language model ended the reply after them.
    """

    attempt: int
    token_ids: tuple[int, ...]
    finished: bool

    @property
    def num_drawn(self) -> int:
        """Number of tokens drawn, with the one that ends the reply."""
        return len(self.token_ids) + self.finished


Drafting: TypeAlias = Generator[Sequence[int | None], None, list[list[Candidate]]]
"""A round of drafting in progress: yields between pieces of device work, and returns candidates.

What it yields is, for each request, the token just drawn for its first candidate where the
request is `streamed` and there is one (never the token that ends the reply), else None; or an
empty sequence, when no request has a new token.
"""


class LanguageModel(ABC):
    """A language model that drafts candidates for the next segment of several replies at once.

    Shared by all replies and unchanging but for what it has computed for each prefix. Called by
    one thread, the engine's, except `encode`, `decode` and the properties, which any thread calls.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What a user calls it: hub id or folder."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Equal for two models only when they draw the same from the same prompt."""

    @property
    @abstractmethod
    def vocabulary(self) -> str:
        """Fingerprint of the tokenizer: where it is equal, token ids mean the same text."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Most tokens of prompt and reply together."""

    @property
    def device(self) -> str:
        """Device that its work runs on; models of one device share one engine."""
        return "cpu"

    @property
    def sampling(self) -> Sampling:
        """How it is meant to be sampled, where nobody says otherwise."""
        return Sampling()

    @property
    def max_rows(self) -> int:
        """Most replies that it draws for at once."""
        return 64

    @property
    def max_candidates(self) -> int:
        """Most candidates of one reply that it drafts at once."""
        return 8

    def round_seconds(self, num_rows: int, count: int, size: int) -> float:
        """Return what a round of `num_rows` x `count` candidates of `size` tokens is thought to take.

        Only ratios matter: the decoder chooses `count` by them. As it stands, more candidates
        cost as much as the same number of separate rounds, so that one is drafted at a time.
        """
        return float(num_rows * count * size)

    @abstractmethod
    def encode(self, chat: Chat, *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Return the token ids of a chat, templated, up to and with the opening of the reply.

        Control tokens that occur in the text of a message are encoded as plain text. A chat
        that ends in an assistant message is continued by the reply.
        """

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text by itself, without a template, to count them.

        As it stands, those of a chat in which a user says it.
        """
        return self.encode([{"role": "user", "content": text}])

    @abstractmethod
    def draw(self, requests: Sequence[Request]) -> list[list[Candidate]]:
        """Return `count` candidates for each request, in the order of their attempt numbers.

        A candidate follows from its own request and number: not from `count`, from the other
        requests, or from what was drawn before.

        A candidate with no tokens that is not finished says that the model had no finite logits:
        that reply fails, even where some of its tokens were streamed, and no other does.
        """

    def drafting(self, requests: Sequence[Request]) -> Drafting:
        """Do the work of `draw` in pieces, so that the engine can serve others between them."""
        proposals = self.draw(requests)
        yield ()
        return proposals

    def load(self) -> None:  # noqa: B027 - what is always loaded has nothing to do
        """Load what it needs, once, before its first use; any thread may call it.

        Raises:
            ValueError: There is nothing to load, or it cannot be used; the error says what to do.
        """

    def release(self, prefix: Prefix) -> None:  # noqa: B027 - a model that keeps nothing has nothing to drop
        """Drop what was computed for a reply that has ended."""

    def unload(self) -> None:  # noqa: B027 - likewise
        """Free the weights and everything computed; the next use loads them again."""
