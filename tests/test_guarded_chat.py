"""The guarded chat, turn by turn: routes, streams, checkpoints, and that every doubt is guarded."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import (
    BaseChatModel,
    FakeListChatModel,
    GenericFakeChatModel,
)
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableBranch, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, Send, interrupt

from langchain_stars import ChatStars, create_guarded_chat
from langchain_stars.rewards import as_reward
from langchain_stars.routing import Decision, RewardRouter
from langchain_stars.testing import ScriptedLanguageModel, TableReward

SENSITIVE = "Something sensitive?"
EVERYDAY = "Something nice?"


class Failing(BaseChatModel):
    """A chat model that says something and then fails."""

    says: list[str] = []
    error: Any = RuntimeError("a secret")

    @property
    def _llm_type(self) -> str:
        return "failing"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **_: Any) -> Any:
        raise self.error

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **_: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for text in self.says:
            yield ChatGenerationChunk(message=AIMessageChunk(content=text))
        raise self.error


class Native(BaseChatModel):
    """A chat model that tells which of its two ways it was asked."""

    @property
    def _llm_type(self) -> str:
        return "native"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **_: Any) -> Any:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("sync"))])

    async def _agenerate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **_: Any
    ) -> Any:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("async"))])


def by_words(messages: Sequence[BaseMessage]) -> Any:
    return "guarded" if "sensitive" in messages[-1].text else "fast"


def says(text: str) -> FakeListChatModel:
    return FakeListChatModel(responses=[text])


def chat_of(router: Any = by_words, **settings: Any) -> CompiledStateGraph[Any, Any, Any, Any]:
    models = {"guarded": says("carefully"), "fast": says("quickly")}
    return create_guarded_chat(router=router, **{**models, **settings}).compile()


def ask(graph: Any, text: str = EVERYDAY, **config: Any) -> dict[str, Any]:
    """Returns the state after a turn, the same whether it is awaited or not."""
    state = graph.invoke({"messages": [HumanMessage(text)]}, config or None)
    if graph.checkpointer is None:
        awaited = asyncio.run(graph.ainvoke({"messages": [HumanMessage(text)]}, config or None))
        assert [m.text for m in awaited["messages"]] == [m.text for m in state["messages"]]
        assert (awaited["route"], awaited["routing"]) == (state["route"], state["routing"])
    return state


def thread(name: str = "1") -> dict[str, Any]:
    return {"configurable": {"thread_id": name}}


def stars(**settings: Any) -> ChatStars:
    """Returns a guarded chat model whose language model says mostly what its reward forbids."""
    model = ScriptedLanguageModel(lambda completion: {"wicked ": 0.6, "good ": 0.39, "": 0.01})
    constraint = TableReward(lambda text: 0.0 if "wicked" in text else 1.0, name="kind") >= 0.5
    defaults = {"segment_size": 1, "max_tokens": 12, "seed": 3, "max_attempts": 50}
    return ChatStars(model=model, constraints=[constraint], **{**defaults, **settings})


# Routes


def test_a_turn_is_answered_by_the_model_of_its_route():
    graph = chat_of()
    sensitive, everyday = ask(graph, SENSITIVE), ask(graph, EVERYDAY)
    assert sensitive["messages"][-1].text == "carefully"
    assert everyday["messages"][-1].text == "quickly"
    assert (sensitive["route"], everyday["route"]) == ("guarded", "fast")
    for state in (sensitive, everyday):
        assert state["messages"][-1].response_metadata["stars"]["route"] == state["route"]
        assert len(state["messages"]) == 2


def test_the_state_says_why():
    decided = Decision(route="guarded", reason="sensitive", reward=0.25, floor=0.5)
    assert ask(chat_of(lambda messages: decided, sticky_turns=4))["routing"] == {
        "reason": "sensitive",
        "reward": 0.25,
        "floor": 0.5,
        "turns_left": 4,
    }


def raises(messages: Sequence[BaseMessage]) -> Any:
    raise RuntimeError("a secret")


async def araises(messages: Sequence[BaseMessage]) -> Any:
    raise RuntimeError("a secret")


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (raises, "error"),
        (araises, "error"),
        (lambda messages: "nonsense", "unknown"),
        (lambda messages: None, "unknown"),
        (lambda messages: True, "unknown"),
        (lambda messages: interrupt("?"), "error"),
        (RunnableLambda(raises), "error"),
        (RewardRouter(as_reward(lambda completions: [float("nan")]), floor=0.0), "error"),
    ],
)
def test_a_router_that_fails_or_answers_nonsense_is_guarded(
    router: Any, reason: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.DEBUG):
        state = ask(chat_of(router), "A private matter")
    assert state["messages"][-1].text == "carefully"
    assert state["routing"]["reason"] == reason
    assert "private" not in caplog.text
    assert "secret" not in caplog.text


def test_a_router_that_hangs_is_guarded():
    released = threading.Event()

    def hangs(messages: Sequence[BaseMessage]) -> Any:
        released.wait(30)
        return "fast"

    async def ahangs(messages: Sequence[BaseMessage]) -> Any:
        await asyncio.sleep(30)
        return "fast"

    for router in (hangs, ahangs):
        state = ask(chat_of(router, router_timeout=0.1))
        assert state["messages"][-1].text == "carefully"
        assert state["routing"]["reason"] == "timeout"
    released.set()


def test_an_empty_thread_is_guarded():
    model = GenericFakeChatModel(messages=iter([AIMessage("carefully"), AIMessage("carefully")]))
    graph = chat_of(lambda messages: "fast", guarded=model)
    state = graph.invoke({"messages": []})
    assert (state["route"], state["routing"]["reason"]) == ("guarded", "empty")


async def test_tasks_use_the_native_ways_of_models_and_routers():
    used = []

    class Router(RunnableLambda):  # type: ignore[type-arg]
        def __init__(self) -> None:
            super().__init__(self._sync, self._async)

        def _sync(self, messages: Any) -> Any:
            used.append("sync")
            return "fast"

        async def _async(self, messages: Any) -> Any:
            used.append("async")
            return "guarded"

    graph = chat_of(Router(), guarded=Native(), fast=Native())
    assert (await graph.ainvoke({"messages": [("user", "Hi")]}))["messages"][-1].text == "async"
    assert graph.invoke({"messages": [("user", "Hi")]})["messages"][-1].text == "sync"
    assert used == ["async", "sync"]


# From turn to turn


def test_a_thread_stays_guarded_for_some_turns_and_then_no_longer():
    graph = create_guarded_chat(guarded=says("c"), fast=says("q"), router=by_words, sticky_turns=2)
    app = graph.compile(checkpointer=InMemorySaver())
    seen = []
    for text in (EVERYDAY, SENSITIVE, EVERYDAY, SENSITIVE, EVERYDAY, EVERYDAY, EVERYDAY):
        state = ask(app, text, **thread())
        seen.append((state["route"], state["routing"]["reason"], state["routing"]["turns_left"]))
    assert seen == [
        ("fast", "named", 0),
        ("guarded", "named", 2),
        ("guarded", "sticky", 1),
        ("guarded", "named", 2),
        ("guarded", "sticky", 1),
        ("guarded", "sticky", 0),
        ("fast", "named", 0),
    ]
    assert ask(app, EVERYDAY, **thread("another"))["route"] == "fast"


def test_a_thread_need_not_stick():
    graph = create_guarded_chat(guarded=says("c"), fast=says("q"), router=by_words, sticky_turns=0)
    app = graph.compile(checkpointer=InMemorySaver())
    assert [ask(app, text, **thread())["route"] for text in (SENSITIVE, EVERYDAY)] == [
        "guarded",
        "fast",
    ]


def test_a_caller_cannot_say_how_a_thread_is_routed():
    graph = create_guarded_chat(guarded=says("c"), fast=says("q"), router=by_words)
    app = graph.compile(checkpointer=InMemorySaver())
    ask(app, SENSITIVE, **thread())
    known = {"reason": "safe", "reward": 1.0, "floor": 0.0, "turns_left": 0}
    state = app.invoke(
        {"messages": [HumanMessage(EVERYDAY)], "route": "fast", "routing": known}, thread()
    )
    assert (state["route"], state["routing"]["reason"]) == ("guarded", "sticky")


ROUTED = {"reason": "safe", "reward": 1.0, "floor": 0.0, "turns_left": 0}
SAYING: Any = {"messages": [("user", SENSITIVE)]}


@pytest.mark.parametrize(
    "command",
    [
        Command(update=SAYING, goto="fast"),
        Command(update={**SAYING, "route": "fast", "routing": ROUTED}, goto="fast"),
        Command(update={**SAYING, "routing": ROUTED, "seal": "0" * 64}, goto="fast"),
        Command(update={**SAYING, "seal": 1}, goto="fast"),
        Command(update=SAYING, goto=Send("fast", {**SAYING, "routing": ROUTED})),
        Command(update=SAYING, goto=Send("fast", {"messages": [HumanMessage(SENSITIVE)]})),
        Command(update=SAYING, goto=Send("fast", {"messages": [HumanMessage("Hi")], "seal": ""})),
        Command(update=SAYING, goto=Send("fast", {})),
        Command(update=SAYING, goto=["route", "fast"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("begun", [False, True])
async def test_nobody_but_the_router_sends_a_turn_to_the_fast_model(
    command: Command[Any], begun: bool
):
    asked: list[Any] = []

    def quick(messages: Any) -> AIMessage:
        asked.append(messages)
        return AIMessage("quickly")

    graph = create_guarded_chat(
        guarded=says("carefully"), fast=RunnableLambda(quick), router=by_words
    )
    app = graph.compile(checkpointer=InMemorySaver())
    for name in ("sync", "async"):
        if begun:
            app.invoke({"messages": [("user", EVERYDAY)]}, thread(name))
            assert len(asked) == 1
            asked.clear()
        if name == "sync":
            state = app.invoke(command, thread(name))
        else:
            state = await app.ainvoke(command, thread(name))
        assert asked == []
        assert state["messages"][-1].text == "carefully"
        assert state["route"] == "guarded"


@pytest.mark.parametrize(
    "change",
    [
        HumanMessage(SENSITIVE),
        HumanMessage(SENSITIVE, id="1"),
        HumanMessage(EVERYDAY, id="1", name=SENSITIVE),
        ChatMessage(EVERYDAY, id="1", role=SENSITIVE),
        AIMessage("", tool_calls=[{"name": "f", "args": {"q": SENSITIVE}, "id": "1"}]),
    ],
    ids=["another", "other text", "other name", "other role", "a tool call"],
)
def test_a_thread_that_is_changed_behind_the_router_is_routed_again(change: BaseMessage):
    def everywhere(messages: Sequence[BaseMessage]) -> Any:
        return "guarded" if "sensitive" in str(messages) else "fast"

    graph = create_guarded_chat(guarded=says("c"), fast=says("q"), router=everywhere)
    app = graph.compile(checkpointer=InMemorySaver(), interrupt_before=["fast"])
    app.invoke({"messages": [HumanMessage(EVERYDAY, id="1")]}, thread())
    assert app.get_state(thread()).next == ("fast",)
    state = app.invoke(Command(update={"messages": [change]}), thread())
    assert state["messages"][-1].text == "c"
    assert (state["route"], state["routing"]["turns_left"]) == ("guarded", 2)


def test_a_turn_taken_up_before_the_fast_model_is_routed_again_where_it_was_not_routed():
    saver, routed = InMemorySaver(), []

    def made(name: str, route: str) -> Any:
        def router(messages: Sequence[BaseMessage]) -> Any:
            routed.append(name)
            return route

        graph = create_guarded_chat(guarded=says("c"), fast=says("q"), router=router)
        return graph.compile(checkpointer=saver, interrupt_before=["fast"])

    app, stricter = made("app", "fast"), made("stricter", "guarded")
    for name in ("1", "2"):
        app.invoke({"messages": [("user", EVERYDAY)]}, thread(name))
    assert app.invoke(None, thread("1"))["messages"][-1].text == "q"
    assert routed == ["app", "app"]
    assert stricter.invoke(None, thread("2"))["messages"][-1].text == "c"
    assert routed == ["app", "app", "stricter"]


def test_the_seal_of_a_turn_does_not_outlive_it():
    graph = create_guarded_chat(guarded=says("c"), fast=says("q"), router=by_words)
    app = graph.compile(checkpointer=InMemorySaver())
    state = app.invoke({"messages": [("user", EVERYDAY)]}, thread())
    assert set(state) == {"messages", "route", "routing"}
    assert "seal" not in app.get_state(thread()).values


def test_the_whole_thread_is_routed_and_answered():
    threads = []

    def notes(messages: Sequence[BaseMessage]) -> Any:
        threads.append([message.text for message in messages])
        return "fast"

    graph = create_guarded_chat(guarded=says("c"), fast=says("q"), router=notes)
    app = graph.compile(checkpointer=InMemorySaver())
    ask(app, "one", **thread())
    ask(app, "two", **thread())
    assert threads == [["one"], ["one", "q", "two"]]


# A model that fails


def test_a_turn_that_the_fast_model_does_not_answer_is_guarded(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        state = ask(chat_of(fast=Failing()), "A private matter")
    assert [message.text for message in state["messages"]] == ["A private matter", "carefully"]
    assert (state["route"], state["routing"]["reason"]) == ("guarded", "failed")
    assert state["messages"][-1].response_metadata["stars"]["route"] == "guarded"
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text
    assert "private" not in caplog.text


def test_what_a_failing_fast_model_said_is_another_message_and_not_in_the_state():
    graph = chat_of(fast=Failing(says=["half a re"]))
    chunks = list(graph.stream({"messages": [("user", EVERYDAY)]}, stream_mode="messages"))
    by_id: dict[Any, str] = {}
    for chunk, _ in chunks:
        by_id[chunk.id] = by_id.get(chunk.id, "") + chunk.text
    assert list(by_id.values()) == ["half a re", "carefully"]
    assert "half" not in str(graph.invoke({"messages": [("user", EVERYDAY)]}))


def test_a_turn_never_falls_from_guarded_to_fast():
    asked = []
    graph = chat_of(guarded=Failing(), fast=RunnableLambda(lambda messages: asked.append(messages)))
    with pytest.raises(RuntimeError, match="a secret"):
        graph.invoke({"messages": [HumanMessage(SENSITIVE)]})
    with pytest.raises(RuntimeError, match="a secret"):
        asyncio.run(graph.ainvoke({"messages": [HumanMessage(SENSITIVE)]}))
    assert asked == []
    edges = {(edge.source, edge.target) for edge in graph.get_graph().edges}
    assert ("fast", "guarded") in edges
    assert ("guarded", "fast") not in edges


def test_a_cancelled_turn_is_not_answered_by_the_other_model():
    started, answered = threading.Event(), []

    async def waits(messages: Any) -> Any:
        started.set()
        await asyncio.sleep(30)

    def careful(messages: Any) -> AIMessage:
        answered.append(messages)
        return AIMessage("carefully")

    async def cancel() -> None:
        graph = chat_of(fast=RunnableLambda(lambda _: None, waits), guarded=RunnableLambda(careful))
        task = asyncio.create_task(graph.ainvoke({"messages": [("user", EVERYDAY)]}))
        while not started.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert answered == []


# What is not guarded is refused


def test_a_model_without_a_guard_is_refused_however_it_is_wrapped():
    guarded, bare = stars(), stars().unguarded()
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Be kind."), ("placeholder", "{messages}")]
    )
    for model in (
        bare,
        bare.bind(temperature=0.5),
        bare.with_config(tags=["tag"]),
        bare.with_retry(),
        prompt | bare,
        prompt | bare.bind(seed=1),
        guarded.with_fallbacks([bare]),
        bare.with_fallbacks([guarded]),
        RunnableBranch((lambda messages: len(messages) > 1, guarded), bare),
        guarded.configurable_alternatives(ConfigurableField("model"), other=bare),
    ):
        with pytest.raises(
            ValueError, match="`guarded` must have a guard, got a ChatStars without"
        ):
            chat_of(guarded=model)
    for model in (
        guarded.with_fallbacks([says("anything")]),
        says("anything") | RunnableLambda(lambda message: [message]) | guarded,
        guarded.configurable_alternatives(ConfigurableField("model"), other=says("anything")),
        guarded.configurable_alternatives(ConfigurableField("model"), other=lambda: bare),
    ):
        with pytest.raises(ValueError, match="`guarded` must have a guard whichever model answers"):
            chat_of(guarded=model)


def test_a_model_with_a_guard_is_taken_however_it_is_wrapped():
    guarded = stars()
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Be kind."), ("placeholder", "{messages}")]
    )
    for model in (
        guarded,
        guarded.bind(temperature=0.5),
        guarded.with_config(tags=["tag"]),
        guarded.with_retry(),
        RunnableLambda(lambda messages: {"messages": messages}) | prompt | guarded,
        guarded.with_fallbacks([stars(seed=4)]),
        guarded.configurable_alternatives(ConfigurableField("model"), other=stars(seed=4)),
    ):
        state = ask(chat_of(guarded=model), SENSITIVE)
        assert "wicked" not in state["messages"][-1].text
        assert state["messages"][-1].response_metadata["stars"]["guarded"] is True


def test_a_configuration_cannot_take_the_guard_away():
    model = stars().configurable_fields(constraints=ConfigurableField("constraints"))
    graph = chat_of(guarded=model)
    assert "wicked" not in graph.invoke({"messages": [("user", SENSITIVE)]})["messages"][-1].text
    without = {"configurable": {"constraints": []}}
    with pytest.raises(ValueError, match="`guarded` must have a guard"):
        graph.invoke({"messages": [("user", SENSITIVE)]}, without)
    with pytest.raises(ValueError, match="`guarded` must have a guard"):
        asyncio.run(graph.ainvoke({"messages": [("user", SENSITIVE)]}, without))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sticky_turns": -1}, "`sticky_turns` must be at least 0, got -1"),
        ({"router_timeout": 0}, "`router_timeout` must be above 0, got 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        chat_of(**settings)


# Streams


def chatty(messages: Sequence[BaseMessage]) -> Any:
    """A router that asks a chat model."""
    answer = says("MARKER").invoke(list(messages))
    return "guarded" if answer.text == "MARKER" and "sensitive" in messages[-1].text else "fast"


async def achatty(messages: Sequence[BaseMessage]) -> Any:
    await says("MARKER").ainvoke(list(messages))
    return by_words(messages)


@pytest.mark.parametrize(
    "router", [chatty, achatty, RunnableLambda(chatty), RunnableLambda(achatty)]
)
@pytest.mark.parametrize("text", [SENSITIVE, EVERYDAY])
async def test_nothing_that_a_router_says_is_streamed(router: Any, text: str):
    if isinstance(router, RunnableLambda) and not hasattr(router, "func"):
        router = RunnableLambda(chatty, achatty)
    graph = chat_of(router)
    thread = {"messages": [("user", text)]}
    modes: Any = ["messages", "updates", "values", "custom"]
    parts = list(graph.stream(thread, stream_mode=modes))
    parts += [part async for part in graph.astream(thread, stream_mode=modes)]
    texts = [part.text for mode, (part, _) in (p for p in parts if p[0] == "messages")]
    expected = "carefully" if text == SENSITIVE else "quickly"
    assert "".join(texts) == expected * 2
    assert "MARKER" not in str(parts)


async def test_a_stream_of_messages_is_the_answer_and_nothing_else():
    graph = chat_of(guarded=stars(), fast=stars().unguarded())
    for text in (SENSITIVE, EVERYDAY):
        thread = {"messages": [("user", text)]}
        answer = graph.invoke(thread)["messages"][-1].text
        parts = list(graph.stream(thread, stream_mode="messages"))
        aparts = [part async for part in graph.astream(thread, stream_mode="messages")]
        for streamed in (parts, aparts):
            assert "".join(chunk.text for chunk, _ in streamed) == answer
            assert len([chunk for chunk, _ in streamed if chunk.text]) > 1
            nodes = {metadata["langgraph_node"] for _, metadata in streamed}
            assert nodes == {"guarded" if text == SENSITIVE else "fast"}


async def test_segments_are_told_as_they_are_kept():
    told = []
    guarded = stars(on_segment=lambda segment, text: told.append(text))
    graph = chat_of(guarded=guarded.bind(temperature=1.0), fast=guarded.unguarded())
    for text in (SENSITIVE, EVERYDAY):
        thread: Any = {"messages": [("user", text)]}
        modes: Any = ["custom", "values"]
        parts = list(graph.stream(thread, stream_mode=modes))
        aparts = [part async for part in graph.astream(thread, stream_mode=modes)]
        for streamed in (parts, aparts):
            state = streamed[-1][1]
            segments = [part for mode, part in streamed if mode == "custom"]
            assert "".join(part["text"] for part in segments) == state["messages"][-1].text
            reported = state["messages"][-1].response_metadata["stars"]["segments"]
            assert [part["segment"]["attempts"] for part in segments] == [
                each["attempts"] for each in reported
            ]
            assert json.loads(json.dumps(segments)) == segments
        assert told[-len(segments) :] == [part["text"] for part in segments]


async def test_events_hold_the_answer_and_nothing_that_was_rejected():
    guarded = stars(max_tokens=30)
    graph = chat_of(guarded=guarded, fast=guarded.unguarded())
    events: list[Any] = []
    async for event in graph.astream_events({"messages": [("user", SENSITIVE)]}, version="v2"):
        events.append(event)
    streamed = "".join(
        event["data"]["chunk"].text for event in events if event["event"] == "on_chat_model_stream"
    )
    assert streamed
    assert "wicked" not in str(events)
    [last] = [
        event
        for event in events
        if event["name"] == "LangGraph" and event["event"] == "on_chain_end"
    ]
    message = last["data"]["output"]["messages"][-1]
    assert message.text == streamed
    assert message.response_metadata["stars"]["num_rejected_tokens"] > 0


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol")  # it is experimental
async def test_the_third_stream_protocol_shows_the_answer_and_nothing_else():
    guarded = stars()
    graph = chat_of(chatty, guarded=guarded, fast=guarded.unguarded())
    for text, node in ((SENSITIVE, "guarded"), (EVERYDAY, "fast")):
        stream: Any = await graph.astream_events({"messages": [("user", text)]}, version="v3")
        shown = [(message.node, await message.text) async for message in stream.messages]
        state = await stream.output()
        assert shown == [(node, state["messages"][-1].text)]
        assert state["route"] == node


# Checkpoints


def conversation() -> Any:
    guarded = stars()
    return create_guarded_chat(guarded=guarded, fast=guarded.unguarded(), router=by_words)


def check_conversation(states: list[dict[str, Any]]) -> None:
    assert [state["route"] for state in states] == ["fast", "guarded", "guarded"]
    assert [len(state["messages"]) for state in states] == [2, 4, 6]
    assert states[2]["routing"] == {
        "reason": "sticky",
        "reward": None,
        "floor": None,
        "turns_left": 1,
    }


TURNS = (EVERYDAY, SENSITIVE, EVERYDAY)


def test_a_thread_is_resumed_from_sqlite(tmp_path: Path):
    states = []
    for text in TURNS:
        with SqliteSaver.from_conn_string(str(tmp_path / "chat.db")) as saver:
            app = conversation().compile(checkpointer=saver)
            states.append(ask(app, text, **thread()))
    check_conversation(states)


async def test_a_thread_is_resumed_from_asynchronous_sqlite(tmp_path: Path):
    states = []
    for text in TURNS:
        async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "chat.db")) as saver:
            app = conversation().compile(checkpointer=saver)
            states.append(await app.ainvoke({"messages": [("user", text)]}, thread()))
    check_conversation(states)


async def test_a_thread_is_resumed_from_memory():
    saver = InMemorySaver()
    states = []
    for text in TURNS:
        app = conversation().compile(checkpointer=saver)
        states.append(await app.ainvoke({"messages": [("user", text)]}, thread()))
    check_conversation(states)


def test_nothing_that_was_rejected_is_in_a_checkpoint(tmp_path: Path):
    with SqliteSaver.from_conn_string(str(tmp_path / "chat.db")) as saver:
        app = conversation().compile(checkpointer=saver)
        state = ask(app, SENSITIVE, **thread())
    assert state["messages"][-1].response_metadata["stars"]["num_rejected_tokens"] > 0
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"good" in stored
    assert b"wicked" not in stored


def test_a_turn_that_was_interrupted_is_resumed_on_its_route():
    graph = conversation()
    app = graph.compile(checkpointer=InMemorySaver(), interrupt_before=["guarded"])
    app.invoke({"messages": [("user", SENSITIVE)]}, thread())
    snapshot = app.get_state(thread())
    assert snapshot.next == ("guarded",)
    assert snapshot.values["route"] == "guarded"
    state = app.invoke(None, thread())
    assert state["messages"][-1].response_metadata["stars"]["route"] == "guarded"
    assert "wicked" not in state["messages"][-1].text


def test_a_turn_whose_guarded_model_failed_is_resumed_guarded():
    replies: list[Any] = [RuntimeError("once"), AIMessage("carefully")]

    def flaky(messages: Any) -> Any:
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    graph = create_guarded_chat(
        guarded=RunnableLambda(flaky), fast=says("quickly"), router=by_words
    )
    app = graph.compile(checkpointer=InMemorySaver())
    with pytest.raises(RuntimeError, match="once"):
        app.invoke({"messages": [("user", SENSITIVE)]}, thread())
    assert app.invoke(None, thread())["messages"][-1].text == "carefully"


def test_the_state_is_json_but_for_the_messages():
    state = ask(conversation().compile(checkpointer=InMemorySaver()), SENSITIVE, **thread())
    messages = state.pop("messages")
    assert json.loads(json.dumps(state)) == state
    for message in messages:
        assert json.loads(json.dumps(message.response_metadata)) == message.response_metadata


def test_checkpoints_are_read_back_by_the_strict_serialiser(tmp_path: Path):
    """What `LANGGRAPH_STRICT_MSGPACK` would block, it blocks: nothing of ours is among it."""
    code = f"""
