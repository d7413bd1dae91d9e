"""What makes a turn sensitive: routers, and what becomes of one that fails or doubts.

Knows messages, rewards and routes; nothing of graphs. A router asks reward models and calls no
chat model, so that nothing of its work can be streamed. Doubt is guarded: an error, a wait that
is too long, an answer that is no route, or a thread that cannot be judged all say so.
"""

import asyncio
import contextvars
import hashlib
import inspect
import json
import logging
import math
import os
import re
import threading
import unicodedata
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
)
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, set_config_context

from langchain_stars.engine import Engine, engine_for
from langchain_stars.rewards.algebra import Constraint
from langchain_stars.rewards.base import Chat, Reward, name_of

_log = logging.getLogger(__name__)

Route: TypeAlias = Literal["guarded", "fast"]
"""How a turn is answered: by guarded decoding, or without a guard."""

ROUTES: Final[tuple[Route, ...]] = ("guarded", "fast")

Reason: TypeAlias = Literal[
    "safe",
    "sensitive",
    "named",
    "sticky",
    "failed",
    "empty",
    "unreadable",
    "unknown",
    "timeout",
    "error",
]
"""Why a turn takes its route.

`safe` and `sensitive`: the thread was judged. `named`: a router said so and no more. `sticky`: an
earlier turn was guarded. `failed`: the fast model did not answer. The others are doubts: an
`empty` thread, an `unreadable` one (images, more text than is judged, letters that the reward does
not know), an answer that is no route (`unknown`), a `timeout`, an `error`.
"""

SAFETY_FLOOR: Final = 0.7
"""Reward of the bundled safety reward below which a turn is guarded.

Higher than the floor of replies: to guard an everyday turn costs time, to miss a sensitive one its
guard. What it notices, and what it guards in vain, `examples/evaluate_router.py` measures.
"""

