"""One thread owns a device; replies are rows that join, advance and leave at round boundaries.

Knows rows, lanes, queues and deadlines; nothing of LangChain. Every call, from whatever thread or
event loop, enqueues a row and waits for what it tells, or asks a reward and waits for its answer.
"""

import asyncio
import atexit
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

from langchain_stars.decoder import (
    Delta,
    Event,
    Policy,
    ReplyFailedError,
    Report,
    Row,
    advance,
    combine,
    settle,
)
from langchain_stars.judging import Inquiry, Workers, judging
from langchain_stars.language_models.base import LanguageModel, Prefix, Sampling
from langchain_stars.randomness import new_seed
from langchain_stars.rewards.base import (
    Chat,
    Completion,
    Leaf,
    Reward,
    ScoreRequest,
    Subject,
    name_of,
)

_log = logging.getLogger(__name__)
_Of = TypeVar("_Of")

Priority: TypeAlias = Literal["interactive", "batch"]
"""Whose work goes first: somebody's who waits for one reply, or a batch's."""

_WEIGHTS: dict[Priority, float] = {"interactive": 4.0, "batch": 1.0}
_GRACE_SECONDS = 0.002
_MOST_GRACE_SECONDS = 0.02
_JOIN_SECONDS = 10.0
_MAX_QUESTIONS = 1024
_MAX_QUESTIONS_AT_ONCE = 8
_NOTHING = Completion(text="", finished=False, token_ids=())

_Values: TypeAlias = list[dict[Leaf, float] | None]


class EngineError(RuntimeError):
    """The engine could not do the work. Carries names, counts and types, never anybody's words."""


class QueueFullError(EngineError):
    """As many replies wait as may."""


class DeadlineExceededError(EngineError, TimeoutError):
    """The reply was not finished within its `timeout`."""


class EngineClosedError(EngineError):
    """The engine was shut down while the reply was in progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a reply is to be.

    Attributes:
        language_model: What drafts.
        chat: Messages of the thread, for the rewards.
        prompt_ids: The chat templated and tokenised.
        policy: The guard; None leaves the reply unguarded.
        sampling: How tokens are drawn.
        max_tokens: Most tokens of the reply, at least 1.
        stop: Stop strings, none of them empty.
        seed: Decides every draw of the reply; None takes one that no one can foresee.
        timeout: Seconds, above 0, that the reply may take, waiting included; None is no limit.
        max_queue: Most replies that may wait, at least 0, for this one to be taken.
        priority: `"batch"` where many replies were asked for at once.
        partition: Name under which computed prompts may be shared with other replies, those of
            the language model and those of the rewards; nothing is shared under an empty one.
        segment_size: Tokens drawn at once for an unguarded reply.
        streamed: Whether an unguarded reply is wanted token by token.

    Raises:
        ValueError: A setting is out of range.
    """

    language_model: LanguageModel
    chat: Chat
    prompt_ids: Sequence[int]
    policy: Policy | None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    stop: Sequence[str] = ()
    seed: int | None = None
    timeout: float | None = None
    max_queue: int = 1024
    priority: Priority = "interactive"
    partition: str = ""
    segment_size: int = 16
    streamed: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {self.max_tokens}")
        if not self.prompt_ids:
            raise ValueError("`prompt_ids` must hold at least one token, got none")
        if any(not string for string in self.stop):
            raise ValueError("`stop` must not hold an empty string")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"`timeout` must be above 0, got {self.timeout}")
        if self.max_queue < 0:
            raise ValueError(f"`max_queue` must be at least 0, got {self.max_queue}")


class Reply:
    """What a caller holds of a row: its events, and the right to drop it.

    Iterating yields `Delta`s, and ends when `report` is there; what went wrong is raised. A reply
    that is not read to its end, for whatever reason, must be cancelled: its row then leaves at the
    next round boundary.
    """

    def __init__(self, order: Order, engine: "Engine") -> None:
        self.order = order
        self.report: Report | None = None
        self.cancelled = False
        self.deadline = math.inf if order.timeout is None else time.monotonic() + order.timeout
        self._engine = engine
        self._put: Callable[[Event], None]

    def cancel(self) -> None:
        """Let the row leave; it tells nothing any more."""
        if not self.cancelled:
            self.cancelled = True
            self._engine.wake()

    def tell(self, event: Event) -> None:
        """Pass on an event of the row; called by the engine's thread."""
        if not self.cancelled:
            self._put(event)

    def _take(self, event: Event) -> Delta | None:
        """Return a delta to yield, or None at the end."""
        if isinstance(event, Delta):
            return event
        if isinstance(event, Report):
            self.report = event
            return None
        if isinstance(event, ReplyFailedError):
            event = EngineError(str(event))
        raise event from None

    @property
    def _patience(self) -> float | None:
        """Seconds to wait for the next event; the engine itself keeps the deadline if it can."""
        if self.deadline == math.inf:
            return None
        return max(0.0, self.deadline - time.monotonic()) + 1.0


