"""Asks the rewards, on the device or in workers, and turns every failure into no answer.

Knows score requests, deadlines and threads; nothing of thresholds. An attempt fails when its own
call fails: where a call for several candidates goes wrong, each of them is asked for alone, so
that what fails does not depend on how many were drafted at once. Who is asked comes in stages: what
the answers of one reject needs none of the next.
"""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from langchain_stars.rewards.base import (
    Failures,
    Leaf,
    NamedRewardError,
    Raw,
    RewardError,
    Scorer,
    ScoreRequest,
    reason_of,
    within,
)

_log = logging.getLogger(__name__)
failures = Failures(_log)
"""Of rewards that were asked in vain."""

MAX_FAILURES_IN_A_ROW = 3
"""Attempts on which a reward fails, one after the other, until the reply ends.

One that another reward rejects is rejected and has not failed: it may not even have been asked.
"""

Rejects: TypeAlias = Callable[[int, Mapping[Leaf, float]], str | None]
"""Returns what rejects a candidate, by its place, given the values of some leaves; or None."""

_MAX_TOKENS_AT_ONCE = 512
_CHARACTERS_OF_A_TOKEN = 4
_IDLE_SECONDS = 30.0
_LONGEST_SECONDS = 3600.0


class Workers:
    """Threads that call rewards which do not run on the device.

    A call that outlives its deadline is abandoned: its thread cannot be stopped, so it is counted
    until it returns. Of a scorer with `max_hung` of them no further call is begun; the other
    scorers' calls go on, until `max_threads` are spent.

    Attributes:
        max_workers: Most calls at once, abandoned ones left aside.
        max_hung: Abandoned calls of one scorer that still run, from which on it is not called.
        max_threads: Most threads.
    """

    def __init__(self, *, max_workers: int = 32, max_hung: int = 8, max_threads: int = 256) -> None:
        self.max_workers = max_workers
        self.max_hung = max_hung
        self.max_threads = max_threads
        self._hung: Counter[Scorer] = Counter()
        self._changed = threading.Condition()
        self._tasks: deque[_Task] = deque()
        self._num_idle = 0
        self._num_threads = 0

    @property
    def num_hung(self) -> int:
        """Abandoned calls that still run."""
        return self._hung.total()

    def submit(self, task: "_Task") -> None:
        """Have a thread run `task`; raise RewardError where too many calls hang."""
        with self._changed:
            if self._hung[task.scorer] >= self.max_hung or self.num_hung >= self.max_threads:
                raise NamedRewardError(
                    f"{self.num_hung} calls of rewards hang; no further one is begun"
                )
            self._tasks.append(task)
            self._changed.notify()
            self._add_thread()

    def abandon(self, task: "_Task") -> None:
        """Stop waiting for `task`."""
        with self._changed:
            if not task.done and not task.abandoned:
                task.abandoned = True
                if task.started is not None:
                    self._hung[task.scorer] += 1
                    self._add_thread()

    def _add_thread(self) -> None:
        """Start a thread where more tasks wait than threads, within the limit; under the lock."""
        busy = self._num_threads - self.num_hung
        if (
            len(self._tasks) > self._num_idle
            and busy < self.max_workers
            and self._num_threads < self.max_threads
        ):
            try:
                threading.Thread(target=self._work, name="stars-reward", daemon=True).start()
            except RuntimeError as error:  # the machine has none left: tasks wait for the others
                _log.warning("no thread for rewards: %s", reason_of(error))
            else:
                self._num_threads += 1

    def _work(self) -> None:
        while (task := self._next()) is not None:
            task.run()
            with self._changed:
                task.done = True
                hung = task.abandoned
                if hung:
                    self._hung[task.scorer] -= 1
                    self._hung += Counter()  # forgets scorers without any
            if not hung:
                task.notify()

    def _next(self) -> "_Task | None":
        """Return the next task, or None when there has been none for long."""
        with self._changed:
            while True:
                while self._tasks:
                    task = self._tasks.popleft()
                    if not task.abandoned:
                        task.started = time.monotonic()
                        return task
                self._num_idle += 1
                self._changed.wait(_IDLE_SECONDS)
                self._num_idle -= 1
                if not self._tasks:
                    self._num_threads -= 1
                    return None


class _Task:
    """One call of one scorer for candidates of one reply."""

    def __init__(self, scorer: Scorer, request: ScoreRequest, notify: Callable[[], None]) -> None:
        self.scorer = scorer
        self.request = request
        self.notify = notify
        self.created = time.monotonic()
        self.started: float | None = None
        self.done = False
        self.abandoned = False
        self.answers: list[Raw] | None = None
        self.failure = ""

    def run(self) -> None:
        """Call the scorer; keep its answers, or the type of what it raised."""
        self.answers, self.failure = _ask_one(self.scorer, self.request)