_MAX_HUNG = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a router says of a thread.

    Attributes:
        route: The route.
        reason: Why.
        reward: The worst reward of the thread, in the reward's units; None where none was had.
        floor: The reward that was asked; None where none was.
    """

    route: Route
    reason: Reason = "named"
    reward: float | None = None
    floor: float | None = None


Answer: TypeAlias = Route | Decision
"""What a router returns; anything else is doubt."""

Router: TypeAlias = (
    Callable[[Sequence[BaseMessage]], Answer | Awaitable[Answer]]
    | Runnable[Sequence[BaseMessage], Answer]
)
"""Names the route of a thread: a function of its messages, plain or asynchronous, or a runnable."""


def safety_router(*, floor: float | None = None, **settings: Any) -> "RewardRouter":
    """Return the router that judges a thread with the bundled safety reward.

    That reward knows English only. A thread with a message that is not even in Latin letters is
    guarded without asking it; of other languages in Latin letters it does not know what it says.

    Args:
        floor: The reward below which a turn is guarded; the shipped one if not given.
        settings: What `RewardRouter` takes; `latin_only` is true if not given.
    """
    from langchain_stars.rewards import bundled

    reward = bundled.safety()
    return RewardRouter(
        reward,
        floor=SAFETY_FLOOR if floor is None else floor,
        **{"latin_only": True, **settings},
    )


class RewardRouter(Runnable[Sequence[BaseMessage], Answer]):
    """Guards a turn when a reward expects too little of a reply to it.

    The reward of the empty open reply says what a reply to the thread is expected to be worth.
    Asked are the last `num_turns` turns, as the conversation that they are, and of all turns every
    message by itself that somebody else than the assistant wrote (tool results too, and an
    assistant message that the reply would continue), so that nothing hides among harmless text.
    Each is judged as it is, and as it reads once invisible characters, look-alike letters and
    the like are undone. The worst of these rewards decides: once a message was sensitive, every
    later turn is guarded, for it can ask for the answer again without naming it.

    The system message that begins a thread is the application's own and is not judged, unless
    `trusts_system` is false: say so where callers write the whole thread.

    What was judged of a thread is not judged again at its next turn, as long as it is remembered:
    a number for each message, under a hash of it, of the thread's id and of the reward's identity.
    The id is the `thread_id` of the call's configuration, as a checkpointer wants it; so nobody's
    waiting time tells what others have said. A thread without one is judged anew each time, unless
    `partition` names those who may share.

    Attributes:
        reward: What is asked.
        floor: The reward below which a turn is guarded, in the reward's units.
        num_turns: Turns that are judged together, at least 1.
        max_characters: Most characters, at least 100, judged at once.
        piece_characters: Characters, at least 20, of the pieces in which longer messages are judged
            too, each overlapping the one before by half: a sentence of a long message is noticed
            that the message around it would hide.
        max_views: Most pieces of text judged at a turn, at least 1. A turn of a thread that needs
            more is guarded; what was judged of it is remembered, so that a long thread is not
            guarded for good. A message that needs more by itself is never judged.
        max_kept: Most messages, at least 0, that are remembered as judged, of all threads.
        partition: Name of those whose calls share what is remembered where they have no thread id;
            none do if it is empty.
        trusts_system: Whether the system message that begins a thread is left out.
        latin_only: Whether the reward reads Latin letters only: a thread is guarded without asking
            where most letters of a message, or of a piece of one, are others.
        timeout: Seconds, above 0, to wait for the reward; None is no limit.
        device: Device whose engine asks the reward; None is the one that its model is on.

    Args:
        reward: A reward, or a constraint such as `safety >= 0.6`, which brings the floor.
        floor: The floor; the reward's own if not given.
        num_turns: See above.
        max_characters: See above.
        piece_characters: See above.
        max_views: See above.
        max_kept: See above.
        partition: See above.
        trusts_system: See above.
        latin_only: See above.
        timeout: See above.
        device: See above.

    Raises:
        ValueError: A setting is out of range, or there is no floor.
    """

    def __init__(
        self,
        reward: Reward | Constraint,
        *,
        floor: float | None = None,
        num_turns: int = 3,
        max_characters: int = 2000,
        piece_characters: int = 300,
        max_views: int = 64,
        max_kept: int = 1 << 16,
        partition: str = "",
        trusts_system: bool = True,
        latin_only: bool = False,
        timeout: float | None = 5.0,
        device: str | None = None,
    ) -> None:
        if isinstance(reward, Constraint):
            if floor is not None:
                raise ValueError("`floor` is given twice: the constraint brings its own")
            reward, floor = reward.reward, reward.floor
        floor = reward.floor if floor is None else floor
        if floor is None:
            raise ValueError(f"`floor` must be given: the reward {reward.name} brings none")
        if not math.isfinite(floor):
            raise ValueError(f"`floor` must be finite, got {floor}")
        for name, value, least in (
            ("num_turns", num_turns, 1),
            ("max_characters", max_characters, 100),
            ("piece_characters", piece_characters, 20),
            ("max_views", max_views, 1),
            ("max_kept", max_kept, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"`timeout` must be above 0, got {timeout}")
        self.reward = reward
        self.floor = float(floor)
        self.num_turns = num_turns
        self.max_characters = max_characters
        self.piece_characters = piece_characters
        self.max_views = max_views
        self.max_kept = max_kept
        self.partition = partition
        self.trusts_system = trusts_system
        self.latin_only = latin_only
        self.timeout = timeout
        self.device = device
        self._kept: dict[bytes, float] = {}
        self._lock = threading.Lock()
        self._secret = os.urandom(32)  # the hashes cannot be made by anybody else

    def invoke(
        self,
        input: Sequence[BaseMessage],
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Decision:
        """Return the route of a thread, and why."""
        question = self._question(input, config)
        if isinstance(question, Decision):
            return question
        answers: Sequence[float | None] = []
        if question.chats:
            answers = self._engine().judge(self.reward, question.chats, timeout=self.timeout)
        return self._decide(question, answers)

    async def ainvoke(
        self,
        input: Sequence[BaseMessage],
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Decision:
        """Await the route of a thread, and why."""
        question = await asyncio.to_thread(self._question, input, config)
        if isinstance(question, Decision):
            return question
        answers: Sequence[float | None] = []
        if question.chats:
            engine = self._engine()
            answers = await engine.ajudge(self.reward, question.chats, timeout=self.timeout)
        return self._decide(question, answers)

    __call__ = invoke

    def load(self) -> None:
        """Load the reward now, so that the first turn need not wait for it."""
        self.reward.load()

    def _engine(self) -> Engine:
        devices = [getattr(leaf.scorer, "device", None) for leaf in self.reward.leaves]
        return engine_for(self.device or next(filter(None, devices), "cpu"))

    def _question(
        self, messages: Sequence[BaseMessage], config: RunnableConfig | None
    ) -> "_Question | Decision":
        """Return what is to be asked about a thread, or the decision where nothing can be."""
        doubt = Decision(route="guarded", reason="unreadable", floor=self.floor)
        try:
            units = _units(messages, num_turns=self.num_turns, trusts_system=self.trusts_system)
        except UnreadableError:
            return doubt
        if not units:
            return Decision(route="guarded", reason="empty", floor=self.floor)
        scope = self._scope(config)
        question = _Question()
        unknown: list[tuple[bytes, _Unit]] = []
        for unit in reversed(units):
            key = unit.key(self._secret, scope) if scope else b""
            value = self._recall(key)
            if value is None:
                unknown.append((key, unit))
            else:
                question.known.append(value)
        # Checked first, for to undo the disguises of a long text takes seconds.
        most = room = _most_characters(self.max_views, self.max_characters)
        if not scope and sum(unit.num_own for _, unit in unknown) > most:
            return doubt
        # The newest first, but for the conversation: what there is no room for is judged later.
        unknown.sort(key=lambda each: not each[1].is_conversation)
        places: dict[tuple[_Part, ...], int] = {}
        for key, unit in unknown:
            fits = unit.num_own <= room and unit.num_characters <= most
            views = unit.views(self.max_characters, self.piece_characters) if fits else []
            if not fits or len(places) + len(set(views) - set(places)) > self.max_views:
                if not scope:
                    return doubt
                question.whole = False
                continue
            room -= unit.num_own
            if self.latin_only and any(
                len(view) == 1 and _is_foreign(view[0][1]) for view in views
            ):
                return doubt
            of_unit = [places.setdefault(view, len(places)) for view in views]
            question.asked.append((key, of_unit))
        question.chats = [_as_chat(view) for view in places]
        return question

    def _scope(self, config: RunnableConfig | None) -> bytes:
        """Return what must agree for a value to be used again; nothing where none may be."""
        thread = (ensure_config(config).get("configurable") or {}).get("thread_id") or ""
        if not (thread or self.partition) or not self.max_kept or not self.reward.versioned:
            return b""
        settings = (self.max_characters, self.piece_characters, self.latin_only)
        named = (str(thread), self.partition, self.reward.fingerprint, settings)
        return json.dumps(named).encode()

    def _recall(self, key: bytes) -> float | None:
        with self._lock:
            value = self._kept.pop(key, None)
            if value is not None:
                self._kept[key] = value  # the last to be forgotten
            return value

    def _keep(self, values: Iterable[tuple[bytes, float]]) -> None:
        with self._lock:
            self._kept.update((key, value) for key, value in values if key)
            while len(self._kept) > self.max_kept:
                del self._kept[next(iter(self._kept))]

    def _decide(self, question: "_Question", answers: Sequence[float | None]) -> Decision:
        judged = [
            (key, [answers[place] for place in places]) for key, places in question.asked if places
        ]
        rewards = [(key, _least(values)) for key, values in judged]
        fresh = [(key, reward) for key, reward in rewards if reward is not None]
        self._keep(fresh)
        if len(fresh) < len(rewards):
            return Decision(route="guarded", reason="error", floor=self.floor)
        worst = min([*question.known, *(reward for _, reward in fresh)], default=math.inf)
        if worst < self.floor:
            return Decision(route="guarded", reason="sensitive", reward=worst, floor=self.floor)
        if not question.whole:
            return Decision(route="guarded", reason="unreadable", floor=self.floor)
        return Decision(route="fast", reason="safe", reward=worst, floor=self.floor)


@dataclass(slots=True)
class _Question:
    """What a reward is asked about a thread.

    Attributes:
        known: What it said at earlier turns.
        chats: What it is asked now.
        asked: For each unit that they show, its key and their places among `chats`.
        whole: Whether nothing is left.
    """

    known: list[float] = field(default_factory=list)
    chats: list[Chat] = field(default_factory=list)
    asked: list[tuple[bytes, list[int]]] = field(default_factory=list)
    whole: bool = True


def _least(values: Sequence[float | None]) -> float | None:
    """Return the least of some values; None where one of them is missing."""
    present = [value for value in values if value is not None]
    return min(present) if len(present) == len(values) else None


# Asking a router


def decide(
    router: Router,
    messages: Sequence[BaseMessage],
    *,
    timeout: float | None = None,
    config: RunnableConfig | None = None,
) -> Decision:
    """Return what a router says of a thread; where it fails or doubts, that it is guarded.

    Args:
        router: The router; one that hangs is abandoned in its thread, and where too many hang,
            none is asked any more.
        messages: The thread.
        timeout: Seconds, above 0, that it has; None is no limit.
        config: What the models that it calls inherit.
    """
    if not messages:
        return Decision(route="guarded", reason="empty")
    try:
        call = _Call(router, messages, config)
        try:
            return _checked(call.answer.result(timeout))
        finally:
            call.abandon()
    except Exception as error:
        return _doubt(error)


async def adecide(
    router: Router,
    messages: Sequence[BaseMessage],
    *,
    timeout: float | None = None,
    config: RunnableConfig | None = None,
) -> Decision:
    """Await what `decide` returns; an asynchronous router runs on this event loop."""
    if not messages:
        return Decision(route="guarded", reason="empty")
    asked = _acall(router, messages, config)
    with set_config_context(config or {}) as context:
        task = asyncio.get_running_loop().create_task(asked, context=context)
        try:
            # A router may refuse to be cancelled: it is not waited for, even so.
            await asyncio.wait({task}, timeout=timeout)
            if not task.done():
                raise TimeoutError
            if task.cancelled():
                raise RuntimeError
            return _checked(task.result())
        except Exception as error:
            return _doubt(error)
        finally:
            task.cancel()
            task.add_done_callback(_retrieve)


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Look at what became of an abandoned router, so that nobody is told of it with its words."""
    if not task.cancelled():
        task.exception()


