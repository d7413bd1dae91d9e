"""The guarded chat as a graph: sensitive turns are decoded under guard, the others fast.

Knows states, nodes and edges; nothing of rewards, segments or tokens. The ways lead one way: from
doubt, from a fast model that fails and from an earlier sensitive turn to the guarded model, and
never from there to the fast one.
"""

import hmac
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableConfig,
    RunnableLambda,
    RunnableSequence,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import (
    DynamicRunnable,
    RunnableConfigurableAlternatives,
)
from langchain_core.runnables.fallbacks import RunnableWithFallbacks
from langgraph.channels import EphemeralValue
from langgraph.config import get_stream_writer
from langgraph.constants import TAG_NOSTREAM
from langgraph.errors import GraphBubbleUp
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command
from typing_extensions import TypedDict

from langchain_stars.chat_models import ChatStars
from langchain_stars.decoder import Segment
from langchain_stars.rewards.base import name_of
from langchain_stars.routing import Decision, Reason, Route, Router, adecide, decide, safety_router

_log = logging.getLogger(__name__)

Node: TypeAlias = Literal["route", "guarded", "fast"]
"""Names of the nodes."""

AnsweringModel: TypeAlias = Runnable[LanguageModelInput, BaseMessage]
"""A chat model, or one with a prompt before it or with arguments bound to it."""


class Routing(TypedDict):
    """What is known of a thread's way, as JSON.

    Attributes:
        reason: Why the newest turn takes its route; see `langchain_stars.routing.Reason`.
        reward: The worst reward of the thread as the router judged it; None where it did not.
        floor: The reward that was asked; None where none was.
        turns_left: How many further turns are guarded, whatever the router says.
    """

    reason: Reason
    reward: float | None
    floor: float | None
    turns_left: int


class ChatState(MessagesState):
    """The thread, the route of its newest turn, and what is known of its way.

    Attributes:
        route: How the newest turn is answered.
        routing: Why, and for how many turns the thread stays guarded.
    """

    route: Route
    routing: Routing


class _SealedState(ChatState):
    """What the fast node is given.

    Attributes:
        seal: That the router let this very thread be answered fast; gone after the next step.
    """

    seal: Annotated[str, EphemeralValue]


def create_guarded_chat(
    *,
    guarded: AnsweringModel,
    fast: AnsweringModel,
    router: Router | None = None,
    sticky_turns: int = 2,
    router_timeout: float | None = 30.0,
) -> StateGraph[ChatState, None, MessagesState, ChatState]:
    """Return a graph that answers each turn by the route that `router` names.

    A turn is guarded when the router says so, when it fails, doubts or takes too long, and during
    the `sticky_turns` turns after one that was. A fast model that fails leaves its turn to the
    guarded one; text that it had streamed by then stays shown, under its own message id, and is
    not in the state. A guarded model that fails raises.

    The fast node answers only what the router sent it, unchanged, and leaves everything else to
    the router: a turn of somebody who may send commands to the graph (as clients of LangGraph's
    server may) and goes there himself, a thread that was changed on the way, and a turn that
    another process takes up between the two nodes, which cannot tell the difference.

    Stream it with `stream_mode="messages"` for the text of the replies as it is kept, and with
    `"custom"` for the segments of a `ChatStars`, each a dictionary of `segment` and `text`.
    The reply says its route in `response_metadata["stars"]["route"]`; the state says why in
    `routing`. Nothing that a router's own models say is streamed. The caller compiles, with the
    checkpointer of their choice; the state is plain JSON but for the messages.

    Args:
        guarded: Answers sensitive turns: a `ChatStars` with a guard. Another kind of model is
            taken at its word.
        fast: Answers the others: `guarded.unguarded()`, which shares its weights, or any model.
        router: Names the route of a thread; the bundled safety reward judges it if not given.
        sticky_turns: Turns, at least 0, that stay guarded after a guarded one.
        router_timeout: Seconds, above 0, that the router has; None is no limit. Its first call may
            have to load a reward.

    Raises:
        ValueError: `guarded` has no guard, or a setting is out of range.
    """
    if sticky_turns < 0:
        raise ValueError(f"`sticky_turns` must be at least 0, got {sticky_turns}")
    if router_timeout is not None and not router_timeout > 0:
        raise ValueError(f"`router_timeout` must be above 0, got {router_timeout}")
    _require_guard(guarded)
    guarded, fast = _telling(guarded), _telling(fast)
    chosen: Router = safety_router() if router is None else router
    key = os.urandom(32)

    def route(state: ChatState, config: RunnableConfig) -> Command[Route]:
        decision = decide(
            chosen, state["messages"], timeout=router_timeout, config=_unstreamed(config)
        )
        return _go(decision, state, sticky_turns, key)

    async def aroute(state: ChatState, config: RunnableConfig) -> Command[Route]:
        decision = await adecide(
            chosen, state["messages"], timeout=router_timeout, config=_unstreamed(config)
        )
        return _go(decision, state, sticky_turns, key)

    def answer_guarded(state: ChatState, config: RunnableConfig) -> dict[str, Any]:
        _require_guard(guarded, config)
        reply = guarded.invoke(state["messages"], config)
        return {"messages": [_routed(reply, "guarded")]}

    async def aanswer_guarded(state: ChatState, config: RunnableConfig) -> dict[str, Any]:
        _require_guard(guarded, config)
        reply = await guarded.ainvoke(state["messages"], config)
        return {"messages": [_routed(reply, "guarded")]}

    def answer_fast(state: _SealedState, config: RunnableConfig) -> Command[Any]:
        if not _is_sealed(state, key):
            return Command(goto="route")
        try:
            reply = fast.invoke(state["messages"], config)
        except GraphBubbleUp:
            raise
        except Exception as error:
            return _escalate(error, state)
        return Command(update={"messages": [_routed(reply, "fast")]}, goto=END)

    async def aanswer_fast(state: _SealedState, config: RunnableConfig) -> Command[Any]:
        if not _is_sealed(state, key):
            return Command(goto="route")
        try:
            reply = await fast.ainvoke(state["messages"], config)
        except GraphBubbleUp:
            raise
        except Exception as error:
            return _escalate(error, state)
        return Command(update={"messages": [_routed(reply, "fast")]}, goto=END)

    # Only messages come in: how a thread is routed is not for its caller to say.
    graph = StateGraph(ChatState, input_schema=MessagesState)
    graph.add_node("route", RunnableLambda(route, aroute), destinations=("guarded", "fast"))
    graph.add_node("guarded", RunnableLambda(answer_guarded, aanswer_guarded))
    graph.add_node(
        "fast",
        RunnableLambda(answer_fast, aanswer_fast),
        destinations=("route", "guarded", END),
        input_schema=_SealedState,
    )
    graph.add_edge(START, "route")
    graph.add_edge("guarded", END)
    return graph


