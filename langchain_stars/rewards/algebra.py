"""Rewards written with: sums, multiples, the least and the greatest of several, and floors.

Knows rewards and numbers; nothing of what runs them. A weighted sum is kept flat, with each
reward once, so that `a - a` is nothing and `a + a` is `2 * a`. A sum, a minimum or a maximum of
which one part is not a number is itself not a number, so that it rejects.
"""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain_stars.rewards.base import Leaf, Reward, digest


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class WeightedSum(Reward):
    """A sum of rewards, each times a number, and a constant.

    Attributes:
        terms: Weight and reward; no weight is 0, no reward occurs twice or is itself a sum.
        constant: What is added.
    """

    terms: tuple[tuple[float, Reward], ...]
    constant: float = 0.0

    @property
    def name(self) -> str:
        """The sum as one writes it."""
        parts = [
            (weight < 0, part.name if abs(weight) == 1 else f"{abs(weight):g} * {part.name}")
            for weight, part in self.terms
        ]
        if self.constant or not parts:
            parts.append((self.constant < 0, f"{abs(self.constant):g}"))
        (negative, first), *others = parts
        return (
            ("-" if negative else "")
            + first
            + "".join(f" {'-' if negative else '+'} {text}" for negative, text in others)
        )

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The readings of all terms, each once."""
        return _leaves(part for _, part in self.terms)

    def combine(self, values: Mapping[Leaf, float]) -> float:
        """Return the sum."""
        total = self.constant
        for weight, part in self.terms:
            total += weight * part.combine(values)
        return total

    def bounds(self, values: Mapping[Leaf, float]) -> tuple[float, float]:
        """Return the sums of the least and of the greatest that each term can be.

        They are added up in the order of `combine`: rounding never goes against the order of
        numbers, so that the sum lies between them to the last bit.
        """
        low = high = self.constant
        for weight, part in self.terms:
            least, greatest = part.bounds(values)
            if weight < 0:
                least, greatest = greatest, least
            low += weight * least
            high += weight * greatest
        return low, high

    @property
    def identity(self) -> Mapping[str, Any]:
        """The terms in order, and the constant."""
        return {
            "kind": "sum",
            "terms": [[weight, part.identity] for weight, part in self.terms],
            "constant": self.constant,
        }

    @property
    def target(self) -> float | None:
        """The sum of the targets; None where one is unknown or its reward counts against."""
        total = self.constant
        for weight, part in self.terms:
            target = part.target
            if target is None or weight < 0:
                return None
            total += weight * target
        return total

    @property
    def beta(self) -> float | None:
        """Root of the sum of squares, as the spread of independent parts; None if one is unknown."""
        betas = [(weight, part.beta) for weight, part in self.terms]
        known = [weight * beta for weight, beta in betas if beta is not None]
        return math.hypot(*known) if betas and len(known) == len(betas) else None

    @property
    def alpha(self) -> float | None:
        """The greatest of those that are known, which asks the most of the first segments."""
        return _greatest_alpha([part for _, part in self.terms])


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Extremum(Reward):
    """The least or the greatest of several rewards.

    Attributes:
        kind: Which of them.
        parts: At least one reward.
    """

    kind: Literal["minimum", "maximum"]
    parts: tuple[Reward, ...]

    @property
    def name(self) -> str:
        """The function and the names of the parts."""
        return f"{self.kind}({', '.join(part.name for part in self.parts)})"

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The readings of all parts, each once."""
        return _leaves(self.parts)

    def combine(self, values: Mapping[Leaf, float]) -> float:
        """Return the least or the greatest value; NaN where one is NaN."""
        return self._pick([part.combine(values) for part in self.parts])

    def bounds(self, values: Mapping[Leaf, float]) -> tuple[float, float]:
        """Return the least or greatest of the lower and of the upper bounds."""
        bounds = [part.bounds(values) for part in self.parts]
        return self._pick([low for low, _ in bounds]), self._pick([high for _, high in bounds])

    def _pick(self, values: list[float]) -> float:
        if any(math.isnan(value) for value in values):
            return math.nan
        return min(values) if self.kind == "minimum" else max(values)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The kind and the parts in order."""
        return {"kind": self.kind, "parts": [part.identity for part in self.parts]}

    @property
    def target(self) -> float | None:
        """The least or greatest of the targets, which a reply reaches that reaches them all."""
        targets = [part.target for part in self.parts]
        known = [target for target in targets if target is not None]
        return self._pick(known) if len(known) == len(targets) else None

    @property
    def beta(self) -> float | None:
        """The smallest of the parts' betas, constants apart; None where one is unknown."""
        betas = [part.beta for part in self.parts if part.leaves]
        known = [beta for beta in betas if beta is not None]
        return min(known) if known and len(known) == len(betas) else None

    @property
    def alpha(self) -> float | None:
        """The greatest of those that are known, which asks the most of the first segments."""
        return _greatest_alpha(self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A reward that must hold, always: `safe >= 0.8`.

    Attributes:
        reward: What is asked.
        floor: The least value that holds, in the reward's units.

    Raises:
        TypeError: `reward` is no reward, or `floor` no number.
        ValueError: `floor` is not finite.
    """

    reward: Reward
    floor: float

    def __post_init__(self) -> None:
        if not isinstance(self.reward, Reward):
            raise TypeError(f"`reward` must be a reward, got {type(self.reward).__name__}")
        if isinstance(self.floor, Reward):
            raise TypeError(
                "`floor` must be a number, got a reward; to ask that one reward reaches another, "
                "write `a - b >= 0`"
            )
        object.__setattr__(self, "floor", _number("floor", self.floor))

    @property
    def name(self) -> str:
        """The constraint as one writes it."""
        reward = self.reward
        if (
            isinstance(reward, WeightedSum)
            and reward.terms
            and not reward.constant
            and all(weight < 0 for weight, _ in reward.terms)
        ):
            return f"{scale(reward, -1.0).name} <= {0.0 - self.floor:g}"
        return f"{reward.name} >= {self.floor:g}"

    def holds(self, value: float) -> bool:
        """Return whether a value of the reward reaches the floor; NaN does not."""
        return value >= self.floor

    @property
    def identity(self) -> Mapping[str, Any]:
        """The reward and the floor."""
        return {"kind": "constraint", "reward": self.reward.identity, "floor": self.floor}

    @property
    def fingerprint(self) -> str:
        """Short digest of `identity`."""
        return digest(self.identity)

    def load(self) -> None:
        """Load every scorer that its reward reads."""
        self.reward.load()

    def __bool__(self) -> bool:
        raise TypeError(
            f"the constraint {self.name} is neither true nor false before a reply is judged; "
            "write `0.2 <= a <= 0.8` as two constraints, `a >= 0.2` and `a <= 0.8`"
        )


def add(*parts: Reward | float) -> Reward:
    """Return the sum of rewards and numbers.

    Raises:
        TypeError: A part is neither.
        ValueError: A number is not finite.
    """
    constant = 0.0
    weights: dict[Reward, float] = {}
    for part in parts:
        if not isinstance(part, Reward):
            constant += _number("summand", part)
            continue
        terms, more = _terms(part)
        constant += more
        for weight, term in terms:
            weights[term] = weights.get(term, 0.0) + weight
    return _sum(weights, constant)


def scale(reward: Reward | float, factor: float) -> Reward:
    """Return a reward, or a number as a reward, times a number.

    Raises:
        TypeError: `factor` is not a number; rewards cannot be multiplied with each other.
        ValueError: `factor` is not finite.
    """
    if isinstance(factor, Reward):
        raise TypeError(
            "`factor` must be a number, got a reward: rewards cannot be multiplied with each "
            "other; write a weighted sum, or `minimum(a, b)` where both must be good"
        )
    factor = _number("factor", factor)
    terms, constant = (
        _terms(reward) if isinstance(reward, Reward) else ((), _number("reward", reward))
    )
    return _sum({term: factor * weight for weight, term in terms}, factor * constant)


def divide(reward: Reward, divisor: float) -> Reward:
    """Return a reward divided by a number.

    Raises:
        TypeError: `divisor` is not a number.
        ValueError: `divisor` is 0 or not finite.
    """
    if isinstance(divisor, Reward):
        raise TypeError("`divisor` must be a number, got a reward: rewards cannot be divided")
    divisor = _number("divisor", divisor)
    if divisor == 0:
        raise ValueError("`divisor` must not be 0")
    return scale(reward, 1.0 / divisor)


def at_most(reward: Reward, ceiling: float) -> Constraint:
    """Return the constraint that a reward does not exceed a number.

    Raises:
        TypeError: `ceiling` is not a number.
        ValueError: `ceiling` is not finite.
    """
    if isinstance(ceiling, Reward):
        raise TypeError(
            "`ceiling` must be a number, got a reward; to ask that one reward reaches another, "
            "write `a - b >= 0`"
        )
    return Constraint(reward=scale(reward, -1.0), floor=-_number("ceiling", ceiling))


def minimum(*rewards: Reward | float) -> Reward:
    """Return the reward that is the least of several: good only where all of them are.

    Args:
        rewards: At least one reward; a number caps the others.

    Raises:
        TypeError: One is neither a reward nor a number, or none is a reward.
        ValueError: A number is not finite.
    """
    return _extremum("minimum", rewards)


def maximum(*rewards: Reward | float) -> Reward:
    """Return the reward that is the greatest of several: good where one of them is.

    Args:
        rewards: At least one reward; with a number, the reward is never below it.

    Raises:
        TypeError: One is neither a reward nor a number, or none is a reward.
        ValueError: A number is not finite.
    """
    return _extremum("maximum", rewards)


def _extremum(kind: Literal["minimum", "maximum"], rewards: tuple[Reward | float, ...]) -> Reward:
    parts: dict[Reward, None] = {}
    for reward in rewards:
        if not isinstance(reward, Reward):
            parts[WeightedSum((), _number("reward", reward))] = None
        elif isinstance(reward, Extremum) and reward.kind == kind:
            parts.update(dict.fromkeys(reward.parts))
        else:
            parts[reward] = None
    if not any(isinstance(reward, Reward) for reward in rewards):
        raise TypeError(f"`{kind}` must be given at least one reward, got none")
    return next(iter(parts)) if len(parts) == 1 else Extremum(kind, tuple(parts))


def _terms(reward: Reward) -> tuple[tuple[tuple[float, Reward], ...], float]:
    if isinstance(reward, WeightedSum):
        return reward.terms, reward.constant
    return ((1.0, reward),), 0.0


def _sum(weights: Mapping[Reward, float], constant: float) -> Reward:
    terms = tuple((weight, part) for part, weight in weights.items() if weight != 0.0)
    for value in (constant, *(weight for weight, _ in terms)):
        if not math.isfinite(value):
            raise ValueError(f"a weight or constant of the sum is too large: {value}")
    if len(terms) == 1 and terms[0][0] == 1.0 and constant == 0.0:
        return terms[0][1]
    return WeightedSum(terms, constant)


def _greatest_alpha(parts: Sequence[Reward]) -> float | None:
    return max((part.alpha for part in parts if part.alpha is not None), default=None)


def _leaves(parts: Iterable[Reward]) -> tuple[Leaf, ...]:
    return tuple(dict.fromkeys(leaf for part in parts for leaf in part.leaves))


def _number(name: str, value: object) -> float:
    """Return a finite number as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        remedy = "; wrap a function with `as_reward`" if callable(value) else ""
        raise TypeError(
            f"`{name}` must be a number or a reward, got {type(value).__name__}{remedy}"
        )
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, got {number}")
    return number