async def _acall(
    router: Router, messages: Sequence[BaseMessage], config: RunnableConfig | None
) -> Any:
    if isinstance(router, Runnable):
        return await router.ainvoke(list(messages), config)
    if _is_async(router):
        return await router(list(messages))  # type: ignore[misc]
    call = _Call(router, messages, config, awaits=False)
    try:
        answer = await asyncio.wrap_future(call.answer)
    finally:
        call.abandon()
    return await answer if inspect.isawaitable(answer) else answer


def _is_async(router: Any) -> bool:
    call = type(router).__call__
    return inspect.iscoroutinefunction(router) or inspect.iscoroutinefunction(call)


class _Call:
    """Asks a router in a thread of its own, which ends with it."""

    _lock: Final = threading.Lock()
    _num_hung = 0

    def __init__(
        self,
        router: Router,
        messages: Sequence[BaseMessage],
        config: RunnableConfig | None,
        *,
        awaits: bool = True,
    ) -> None:
        if _Call._num_hung >= _MAX_HUNG:
            raise RuntimeError(f"{_Call._num_hung} routers hang; no further one is asked")
        self.answer: Future[Any] = Future()
        self._router = router
        self._messages = list(messages)
        self._config = config
        self._awaits = awaits
        self._hangs = False
        context = contextvars.copy_context()
        threading.Thread(
            target=context.run, args=(self._run,), name="stars-router", daemon=True
        ).start()

    def _run(self) -> None:
        self.answer.set_running_or_notify_cancel()
        try:
            with set_config_context(self._config or {}) as context:
                answer = context.run(self._ask)
        except BaseException as error:  # whatever a router raises, the thread must tell
            self._end(None, _Failure(type(error)))
        else:
            self._end(answer, None)

    def _ask(self) -> Any:
        if isinstance(self._router, Runnable):
            return self._router.invoke(self._messages, self._config)
        answer = self._router(self._messages)
        if self._awaits and inspect.isawaitable(answer):
            return asyncio.run(_awaited(answer))
        return answer

    def _end(self, answer: Any, error: Exception | None) -> None:
        with _Call._lock:
            if self._hangs:
                _Call._num_hung -= 1
            if error is not None:
                self.answer.set_exception(error)
            else:
                self.answer.set_result(answer)

    def abandon(self) -> None:
        """Stop waiting for the answer."""
        with _Call._lock:
            if not self.answer.done() and not self._hangs:
                self._hangs = True
                _Call._num_hung += 1


