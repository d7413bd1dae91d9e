"""Plain functions as rewards, in the calling convention of TRL's reward functions.

Knows functions, chats and numbers; nothing of models. A function is called in a worker thread,
under a deadline, about one reply at a time.
"""

import asyncio
import copy
import inspect
import math
import numbers
import os
import threading
import traceback
import uuid
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import CodeType
from typing import Any

from langchain_stars.rewards.base import (
    Leaf,
    NamedRewardError,
    Raw,
    Scorer,
    ScoreRequest,
    name_of,
    within,
)
from langchain_stars.templates import text_of

_KEYWORDS = ("prompts", "completions", "completion_ids", "finished")


def as_reward(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    version: str | None = None,
    range: tuple[float, float] | None = None,
    target: float | None = None,
    beta: float | None = None,
    alpha: float | None = None,
    floor: float | None = None,
) -> "FunctionReward":
    """Wrap a function as a reward, so that it can be written with: `helpful + 0.5 * brief`.

    The function is called by keyword with four lists, one entry for each completion: `prompts`
    (each a list of messages), `completions` (each a list with one assistant message),
    `completion_ids` (each a list of the language model's tokens, empty where there are none) and
    `finished` (whether the reply ends there). One that lacks `**kwargs` is given those of them
    that it names. It returns one real number for each completion; it may be asynchronous.

    Where the thread ends in a message of the assistant, the completion begins with that.

    None, NaN and infinities reject their completion, and so do numbers out of `range`. Errors,
    a wrong number of rewards and what is no number reject all completions of the call.

    Args:
        function: The function, or any object that can be called.
        name: What reports call it; the name of the function if not given.
        version: Changes whenever the function would answer otherwise. Without one, nothing that
            it judged is ever taken from a cache. What has no name of its own (a lambda, a partial
            function, an instance or a method of one) needs a `name` beside it.
        range: Least and greatest value that it returns. With it a candidate can be rejected
            before a slower reward has answered.
        target: The reward of a good reply.
        beta: The softness of acceptance that suits its scale, at least 0.
        alpha: Where thresholds should start, from 0 (the prompt's reward) to 1 (`target`); 1 where
            the reward of the empty reply is none of the reply's.
        floor: The least reward of an acceptable reply.

    Raises:
        TypeError: It cannot be called, or not in this convention.
        ValueError: A number is out of its range, or `version` needs a `name`.
    """
    return FunctionReward(
        FunctionScorer(function, name=name, version=version),
        range=range,
        target=target,
        beta=beta,
        alpha=alpha,
        floor=floor,
    )


class FunctionReward(Leaf):
    """What a function returns, as a reward; made by `as_reward`.

    Attributes:
        scorer: Calls the function.
    """

    def __init__(
        self,
        scorer: "FunctionScorer",
        *,
        range: tuple[float, float] | None = None,
        target: float | None = None,
        beta: float | None = None,
        alpha: float | None = None,
        floor: float | None = None,
    ) -> None:
        low, high = (-math.inf, math.inf) if range is None else range
        if not low < high:
            raise ValueError(f"`range` must be two numbers in order, got {range}")
        for argument, value in (("target", target), ("beta", beta), ("floor", floor)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"`{argument}` must be finite, got {value}")
        if beta is not None and beta < 0:
            raise ValueError(f"`beta` must be at least 0, got {beta}")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1], got {alpha}")
        self.scorer = scorer
        self._function_scorer = scorer
        self._range = (float(low), float(high))
        self._target = target
        self._beta = beta
        self._alpha = alpha
        self._floor = floor

    @property
    def name(self) -> str:
        """The name of the function, or the one it was given."""
        return self._function_scorer.name

    def read(self, raw: Raw) -> float:
        """Return the number; NaN where it is out of the range that was promised."""
        (value,) = raw
        return within(value, self._range)

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value, as promised."""
        return self._range

    @property
    def identity(self) -> Mapping[str, Any]:
        """The function's, and its range."""
        return {"scorer": self.scorer.identity, "range": [_finite(end) for end in self._range]}

    @property
    def target(self) -> float | None:
        """The reward of a good reply, as given."""
        return self._target

    @property
    def beta(self) -> float | None:
        """The softness, as given."""
        return self._beta

    @property
    def alpha(self) -> float | None:
        """Where thresholds should start, as given."""
        return self._alpha

    @property
    def floor(self) -> float | None:
        """The least reward of an acceptable reply, as given."""
        return self._floor