class Inquiry:
    """What is asked about the candidates of one reply in one round, and the answers so far.

    Scorers are asked one stage after another: those on the device in their order, a stage each,
    and then those in workers, all at once. What the answers up to a stage reject is rejected,
    whatever later stages say of it or fail to say, so that asking them makes no difference but to
    speed. A candidate on which a scorer fails has failed only where no other answer rejects it:
    neither does it make a difference in which order they are asked.

    Args:
        request: The candidates.
        leaves: The readings wanted.
        timeout: Seconds that a call in a worker may take; None is the longest there is.
        order: In which the scorers on the device are asked; that of `leaves` if not given.
        rejects: Says what rejects a candidate; nothing does if not given.
        lazy: Whether later stages are asked about those candidates alone that are not rejected.
        spares_workers: Whether scorers in workers then wait for what those on the device reject;
            else they are asked about everything at once, meanwhile.
        in_turn: Whether the candidates are attempts, of which none is looked at behind
            `MAX_FAILURES_IN_A_ROW` that failed.

    Attributes:
        request: The candidates.
        leaves: The readings wanted.
    """

    def __init__(
        self,
        request: ScoreRequest,
        leaves: Sequence[Leaf],
        *,
        timeout: float | None,
        order: Sequence[Scorer] = (),
        rejects: Rejects | None = None,
        lazy: bool = False,
        spares_workers: bool = False,
        in_turn: bool = False,
    ) -> None:
        self.request = request
        self.leaves = tuple(leaves)
        self._in_turn = in_turn
        self._timeout = timeout
        self._rejects = rejects
        self._lazy = lazy and rejects is not None
        self._waits = self._lazy and spares_workers
        self._answers: dict[Scorer, dict[int, Raw | None]] = {}
        self._asked: set[Scorer] = set()
        self._values: dict[tuple[Leaf, int], float | None] = {}
        self._calls: list[_Call] = []
        self._begun = False
        wanted = dict.fromkeys(leaf.scorer for leaf in self.leaves)
        scorers = dict.fromkeys([*(scorer for scorer in order if scorer in wanted), *wanted])
        self._on_device = [scorer for scorer in scorers if scorer.on_device]
        self._in_workers = [scorer for scorer in scorers if not scorer.on_device]

    @property
    def scorers(self) -> list[Scorer]:
        """The scorers that `leaves` read, each once, in the order of their stages."""
        return [*self._on_device, *self._in_workers]

    @property
    def pending(self) -> list[Scorer]:
        """The scorers on the device that have not been asked, in order."""
        return [scorer for scorer in self._on_device if scorer not in self._asked]

    @property
    def done(self) -> bool:
        """Whether every scorer that is to be asked has answered or failed."""
        return self._begun and not self._calls

    @property
    def deadline(self) -> float:
        """When, on the monotonic clock, it must next be polled."""
        return min((call.deadline for call in self._calls), default=math.inf)

    def values(self, place: int) -> dict[Leaf, float] | None:
        """Return the value of every leaf for one candidate; None where one is missing."""
        values = self.known(place)
        return values if len(values) == len(self.leaves) else None

    def known(self, place: int) -> dict[Leaf, float]:
        """Return the values that have been had for one candidate."""
        values = {leaf: self._value(leaf, place) for leaf in self.leaves}
        return {leaf: value for leaf, value in values.items() if value is not None}

    def answers(self, place: int) -> dict[Scorer, Raw | None]:
        """Return what each scorer that was asked about a candidate has said; None if it failed."""
        return {
            scorer: answers[place] for scorer, answers in self._answers.items() if place in answers
        }

    def rejection(self, place: int) -> str | None:
        """Return what rejects a candidate at the first stage that has what it takes, or None."""
        if self._rejects is None:
            return None
        known: dict[Leaf, float] = {}
        for stage in [*([scorer] for scorer in self._on_device), self._in_workers]:
            if any(place not in self._answers.get(scorer, ()) for scorer in stage):
                break
            for leaf in self.leaves:
                if leaf.scorer in stage and (value := self._value(leaf, place)) is not None:
                    known[leaf] = value
            if stage and (name := self._rejects(place, known)) is not None:
                return name
        return None

    def ask(self, scorer: Scorer) -> list[int]:
        """Return the candidates that a scorer is to be asked about now, by their places."""
        self._asked.add(scorer)
        answered = self._answers.get(scorer, {})
        return [
            place
            for place in range(len(self.request.candidates))
            if place not in answered and not (self._lazy and self.rejection(place) is not None)
        ]

    def begin(self, workers: Workers, notify: Callable[[], None]) -> None:
        """Begin the calls that run in workers; once what must be asked before them has answered."""
        if self._begun or (self._waits and self.pending):
            return
        self._begun = True
        last = self._in_turn and len(self._in_workers) == 1 and not self.pending
        for scorer in self._in_workers:
            places = self.ask(scorer)
            if places:
                self._calls.append(
                    _Call(self, scorer, places, workers, notify, self._timeout, last=last)
                )
        self.poll()

    def poll(self) -> None:
        """Collect the answers that have come, and abandon the calls that are late."""
        self._calls = [call for call in self._calls if not call.poll()]

    def cancel(self) -> None:
        """Stop waiting for any answer."""
        for call in self._calls:
            call.cancel()
        self._calls = []
        self._begun = True

    def answered(self, scorer: Scorer, answers: Mapping[int, Raw | None]) -> None:
        """Take what a scorer says of candidates, by their places."""
        self._answers.setdefault(scorer, {}).update(answers)

    def _value(self, leaf: Leaf, place: int) -> float | None:
        """Return what a leaf reads in an answer; None where there is none, or no number."""
        raw = self._answers.get(leaf.scorer, {}).get(place)
        if raw is None:
            return None
        if (leaf, place) not in self._values:
            self._values[leaf, place] = _read(leaf, raw)
        return self._values[leaf, place]