class _Failure(Exception):
    """What a router raised in its thread; the error itself may be none that a future can hold."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind
        super().__init__(name_of(kind))


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _checked(answer: Any) -> Decision:
    """Return a decision of plain words and numbers; an answer that is no route is doubt."""
    said = answer if isinstance(answer, Decision) else Decision(route=answer)
    for route in ROUTES:
        for reason in get_args(Reason):
            # What is kept is never the router's own object: it may be text of users.
            if _is_word(said.route, route) and _is_word(said.reason, reason):
                numbers = {"reward": _number(said.reward), "floor": _number(said.floor)}
                return Decision(route=route, reason=reason, **numbers)
    _log.warning("the router answered %s, which is no route", name_of(type(answer)))
    return Decision(route="guarded", reason="unknown")


def _is_word(said: Any, word: str) -> bool:
    return isinstance(said, str) and said == word


def _number(said: Any) -> float | None:
    """Return a number that is finite, whatever holds it; raise where there is none."""
    if said is None:
        return None
    if isinstance(said, (str, bytes)) or not math.isfinite(number := float(said)):
        raise ValueError(f"a router answered {name_of(type(said))} where a number belongs")
    return number


def _doubt(error: Exception) -> Decision:
    kind = error.kind if isinstance(error, _Failure) else type(error)
    _log.warning("the router failed: %s", name_of(kind))
    reason: Reason = "timeout" if issubclass(kind, TimeoutError) else "error"
    return Decision(route="guarded", reason=reason)


# What is judged of a thread


_Part: TypeAlias = tuple[str, str]
"""Role and text of a message."""


class UnreadableError(ValueError):
    """A thread holds what cannot be judged; says of which type or how much, and no more."""


def _most_characters(max_views: int, max_characters: int) -> int:
    """Return how many characters some chats show, at most: pieces overlap by half."""
    return (max_views + 1) * max_characters // 2


def _as_chat(parts: Iterable[_Part]) -> Chat:
    return [{"role": role, "content": text} for role, text in parts]


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is judged as one: a message, the messages of a turn, or the end of a conversation.

    Attributes:
        parts: Role and text of its messages.
        is_conversation: Whether roles are shown; else it is the user's text.
    """

    parts: tuple[_Part, ...]
    is_conversation: bool = False

    @property
    def num_characters(self) -> int:
        """Characters of its messages."""
        return sum(len(text) for _, text in self.parts)

    @property
    def num_own(self) -> int:
        """Characters that no other unit has."""
        if self.is_conversation:
            return sum(len(text) for role, text in self.parts if role != "user")
        return len(self.parts[0][1]) if len(self.parts) == 1 else 0

    def key(self, secret: bytes, scope: bytes) -> bytes:
        """Return a hash of it, within a scope."""
        text = json.dumps((self.is_conversation, self.parts)).encode()
        return hashlib.blake2b(
            len(scope).to_bytes(8, "big") + scope + text, key=secret, digest_size=20
        ).digest()

    def views(self, max_characters: int, piece_characters: int) -> list[tuple[_Part, ...]]:
        """Return the chats that show it, each to be judged with an empty reply.

        It is shown as it is, as it reads, and with what it hides.

        Args:
            max_characters: Most characters of a chat; a text that is longer is shown in pieces.
            piece_characters: Characters of pieces in which texts that are longer are shown too.
        """
        chats: dict[tuple[_Part, ...], None] = {}
        for plain in (_as_it_is, _as_it_reads, _with_what_it_hides):
            shown = [(role, plain(text)) for role, text in self.parts]
            if self.is_conversation:
                chats.update(dict.fromkeys(_last(_merged(shown), max_characters)))
                continue
            text = "\n\n".join(text for _, text in shown).strip()
            for length in (max_characters, piece_characters):
                for piece in _pieces(text, length):
                    chats[(("user", piece),)] = None
        return list(chats)