class FunctionScorer(Scorer):
    """Calls a function in TRL's convention.

    Attributes:
        name: What reports call it.
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str | None = None, version: str | None = None
    ) -> None:
        if not callable(function):
            raise TypeError(f"`function` must be callable, got {type(function).__name__}")
        given = name if name is not None else getattr(function, "__name__", None)
        self.name = str(given or type(function).__name__)
        if not self.name.strip():
            raise ValueError("`name` must not be empty")
        if version is not None and name is None and not _has_name(function):
            raise ValueError(
                f"`name` must be given beside `version`: others may be called {self.name!r} too"
            )
        self._function = function
        self._version = version
        self._nonce = uuid.uuid4().hex
        self._keywords = _accepted(function, self.name)
        self._loop = _Loop()

    @property
    def identity(self) -> Mapping[str, Any]:
        """Names and version; without a version, an identity that no other object has."""
        identity: dict[str, Any] = {
            "kind": "function",
            "name": self.name,
            "function": _qualified(self._function),
        }
        if self._version is not None:
            return identity | {"version": self._version}
        return identity | {"versioned": False, "nonce": self._nonce}

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        """Call the function once for each request."""
        return [self._ask(request) for request in requests]

    def unload(self) -> None:
        """End the thread that ran asynchronous calls."""
        self._loop.close()

    def _ask(self, request: ScoreRequest) -> list[Raw]:
        candidates = request.candidates
        prompt = list(request.subject.chat)
        begun = ""
        if prompt and prompt[-1].get("role") == "assistant":  # the reply goes on from there
            begun = text_of(prompt.pop().get("content"))
        # Copies: what the function does to its arguments is nobody else's concern.
        arguments: dict[str, Any] = {
            "prompts": [copy.deepcopy(prompt) for _ in candidates],
            "completions": [
                [{"role": "assistant", "content": begun + candidate.text}]
                for candidate in candidates
            ],
            "completion_ids": [
                [] if begun else list(candidate.token_ids or ()) for candidate in candidates
            ],
            "finished": [candidate.finished for candidate in candidates],
        }
        failure = ""
        try:
            answer = self._function(**{key: arguments[key] for key in self._keywords})
            if inspect.isawaitable(answer):
                answer = self._loop.run(_awaited(answer))
            values = _values(answer)
        except Exception as error:
            failure = _describe(error, self._function)
        # Raised here, not there, so that it has no context that holds what was judged.
        if failure:
            raise NamedRewardError(failure, reward=self.name)
        if len(values) != len(candidates):
            raise NamedRewardError(
                f"returned {len(values)} rewards for {len(candidates)} completions",
                reward=self.name,
            )
        return [(value,) for value in values]


class _NotNumbers(TypeError):
    """What was returned is no list of numbers; says of which type it is."""


def _describe(error: Exception, function: Callable[..., Any]) -> str:
    """Return what went wrong and where, without the words that an error may carry."""
    if isinstance(error, _NotNumbers):
        return str(error)
    told = f"raised {name_of(type(error))}"
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return told
    # Of the function itself alone: what it runs may be named after what is judged.
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code is code]
    return f"{told} in line {lines[-1]} of {os.path.basename(code.co_filename)}" if lines else told


def _values(answer: Any) -> list[float]:
    if not isinstance(answer, (list, tuple)):
        if isinstance(answer, (str, bytes, Mapping)) or not hasattr(answer, "tolist"):
            raise _NotNumbers(f"returned {name_of(type(answer))}, not a list of numbers")
        answer = answer.tolist()  # an array or a tensor
        if not isinstance(answer, list):
            raise _NotNumbers("returned a single number, not a list of numbers")
    return [_value(value) for value in answer]


def _value(value: Any) -> float:
    """Return one reward; what is none (None, NaN, an infinity) is NaN and rejects."""
    if value is None:
        return math.nan
    if not isinstance(value, numbers.Real):
        if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
            raise _NotNumbers(f"returned a list with {name_of(type(value))} in it")
        if getattr(value, "ndim", 0) > 0:
            raise _NotNumbers("returned a list of arrays, not of numbers")
    number = float(value)
    return number if math.isfinite(number) else math.nan


def _has_name(function: Callable[..., Any]) -> bool:
    """Return whether a function is known by its name, and holds no object that decides for it."""
    owner = getattr(function, "__self__", None)
    return getattr(function, "__name__", "<lambda>") != "<lambda>" and (
        not inspect.ismethod(function) or isinstance(owner, type)
    )


def _qualified(function: Callable[..., Any]) -> str:
    """Return the module of a function, or of the class of an object, and its name there."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _accepted(function: Callable[..., Any], name: str) -> tuple[str, ...]:
    """Return the keywords that a function is called with."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C do not tell
        return _KEYWORDS
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        keywords: tuple[str, ...] = _KEYWORDS
    else:
        by_name = {
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        keywords = tuple(keyword for keyword in _KEYWORDS if keyword in by_name)
    wanted = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and (parameter.name not in keywords or parameter.kind is parameter.POSITIONAL_ONLY)
    ]
    if wanted:
        raise TypeError(
            f"reward {name!r} is called by keyword with {', '.join(_KEYWORDS)}; "
            f"it wants {', '.join(wanted)} as well: give it a default"
        )
    if "completions" not in keywords:
        raise TypeError(
            f"reward {name!r} is called by keyword with {', '.join(_KEYWORDS)}; "
            "it must accept `completions`, or `**kwargs`"
        )
    return keywords


async def _awaited(answer: Any) -> Any:
    return await answer


class _Loop:
    """An event loop in a thread of its own, begun when it is first needed.

    All calls of a function share it, so that a client which belongs to a loop can be kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        _loops.add(self)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end, from any thread but the loop's own."""
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_serve, args=(loop,), name="stars-reward", daemon=True
                ).start()
                self._loop, self._process = loop, os.getpid()
                weakref.finalize(self, _stop, loop, self._process).atexit = False
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """Cancel what runs, and end the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            _stop(loop, self._process)

    def renew(self) -> None:
        """Go on in a forked child, in which the thread is not and the lock may be held."""
        self._lock = threading.Lock()
        self._loop = None


_loops: "weakref.WeakSet[_Loop]" = weakref.WeakSet()


def _renew() -> None:
    for loop in list(_loops):
        loop.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _stop(loop: asyncio.AbstractEventLoop, process: int) -> None:
    if process == os.getpid() and not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
