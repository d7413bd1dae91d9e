"""What the decoder asks of a reward: the value of candidates, on the reward's own scale.

Knows chats, completions and numbers; nothing of thresholds, language models or LangChain. A
`Scorer` is what is run (a model, a function, a server); a `Reward` is one reading of what
scorers say, or arithmetic on several readings. Rewards that read the same scorer run it once.
"""

import hashlib
import json
import logging
import math
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    from langchain_stars.rewards.algebra import Constraint

Chat: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages: dictionaries with `role` and `content` and what the role adds."""

_ROUNDING = 1e-6

_flags_of = vars(type)["__flags__"].__get__  # not the class's own word for it
_MADE_WHILE_RUNNING = 1 << 9  # CPython's Py_TPFLAGS_HEAPTYPE: all but the types compiled in


class RewardError(RuntimeError):
    """A reward could not be asked, or did not answer as it must.

    Carries names, counts and types; never what was judged.
    """


class NamedRewardError(RewardError):
    """A `RewardError` of this package's own making, whose reason may be logged.

    Anybody can raise a `RewardError` with anybody's words in it; of those the type alone is told.

    Attributes:
        reason: What failed, in names, counts and types.
    """

    def __init__(self, reason: str, *, reward: str | None = None) -> None:
        """Keep the reason; the message also has the name of the reward, if one is given."""
        super().__init__(reason if reward is None else f"reward {reward!r}: {reason}")
        self.reason = reason


def name_of(kind: type) -> str:
    """Return the name of a type, where it is a class of a module, so that it may be told.

    A class that somebody's code made while it ran may be named with anybody's words.
    """
    if not _flags_of(kind) & _MADE_WHILE_RUNNING:  # such as that of None, which no module names
        return kind.__name__
    try:
        known = vars(sys.modules[kind.__module__]).get(kind.__qualname__) is kind
    except Exception:  # such a class may say that its module is anything
        known = False
    return kind.__name__ if known else "a type of no module"


def reason_of(error: BaseException) -> str:
    """Return what may be logged of an error that judging raised: a named reason, or its type."""
    return error.reason if isinstance(error, NamedRewardError) else name_of(type(error))


class Failures:
    """Tells in a log what failed, ever more seldom: the first time, the second, fourth, eighth.

    A reward that always fails would fill a log otherwise. Safe to share between threads.

    Attributes:
        log: Where it is told.
    """

    MAX_KINDS = 1000
    """Kinds of failures that are counted at once; with one more, all begin anew."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def tell(self, name: str, reason: str) -> None:
        """Count that something failed, and tell it with its count where that is a power of two."""
        with self._lock:
            if len(self._counts) >= self.MAX_KINDS and (name, reason) not in self._counts:
                self._counts.clear()
            self._counts[name, reason] += 1
            count = self._counts[name, reason]
        if count == 1:
            self.log.warning("%s failed: %s", name, reason)
        elif count & (count - 1) == 0:
            self.log.warning("%s failed: %s (%d times)", name, reason, count)

    def clear(self) -> None:
        """Forget the counts."""
        with self._lock:
            self._counts.clear()


class Subject:
    """The reply that is judged: one object a reply, compared by identity.

    Scorers keep what they computed for a reply (its KV) under it.

    Attributes:
        chat: Messages of the thread, the last one usually the user's.
        vocabulary: Fingerprint of the tokenizer of the token ids of its completions.
        lane: Replies of one lane are judged together.
        partition: Name under which what is computed for its prompt may be shared with other
            replies; nothing is shared under an empty one.
    """

    __slots__ = ("__weakref__", "chat", "lane", "partition", "vocabulary")

    def __init__(
        self,
        chat: Chat,
        *,
        vocabulary: str = "",
        lane: str = "interactive",
        partition: str = "",
    ) -> None:
        self.chat = tuple(chat)
        self.vocabulary = vocabulary
        self.lane = lane
        self.partition = partition


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A reply to be judged: everything from its first character on.

    Attributes:
        text: What is judged, and shown where it is kept.
        finished: Whether the reply ends here. An open one may be cut off in a sentence.
        token_ids: The language model's tokens whose decoding is exactly `text`; None where there
            are none (a text cut at a stop string, or in a character).
    """

    text: str
    finished: bool
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Candidates of one reply that are to be judged.

    Attributes:
        subject: The reply.
        accepted: What has been kept of it: all candidates continue it (but for one that a stop
            string cuts back into it).
        candidates: The completions to judge, in the order of their attempts.
    """

    subject: Subject
    accepted: Completion
    candidates: tuple[Completion, ...]


Raw: TypeAlias = tuple[float, ...]
"""What a scorer says of one candidate: one number for each of its heads."""


