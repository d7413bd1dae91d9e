"""Asks the rewards, on the device or in workers, and turns every failure into no answer.

Knows score requests, deadlines and threads; nothing of thresholds. An attempt fails when its own
call fails: where a call for several candidates goes wrong, each of them is asked for alone, so
that what fails does not depend on how many were drafted at once.
"""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace

from langchain_stars.rewards.base import Leaf, Raw, RewardError, Scorer, ScoreRequest

_log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3
"""Attempts whose rewards fail, one after the other, until the reply ends."""

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
                raise RewardError(f"{self.num_hung} calls of rewards hang; no further one is begun")
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
            self._num_threads += 1
            threading.Thread(target=self._work, name="stars-reward", daemon=True).start()

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

    Attributes:
        request: The candidates.
        leaves: The readings wanted.
        num_failures: Calls that failed, those for several candidates among them.
    """

    def __init__(
        self, request: ScoreRequest, leaves: Sequence[Leaf], *, timeout: float | None
    ) -> None:
        self.request = request
        self.leaves = tuple(leaves)
        self.num_failures = 0
        self._timeout = timeout
        self._answers: dict[Scorer, list[Raw | None]] = {}
        self._calls: list[_Call] = []

    @property
    def scorers(self) -> list[Scorer]:
        """The scorers that `leaves` read, each once."""
        return list(dict.fromkeys(leaf.scorer for leaf in self.leaves))

    @property
    def done(self) -> bool:
        """Whether every scorer has answered or failed."""
        return not self._calls

    @property
    def deadline(self) -> float:
        """When, on the monotonic clock, it must next be polled."""
        return min((call.deadline for call in self._calls), default=math.inf)

    def values(self, index: int) -> dict[Leaf, float] | None:
        """Return the value of every leaf for one candidate; None where a reward failed."""
        values: dict[Leaf, float] = {}
        for leaf in self.leaves:
            raw = self._answers[leaf.scorer][index]
            if raw is None:
                return None
            try:
                value = float(leaf.read(raw))
            except Exception as error:  # a reading of hostile numbers may fail in any way
                _log.warning("reward %s failed: %s", leaf.name, type(error).__name__)
                return None
            if not math.isfinite(value):
                return None
            values[leaf] = value
        return values

    def begin(self, workers: Workers, notify: Callable[[], None]) -> None:
        """Begin the calls that run in workers."""
        for scorer in self.scorers:
            if not scorer.on_device:
                self._calls.append(_Call(self, scorer, workers, notify, self._timeout))
        self.poll()

    def poll(self) -> None:
        """Collect the answers that have come, and abandon the calls that are late."""
        self._calls = [call for call in self._calls if not call.poll()]

    def cancel(self) -> None:
        """Stop waiting for any answer."""
        for call in self._calls:
            call.cancel()
        self._calls = []

    def answered(self, scorer: Scorer, answers: list[Raw | None]) -> None:
        """Take what a scorer says of every candidate."""
        self._answers[scorer] = answers


class _Call:
    """Asks one scorer in a worker about all candidates, or one by one where that fails."""

    def __init__(
        self,
        inquiry: Inquiry,
        scorer: Scorer,
        workers: Workers,
        notify: Callable[[], None],
        timeout: float | None,
    ) -> None:
        self._inquiry = inquiry
        self._scorer = scorer
        self._workers = workers
        self._notify = notify
        self._timeout = _LONGEST_SECONDS if timeout is None else timeout
        self._answers: list[Raw | None] = []
        self._alone = len(inquiry.request.candidates) == 1
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
        request = self._inquiry.request
        if self._alone:
            index = len(self._answers)
            request = replace(request, candidates=request.candidates[index : index + 1])
        self._task = _Task(self._scorer, request, self._notify)
        try:
            self._workers.submit(self._task)
        except RewardError as error:
            self._task.failure = type(error).__name__
            self._task.done = True

    def poll(self) -> bool:
        """Return whether every candidate has its answer or has failed."""
        num_candidates = len(self._inquiry.request.candidates)
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
                self._inquiry.num_failures += 1
                _log.warning("reward %s failed: %s", _name(self._scorer), failure)
            if not self._alone:
                if answers is not None:
                    self._answers += answers
                    break
                self._alone = True
            else:
                self._answers.append(answers[0] if answers is not None else None)
                self._failed_in_a_row = 0 if answers is not None else self._failed_in_a_row + 1
                if self._failed_in_a_row >= MAX_FAILURES_IN_A_ROW:
                    # The reply ends before a later one would be looked at.
                    self._answers += [None] * (num_candidates - len(self._answers))
                    break
            if len(self._answers) < num_candidates:
                self._begin()
        self._inquiry.answered(self._scorer, self._answers)
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
    scorers = dict.fromkeys(
        scorer for inquiry in inquiries for scorer in inquiry.scorers if scorer.on_device
    )
    for scorer in scorers:
        asked = [inquiry for inquiry in inquiries if scorer in inquiry.scorers]
        for group in _groups(asked):
            yield
            _ask_on_device(scorer, group)


def _groups(inquiries: Sequence[Inquiry]) -> Generator[list[Inquiry], None, None]:
    """Split inquiries so that no piece of device work is long."""
    group: list[Inquiry] = []
    num_tokens = 0
    for inquiry in inquiries:
        size = _num_tokens(inquiry.request)
        if group and num_tokens + size > _MAX_TOKENS_AT_ONCE:
            yield group
            group, num_tokens = [], 0
        group.append(inquiry)
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


def _ask_on_device(scorer: Scorer, inquiries: Sequence[Inquiry]) -> None:
    try:
        answers = scorer.score([inquiry.request for inquiry in inquiries])
        if len(answers) != len(inquiries):
            raise RewardError(f"answered {len(answers)} of {len(inquiries)} requests")
        for inquiry, of_request in zip(inquiries, answers, strict=True):
            _check_count(len(of_request), inquiry.request)
    except BaseException as error:  # whatever it raises, the engine's thread goes on
        _log.warning("reward %s failed: %s", _name(scorer), type(error).__name__)
    else:
        for inquiry, of_request in zip(inquiries, answers, strict=True):
            inquiry.answered(scorer, list(of_request))
        return
    for inquiry in inquiries:
        alone: list[Raw | None] = []
        for candidate in inquiry.request.candidates:
            one = replace(inquiry.request, candidates=(candidate,))
            of_one, failure = _ask_one(scorer, one)
            if of_one is None:
                inquiry.num_failures += 1
                _log.warning("reward %s failed: %s", _name(scorer), failure)
            alone.append(of_one[0] if of_one is not None else None)
        inquiry.answered(scorer, alone)


def _ask_one(scorer: Scorer, request: ScoreRequest) -> tuple[list[Raw] | None, str]:
    """Return the answers for one request, or None and the type of what went wrong."""
    try:
        answers = scorer.score([request])
        if len(answers) != 1:
            return None, "wrong count"
        _check_count(len(answers[0]), request)
        return list(answers[0]), ""
    except BaseException as error:  # a worker must survive whatever a callable raises
        return None, type(error).__name__


def _check_count(count: int, request: ScoreRequest) -> None:
    if count != len(request.candidates):
        raise RewardError(f"answered {count} of {len(request.candidates)} candidates")


def _name(scorer: Scorer) -> str:
    identity: Mapping[str, object] = scorer.identity
    return str(identity.get("name", type(scorer).__name__))