def _read(leaf: Leaf, raw: Raw) -> float | None:
    try:
        value = within(float(leaf.read(raw)), leaf.range)
    except Exception as error:  # a reading of hostile numbers may fail in any way
        failures.tell(f"reward {leaf.name}", reason_of(error))
        return None
    return value if math.isfinite(value) else None


class _Call:
    """Asks one scorer in a worker about some candidates, or one by one where that fails.

    Args:
        inquiry: Whose candidates they are.
        scorer: Who is asked.
        places: Which candidates.
        workers: Where.
        notify: Called when there may be an answer.
        timeout: Seconds that a call may take.
        last: Whether a candidate on which the scorer fails is a failed attempt, since nobody else
            is still to answer.
    """

    def __init__(
        self,
        inquiry: Inquiry,
        scorer: Scorer,
        places: Sequence[int],
        workers: Workers,
        notify: Callable[[], None],
        timeout: float | None,
        *,
        last: bool,
    ) -> None:
        self._inquiry = inquiry
        self._scorer = scorer
        self._places = places
        self._last = last
        self._workers = workers
        self._notify = notify
        self._timeout = _LONGEST_SECONDS if timeout is None else timeout
        self._answers: list[Raw | None] = []
        self._alone = len(places) == 1
        self._failed_in_a_row = 0
        self._task: _Task | None = None
        self._begin()

    @property
    def deadline(self) -> float:
        started = self._task.started if self._task else None
        if started is None:  # waiting for a worker: look again soon
            return time.monotonic() + min(self._timeout, 0.05)
        return started + self._timeout

    def _begin(self) -> None:
        places = self._places
        if self._alone:
            places = places[len(self._answers) : len(self._answers) + 1]
        request = _about(self._inquiry.request, places)
        self._task = _Task(self._scorer, request, self._notify)
        try:
            self._workers.submit(self._task)
        except RewardError as error:
            self._task.failure = reason_of(error)
            self._task.done = True

    def poll(self) -> bool:
        """Return whether every candidate has its answer or has failed."""
        num_candidates = len(self._places)
        while len(self._answers) < num_candidates:
            task = self._task
            assert task is not None
            if task.done:
                answers = task.answers
                failure = task.failure
            elif task.started is not None and time.monotonic() >= task.started + self._timeout:
                self._workers.abandon(task)
                answers, failure = None, "timeout"
            elif (
                task.started is None
                and time.monotonic() >= task.created + self._timeout + _IDLE_SECONDS
            ):
                self._workers.abandon(task)
                answers, failure = None, "no free worker"
            else:
                return False
            if answers is None:
                failures.tell(f"reward {_name(self._scorer)}", failure)
            if not self._alone:
                if answers is not None:
                    self._answers += answers
                    break
                self._alone = True
            else:
                at = len(self._answers)
                place = self._places[at]
                follows = at > 0 and self._places[at - 1] == place - 1
                before = self._failed_in_a_row if follows else 0
                self._answers.append(answers[0] if answers is not None else None)
                self._inquiry.answered(self._scorer, {place: self._answers[at]})
                # What is rejected without the answer has not failed.
                failed = answers is None and self._inquiry.rejection(place) is None
                self._failed_in_a_row = before + 1 if failed else 0
                if self._last and self._failed_in_a_row >= MAX_FAILURES_IN_A_ROW:
                    # The reply ends before a later one would be looked at.
                    self._answers += [None] * (num_candidates - len(self._answers))
                    break
            if len(self._answers) < num_candidates:
                self._begin()
        self._inquiry.answered(self._scorer, dict(zip(self._places, self._answers, strict=True)))
        return True

    def cancel(self) -> None:
        if self._task is not None:
            self._workers.abandon(self._task)


