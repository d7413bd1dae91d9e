"""One round for some replies: draw candidates, judge them, choose, extend.

Knows tokens, texts, rewards and thresholds; nothing of LangChain, of threads or of devices. What
is rejected never leaves this module: not in an event, a report, a log or an exception.

Source:
    STARS (Quamar et al., arXiv:2511.03827): segments of a fixed number of tokens, judged with the
    whole prefix and drawn again until one is accepted, at most 20 times. That the attempts of a
    round are judged in the order of their numbers, so that drafting several at once has the law of
    drafting one at a time, is ours.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, takewhile
from typing import Any, Literal, TypeAlias, TypeVar

from langchain_stars.acceptance import Acceptance, expected_accepted
from langchain_stars.judging import MAX_FAILURES_IN_A_ROW, Inquiry, Workers, failures, judging
from langchain_stars.language_models.base import (
    Candidate,
    LanguageModel,
    Prefix,
    Request,
    Sampling,
)
from langchain_stars.randomness import acceptance_uniform, fallback_uniform
from langchain_stars.rewards.algebra import Constraint
from langchain_stars.rewards.base import (
    Completion,
    Leaf,
    Raw,
    Reward,
    Scorer,
    ScoreRequest,
    Subject,
    digest,
    name_of,
    reason_of,
)
from langchain_stars.text import Text

Outcome: TypeAlias = Literal["accepted", "fallback", "unguarded"]
"""How a segment came to be kept."""

FinishReason: TypeAlias = Literal["stop", "length", "refusal"]
"""Why a reply ended: by itself or at a stop string, at `max_tokens`, or for want of a segment."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_MANY_TOKENS = 256

DEFAULT_REFUSAL = "I'm sorry, but I can't help with that."


class ReplyFailedError(RuntimeError):
    """One reply cannot go on, for a reason of its own. Carries a type, never anybody's words."""