class SyncReply(Reply):
    """A reply whose events a thread reads."""

    def __init__(self, order: Order, engine: "Engine") -> None:
        super().__init__(order, engine)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._put = self._events.put

    def __iter__(self) -> Iterator[Delta]:
        """Yield the deltas; cancel where the reader stops early."""
        try:
            while True:
                try:
                    event = self._events.get(timeout=self._patience)
                except queue.Empty:
                    event = _late(self.order)
                delta = self._take(event)
                if delta is None:
                    return
                yield delta
        finally:
            self.cancel()


class AsyncReply(Reply):
    """A reply whose events a task reads."""

    def __init__(self, order: Order, engine: "Engine") -> None:
        super().__init__(order, engine)
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

        def put(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(self._events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody reads any more
                self.cancel()

        self._put = put

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield the deltas; cancel where the reader stops early or its task is cancelled."""
        try:
            while True:
                try:
                    event = await asyncio.wait_for(self._events.get(), self._patience)
                except TimeoutError:
                    event = _late(self.order)
                delta = self._take(event)
                if delta is None:
                    return
                yield delta
        finally:
            self.cancel()


def _late(order: Order) -> DeadlineExceededError:
    return DeadlineExceededError(f"the reply was not finished within `timeout`={order.timeout} s")


@dataclass(slots=True, eq=False)
class _Seat:
    """A row in progress and who waits for it."""

    row: Row
    reply: Reply


@dataclass(slots=True, eq=False)
class _Lane:
    """Rows that share rounds: those of one language model and one priority."""

    language_model: LanguageModel
    priority: Priority
    waiting: deque[Reply] = field(default_factory=deque)
    seats: list[_Seat] = field(default_factory=list)
    round: Generator[None, None, None] | None = None
    in_round: list[_Seat] = field(default_factory=list)
    served: float = 0.0
    num_rows: int = 1

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.seats or self.round)


@dataclass(slots=True, eq=False)
class _Question:
    """What rewards are asked outside of a reply, and the answer that somebody waits for."""

    inquiries: list[Inquiry]
    answer: Future[_Values] = field(default_factory=Future)

    def settle(self) -> bool:
        """Answer where everything has been judged or nobody waits; return whether it is over."""
        if not self.answer.cancelled():
            for inquiry in self.inquiries:
                inquiry.poll()
            if not all(inquiry.done for inquiry in self.inquiries):
                return False
            if self.answer.set_running_or_notify_cancel():
                self.answer.set_result([inquiry.values(0) for inquiry in self.inquiries])
        self.end()
        return True

    def fail(self, error: Exception) -> None:
        """Answer with an exception, where somebody still waits."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)
        self.end()

    def end(self) -> None:
        """Drop what was computed for it."""
        for inquiry in self.inquiries:
            inquiry.cancel()
            for scorer in inquiry.scorers:
                _release(scorer.release, inquiry.request.subject)


@dataclass(slots=True)
class Statistics:
    """What an engine has done, in counts.

    Attributes:
        num_rounds: Rounds begun.
        num_row_rounds: Rows in them, added up.
        num_waiting_rounds: Rounds begun while a reply of the lane was waiting for room.
        num_waiting_row_rounds: Rows in those.
        num_replies: Replies ended, however.
        num_failures: Replies ended by an error of the language model.
        num_questions: Questions put to rewards outside of replies.
    """

    num_rounds: int = 0
    num_row_rounds: int = 0
    num_waiting_rounds: int = 0
    num_waiting_row_rounds: int = 0
    num_replies: int = 0
    num_failures: int = 0
    num_questions: int = 0


class Engine:
    """Runs the rounds of all replies of one device, in one thread.

    Rows of one language model share rounds. An interactive reply does not wait for a flood of
    batch rows: the two take turns on the device, by time, between the pieces of their rounds.
    What a reward is asked outside of a reply takes turns with the lanes, a piece each.

    Attributes:
        max_rows: Most rows of a lane in progress; None leaves it to the language model.
        barrier: Whether rows wait for each other at every segment; for comparison only.
        lazy: Whether a candidate is judged only where those before it were rejected, where that is
            thought to be faster, and by one reward only where no other one rejects it already;
            changes the speed only.
        clock: Tells, in seconds, how long lanes have had the device.
        statistics: Counts.
    """

    def __init__(
        self,
        name: str = "cpu",
        *,
        max_rows: int | None = None,
        barrier: bool = False,
        lazy: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self.max_rows = max_rows
        self.barrier = barrier
        self.lazy = lazy
        self._clock = clock
        self.statistics = Statistics()
        self._workers = Workers()
        self._changed = threading.Condition()
        self._arrivals: deque[Reply] = deque()
        self._num_open: dict[LanguageModel, int] = {}
        self._lanes: list[_Lane] = []
        self._questions: deque[_Question] = deque()
        self._asked: list[_Question] = []
        self._hearing: Generator[None, None, None] | None = None
        self._woken = False
        self._closed = False
        self._thread: threading.Thread | None = None

    # What any thread may call

    def reply(self, order: Order) -> SyncReply:
        """Enqueue a reply that this thread will read.

        Raises:
            QueueFullError: As many replies wait as may.
            EngineClosedError: The engine was shut down.
        """
        reply = SyncReply(order, self)
        self._enqueue(reply)
        return reply

    def areply(self, order: Order) -> AsyncReply:
        """Enqueue a reply that this task will read; raises what `reply` raises."""
        reply = AsyncReply(order, self)
        self._enqueue(reply)
        return reply

    def judge(
        self,
        reward: Reward,
        chats: Sequence[Chat],
        *,
        completion: Completion = _NOTHING,
        timeout: float | None = None,
    ) -> list[float | None]:
        """Return what a reward says of a reply to each of some chats, outside of any reply.

        Args:
            reward: What is asked; loaded in the caller's thread.
            chats: The threads, each judged by itself.
            completion: The reply; the empty open one if not given.
            timeout: Seconds, above 0, to wait for the answers once the reward is loaded; None is
                no limit.

        Returns:
            One finite number a chat, in the reward's units; None where the reward failed.

        Raises:
            QueueFullError: As many questions wait as may.
            DeadlineExceededError: There was no answer within `timeout`.
            EngineClosedError: The engine was shut down.
        """
        reward.load()
        answer = self._ask(reward, chats, completion, timeout)
        try:
            values = answer.result(timeout)
        except TimeoutError:
            raise _unanswered(timeout) from None
        finally:
            self._drop(answer)
        return [None if each is None else combine(reward, each) for each in values]

    async def ajudge(
        self,
        reward: Reward,
        chats: Sequence[Chat],
        *,
        completion: Completion = _NOTHING,
        timeout: float | None = None,
    ) -> list[float | None]:
        """Await what `judge` returns; a cancelled task asks no longer."""
        await asyncio.to_thread(reward.load)
        answer = self._ask(reward, chats, completion, timeout)
        try:
            values = await asyncio.wait_for(asyncio.wrap_future(answer), timeout)
        except TimeoutError:
            raise _unanswered(timeout) from None
        finally:
            self._drop(answer)
        return [None if each is None else combine(reward, each) for each in values]

    def _ask(
        self, reward: Reward, chats: Sequence[Chat], completion: Completion, timeout: float | None
    ) -> Future[_Values]:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"`timeout` must be above 0, got {timeout}")
        inquiries = [
            Inquiry(
                ScoreRequest(
                    subject=Subject(chat, lane="questions"),
                    accepted=_NOTHING,
                    candidates=(completion,),
                ),
                reward.leaves,
                timeout=None,  # who waits does so for all answers together, and drops the question
            )
            for chat in chats
        ]
        question = _Question(inquiries)
        with self._changed:
            if self._closed:
                raise EngineClosedError("the engine was shut down")
            if len(self._questions) >= _MAX_QUESTIONS:
                raise QueueFullError(f"{len(self._questions)} questions wait already")
            self._questions.append(question)
            self._begin()
            self._changed.notify()
        return question.answer

    def _drop(self, answer: Future[_Values]) -> None:
        """Ask no longer, where there is no answer yet."""
        if answer.cancel():
            self.wake()

    def wake(self) -> None:
        """Have the thread look at what has changed."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self, *, timeout: float = _JOIN_SECONDS) -> None:
        """End every reply in progress with `EngineClosedError`, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _enqueue(self, reply: Reply) -> None:
        with self._changed:
            if self._closed:
                raise EngineClosedError("the engine was shut down")
            order = reply.order
            num_open = self._num_open.get(order.language_model, 0)
            room = self._num_rows(order.language_model)
            if num_open >= room + order.max_queue:
                raise QueueFullError(
                    f"{room} replies are in progress, {num_open - room} wait already, and "
                    f"`max_queue` is {order.max_queue}; ask again later, or raise it"
                )
            self._num_open[order.language_model] = num_open + 1
            self._arrivals.append(reply)
            self._begin()
            self._changed.notify()

    def _begin(self) -> None:
        """Start the thread where there is none; under the lock."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=f"stars-engine-{self.name}", daemon=True
            )
            self._thread.start()

    # What the thread does

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # nobody may wait for a thread that is gone
            _log.critical("the engine %s ended: %s", self.name, name_of(type(error)))
        with self._changed:
            self._closed = True
            arrivals, self._arrivals = self._arrivals, deque()
        for reply in arrivals:
            self._lane_of(reply.order).waiting.append(reply)
        self._end_all()

    def _serve(self) -> None:
        """Run rounds until the engine is closed."""
        while True:
            with self._changed:
                if not self._closed and not self._arrivals and not self._woken:
                    pause = self._pause()
                    if pause > 0:
                        self._changed.wait(None if pause == math.inf else pause)
                if not self._lanes:
                    self._gather()
                if self._closed:
                    return
                arrivals, self._arrivals = self._arrivals, deque()
                self._woken = False
            for reply in arrivals:
                self._lane_of(reply.order).waiting.append(reply)
            for lane in self._lanes:
                try:
                    self._tend(lane)
                except Exception as error:
                    self._abandon(lane, error)
            self._lanes = [lane for lane in self._lanes if lane.busy]
            ready = [lane for lane in self._lanes if lane.round is not None]
            if ready:
                self._step(min(ready, key=lambda lane: (lane.served, lane.priority == "batch")))
            self._hear()

    def _gather(self) -> None:
        """Wait a moment for calls that come together, to share their first round; under the lock."""
        end = time.monotonic() + _MOST_GRACE_SECONDS
        count = 0
        while count < len(self._arrivals) and not self._closed and time.monotonic() < end:
            count = len(self._arrivals)
            self._changed.wait(_GRACE_SECONDS)

    def _pause(self) -> float:
        """Return how long nothing can happen, in seconds, unless the thread is woken."""
        if self._questions or self._hearing is not None:
            return 0.0
        if any(lane.round is not None or self._can_begin(lane) for lane in self._lanes):
            return 0.0
        moments = [math.inf]
        for question in self._asked:
            moments += [inquiry.deadline for inquiry in question.inquiries]
        for lane in self._lanes:
            moments += [reply.deadline for reply in lane.waiting]
            for seat in lane.seats:
                moments.append(seat.reply.deadline)
                if seat.row.inquiry is not None:
                    moments.append(seat.row.inquiry.deadline)
        first = min(moments)
        return first if first == math.inf else max(0.0, first - time.monotonic())

    def _can_begin(self, lane: _Lane) -> bool:
        """Return whether a lane without a round has a row for one, or room for who waits."""
        if lane.waiting and len(lane.seats) < lane.num_rows:
            return True
        return any(seat.row.inquiry is None or seat.row.inquiry.done for seat in lane.seats)

    def _hear(self) -> None:
        """Do one piece of what is asked outside of replies; answer what has been judged."""
        if self._hearing is None:
            begun: list[_Question] = []
            with self._changed:
                while self._questions and len(begun) < _MAX_QUESTIONS_AT_ONCE:
                    begun.append(self._questions.popleft())
            begun = [question for question in begun if not question.answer.cancelled()]
            if begun:
                self.statistics.num_questions += len(begun)
                self._asked += begun
                self._hearing = judging(
                    [inquiry for question in begun for inquiry in question.inquiries],
                    workers=self._workers,
                    notify=self.wake,
                )
        try:
            if self._hearing is not None:
                next(self._hearing)
                return
        except StopIteration:
            self._hearing = None
        except Exception as error:
            _log.error("%d questions failed: %s", len(self._asked), name_of(type(error)))
            self._hearing = None
            asked, self._asked = self._asked, []
            for question in asked:
                question.fail(EngineError(f"the rewards failed: {name_of(type(error))}"))
        self._asked = [question for question in self._asked if not question.settle()]

    def _lane_of(self, order: Order) -> _Lane:
        for lane in self._lanes:
            if lane.language_model is order.language_model and lane.priority == order.priority:
                return lane
        lane = _Lane(order.language_model, order.priority)
        lane.served = min((other.served for other in self._lanes), default=0.0)
        self._lanes.append(lane)
        return lane

    def _tend(self, lane: _Lane) -> None:
        """Drop who has gone, admit who waits, and begin a round where none is in progress."""
        now = time.monotonic()
        for _ in range(len(lane.waiting)):
            reply = lane.waiting.popleft()
            if reply.cancelled or reply.deadline <= now:
                self._leave(reply)
                reply.tell(_late(reply.order))
            else:
                lane.waiting.append(reply)
        if lane.round is not None:
            if all(seat.reply.cancelled or seat.reply.deadline <= now for seat in lane.in_round):
                lane.round.close()
                lane.round, lane.in_round = None, []
            else:
                return
        for seat in lane.seats:
            if not seat.row.ended and seat.reply.deadline <= now:
                seat.row.fail(_late(seat.reply.order))
            if not seat.row.ended and not seat.reply.cancelled:
                self._settle(seat)
        self._dismiss(lane)
        lane.num_rows = self._num_rows(lane.language_model)
        room = lane.num_rows - len(lane.seats)
        while lane.waiting and room > 0:
            reply = lane.waiting.popleft()
            try:
                self._admit(lane, reply)
                room -= 1
            except Exception as error:
                self._leave(reply)
                reply.tell(_failure(error))
        lane.in_round = [seat for seat in lane.seats if seat.row.inquiry is None]
        if lane.in_round:
            lane.round = advance(
                lane.language_model,
                [seat.row for seat in lane.in_round],
                workers=self._workers,
                notify=self.wake,
                barrier=self.barrier,
                lazy=self.lazy,
            )
            self.statistics.num_rounds += 1
            self.statistics.num_row_rounds += len(lane.in_round)
            if lane.waiting:
                self.statistics.num_waiting_rounds += 1
                self.statistics.num_waiting_row_rounds += len(lane.in_round)

    def _settle(self, seat: _Seat) -> None:
        try:
            settle(seat.row)
        except Exception as error:
            seat.row.fail(_failure(error))

    def _admit(self, lane: _Lane, reply: Reply) -> None:
        order = reply.order
        row = Row(
            prefix=Prefix(order.prompt_ids, lane=order.priority, partition=order.partition),
            subject=Subject(
                order.chat,
                vocabulary=order.language_model.vocabulary,
                lane=order.priority,
                partition=order.partition,
            ),
            policy=order.policy,
            sampling=order.sampling,
            seed=new_seed() if order.seed is None else order.seed,
            max_tokens=order.max_tokens,
            decode=order.language_model.decode,
            tell=reply.tell,
            stop=order.stop,
            segment_size=order.segment_size,
            streamed=order.streamed,
        )
        lane.seats.append(_Seat(row, reply))

    def _num_rows(self, language_model: LanguageModel) -> int:
        most = language_model.max_rows
        return most if self.max_rows is None else min(most, self.max_rows)

    def _leave(self, reply: Reply) -> None:
        """Count a reply that has ended."""
        self.statistics.num_replies += 1
        model = reply.order.language_model
        with self._changed:
            self._num_open[model] -= 1
            if not self._num_open[model]:
                del self._num_open[model]

    def _step(self, lane: _Lane) -> None:
        """Do one piece of a lane's round."""
        assert lane.round is not None
        begin = self._clock()
        try:
            next(lane.round)
        except StopIteration:
            lane.round, lane.in_round = None, []
            self._grace(lane)
        except Exception as error:
            self._fail(lane, error, lane.in_round)
        finally:
            lane.served += (self._clock() - begin) / _WEIGHTS[lane.priority]

    def _grace(self, lane: _Lane) -> None:
        """Wait a moment for quick rewards in workers, so that their rows do not miss a round."""
        end = time.monotonic() + _GRACE_SECONDS
        open_seats = [seat for seat in lane.seats if seat.row.inquiry is not None]
        woken = False
        while open_seats and time.monotonic() < end:
            with self._changed:
                if not self._woken:
                    self._changed.wait(_GRACE_SECONDS)
                woken, self._woken = woken or self._woken, False
            for seat in open_seats:
                self._settle(seat)
            open_seats = [seat for seat in open_seats if seat.row.inquiry is not None]
        if woken:  # it may have been for another lane
            self.wake()
        self._dismiss(lane)

    def _fail(self, lane: _Lane, error: Exception, seats: Sequence[_Seat]) -> None:
        """End the rows of a round that went wrong; the engine itself goes on."""
        _log.error("a round of %d rows failed: %s", len(seats), name_of(type(error)))
        for seat in seats:
            self.statistics.num_failures += 1
            seat.row.fail(_failure(error))
        lane.round, lane.in_round = None, []
        self._dismiss(lane)

    def _abandon(self, lane: _Lane, error: Exception) -> None:
        """End every row of a lane whose models cannot even be asked."""
        self._fail(lane, error, lane.seats)
        for reply in lane.waiting:
            self._leave(reply)
            reply.tell(_failure(error))
        lane.waiting.clear()

    def _dismiss(self, lane: _Lane) -> None:
        """Let the rows leave that have ended or that nobody waits for."""
        staying: list[_Seat] = []
        for seat in lane.seats:
            row = seat.row
            if not row.ended and not seat.reply.cancelled:
                staying.append(seat)
                continue
            self._leave(seat.reply)
            if row.inquiry is not None:
                row.inquiry.cancel()
            _release(lane.language_model.release, row.prefix)
            for scorer in row.scorers:
                _release(scorer.release, row.subject)
        lane.seats = staying

    def _end_all(self) -> None:
        for lane in self._lanes:
            if lane.round is not None:
                lane.round.close()
                lane.round, lane.in_round = None, []
            for seat in lane.seats:
                seat.row.fail(EngineClosedError("the engine was shut down"))
            self._dismiss(lane)
            for reply in lane.waiting:
                self._leave(reply)
                reply.tell(EngineClosedError("the engine was shut down"))
        self._lanes = []
        if self._hearing is not None:
            self._hearing.close()
            self._hearing = None
        with self._changed:
            questions, self._questions = [*self._asked, *self._questions], deque()
        self._asked = []
        for question in questions:
            question.fail(EngineClosedError("the engine was shut down"))


def _release(release: Callable[[_Of], None], of: _Of) -> None:
    """Have what was computed for a reply dropped; what fails there harms nobody's reply."""
    try:
        release(of)
    except Exception as error:
        name = getattr(release, "__qualname__", type(release).__name__)
        _log.error("%s failed: %s", name, name_of(type(error)))


def _unanswered(timeout: float | None) -> DeadlineExceededError:
    return DeadlineExceededError(f"the reward did not answer within `timeout`={timeout} s")


def _failure(error: Exception) -> EngineError:
    """Return what a caller is told of an error that may hold anybody's words."""
    return EngineError(f"the language model failed: {name_of(type(error))}")


_engines: dict[str, Engine] = {}
_engines_lock = threading.Lock()


def engine_for(device: str) -> Engine:
    """Return the engine that owns a device, the same for all who ask; begun where there is none."""
    with _engines_lock:
        engine = _engines.get(device)
        if engine is None or engine._closed:
            engine = _engines[device] = Engine(device)
        return engine


def shut_down() -> None:
    """End every engine; the next reply begins a new one."""
    with _engines_lock:
        engines = list(_engines.values())
        _engines.clear()
    for engine in engines:
        engine.close()


def _forget() -> None:
    """Forget, in a forked child, the engines whose threads stayed in the parent."""
    global _engines_lock
    _engines_lock = threading.Lock()
    _engines.clear()


atexit.register(shut_down)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