def _units(
    messages: Sequence[BaseMessage], *, num_turns: int, trusts_system: bool
) -> "list[_Unit]":
    """Return what is judged of a thread, each once: the conversation, then from its beginning on.

    Args:
        messages: The thread.
        num_turns: Turns from the end that are shown together, at least 1. A turn begins at a human
            message that does not follow another.
        trusts_system: Whether the system message that begins the thread is left out.

    Raises:
        UnreadableError: A message holds something that is not text.
    """
    turns = _turns(messages, trusts_system=trusts_system)
    units: dict[_Unit, None] = {}
    conversation = tuple(part for turn in turns[-num_turns:] for part in turn)
    if len(conversation) > 1:
        units[_Unit(conversation, is_conversation=True)] = None
    for turn in turns:
        asked = tuple(part for part in turn if part[0] == "user")
        units.update((_Unit((part,)), None) for part in asked)
        if len(asked) > 1:
            units[_Unit(asked)] = None
    return list(units)


def _turns(messages: Sequence[BaseMessage], *, trusts_system: bool) -> list[list[_Part]]:
    """Return role and text of the messages, by turns; whatever may be anybody's is the user's."""
    kept = [message for message in messages if not isinstance(message, RemoveMessage)]
    begun = bool(kept) and isinstance(kept[0], SystemMessage)
    if begun and trusts_system:
        del kept[0]
        begun = False
    first = next(
        (i for i, message in enumerate(kept) if i >= begun and not _is_reply(message)), len(kept)
    )
    last = next(
        (len(kept) - i for i, message in enumerate(reversed(kept)) if not _is_reply(message)), 0
    )
    turns: list[list[_Part]] = []
    for place, message in enumerate(kept):
        follows = place > 0 and isinstance(kept[place - 1], HumanMessage)
        if not turns or (isinstance(message, HumanMessage) and not follows and place > first):
            turns.append([])
        # What is said before the first question, or would be continued, a caller may have made up.
        replied = _is_reply(message) and first < place < last
        text = _text(message)
        if message.name and not replied:  # which some chat templates write down
            text = f"{message.name}\n\n{text}"
        if text.strip():
            turns[-1].append(("assistant" if replied else "user", text))
    return turns


