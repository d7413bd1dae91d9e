"""Which candidate is good enough: thresholds, odds, floors, exhaustion.

Numbers only: knows rewards, thresholds and counts; nothing of tokens, text, tensors or devices.

Source:
    CARDS (Li et al., COLM 2025), the rule of its published code, with the planned length of the
    segment in the place of the candidate's own. For STARS (arXiv:2511.03827) the same rule is
    inferred from its settings and its limit of 20 attempts; it is not stated in what we could read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

OnExhausted: TypeAlias = Literal["fallback", "best", "refuse", "raise"]
"""What happens when no attempt was accepted; see `Acceptance.on_exhausted`."""


DEFAULT_ALPHA = 0.5
"""Where a linear schedule starts if nobody says."""


class Schedule(Protocol):
    """The threshold of a segment, one number fixed before the segment is drafted."""

    @property
    def needs_prompt_reward(self) -> bool:
        """Whether `threshold` wants the reward of the prompt."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the thresholds, as JSON."""
        ...

    def threshold(self, num_tokens: int, prompt_reward: float | None) -> float:
        """Return the reward asked of a reply that will be `num_tokens` long.

        Args:
            num_tokens: Accepted tokens and those of a whole further segment.
            prompt_reward: Reward of the empty open reply; None where it is unknown.
        """
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """Asks the same of every segment.

    Attributes:
        target: The reward asked.
    """

    target: float

    def __post_init__(self) -> None:
        _require_finite(target=self.target)

    @property
    def needs_prompt_reward(self) -> bool:
        """False: the prompt does not matter."""
        return False

    @property
    def identity(self) -> dict[str, Any]:
        """Kind and target."""
        return {"schedule": "constant", "target": self.target}

    def threshold(self, num_tokens: int, prompt_reward: float | None) -> float:
        """Return `target`."""
        return self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Rises from near the prompt's own reward to the target at `horizon` tokens.

    Attributes:
        target: Reward asked of a whole reply.
        alpha: Start of the threshold, from 0 (prompt's reward) to 1 (`target`).
        horizon: Number of tokens, at least 1, from which the target itself is asked.

    Raises:
        ValueError: A setting is out of range.

    Source:
        CARDS' published code (`reward_sampling.py`): r0 = (1 - alpha) r(prompt) + alpha target,
        tau = min(target, r0 + l (target - r0) / L). Here l counts the segment at its planned
        length, so that a candidate that ends early faces no lower threshold. Inferred for STARS.
    """

    target: float
    alpha: float = DEFAULT_ALPHA
    horizon: int = 128

    def __post_init__(self) -> None:
        _require_finite(target=self.target)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1], got {self.alpha}")
        if self.horizon < 1:
            raise ValueError(f"`horizon` must be at least 1, got {self.horizon}")

    @property
    def needs_prompt_reward(self) -> bool:
        """Whether `alpha` is below 1."""
        return self.alpha < 1

    @property
    def identity(self) -> dict[str, Any]:
        """Kind and settings."""
        return {
            "schedule": "linear",
            "target": self.target,
            "alpha": self.alpha,
            "horizon": self.horizon,
        }

    def threshold(self, num_tokens: int, prompt_reward: float | None) -> float:
        """Return min(target, r0 + t (target - r0)) with t = min(1, num_tokens / horizon)."""
        if prompt_reward is None or not math.isfinite(prompt_reward):
            return self.target
        start = (1 - self.alpha) * prompt_reward + self.alpha * self.target
        progress = min(1.0, num_tokens / self.horizon)
        return min(self.target, start + progress * (self.target - start))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """Asks, at each position, what was found there before the first guarded reply.

    Attributes:
        thresholds: Reward asked of the first, second, ... segment; the last one of all later ones.
        segment_size: Tokens of a segment, at least 1, when they were found.

    Raises:
        ValueError: There is no threshold, one is not finite, or `segment_size` is below 1.
    """

    thresholds: tuple[float, ...]
    segment_size: int

    def __post_init__(self) -> None:
        if not self.thresholds:
            raise ValueError("`thresholds` must hold at least one number, got none")
        for value in self.thresholds:
            _require_finite(thresholds=value)
        if self.segment_size < 1:
            raise ValueError(f"`segment_size` must be at least 1, got {self.segment_size}")

    @property
    def needs_prompt_reward(self) -> bool:
        """False: what was found stands."""
        return False

    @property
    def identity(self) -> dict[str, Any]:
        """Kind and settings."""
        return {
            "schedule": "calibrated",
            "thresholds": list(self.thresholds),
            "segment_size": self.segment_size,
        }

    def threshold(self, num_tokens: int, prompt_reward: float | None) -> float:
        """Return the threshold of the segment that ends at `num_tokens`."""
        position = max(0, math.ceil(num_tokens / self.segment_size) - 1)
        return self.thresholds[min(position, len(self.thresholds) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Decides on attempts, one by one, and what happens when none is accepted.

    Attributes:
        schedule: Thresholds of the objective; None where there is no objective, and an attempt
            is accepted when all floors hold.
        beta: Softness of the rule, in reward units, at least 0; 0 is a hard cut. Not the
            sampling temperature.
        max_attempts: Most attempts of a segment, at least 1.
        on_exhausted: `"fallback"` draws from the attempts that met every floor, with weights
            exp(reward / beta); `"best"` takes the best of them; `"refuse"` ends the reply with
            the refusal message, as the first two do when no attempt met every floor; `"raise"`
            raises `GuardExhausted`.

    Raises:
        ValueError: A setting is out of range.
    """

    schedule: Schedule | None
    beta: float = 0.0
    max_attempts: int = 20
    on_exhausted: OnExhausted = "fallback"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"`beta` must be a finite number, at least 0, got {self.beta}")
        if self.max_attempts < 1:
            raise ValueError(f"`max_attempts` must be at least 1, got {self.max_attempts}")
        if self.on_exhausted not in ("fallback", "best", "refuse", "raise"):
            raise ValueError(
                "`on_exhausted` must be 'fallback', 'best', 'refuse' or 'raise', "
                f"got {self.on_exhausted!r}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides, as JSON."""
        return {
            "schedule": self.schedule.identity if self.schedule else None,
            "beta": self.beta,
            "max_attempts": self.max_attempts,
            "on_exhausted": self.on_exhausted,
        }

    def bar(self, threshold: float, u: float) -> float:
        """Return the least reward that is accepted, given `u`, uniform in (0, 1].

        threshold + beta ln(u): a reward r below the threshold is then accepted with probability
        exp((r - threshold) / beta), and one at or above it always.
        """
        return threshold + self.beta * math.log(u) if self.beta else threshold

    def choose_from_pool(self, rewards: Sequence[float], u: float) -> int:
        """Return the index of the attempt taken when none was accepted.

        Args:
            rewards: Objective of the attempts that met every floor, in the order of their
                numbers; at least one, all finite.
            u: Uniform in (0, 1]; used by `"fallback"` with `beta` above 0.
        """
        best = max(range(len(rewards)), key=lambda index: (rewards[index], -index))
        if self.on_exhausted == "best" or self.beta == 0:
            return best
        weights = [math.exp((reward - rewards[best]) / self.beta) for reward in rewards]
        left = u * math.fsum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left <= 0 and weight > 0:
                return index
        return max(index for index, weight in enumerate(weights) if weight > 0)


def expected_accepted(probability: float, count: int) -> float:
    """Return the chance, in [0, 1], that at least one of `count` attempts is accepted."""
    return 1.0 - (1.0 - probability) ** count


def _require_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}")
