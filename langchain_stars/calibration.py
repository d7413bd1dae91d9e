"""Finds thresholds, target and softness for a reward from a few prompts; writes them to a file.

Knows language models, rewards and numbers; nothing of LangChain. The language model's own first
attempts are judged, segment by segment, under a guard that accepts everything: so they have the
law of the unguarded reply, and are judged exactly as guarded ones will be.

Source:
    The acceptance rule of `acceptance.py`. That the mean number of attempts, which is what a guard
    costs, is what its thresholds are chosen by is ours.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from langchain_stars.acceptance import DEFAULT_ALPHA, Acceptance, Calibrated, Linear
from langchain_stars.decoder import Policy
from langchain_stars.engine import Engine, Order, engine_for
from langchain_stars.language_models.base import Chat, LanguageModel, Sampling
from langchain_stars.rewards.base import Reward

_LOWEST = -1e30
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """What the reward gives the model's own replies up to one segment.

    Attributes:
        num_replies: Replies that reached it, at least 1.
        mean: Mean reward.
        spread: Standard deviation of the reward over all replies.
        spread_within: Standard deviation over the replies to one prompt, pooled; what attempts
            can choose from.
        quantiles: Rewards at 5, 25, 50, 75 and 95 %.
    """

    num_replies: int
    mean: float
    spread: float
    spread_within: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was found, for one language model, one reward and one way of sampling.

    Attributes:
        target: Reward asked of a whole reply by the linear schedule.
        beta: Softness, in reward units.
        alpha: Where the linear schedule starts.
        horizon: Tokens from which it asks for the target.
        thresholds: Of the calibrated schedule, by segment.
        mean_attempts: Attempts a segment that both are chosen for.
        segment_size: Tokens of a segment.
        positions: The rewards seen, by segment.
        prompt_reward: Mean and standard deviation of the reward of the empty open reply; None
            where it could not be had.
        num_prompts: Prompts asked.
        reward: Name of the reward.
        reward_fingerprint: Of the reward.
        model: Name of the language model.
        model_fingerprint: Of the language model.
    """

    target: float
    beta: float
    alpha: float
    horizon: int
    thresholds: tuple[float, ...]
    mean_attempts: float
    segment_size: int
    positions: tuple[Position, ...]
    prompt_reward: tuple[float, float] | None
    num_prompts: int
    reward: str
    reward_fingerprint: str
    model: str
    model_fingerprint: str

    @property
    def schedule(self) -> Calibrated:
        """The thresholds by position, frozen."""
        return Calibrated(thresholds=self.thresholds, segment_size=self.segment_size)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `ChatStars` for the linear schedule."""
        return {
            "target": self.target,
            "beta": self.beta,
            "alpha": self.alpha,
            "horizon": self.horizon,
            "segment_size": self.segment_size,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file, whole or not at all."""
        target = Path(path)
        draft = target.with_name(target.name + ".part")
        draft.write_text(
            json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8"
        )
        draft.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("format") != _FORMAT:
                raise ValueError("another format")
            data["positions"] = tuple(
                Position(**{**one, "quantiles": tuple(one["quantiles"])})
                for one in data["positions"]
            )
            data["thresholds"] = tuple(data["thresholds"])
            data["prompt_reward"] = data["prompt_reward"] and tuple(data["prompt_reward"])
            return cls(**data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`path` must name a file that `calibrate` wrote, got {os.fspath(path)!r}"
            ) from error