def _is_reply(message: BaseMessage) -> bool:
    return isinstance(message, AIMessage) or (
        isinstance(message, ChatMessage) and message.role in ("assistant", "ai")
    )


_IN_WORDS = ("text", "refusal", "reasoning", "thinking")


def _text(message: BaseMessage) -> str:
    """Return everything that a message says in words, the arguments of tool calls included."""
    parts: list[str] = []
    blocks = [message.content] if isinstance(message.content, str) else message.content
    for block in blocks:
        if isinstance(block, str):
            parts.append(block)
        elif block.get("type") in _IN_WORDS:
            parts += [block[key] for key in _IN_WORDS if isinstance(block.get(key), str)]
        elif not (_is_reply(message) and block.get("type") in ("tool_call", "tool_use")):
            raise UnreadableError(f"a {message.type} message holds a block that is not text")
    if isinstance(message, AIMessage):
        parts += [json.dumps(call["args"], ensure_ascii=False) for call in message.tool_calls]
    return "\n\n".join(parts)


def _merged(parts: Iterable[_Part]) -> list[_Part]:
    """Join neighbours of one role, as many chat templates want them."""
    merged: list[_Part] = []
    for role, text in parts:
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n\n{text}")
        else:
            merged.append((role, text))
    return merged


def _last(parts: list[_Part], max_characters: int) -> list[tuple[_Part, ...]]:
    """Return the end of a conversation as one chat, from a user's message on; none if it is one."""
    kept: list[_Part] = []
    room = max_characters
    for role, text in reversed(parts):
        if room <= 0:
            break
        kept.append((role, text[-room:]))
        room -= len(text)
    while kept and kept[-1][0] != "user":
        kept.pop()
    return [tuple(reversed(kept))] if len(kept) > 1 else []


def _pieces(text: str, length: int) -> list[str]:
    """Return a text in pieces of which each overlaps the one before by half."""
    if not text:
        return []
    step = length // 2
    return [
        text[begin : begin + length] for begin in range(0, max(1, len(text) - length + step), step)
    ]


def _is_foreign(text: str) -> bool:
    """Return whether most letters are not Latin, however Latin ones are written."""
    letters = [char for char in unicodedata.normalize("NFKC", text) if char.isalpha()]
    num_latin = sum(char < "\u0250" or "\u1e00" <= char <= "\u1eff" for char in letters)
    return len(letters) > 2 * num_latin


# How a text reads

