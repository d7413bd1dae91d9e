"""The examples and the deployable graph, run as they stand."""

import asyncio
import builtins
import contextlib
import importlib.util
import io
import json
import os
import runpy
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from langchain_stars.engine import Engine
from langchain_stars.rewards import bundled, classifiers

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BUNDLED = (bundled.FOLDER / "rewards" / "config.json").is_file()
needs_bundled = pytest.mark.skipif(not BUNDLED, reason="the bundled weights are not there")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Returns a function that runs an example as a script, and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@needs_bundled
def test_a_chain_streams_what_its_chat_model_keeps(run: Any):
    reply, _, report = run("chain.py").partition("\n\n")
    assert reply.strip()
    summary, *segments = report.splitlines()
    attempts, count = (int(word) for word in summary.split() if word.isdigit())
    assert attempts >= count == len(segments) >= 1


@needs_bundled
def test_a_guarded_chat_goes_on_where_it_ended(run: Any, tmp_path: Path):
    pytest.importorskip("langgraph.checkpoint.sqlite")
    memory = str(tmp_path / "chat.db")
    first = run("guarded_chat.py", "--memory", memory, "Hello! How are you?")
    second = run("guarded_chat.py", "--memory", memory, "How can I hurt someone?")
    assert "[fast: safe]" in first
    assert "[guarded: sensitive]" in second
    assert first.endswith("2 messages in the thread\n")
    assert second.endswith("4 messages in the thread\n")


@needs_bundled
def test_composed_rewards_are_what_replies_are_steered_by(
    run: Any, monkeypatch: pytest.MonkeyPatch
):
    asked: set[str] = set()
    judge = Engine.judge

    def watched(engine: Engine, *arguments: Any, **keywords: Any) -> Any:
        asked.add(engine.name)
        return judge(engine, *arguments, **keywords)

    monkeypatch.setattr(Engine, "judge", watched)
    monkeypatch.setattr(classifiers, "_scorers", weakref.WeakValueDictionary())
    monkeypatch.setattr(classifiers, "_default_device", lambda: "cpu:0")
    lines = run("compose_rewards.py").splitlines()
    assert asked == {"cpu:0"}, "replies are judged where the rewards are"
    [header] = [line for line in lines if line.startswith("guard")]
    names = header.split()[2:]
    means = {}
    for line in lines[lines.index(header) + 1 :: 2]:
        *_, attempts = line[: len("guard".ljust(36)) + 8].split()
        values = dict(zip(names, map(float, line.split()[-len(names) :]), strict=True))
        means[line[:36].strip()] = (float(attempts), values)
    assert len(means) == 5
    assert all(attempts >= 1 for attempts, _ in list(means.values())[1:])
    assert means["positive"][1]["positive"] > means["none"][1]["positive"]


# The graph that is deployed


@pytest.fixture
def deployed() -> Any:
    """The module that langgraph.json names."""
    settings = json.loads((ROOT / "graphs" / "langgraph.json").read_text())
    [(name, graph)] = settings["graphs"].items()
    path, _, factory = graph["path"].partition(":")
    assert (ROOT / "graphs" / settings["dependencies"][0]).resolve() == ROOT
    assert (name, factory) == ("guarded_chat", "make_graph")
    spec = importlib.util.spec_from_file_location("deployed", ROOT / "graphs" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_bundled
def test_the_deployed_graph_answers_by_route(deployed: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STARS_MAX_TOKENS", "8")
    monkeypatch.setenv("STARS_DEVICE", "cpu")
    monkeypatch.setenv("STARS_CONSTRAINTS", "safety >= 0.1; helpfulness >= 0.01;")
    for floor, route in (("-1", "fast"), ("2", "guarded")):
        monkeypatch.setenv("STARS_ROUTER_FLOOR", floor)
        graph, again = (asyncio.run(deployed.make_graph()) for _ in range(2))
        assert graph is again, "it is made once, and not for every run"
        assert graph.checkpointer is None, "the server brings its own"
        state = asyncio.run(graph.ainvoke({"messages": [("user", "Hello!")]}))
        assert state["route"] == route
        assert state["messages"][-1].usage_metadata["output_tokens"] <= 8


@needs_bundled
async def test_the_deployed_graph_judges_the_system_message_too(
    deployed: Any, monkeypatch: pytest.MonkeyPatch
):
    """Whoever calls it writes that; letters that the router does not know show that it is read."""
    monkeypatch.setenv("STARS_MAX_TOKENS", "8")
    monkeypatch.setenv("STARS_ROUTER_FLOOR", "-1")
    graph = await deployed.make_graph()
    for system, reason in (("Be kind.", "safe"), ("Отвечай на всё.", "unreadable")):
        state = await graph.ainvoke({"messages": [("system", system), ("user", "Hello!")]})
        assert state["routing"]["reason"] == reason


@needs_bundled
async def test_the_deployed_graph_reads_no_file_on_the_event_loop(
    deployed: Any, monkeypatch: pytest.MonkeyPatch
):
    """The development server ends a run that does."""
    on_loop: list[str] = []

    def watched(name: str, function: Any) -> Any:
        def watch(*arguments: Any, **keywords: Any) -> Any:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                on_loop.append(f"{name} {arguments}")
            return function(*arguments, **keywords)

        return watch

    for name in ("scandir", "stat", "listdir", "getcwd"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    monkeypatch.setattr(io, "open", watched("open", io.open))
    monkeypatch.setattr(builtins, "open", watched("open", open))
    monkeypatch.setenv("STARS_MAX_TOKENS", "8")
    monkeypatch.setenv("STARS_MODEL", str(bundled.FOLDER / "language_model"))
    graph = await deployed.make_graph()
    for text in ("Hello!", "How can I hurt someone?"):
        async for _ in graph.astream({"messages": [("user", text)]}, stream_mode="messages"):
            pass
    assert on_loop == []


@needs_bundled
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("STARS_MAX_TOKENS", "many", "`STARS_MAX_TOKENS` cannot be understood, got 'many'"),
        ("STARS_ROUTER_FLOOR", "low", "`STARS_ROUTER_FLOOR` cannot be understood, got 'low'"),
        ("STARS_STICKY_TURNS", "-1", "`sticky_turns` must be at least 0, got -1"),
        ("STARS_CONSTRAINTS", "kindness >= 1", "the reward 'kindness' is none of safety"),
    ],
)
def test_a_variable_that_cannot_be_understood_is_named(
    deployed: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        asyncio.run(deployed.make_graph())


def test_every_variable_of_the_environment_is_documented(deployed: Any):
    source = Path(deployed.__file__).read_text()
    read = {
        f"STARS_{name.upper()}" for name in (*deployed._SETTINGS, "router_floor", "sticky_turns")
    }
    documented = {
        line.split(":")[0].strip()
        for line in (deployed.__doc__ or "").splitlines()
        if "STARS_" in line
    }
    assert documented == read
    assert source.count("_read(") == 4  # its definition, and one call for each kind of setting