import logging, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
logging.basicConfig(level=logging.WARNING)
from test_guarded_chat import *
with SqliteSaver.from_conn_string({str(tmp_path / "chat.db")!r}) as saver:
    states = [ask(conversation().compile(checkpointer=saver), text, **thread()) for text in TURNS]
check_conversation(states)
assert all(isinstance(message, BaseMessage) for message in states[-1]["messages"])
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={"LANGGRAPH_STRICT_MSGPACK": "true", "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "msgpack" not in process.stderr.lower()
    assert "unregistered" not in process.stderr.lower()


# Drawing, and many at once


def test_the_graph_can_be_drawn_with_all_its_ways():
    graph = chat_of().get_graph()
    assert {(edge.source, edge.target) for edge in graph.edges} == {
        ("__start__", "route"),
        ("route", "guarded"),
        ("route", "fast"),
        ("fast", "route"),
        ("fast", "guarded"),
        ("fast", "__end__"),
        ("guarded", "__end__"),
    }
    assert "route -.-> guarded" in graph.draw_mermaid()


def test_the_graph_tells_its_schemas():
    graph = chat_of()
    assert set(graph.get_input_jsonschema()["properties"]) == {"messages"}
    assert set(graph.get_output_jsonschema()["properties"]) == {"messages", "route", "routing"}


async def test_many_turns_at_once_keep_their_routes():
    guarded = stars()
    graph = chat_of(guarded=guarded, fast=guarded.unguarded())
    texts = [SENSITIVE if index % 3 else EVERYDAY for index in range(30)]
    states = await graph.abatch([{"messages": [("user", text)]} for text in texts])
    for text, state in zip(texts, states, strict=True):
        assert state["route"] == ("guarded" if text == SENSITIVE else "fast")
        metadata = state["messages"][-1].response_metadata["stars"]
        assert metadata["guarded"] is (text == SENSITIVE)
        assert state["messages"][0].text == text


async def test_a_stream_that_is_left_early_gives_its_row_free():
    model = ScriptedLanguageModel(lambda completion: {"a": 1.0}, step_seconds=0.002)
    slow = ChatStars(model=model, reward=None, constraints=[], max_tokens=100_000)
    graph = chat_of(fast=slow)

    async def leave() -> AsyncIterator[Any]:
        async for chunk, _ in graph.astream(
            {"messages": [("user", EVERYDAY)]}, stream_mode="messages"
        ):
            return chunk
        raise AssertionError

    await asyncio.wait_for(leave(), 10)
    steps = -1
    for _ in range(100):
        await asyncio.sleep(0.05)
        if model.num_steps == steps:
            break
        steps = model.num_steps
    assert model.num_steps == steps < 50_000