def _go(decision: Decision, state: ChatState, sticky_turns: int, key: bytes) -> Command[Route]:
    """Take the route that was decided, or the guarded one where the thread still sticks to it."""
    left = state["routing"]["turns_left"] if "routing" in state else 0
    taken: Route = decision.route
    reason = decision.reason
    if taken == "guarded":
        left = sticky_turns
    elif left > 0:
        taken, reason, left = "guarded", "sticky", left - 1
    routing = Routing(reason=reason, reward=decision.reward, floor=decision.floor, turns_left=left)
    update: dict[str, Any] = {"route": taken, "routing": routing}
    if taken == "fast":
        update["seal"] = _seal(state["messages"], key)
    return Command(goto=taken, update=update)


def _seal(messages: Sequence[BaseMessage], key: bytes) -> str:
    """Return what nobody else can write of a thread, everything that its messages hold included."""
    thread = [message.model_dump(warnings=False) for message in messages]
    text = json.dumps(thread, sort_keys=True, default=repr)
    return hmac.new(key, text.encode(errors="surrogatepass"), "sha256").hexdigest()


def _is_sealed(state: _SealedState, key: bytes) -> bool:
    """Return whether the router sent this thread; what cannot even be read, it did not send."""
    try:
        return hmac.compare_digest(state["seal"], _seal(state["messages"], key))
    except Exception:  # a command may have put anything there
        return False


def _escalate(error: Exception, state: ChatState) -> Command[Any]:
    """Leave a turn that the fast model did not answer to the guarded one."""
    _log.warning("the fast model failed: %s", name_of(type(error)))
    routing: Routing = {**state["routing"], "reason": "failed"}
    return Command(goto="guarded", update={"route": "guarded", "routing": routing})


def _unstreamed(config: RunnableConfig) -> RunnableConfig:
    """Return a configuration under which nothing that a chat model says is streamed."""
    return {**config, "tags": [*config.get("tags", ()), TAG_NOSTREAM]}


def _routed(reply: BaseMessage, route: Route) -> BaseMessage:
    """Return a reply that says its route."""
    stars: Mapping[str, Any] = reply.response_metadata.get("stars") or {}
    metadata = {**reply.response_metadata, "stars": {**stars, "route": route}}
    return reply.model_copy(update={"response_metadata": metadata})


def _telling(model: Any) -> Any:
    """Return a model whose kept segments are written to the graph's `custom` stream too."""
    if isinstance(model, RunnableBindingBase):
        return model.model_copy(update={"bound": _telling(model.bound)})
    if not isinstance(model, ChatStars):
        return model
    own = model.on_segment

    def tell(segment: Segment, text: str) -> None:
        if own is not None:
            own(segment, text)
        get_stream_writer()({"segment": segment.as_dict(), "text": text})

    return model.model_copy(update={"on_segment": tell})


def _require_guard(model: Any, config: RunnableConfig | None = None) -> None:
    """Check that no chat model without a guard can answer in a model's place, as far as it tells.

    Where one of them is a `ChatStars`, all must be: a fallback of another kind would undo it.
    """
    models = _models(model, config)
    ours = [each for each in models if isinstance(each, ChatStars)]
    if any(not each.guarded for each in ours):
        raise ValueError(
            "`guarded` must have a guard, got a ChatStars without one; give it a `reward` or "
            "`constraints`"
        )
    others = [type(each).__name__ for each in models if not isinstance(each, ChatStars)]
    if ours and others:
        raise ValueError(
            f"`guarded` must have a guard whichever model answers, got {', '.join(others)} beside "
            "a ChatStars"
        )


def _models(model: Any, config: RunnableConfig | None) -> list[Any]:
    """Return the chat models that can answer in a runnable's place, and what may be one.

    Where a configuration chooses between models, these are all of them, or the one it chooses.
    """
    if isinstance(model, BaseChatModel) or not isinstance(model, Runnable):
        return [model]
    parts: list[Any] = []
    if isinstance(model, RunnableBindingBase):
        parts = [model.bound]
    elif isinstance(model, DynamicRunnable) and config is not None:
        parts = [model.prepare(config)[0]]
    elif isinstance(model, RunnableConfigurableAlternatives):
        parts = [model.default, *model.alternatives.values()]
    elif isinstance(model, DynamicRunnable):
        parts = [model.default]
    elif isinstance(model, RunnableWithFallbacks):
        parts = list(model.runnables)
    elif isinstance(model, RunnableSequence):
        parts = list(model.steps)
    elif isinstance(model, RunnableBranch):
        parts = [*(branch for _, branch in model.branches), model.default]
    return [each for part in parts for each in _models(part, config)]