_TAGS = range(0xE0020, 0xE007F)
_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]+")
_OVERLAYS = re.compile(
    "[\u0334-\u0338\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
)
_FILLERS = dict.fromkeys([0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0x1D159])
_MARKS = re.compile("[\u0300-\u036f]+")
_LATIN = re.compile("[A-Za-z]")
_WORDS = re.compile("[\\w\u0300-\u036f]+")
# One digit between letters shows that digits stand for letters; then they do so everywhere.
_DIGIT_IN_WORD = re.compile("[A-Za-z][013457@$][A-Za-z]")
_WORDS_WITH_DIGITS = re.compile("[013457@$A-Za-z]*[A-Za-z][013457@$A-Za-z]*")
_LETTERS_OF_DIGITS = str.maketrans("013457@$", "oieastas")
_SPACED = re.compile(r"\b(?:[^\W\d_][ .\-_*|/]){3,}[^\W\d_]\b")
_SEPARATORS = re.compile(r"[ .\-_*|/]")
_BLANKS = re.compile(r"[^\S\n]{3,}")
_LINES = re.compile(r"\n{3,}")

# Letters beside the Latin ones that they look like; what compatibility forms (NFKC) undo is left out.
_LOOK_ALIKES = """
аa вb еe ѕs іi јj кk мm нh оo рp сc тt уy хx ԁd ԛq ԝw һh ӏl АA ВB СC ЕE НH ІI ЈJ КK МM ОO РP ЅS ТT ХX УY
αa βb γy εe ιi κk νv οo ρp τt υu χx ωw ηn ΑA ΒB ΕE ΖZ ΗH ΙI ΚK ΜM ΝN ΟO ΡP ΤT ΥY ΧX
ɑa ɡg ıi ʙb ᴄc ᴅd ᴇe ɢg ʜh ɪi ᴊj ᴋk ʟl ᴍm ɴn ᴏo ᴘp ʀr ꜱs ᴛt ᴜu ᴠv ᴡw ʏy ᴢz
"""
_LATIN_OF = {ord(pair[0]): pair[1] for pair in _LOOK_ALIKES.split()}
# Letters in circles and squares, and those that flags are made of.
_LATIN_OF_SYMBOLS = {
    start + index: chr(ord("a") + index)
    for start in (0x1F150, 0x1F170, 0x1F1E6)
    for index in range(26)
}


def _as_it_is(text: str) -> str:
    return text


def _as_it_reads(text: str) -> str:
    """Return a text as a reader sees it: plain letters, without what is invisible."""
    return _normalised(_SELECTORS.sub("", text))


def _with_what_it_hides(text: str) -> str:
    """Return a text with the messages written out that invisible characters spell."""
    spelled = "".join(chr(ord(char) - 0xE0000) if ord(char) in _TAGS else char for char in text)
    return _normalised(_SELECTORS.sub(_spelled, spelled))


def _spelled(match: "re.Match[str]") -> str:
    """Return the text whose bytes are written as variation selectors."""
    codes = [ord(char) for char in match.group()]
    if len(codes) < 2:
        return ""
    values = bytes(code - 0xFE00 if code < 0xFE10 else code - 0xE0100 + 16 for code in codes)
    return "".join(char for char in values.decode(errors="ignore") if char.isprintable())


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.replace("\r\n", "\n"))
    text = "".join(
        char
        for char in text
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cn", "Co", "Cs")
    )
    text = _OVERLAYS.sub("", text.translate(_FILLERS))
    text = text.translate(_LATIN_OF_SYMBOLS)
    if _LATIN.search(text):
        text = _WORDS.sub(_latin, text)
    if _DIGIT_IN_WORD.search(text):
        text = _WORDS_WITH_DIGITS.sub(
            lambda match: match.group().translate(_LETTERS_OF_DIGITS), text
        )
    text = _SPACED.sub(lambda match: _SEPARATORS.sub("", match.group()), text)
    return _LINES.sub("\n\n", _BLANKS.sub(" ", text))


def _latin(match: "re.Match[str]") -> str:
    """Return a word in plain Latin letters where it can be read as such, else the word."""
    word = match.group()
    parts = unicodedata.normalize("NFD", word)
    bare = _MARKS.sub("", parts)
    if len(_MARKS.findall(parts)) > max(2, len(bare) / 2):  # no language marks that many
        word = bare
    latin = word.translate(_LATIN_OF)
    return latin if latin.isascii() else word