def calibrate(
    language_model: LanguageModel,
    reward: Reward,
    chats: Sequence[Chat],
    *,
    mean_attempts: float = 2.0,
    beta: float | None = None,
    alpha: float | None = None,
    horizon: int | None = None,
    segment_size: int = 16,
    max_tokens: int = 128,
    num_samples: int = 4,
    sampling: Sampling | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Calibration:
    """Return settings under which a segment takes about `mean_attempts` attempts.

    Args:
        language_model: The model that will be guarded.
        reward: The objective.
        chats: Prompts as the application meets them, at least one; fifty tell more.
        mean_attempts: Attempts a segment, above 1: what the guard may cost.
        beta: Softness, in reward units, at least 0; a quarter of what the replies to one prompt
            differ by if not given.
        alpha: Start of the linear schedule, from 0 (prompt's reward) to 1 (target); the reward's
            own if not given, else 0.5.
        horizon: Tokens from which the target is asked; the smaller of `max_tokens` and 128 if
            not given.
        segment_size: Tokens of a segment, at least 1.
        max_tokens: Most tokens of a reply, at least 1.
        num_samples: Replies to each prompt, at least 2.
        sampling: How tokens are drawn; as the model says if not given.
        seed: Decides the replies.
        engine: Runs them; that of the model's device if not given.
        progress: Wraps the replies as they are read, as `tqdm` does.

    Raises:
        ValueError: A setting is out of range, or no reply could be judged.
    """
    for name, value, holds, requirement in (
        ("chats", len(chats), len(chats) >= 1, "hold at least one chat"),
        ("mean_attempts", mean_attempts, 1 < mean_attempts < math.inf, "be finite and above 1"),
        ("num_samples", num_samples, num_samples >= 2, "be at least 2"),
        ("beta", beta, beta is None or 0 <= beta < math.inf, "be finite and at least 0"),
    ):
        if not holds:
            raise ValueError(f"`{name}` must {requirement}, got {value}")
    horizon = min(max_tokens, 128) if horizon is None else horizon
    if alpha is None:
        alpha = DEFAULT_ALPHA if reward.alpha is None else reward.alpha
    accept_all = Policy(
        objective=reward,
        acceptance=Acceptance(
            schedule=Linear(target=_LOWEST, alpha=0.0, horizon=horizon), on_exhausted="refuse"
        ),
        segment_size=segment_size,
    )
    reward.load()
    engine = engine or engine_for(language_model.device)
    replies = [
        (
            number,
            engine.reply(
                Order(
                    language_model=language_model,
                    chat=chat,
                    prompt_ids=language_model.encode(chat),
                    policy=accept_all,
                    sampling=sampling or language_model.sampling,
                    max_tokens=max_tokens,
                    seed=seed + number * num_samples + sample,
                    priority="batch",
                    max_queue=len(chats) * num_samples,
                )
            ),
        )
        for number, chat in enumerate(chats)
        for sample in range(num_samples)
    ]
    rewards: list[list[tuple[int, float]]] = []
    prompt_rewards: dict[int, float] = {}
    try:
        for number, reply in progress(replies):
            for _ in reply:
                pass
            report = reply.report
            assert report is not None
            if report.prompt_reward is not None:
                prompt_rewards[number] = report.prompt_reward
            for segment in report.segments:
                if segment.index == len(rewards):
                    rewards.append([])
                if segment.reward is not None:
                    rewards[segment.index].append((number, segment.reward))
    finally:
        for _, reply in replies:
            reply.cancel()
    rewards = [of_position for of_position in rewards if len(of_position) > 1]
    if not rewards:
        raise ValueError(f"no reply could be judged by `reward` {reward.name}; does it fail?")
    positions = tuple(_position(of_position) for of_position in rewards)
    if beta is None:
        beta = 0.25 * statistics.fmean(position.spread_within for position in positions)
    wanted = 1.0 / mean_attempts
    thresholds: list[float] = []
    for of_position in rewards:
        values = [reward_seen for _, reward_seen in of_position]

        def rate_here(threshold: float, values: Sequence[float] = values) -> float:
            return _rate([reward_seen - threshold for reward_seen in values], beta)

        thresholds.append(_solve(rate_here, wanted, of_position))
    everything = [pair for of_position in rewards for pair in of_position]

    def rate_at(target: float) -> float:
        linear = Linear(target=target, alpha=alpha, horizon=horizon)
        return _rate(
            [
                value - linear.threshold(segment_size * (place + 1), prompt_rewards.get(number))
                for place, of_position in enumerate(rewards)
                for number, value in of_position
            ],
            beta,
        )

    known = list(prompt_rewards.values())
    return Calibration(
        target=_solve(rate_at, wanted, everything),
        beta=beta,
        alpha=alpha,
        horizon=horizon,
        thresholds=tuple(thresholds),
        mean_attempts=mean_attempts,
        segment_size=segment_size,
        positions=positions,
        prompt_reward=(statistics.fmean(known), statistics.pstdev(known)) if known else None,
        num_prompts=len(chats),
        reward=reward.name,
        reward_fingerprint=reward.fingerprint,
        model=language_model.name,
        model_fingerprint=language_model.fingerprint,
    )


def _position(rewards: Sequence[tuple[int, float]]) -> Position:
    values = sorted(value for _, value in rewards)
    of_prompt: dict[int, list[float]] = {}
    for number, value in rewards:
        of_prompt.setdefault(number, []).append(value)
    within = [
        (value - statistics.fmean(of_one)) ** 2
        for of_one in of_prompt.values()
        if len(of_one) > 1
        for value in of_one
    ]
    freedom = sum(len(of_one) - 1 for of_one in of_prompt.values() if len(of_one) > 1)
    return Position(
        num_replies=len(values),
        mean=statistics.fmean(values),
        spread=statistics.pstdev(values),
        spread_within=math.sqrt(math.fsum(within) / freedom) if freedom else 0.0,
        quantiles=tuple(values[round(q * (len(values) - 1))] for q in _QUANTILES),
    )


def _rate(margins: Sequence[float], beta: float) -> float:
    """Return the share of attempts accepted, given by how much each exceeds its threshold."""
    if beta == 0:
        return statistics.fmean(float(margin >= 0) for margin in margins)
    return statistics.fmean(math.exp(min(0.0, margin) / beta) for margin in margins)


def _solve(
    rate: Callable[[float], float], wanted: float, rewards: Sequence[tuple[int, float]]
) -> float:
    """Return the highest threshold, to six digits, at which the rate is still the wanted one."""
    values = [value for _, value in rewards]
    low, high = min(values), max(values)
    width = max(high - low, abs(high), 1e-6)
    low, high = low - width, high + 4 * width
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) >= wanted else (low, middle)
    return low