class GuardExhausted(RuntimeError):
    """No attempt was good enough, and the policy asks for an exception.

    Carries counts and names of rewards; never what was rejected.

    Attributes:
        segment: Index of the segment that could not be had.
        num_attempts: Attempts made for it.
        num_failures: Attempts of it on which a reward failed.
        bounds: How many attempts each constraint or objective rejected, by name.
    """

    def __init__(
        self, *, segment: int, num_attempts: int, num_failures: int, bounds: dict[str, int]
    ) -> None:
        self.segment = segment
        self.num_attempts = num_attempts
        self.num_failures = num_failures
        self.bounds = bounds
        rejected = ", ".join(f"{name} {count}" for name, count in bounds.items()) or "none"
        super().__init__(
            f"no attempt of segment {segment} was accepted: {num_attempts} attempts, "
            f"{num_failures} with a failed reward; rejected by {rejected}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a reply must be: the guard of a chat model, fixed before its first token.

    Attributes:
        objective: Reward that must reach the threshold; None where only constraints matter.
        constraints: Rewards that must reach their floor, whatever the objective says.
        acceptance: Thresholds, softness, number of attempts, exhaustion.
        segment_size: Most tokens of a segment, at least 1.
        max_candidates: Most candidates of a reply drafted at once, at least 1; None leaves it to
            the decoder. Changes the speed and never the law.
        adaptive: Whether the number drafted at once is chosen, up to `max_candidates`, or is it.
        holdback: Number of accepted segments, at least 0, that are not shown yet, and are taken
            back where the reply cannot go on.
        max_takebacks: How often in a reply, at least 0.
        refusal_message: The application's own words where a reply ends without a segment.
        reward_timeout: Seconds, above 0, that a reward which runs in a worker has for a call.

    Raises:
        ValueError: A setting is out of range.
    """

    objective: Reward | None = None
    constraints: tuple[Constraint, ...] = ()
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(schedule=None))
    segment_size: int = 16
    max_candidates: int | None = None
    adaptive: bool = True
    holdback: int = 0
    max_takebacks: int = 2
    refusal_message: str = DEFAULT_REFUSAL
    reward_timeout: float | None = 30.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("segment_size", self.segment_size, 1),
            ("max_candidates", self.max_candidates, 1),
            ("holdback", self.holdback, 0),
            ("max_takebacks", self.max_takebacks, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(f"`reward_timeout` must be above 0, got {self.reward_timeout}")
        if (self.objective is None) != (self.acceptance.schedule is None):
            raise ValueError(
                "an objective needs a schedule of thresholds, and a schedule an objective"
            )

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The readings of scorers that decide, each once, constraints first."""
        parts = [constraint.reward for constraint in self.constraints]
        if self.objective is not None:
            parts.append(self.objective)
        return tuple(dict.fromkeys(leaf for part in parts for leaf in part.leaves))

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """The scorers that decide, each once."""
        return tuple(dict.fromkeys(leaf.scorer for leaf in self.leaves))

    @property
    def spares_workers(self) -> bool:
        """Whether what scorers on the device say can reject, whatever those in workers say."""
        parts = [constraint.reward for constraint in self.constraints]
        if self.objective is not None:
            parts.append(self.objective)
        for part in parts:
            answered = {leaf: 0.0 for leaf in part.leaves if leaf.scorer.on_device}
            if answered and greatest(part, answered) < math.inf:
                return True
        return False

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides which replies are possible and how likely, as JSON."""
        return {
            "objective": self.objective.identity if self.objective else None,
            "constraints": [constraint.identity for constraint in self.constraints],
            "acceptance": self.acceptance.identity,
            "segment_size": self.segment_size,
            "holdback": self.holdback,
            "max_takebacks": self.max_takebacks if self.holdback else 0,
            "refusal_message": self.refusal_message,
            "reward_timeout": self.reward_timeout,
        }

    @property
    def fingerprint(self) -> str:
        """Short digest of `identity`."""
        return digest(self.identity)

    def load(self) -> None:
        """Load every scorer."""
        for scorer in self.scorers:
            scorer.load()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tokens that was kept, and how; the numbers of it, not the words.

    Attributes:
        index: Its place in the reply, from 0.
        num_tokens: Tokens kept.
        attempts: Attempts judged for it, the one that was kept among them.
        reward: Objective of the reply up to its end, in reward units; None without an objective.
        threshold: What was asked; None without an objective.
        outcome: `"accepted"`, `"fallback"` or `"unguarded"`.
        bound: Name of the constraint or objective that rejected most of its attempts; None where
            none was rejected.
    """

    index: int
    num_tokens: int
    attempts: int
    reward: float | None
    threshold: float | None
    outcome: Outcome
    bound: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a reply.

    Attributes:
        finish_reason: Why it ended.
        segments: The segments kept.
        seed: Seed that gives the same reply again.
        policy: Fingerprint of the policy; None for an unguarded reply.
        prompt_reward: Objective of the empty open reply where the schedule wants it and it could
            be had.
        num_prompt_tokens: Tokens of the prompt.
        num_drafted_tokens: Tokens drawn, whatever became of them.
        num_rejected_tokens: Tokens of attempts that were judged and not kept, or taken back.
        num_emitted_tokens: Tokens of the reply that were kept.
        num_attempts: Attempts judged.
        num_fallbacks: Segments taken from the rejected that met every floor.
        num_takebacks: How often held segments were taken back.
        num_failures: Attempts on which a reward failed.
    """

    finish_reason: FinishReason
    segments: tuple[Segment, ...]
    seed: int
    policy: str | None
    prompt_reward: float | None
    num_prompt_tokens: int
    num_drafted_tokens: int
    num_rejected_tokens: int
    num_emitted_tokens: int
    num_attempts: int
    num_fallbacks: int
    num_takebacks: int
    num_failures: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that may be shown, and the segment that was kept with it, if one was."""

    text: str
    segment: Segment | None = None


Event: TypeAlias = Delta | Report | Exception
"""What a row tells: text as it is kept, and at last one report or one exception."""


@dataclass(slots=True)
class _Judged:
    """An attempt that was judged and met every floor."""

    number: int
    text: Text
    reward: float
    num_drawn: int


@dataclass(slots=True)
class _Unfinished:
    """An attempt that the objective rejects on what some scorers say; the others were not asked."""

    number: int
    text: Text
    num_drawn: int
    answers: dict[Scorer, Raw | None]


@dataclass(slots=True)
class _Visit:
    """The attempts at one segment. Numbers go on where an earlier visit to its index ended."""

    index: int
    before: Text
    threshold: float | None
    first: int
    attempts: int = 0
    num_failures: int = 0
    pool: list[_Judged] = field(default_factory=list)
    unfinished: list[_Unfinished] = field(default_factory=list)
    bounds: Counter[str] = field(default_factory=Counter)

    @property
    def bound(self) -> str | None:
        """Name of what rejected most attempts; of the first declared where two did."""
        return self.bounds.most_common(1)[0][0] if self.bounds else None


@dataclass(slots=True)
class _Kept:
    """An accepted segment that can still be taken back."""

    visit: _Visit
    attempt: _Judged
    segment: Segment


class Row:
    """A reply in progress.

    Attributes:
        prefix: Prompt and accepted tokens.
        subject: The reply, for the scorers.
        policy: Its guard; None for an unguarded reply.
        scorers: The scorers of its guard, each once.
        inquiry: What the scorers are being asked about it; None when nothing is open.
        ended: Whether its last event has been told.
    """

    def __init__(
        self,
        *,
        prefix: Prefix,
        subject: Subject,
        policy: Policy | None,
        sampling: Sampling,
        seed: int,
        max_tokens: int,
        decode: Callable[[Sequence[int]], str],
        tell: Callable[[Event], None],
        stop: Sequence[str] = (),
        segment_size: int = 16,
        streamed: bool = False,
    ) -> None:
        self.prefix = prefix
        self.subject = subject
        self.policy = policy
        self.scorers = policy.scorers if policy else ()
        self.inquiry: Inquiry | None = None
        self.ended = False
        self.prompt_reward: float | None = None
        self._sampling = sampling
        self._seed = seed
        self._max_tokens = max_tokens
        self._decode = decode
        self._tell = tell
        self._stop = tuple(stop)
        self._segment_size = policy.segment_size if policy else segment_size
        self._streamed = streamed and policy is None
        self._leaves = policy.leaves if policy else ()
        self._spares_workers = policy is not None and policy.spares_workers
        self._fingerprint = policy.fingerprint if policy else None
        self._wants_prompt_reward = bool(
            policy and policy.acceptance.schedule and policy.acceptance.schedule.needs_prompt_reward
        )
        self._text = Text()
        self._live = Text()
        self._shown = ""
        self._segments: list[Segment] = []
        self._held: list[_Kept] = []
        self._last_number: Counter[int] = Counter()
        self._visit: _Visit | None = None
        self._drawn_for: _Visit | None = None
        self._proposed: list[tuple[int, Candidate, Text]] = []
        self._wants_pool = False
        self._failures_in_a_row = 0
        self._num_accepted = 0
        self._num_judged = 0
        self._num_drafted = 0
        self._num_rejected = 0
        self._num_fallbacks = 0
        self._num_takebacks = 0
        self._num_failures = 0

    # Drafting

    def prepare(self) -> bool:
        """Fix the threshold of the next segment, before anything of it is drafted."""
        return self._current is not None

    @property
    def wants_prompt_reward(self) -> bool:
        """Whether the reward of the prompt must be had before the first segment."""
        return self._wants_prompt_reward

    @property
    def wants_pool(self) -> bool:
        """Whether rejected attempts must be judged to the end, for one of them to be kept."""
        return self._wants_pool

    @property
    def attempts_left(self) -> int:
        """Attempts that the segment still has; 1 for an unguarded reply."""
        if self.policy is None:
            return 1
        return self.policy.acceptance.max_attempts - self._current.attempts

    @property
    def acceptance_rate(self) -> float:
        """Share of attempts accepted so far, in (0, 1); three of four before the first."""
        return (self._num_accepted + 1.5) / (self._num_judged + 2.0)

    @property
    def size(self) -> int:
        """Tokens of the next segment, at most."""
        return min(self._segment_size, self._max_tokens - len(self.prefix.token_ids))

    @property
    def judged_on_device(self) -> bool:
        """Whether every scorer that judges the reply runs on the engine's thread."""
        return all(scorer.on_device for scorer in self.scorers)

    @property
    def num_segments(self) -> int:
        """Segments kept so far."""
        return len(self._segments)

    def request(self, count: int) -> Request:
        """Return what the language model is asked for: the next `count` attempts."""
        visit = self._drawn_for = self._current
        return Request(
            prefix=self.prefix,
            seed=self._seed,
            segment=visit.index,
            first_attempt=visit.first + visit.attempts,
            count=count,
            size=self.size,
            sampling=self._sampling,
            streamed=self._streamed,
        )

    @property
    def _current(self) -> _Visit:
        if self._visit is None:
            index = len(self._segments)
            threshold = None
            if self.policy is not None and self.policy.acceptance.schedule is not None:
                threshold = self.policy.acceptance.schedule.threshold(
                    len(self.prefix.token_ids) + self._segment_size, self.prompt_reward
                )
            self._visit = _Visit(
                index=index,
                before=self._text,
                threshold=threshold,
                first=self._last_number[index] + 1,
            )
        return self._visit

    # Judging

    def ask_about_prompt(self) -> Inquiry:
        """Return the question what the empty open reply is worth."""
        assert self.policy is not None
        assert self.policy.objective is not None
        empty = Completion(text="", finished=False, token_ids=())
        return self._ask((empty,), self.policy.objective.leaves)

    def take_prompt_reward(self) -> None:
        """Take the answer; where there is none, the target is asked from the first segment."""
        assert self.policy is not None
        assert self.policy.objective is not None
        assert self.inquiry is not None
        values = self.inquiry.values(0)
        self.inquiry = None
        self._wants_prompt_reward = False
        reward = combine(self.policy.objective, values) if values is not None else None
        if reward is None:
            self._num_failures += 1
        self.prompt_reward = reward

    def count_drafted(self, candidates: Sequence[Candidate]) -> None:
        """Count what has been drawn, whatever becomes of it."""
        self._num_drafted += sum(candidate.num_drawn for candidate in candidates)

    def awaits(self, candidate: Candidate) -> bool:
        """Return whether the next attempt of the reply is this candidate, drawn in this round."""
        visit = self._visit
        return (
            not self.ended
            and self.inquiry is None
            and visit is not None
            and visit is self._drawn_for
            and visit.first + visit.attempts == candidate.attempt
        )

    def ask_about(
        self,
        candidates: Sequence[Candidate],
        *,
        lazy: bool = False,
        cost: Callable[[Scorer], float] | None = None,
    ) -> Inquiry:
        """Return the question what the candidates are worth.

        Args:
            candidates: The next attempts.
            lazy: Whether nothing more is asked about what an answer rejects.
            cost: Tells which scorer of the objective is asked before which; those of constraints
                are asked as they are declared, so that the first one that rejects is named.
        """
        self._proposed = [
            (place, candidate, self._extend(candidate))
            for place, candidate in enumerate(candidates)
        ]
        return self._ask(
            tuple(_completion(text) for *_, text in self._proposed),
            self._leaves,
            order=self._order(cost) if cost else (),
            rejects=partial(self._rejects, [candidate.attempt for candidate in candidates]),
            lazy=lazy,
            spares_workers=self._spares_workers,
            in_turn=True,
        )

    def _ask(
        self, completions: tuple[Completion, ...], leaves: Sequence[Leaf], **settings: Any
    ) -> Inquiry:
        assert self.policy is not None
        request = ScoreRequest(
            subject=self.subject, accepted=_completion(self._text), candidates=completions
        )
        self.inquiry = Inquiry(request, leaves, timeout=self.policy.reward_timeout, **settings)
        return self.inquiry

    def _order(self, cost: Callable[[Scorer], float]) -> list[Scorer]:
        """Return the scorers: those of constraints as declared, then the others, cheapest first."""
        first = {leaf.scorer for each in self._guard.constraints for leaf in each.reward.leaves}
        scorers = dict.fromkeys(leaf.scorer for leaf in self._leaves if leaf.scorer.on_device)
        rest = [scorer for scorer in scorers if scorer not in first]
        if len(rest) > 1:
            rest.sort(key=cost)
        return [*(scorer for scorer in scorers if scorer in first), *rest]

    def _rejects(
        self, attempts: Sequence[int], place: int, known: Mapping[Leaf, float]
    ) -> str | None:
        """Return what rejects an attempt whatever the values are that are not known, or None."""
        policy = self._guard
        for constraint in policy.constraints:
            if greatest(constraint.reward, known) < constraint.floor:
                return constraint.name
        objective = policy.objective
        if objective is not None and greatest(objective, known) < self._bar(attempts[place]):
            return objective.name
        return None

    def _bar(self, attempt: int) -> float:
        """Return the least objective that the attempt is accepted with."""
        visit = self._current
        assert visit.threshold is not None
        u = acceptance_uniform(seed=self._seed, segment=visit.index, attempt=attempt)
        return self._guard.acceptance.bar(visit.threshold, u)

    def ask_about_pool(self) -> Inquiry:
        """Return the question what the attempts are worth that were rejected on a bound."""
        unfinished = self._current.unfinished
        inquiry = self._ask(tuple(_completion(each.text) for each in unfinished), self._leaves)
        for place, each in enumerate(unfinished):
            for scorer, raw in each.answers.items():
                inquiry.answered(scorer, {place: raw})
        return inquiry

    def take_pool(self) -> None:
        """Take the answers, and go on with one of the attempts that met every floor."""
        assert self.inquiry is not None
        visit, inquiry = self._current, self.inquiry
        unfinished, visit.unfinished, self.inquiry = visit.unfinished, [], None
        self._wants_pool = False
        for place, each in enumerate(unfinished):
            reward = self._reward(inquiry.known(place))
            if reward is not None:
                visit.pool.append(_Judged(each.number, each.text, reward, each.num_drawn))
        self._fall_back()

    def _extend(self, candidate: Candidate) -> Text:
        num_tokens = len(self.prefix.token_ids) + len(candidate.token_ids)
        return self._text.extended(
            candidate.token_ids,
            decode=self._decode,
            stop=self._stop,
            finished=candidate.finished,
            final=num_tokens >= self._max_tokens,
        )

    # Choosing

    def choose(self) -> None:
        """Keep the first candidate that is good enough, in the order of the attempts, or none."""
        assert self.inquiry is not None
        policy, visit, inquiry = self._guard, self._current, self.inquiry
        proposed, self._proposed, self.inquiry = self._proposed, [], None
        for place, candidate, text in proposed:
            visit.attempts += 1
            self._num_judged += 1
            self._last_number[visit.index] = candidate.attempt
            judged, bound = self._judge(place, candidate, text, inquiry)
            if isinstance(judged, _Judged) and bound is None:
                self._num_accepted += 1
                self._failures_in_a_row = 0
                self._keep(judged, "accepted")
                return
            self._num_rejected += candidate.num_drawn
            if isinstance(judged, _Judged):
                visit.pool.append(judged)
            elif judged is not None:
                visit.unfinished.append(judged)
            if bound is None:
                visit.num_failures += 1
                self._num_failures += 1
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                    self._end_exhausted()
                    return
            else:
                visit.bounds[bound] += 1
                self._failures_in_a_row = 0
        if visit.attempts >= policy.acceptance.max_attempts:
            self._exhaust()

    def _judge(
        self, place: int, candidate: Candidate, text: Text, inquiry: Inquiry
    ) -> tuple[_Judged | _Unfinished | None, str | None]:
        """Return the attempt where it meets every floor or may do so, and what rejected it.

        Neither, where a reward failed and nothing that has been answered rejects it.
        """
        policy, number = self._guard, candidate.attempt
        known, bound = inquiry.known(place), inquiry.rejection(place)
        if bound is None:
            if len(known) < len(self._leaves):
                return None, None
            for constraint in policy.constraints:
                value = combine(constraint.reward, known)
                if value is None:
                    return None, None
                if not constraint.holds(value):
                    return None, constraint.name
        elif policy.objective is None or bound != policy.objective.name:
            return None, bound  # a constraint's, so that it is never kept
        answers = inquiry.answers(place)
        if len(answers) < len(inquiry.scorers):  # the others were spared
            waits = policy.acceptance.on_exhausted in ("fallback", "best") and all(
                leaf in known for leaf in self._leaves if leaf.scorer in answers
            )
            return _Unfinished(number, text, candidate.num_drawn, answers) if waits else None, bound
        reward = self._reward(known)
        if reward is None:
            return None, bound
        if bound is None and policy.objective is not None and not reward >= self._bar(number):
            bound = policy.objective.name
        return _Judged(number, text, reward, candidate.num_drawn), bound

    def _reward(self, known: dict[Leaf, float]) -> float | None:
        """Return the objective of what meets every floor; None where one is missed or unknown.

        It is 0 where there is no objective.
        """
        policy = self._guard
        if len(known) < len(self._leaves):
            return None
        for constraint in policy.constraints:
            value = combine(constraint.reward, known)
            if value is None or not constraint.holds(value):
                return None
        return 0.0 if policy.objective is None else combine(policy.objective, known)

    @property
    def _guard(self) -> Policy:
        assert self.policy is not None
        return self.policy

    def _exhaust(self) -> None:
        """Go on without an accepted attempt: take back, fall back, refuse or raise."""
        policy = self._guard
        while self._held and self._num_takebacks < policy.max_takebacks:
            self._take_back()
            if self.attempts_left > 0:
                return
        visit = self._current
        if policy.acceptance.on_exhausted in ("refuse", "raise"):
            self._end_exhausted()
        elif visit.unfinished:
            self._wants_pool = True
        else:
            self._fall_back()

    def _fall_back(self) -> None:
        """Keep one of the attempts that met every floor, or end where none did."""
        visit, acceptance = self._current, self._guard.acceptance
        if not visit.pool:
            self._end_exhausted()
            return
        u = fallback_uniform(
            seed=self._seed,
            segment=visit.index,
            attempt=self._last_number[visit.index],
            draw=self._num_takebacks,
        )
        pool = sorted(visit.pool, key=lambda judged: judged.number)
        judged = pool[acceptance.choose_from_pool([judged.reward for judged in pool], u)]
        self._num_fallbacks += 1
        self._num_rejected -= judged.num_drawn
        self._keep(judged, "fallback")

    def _take_back(self) -> None:
        """Restore the reply to before the first segment that is not shown yet."""
        self._num_takebacks += 1
        self._discard_held()
        first = self._held[0]
        if first.segment.outcome == "accepted":  # a fallback is in the pool already
            first.visit.pool.append(first.attempt)
        self._segments = self._segments[: first.visit.index]
        self._held = []
        self._text = first.visit.before
        self.prefix.token_ids = self._text.token_ids
        self._visit = first.visit

    def _discard_held(self) -> None:
        """Count the segments that are held as never kept."""
        for kept in self._held:
            self._num_rejected += kept.attempt.num_drawn
            self._num_fallbacks -= kept.segment.outcome == "fallback"

    def _keep(self, judged: _Judged, outcome: Outcome) -> None:
        policy, visit = self._guard, self._current
        segment = Segment(
            index=visit.index,
            num_tokens=max(0, len(judged.text.token_ids) - len(visit.before.token_ids)),
            attempts=visit.attempts,
            reward=judged.reward if policy.objective is not None else None,
            threshold=visit.threshold,
            outcome=outcome,
            bound=visit.bound,
        )
        self._segments.append(segment)
        self._text = judged.text
        self.prefix.token_ids = judged.text.token_ids
        self._visit = None
        if policy.holdback:
            self._held.append(_Kept(visit, judged, segment))
        self._show_or_end()

    def _show_or_end(self) -> None:
        if self._text.finished:
            self._end("stop")
        elif len(self.prefix.token_ids) >= self._max_tokens:
            self._end("length")
        elif self.policy is not None and self.policy.holdback:
            while len(self._held) > self.policy.holdback:
                released = self._held.pop(0)
                after = self._held[0].visit.before
                self._show(after.showable(self._stop), released.segment)
        else:
            self._show(self._text.showable(self._stop), self._segments[-1])

    def _show(self, text: str, segment: Segment | None) -> None:
        assert text.startswith(self._shown)
        new, self._shown = text[len(self._shown) :], max(text, self._shown, key=len)
        if new or segment is not None:
            self._tell(Delta(new, segment))

    def _end(self, reason: FinishReason) -> None:
        """Show what is left and report."""
        held, self._held = self._held, []
        for kept, follower in pairwise(held):
            self._show(follower.visit.before.showable(self._stop), kept.segment)
        self._show(self._text.text, self._segments[-1])
        self._report(reason)

    def _end_exhausted(self) -> None:
        """End the reply with the refusal message, after what has been shown, or raise."""
        policy, visit = self._guard, self._current
        if policy.acceptance.on_exhausted == "raise":
            self._finish(
                GuardExhausted(
                    segment=visit.index,
                    num_attempts=visit.attempts,
                    num_failures=visit.num_failures,
                    bounds=dict(visit.bounds),
                )
            )
            return
        self._discard_held()
        if self._held:
            first = self._held[0].visit
            self._segments = self._segments[: first.index]
            self._text = first.before
            self._held = []
        gap = "\n\n" if self._shown and not self._shown.endswith("\n") else ""
        self._tell(Delta(gap + policy.refusal_message))
        self._report("refusal")

    def _report(self, reason: FinishReason) -> None:
        self._finish(
            Report(
                finish_reason=reason,
                segments=tuple(self._segments),
                seed=self._seed,
                policy=self._fingerprint,
                prompt_reward=self.prompt_reward,
                num_prompt_tokens=len(self.prefix.prompt_ids),
                num_drafted_tokens=self._num_drafted,
                num_rejected_tokens=self._num_rejected,
                num_emitted_tokens=len(self._text.token_ids),
                num_attempts=self._num_judged,
                num_fallbacks=self._num_fallbacks,
                num_takebacks=self._num_takebacks,
                num_failures=self._num_failures,
            )
        )

    def fail(self, error: Exception) -> None:
        """End the reply with an exception."""
        if not self.ended:
            self._finish(error)

    def _finish(self, event: Event) -> None:
        self.ended = True
        if self.inquiry is not None:
            self.inquiry.cancel()
            self.inquiry = None
        self._proposed = []
        self._tell(event)

    # Without a guard

    def feed(self, token_id: int) -> None:
        """Show one more token of an unguarded reply while its segment is still being drawn."""
        if self.ended or self._live.finished:
            return
        final = len(self._live.token_ids) + 1 >= self._max_tokens
        self._live = self._live.extended(
            (token_id,), decode=self._decode, stop=self._stop, final=final
        )
        self._show(self._live.showable(self._stop), None)

    def take(self, candidate: Candidate) -> None:
        """Keep what was drawn: an unguarded reply takes whatever comes."""
        visit = self._current
        visit.attempts += 1
        if not self._streamed:
            text = self._extend(candidate)
        else:  # goes on from what has been shown token by token
            ids = (*visit.before.token_ids, *candidate.token_ids)
            text = self._live
            if not text.finished:
                text = text.extended(
                    ids[len(text.token_ids) :],
                    decode=self._decode,
                    stop=self._stop,
                    finished=candidate.finished,
                    final=len(ids) >= self._max_tokens,
                )
        self._segments.append(
            Segment(
                index=visit.index,
                num_tokens=max(0, len(text.token_ids) - len(visit.before.token_ids)),
                attempts=1,
                reward=None,
                threshold=None,
                outcome="unguarded",
                bound=None,
            )
        )
        self._text = self._live = text
        self.prefix.token_ids = text.token_ids
        self._visit = None
        self._show_or_end()


def advance(
    language_model: LanguageModel,
    rows: Sequence[Row],
    *,
    workers: Workers,
    notify: Callable[[], None],
    barrier: bool = False,
    lazy: bool = True,
) -> Generator[None, None, None]:
    """Run one round for every row; a row whose candidates all fail tries again in the next.

    Rows advance independently. Candidates of a row are judged in the order of their numbers and
    the rest of its round is thrown away, so that a larger round changes the speed and not the
    law. Yields between pieces of device work. When it ends, a row whose `inquiry` is open waits
    for a reward that runs in a worker: `settle` it before its next round.

    Args:
        language_model: What drafts.
        rows: Replies of one lane, none of them ended or with an open inquiry.
        workers: Threads for rewards that do not run on the device.
        notify: Called, from any thread, when an inquiry may have been answered.
        barrier: Whether no row begins its next segment before all have theirs, as in the
            published loop; its waiting rows are computed with the others, to no effect. For
            comparison only.
        lazy: Whether the second candidate of a row is judged only where the first was rejected,
            and so on, where that is thought to be faster, and whether a reward is asked about a
            candidate only where those before it have not rejected that already, as a floor or the
            bounds of the objective tell; else all are asked about all, which is slower and decides
            the same. Where the segment is then exhausted and one of its attempts is to be kept,
            what was not asked about them is asked.
    """
    starting = [row for row in rows if row.wants_prompt_reward]
    finishing = [row for row in rows if row.wants_pool]
    if starting or finishing:
        inquiries = [row.ask_about_prompt() for row in starting]
        inquiries += [row.ask_about_pool() for row in finishing]
        yield from judging(inquiries, workers=workers, notify=notify)
        for row in (*starting, *finishing):
            _alone(row, partial(settle, row))
    ready = [row for row in rows if row.inquiry is None and not row.ended]
    ready = [row for row in ready if _alone(row, row.prepare)]
    if not ready:
        return
    behind = min(row.num_segments for row in ready)
    counts = _counts(language_model, ready, lazy=lazy and _waves_pay(language_model, ready))
    drafting = language_model.drafting(
        [row.request(count) for row, count in zip(ready, counts, strict=True)]
    )
    try:
        while True:
            try:
                tokens = next(drafting)
            except StopIteration as stop:
                proposals: list[list[Candidate]] = stop.value
                break
            for row, token_id in zip(ready, tokens, strict=False):
                if token_id is not None:
                    _alone(row, partial(row.feed, token_id))
            yield
    finally:
        drafting.close()
    undecided: list[tuple[Row, list[Candidate]]] = []
    for row, count, candidates in zip(ready, counts, proposals, strict=True):
        if row.ended:
            continue
        if len(candidates) != count or not candidates[0].num_drawn:
            row.fail(ReplyFailedError("the language model drew nothing"))
            continue
        # The reply fails when its turn comes to an attempt without tokens, and not before.
        candidates = list(takewhile(lambda each: each.num_drawn, candidates))
        row.count_drafted(candidates)
        if barrier and row.num_segments > behind:
            continue
        if row.policy is None:
            _alone(row, partial(row.take, candidates[0]))
        else:
            undecided.append((row, candidates))
    in_waves = lazy and _waves_pay(language_model, [row for row, _ in undecided])
    cost = partial(_seconds, language_model, num_tokens=sum(row.size for row, _ in undecided))
    while undecided:
        waves = [
            (row, candidates[:1], candidates[1:])
            if in_waves and row.judged_on_device
            else (row, candidates, [])
            for row, candidates in undecided
        ]
        inquiries = [
            inquiry
            for row, candidates, _ in waves
            if (inquiry := _alone(row, partial(row.ask_about, candidates, lazy=lazy, cost=cost)))
            is not None
        ]
        yield from judging(inquiries, workers=workers, notify=notify)
        undecided = []
        for row, _, rest in waves:
            _alone(row, partial(settle, row))
            if rest and row.awaits(rest[0]):
                undecided.append((row, rest))


def _alone(row: Row, work: Callable[[], _T]) -> _T | None:
    """Do one row's own work; where it fails, that row ends and the others go on."""
    try:
        return work()
    except Exception as error:
        row.fail(ReplyFailedError(f"the reply failed: {name_of(type(error))}"))
        return None


def settle(row: Row) -> bool:
    """Let a row act on its inquiry where that has been answered; return whether it has been."""
    if row.inquiry is None:
        return True
    row.inquiry.poll()
    if not row.inquiry.done:
        return False
    if row.wants_prompt_reward:
        row.take_prompt_reward()
    elif row.wants_pool:
        row.take_pool()
    else:
        row.choose()
    return True


def _waves_pay(language_model: LanguageModel, rows: Sequence[Row]) -> bool:
    """Return whether to judge the candidates of a round one after the other.

    Where reading a model's weights takes longer than computing a few tokens, as on a GPU, it is
    faster to judge all at once, unless there are many.
    """
    num_tokens = sum(row.size for row in rows)
    return not language_model.device.startswith("cuda") or num_tokens >= _MANY_TOKENS


def _counts(language_model: LanguageModel, rows: Sequence[Row], *, lazy: bool) -> list[int]:
    """Return how many candidates to draft for each row: what promises most segments a second.

    A reward reads a candidate of every row in one pass, in the time that was measured for as many
    tokens, or in that of the language model times its relative cost; where judging is lazy, none
    behind the accepted one.

    Source:
        The cost model is ours: a round with M candidates a row keeps 1 - (1 - p)^M segments of a
        row whose attempts are accepted with probability p, in the seconds that the language
        model and the rewards take for it.
    """
    guarded = [row for row in rows if row.policy is not None]
    chosen = 1
    adaptive = [row for row in guarded if row.policy is not None and row.policy.adaptive]
    if adaptive:
        size = max(row.size for row in rows)
        ceiling = min(language_model.max_candidates, max(_ceiling(row) for row in adaptive))
        best = 0.0
        num_tokens = len(rows) * size
        times = {
            scorer: _seconds(language_model, scorer, num_tokens=num_tokens)
            for scorer in {scorer for row in adaptive for scorer in row.scorers}
        }
        reading = max(sum(times[scorer] for scorer in row.scorers) for row in adaptive)
        for count in range(1, ceiling + 1):
            kept = [
                expected_accepted(row.acceptance_rate, min(count, _ceiling(row)))
                for row in adaptive
            ]
            gain = sum(kept)
            judged = float(count)
            if lazy:
                judged = sum(
                    each / row.acceptance_rate for each, row in zip(kept, adaptive, strict=True)
                ) / len(adaptive)
            seconds = language_model.round_seconds(len(rows), count, size) + reading * judged
            if gain / max(seconds, 1e-9) > best * 1.05:
                best, chosen = gain / max(seconds, 1e-9), count
    return [_count(row, chosen, language_model.max_candidates) for row in rows]


def _ceiling(row: Row) -> int:
    most = row.policy.max_candidates if row.policy else 1
    return max(1, row.attempts_left if most is None else min(most, row.attempts_left))


def _count(row: Row, chosen: int, most: int) -> int:
    if row.policy is None:
        return 1
    return min(_ceiling(row), chosen if row.policy.adaptive else most)


def _seconds(language_model: LanguageModel, scorer: Scorer, *, num_tokens: int) -> float:
    """Return how long a scorer is thought to read some tokens; decides nothing but speed."""
    try:
        measured = scorer.seconds(num_tokens)
        seconds, cost = (0.0, float(scorer.cost)) if measured is None else (float(measured), 0.0)
    except Exception as error:  # where it cannot be asked, it will say so when it judges
        _log.warning("the time of %s is unknown: %s", type(scorer).__name__, name_of(type(error)))
        return 0.0
    if cost:
        seconds = cost * language_model.round_seconds(num_tokens, 1, 1)
    return seconds if math.isfinite(seconds) else 0.0


def _completion(text: Text) -> Completion:
    return Completion(
        text=text.text,
        finished=text.finished,
        token_ids=text.token_ids if text.exact else None,
    )


def combine(reward: Reward, values: dict[Leaf, float]) -> float | None:
    """Return a reward's value; None where it fails or is no finite number."""
    try:
        value = float(reward.combine(values))
    except Exception as error:  # a reward of somebody else's may fail in any way
        failures.tell(f"reward {reward.name}", reason_of(error))
        return None
    return value if math.isfinite(value) else None


def greatest(reward: Reward, known: Mapping[Leaf, float]) -> float:
    """Return the greatest value that a reward can have; NaN where it does not tell."""
    try:
        return float(reward.bounds(known)[1])
    except Exception as error:  # as above
        failures.tell(f"bounds of {reward.name}", reason_of(error))
        return math.nan