def judging(
    inquiries: Sequence[Inquiry], *, workers: Workers, notify: Callable[[], None]
) -> Generator[None, None, None]:
    """Ask everything that the inquiries want; yield between pieces of device work.

    Scorers on the device have answered when it ends. Those in workers may still be busy: an
    inquiry says so by `done`, and `notify` is called, from any thread, when to poll it.
    """
    for inquiry in inquiries:
        inquiry.begin(workers, notify)
    while waiting := [inquiry for inquiry in inquiries if inquiry.pending]:
        scorer = _next([inquiry.pending for inquiry in waiting])
        parts = []
        for inquiry in waiting:
            if inquiry.pending[0] is scorer:
                places = inquiry.ask(scorer)
                if places:
                    parts.append(_Part(inquiry, places, _about(inquiry.request, places)))
        for group in _groups(parts):
            yield
            _ask_on_device(scorer, group)
        for inquiry in waiting:
            inquiry.begin(workers, notify)


def _next(queues: Sequence[Sequence[Scorer]]) -> Scorer:
    """Return who is asked next: somebody's next whom nobody else will want later, if there is one."""
    later = {scorer for queue in queues for scorer in queue[1:]}
    heads = list(dict.fromkeys(queue[0] for queue in queues))
    return next((scorer for scorer in heads if scorer not in later), heads[0])


@dataclass(frozen=True, slots=True)
class _Part:
    """Those candidates of an inquiry that a scorer is asked about."""

    inquiry: Inquiry
    places: list[int]
    request: ScoreRequest

    def answered(self, scorer: Scorer, answers: Sequence[Raw | None]) -> None:
        self.inquiry.answered(scorer, dict(zip(self.places, answers, strict=True)))


def _about(request: ScoreRequest, places: Sequence[int]) -> ScoreRequest:
    if len(places) == len(request.candidates):
        return request
    return replace(request, candidates=tuple(request.candidates[place] for place in places))


def _groups(parts: Sequence[_Part]) -> Generator[list[_Part], None, None]:
    """Split what is asked so that no piece of device work is long."""
    group: list[_Part] = []
    num_tokens = 0
    for part in parts:
        size = _num_tokens(part.request)
        if group and num_tokens + size > _MAX_TOKENS_AT_ONCE:
            yield group
            group, num_tokens = [], 0
        group.append(part)
        num_tokens += size
    if group:
        yield group


def _num_tokens(request: ScoreRequest) -> int:
    """Return about how many tokens a request is; the first about a reply has its prompt too."""
    known = len(request.accepted.token_ids or ())
    size = sum(max(1, len(candidate.token_ids or ()) - known) for candidate in request.candidates)
    if not request.accepted.text:
        characters = sum(len(str(message.get("content"))) for message in request.subject.chat)
        size += characters // _CHARACTERS_OF_A_TOKEN
    return size


def _ask_on_device(scorer: Scorer, parts: Sequence[_Part]) -> None:
    try:
        answers = scorer.score([part.request for part in parts])
        if len(answers) != len(parts):
            raise NamedRewardError(f"answered {len(answers)} of {len(parts)} requests")
        for part, of_request in zip(parts, answers, strict=True):
            _check_count(len(of_request), part.request)
    except BaseException as error:  # whatever it raises, the engine's thread goes on
        failures.tell(f"reward {_name(scorer)}", reason_of(error))
    else:
        for part, of_request in zip(parts, answers, strict=True):
            part.answered(scorer, of_request)
        return
    for part in parts:
        alone: list[Raw | None] = []
        for candidate in part.request.candidates:
            of_one, failure = _ask_one(scorer, replace(part.request, candidates=(candidate,)))
            if of_one is None:
                failures.tell(f"reward {_name(scorer)}", failure)
            alone.append(of_one[0] if of_one is not None else None)
        part.answered(scorer, alone)


def _ask_one(scorer: Scorer, request: ScoreRequest) -> tuple[list[Raw] | None, str]:
    """Return the answers for one request, or None and the type of what went wrong."""
    try:
        answers = scorer.score([request])
        if len(answers) != 1:
            return None, "wrong count"
        _check_count(len(answers[0]), request)
        return list(answers[0]), ""
    except BaseException as error:  # a worker must survive whatever a callable raises
        return None, reason_of(error)


def _check_count(count: int, request: ScoreRequest) -> None:
    if count != len(request.candidates):
        raise NamedRewardError(f"answered {count} of {len(request.candidates)} candidates")


def _name(scorer: Scorer) -> str:
    try:
        return str(scorer.identity.get("name", type(scorer).__name__))
    except Exception:  # what cannot even say its name has failed already
        return type(scorer).__name__