class Scorer(ABC):
    """What is run to judge candidates.

    Shared by all replies and unchanging but for what it has computed for each subject.

    Attributes:
        on_device: Whether it runs on the engine's thread, which then asks it for all rows at
            once; else it is called in a worker thread, for one reply a call, under a deadline.
    """

    on_device: ClassVar[bool] = False

    @abstractmethod
    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        """Return, for each request and each of its candidates, one number for each head.

        Raises:
            Exception: Anything; the candidates of the call are then asked for one by one, and
                those whose own call fails are rejected.
        """

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides its answers, as JSON: kind, name, revision, settings."""

    @property
    def cost(self) -> float:
        """What a candidate token costs, relative to one of the language model; 0 is nothing.

        It matters where `seconds` is None. Neither decides more than speed.
        """
        return 0.0

    def seconds(self, num_tokens: int) -> float | None:
        """Return how long reading some tokens of candidates takes; None where nobody measured."""
        return None

    def load(self) -> None:  # noqa: B027 - what is always loaded has nothing to do
        """Load what it needs, once, before its first use; any thread may call it."""

    def release(self, subject: Subject) -> None:  # noqa: B027 - what keeps nothing drops nothing
        """Drop what was computed for a reply that has ended."""

    def unload(self) -> None:  # noqa: B027 - likewise
        """Free what `load` loaded; the next use loads it again."""


class Reward(ABC):
    """What a completion is worth, on a scale of its own; higher is better.

    Rewards are written with: `helpful + 0.5 * positive`, `minimum(a, b)`, and
    `safe >= 0.8`, which is a constraint.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports and errors call it."""

    @property
    @abstractmethod
    def leaves(self) -> tuple["Leaf", ...]:
        """The readings of scorers that it is made of, each once."""

    @abstractmethod
    def combine(self, values: Mapping["Leaf", float]) -> float:
        """Return the reward, given the value of every leaf."""

    @abstractmethod
    def bounds(self, values: Mapping["Leaf", float]) -> tuple[float, float]:
        """Return the least and the greatest reward possible, given the values of some leaves."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides its value, as JSON."""

    @property
    def target(self) -> float | None:
        """The reward that a good reply reaches, where it is known; a policy may ask another."""
        return None

    @property
    def beta(self) -> float | None:
        """The softness of acceptance that suits its scale, where it is known."""
        return None

    @property
    def alpha(self) -> float | None:
        """Where thresholds should start, from 0 (the prompt's reward) to 1 (the target), if known.

        1 where the reward of the empty reply is not a beginning of the reply's: a reward that
        answers there for the request would ask less of replies to bad requests.
        """
        return None

    @property
    def floor(self) -> float | None:
        """The least reward of an acceptable reply, where it is known."""
        return None

    @property
    def versioned(self) -> bool:
        """Whether an equal `identity` means equal values, in another process and later on.

        It does not for a function that was wrapped without a version: what such a reward judged
        must never be taken from a cache.
        """
        return all(leaf.versioned for leaf in self.leaves)

    @property
    def fingerprint(self) -> str:
        """Short digest of `identity`."""
        return digest(self.identity)

    def load(self) -> None:
        """Load every scorer that it reads."""
        for leaf in self.leaves:
            leaf.load()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # The algebra is in `rewards/algebra.py`; these are its spellings.
    def __add__(self, other: "Reward | float") -> "Reward":
        from langchain_stars.rewards import algebra

        return algebra.add(self, other)

    __radd__ = __add__

    def __sub__(self, other: "Reward | float") -> "Reward":
        from langchain_stars.rewards import algebra

        return algebra.add(self, algebra.scale(other, -1.0))

    def __rsub__(self, other: float) -> "Reward":
        from langchain_stars.rewards import algebra

        return algebra.add(algebra.scale(self, -1.0), other)

    def __mul__(self, factor: float) -> "Reward":
        from langchain_stars.rewards import algebra

        return algebra.scale(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Reward":
        from langchain_stars.rewards import algebra

        return algebra.divide(self, divisor)

    def __neg__(self) -> "Reward":
        from langchain_stars.rewards import algebra

        return algebra.scale(self, -1.0)

    def __ge__(self, floor: float) -> "Constraint":
        from langchain_stars.rewards import algebra

        return algebra.Constraint(reward=self, floor=floor)

    def __le__(self, ceiling: float) -> "Constraint":
        from langchain_stars.rewards import algebra

        return algebra.at_most(self, ceiling)


class Leaf(Reward):
    """One reading of one scorer.

    Attributes:
        scorer: What is run.
    """

    scorer: Scorer

    @abstractmethod
    def read(self, raw: Raw) -> float:
        """Return the reward that the scorer's numbers for one candidate mean."""

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value that `read` can return."""
        return (-math.inf, math.inf)

    @property
    def leaves(self) -> tuple["Leaf", ...]:
        """The reading itself."""
        return (self,)

    @property
    def versioned(self) -> bool:
        """Whether its scorer has an identity that lasts."""
        return bool(self.scorer.identity.get("versioned", True))

    def load(self) -> None:
        """Load its scorer."""
        self.scorer.load()

    def combine(self, values: Mapping["Leaf", float]) -> float:
        """Return its own value."""
        return values[self]

    def bounds(self, values: Mapping["Leaf", float]) -> tuple[float, float]:
        """Return its value twice where it is known, and its range where not."""
        value = values.get(self)
        return self.range if value is None else (value, value)


def within(value: float, range: tuple[float, float]) -> float:
    """Return a value, moved into its range where only rounding keeps it out, else NaN."""
    low, high = range
    slack = _ROUNDING * max(1.0, abs(value))
    if not (math.isfinite(value) and low - slack <= value <= high + slack):
        return math.nan
    return min(max(value, low), high)


def digest(identity: Any) -> str:
    """Return a short digest, 16 hexadecimal digits, of anything that is JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
