"""One thread, many callers: rounds are shared, replies are not."""

import asyncio
import gc
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_decoder_law import policy, script

from langchain_stars.acceptance import Acceptance, Constant
from langchain_stars.decoder import Policy, Report
from langchain_stars.engine import (
    DeadlineExceededError,
    Engine,
    EngineClosedError,
    EngineError,
    Order,
    QueueFullError,
    engine_for,
    shut_down,
)
from langchain_stars.language_models.base import Drafting
from langchain_stars.rewards.callables import as_reward
from langchain_stars.rewards.classifiers import SequenceClassifier, SequenceReward
from langchain_stars.testing import ScriptedLanguageModel, TableReward


@pytest.fixture
def engine() -> Iterator[Engine]:
    an_engine = Engine("test")
    yield an_engine
    an_engine.close()


def order(model: ScriptedLanguageModel, a_policy: Policy | None = None, **settings: Any) -> Order:
    chat = settings.pop("chat", [{"role": "user", "content": "hi"}])
    return Order(
        language_model=model,
        chat=chat,
        prompt_ids=model.encode(chat),
        policy=a_policy,
        **{"max_tokens": 5, "seed": 0, "segment_size": 2, **settings},
    )


def text_of(engine: Engine, an_order: Order) -> str:
    return "".join(delta.text for delta in engine.reply(an_order))


async def atext_of(engine: Engine, an_order: Order) -> str:
    return "".join([delta.text async for delta in engine.areply(an_order)])


def endless(completion: str) -> dict[str | bytes, float]:
    return {"a": 1.0}


def until(holds: Callable[[], bool], *, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def idle(engine: Engine) -> bool:
    return not engine._num_open and not engine._lanes


def test_replies_do_not_depend_on_who_shares_their_rounds(engine: Engine) -> None:
    model = ScriptedLanguageModel(script)
    policies = [policy("linear", "fallback", count=3), policy("constant", "best", count=2), None]

    def one(seed: int) -> Order:
        return order(model, policies[seed % 3], seed=seed)

    alone = [text_of(engine, one(seed)) for seed in range(60)]
    with ThreadPoolExecutor(30) as threads:
        threaded = list(threads.map(lambda seed: text_of(engine, one(seed)), range(60)))

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(atext_of(engine, one(seed)) for seed in range(60)))

    assert threaded == alone
    assert asyncio.run(all_at_once()) == alone
    until(lambda: idle(engine))


def test_concurrent_calls_share_rounds(engine: Engine) -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.002)

    async def all_at_once() -> None:
        orders = [order(model, max_tokens=20) for _ in range(16)]
        await asyncio.gather(*(atext_of(engine, one) for one in orders))

    asyncio.run(all_at_once())
    assert engine.statistics.num_row_rounds == 160
    assert engine.statistics.num_rounds <= 20


def test_several_event_loops_share_one_engine(engine: Engine) -> None:
    model = ScriptedLanguageModel(script)
    results: dict[int, str] = {}

    def loop_of(seed: int) -> None:
        results[seed] = asyncio.run(atext_of(engine, order(model, seed=seed)))

    threads = [threading.Thread(target=loop_of, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {seed: text_of(engine, order(model, seed=seed)) for seed in range(6)}


def test_no_more_rows_than_allowed_are_in_progress_and_the_rest_wait_in_order(
    engine: Engine,
) -> None:
    model = ScriptedLanguageModel(endless, max_rows=2, step_seconds=0.001)
    ended: list[int] = []

    def run(number: int) -> None:
        text_of(engine, order(model, max_tokens=8))
        ended.append(number)

    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=run, args=(number,)))
        threads[-1].start()
        time.sleep(0.003)
    for thread in threads:
        thread.join()
    assert all(abs(number - place) <= 1 for place, number in enumerate(ended))
    assert engine.statistics.num_waiting_row_rounds == 2 * engine.statistics.num_waiting_rounds


def test_a_full_queue_says_so_and_takes_the_next_one_later(engine: Engine) -> None:
    model = ScriptedLanguageModel(endless, max_rows=1, step_seconds=0.001)
    first = engine.reply(order(model, max_tokens=100_000))
    second = engine.reply(order(model, max_queue=1))
    with pytest.raises(
        QueueFullError, match=r"1 replies are in progress, 1 wait.*`max_queue` is 1"
    ):
        engine.reply(order(model, max_queue=1))
    first.cancel()
    assert "".join(delta.text for delta in second) == "aaaaa"
    assert text_of(engine, order(model, max_queue=0)) == "aaaaa"


@pytest.mark.parametrize("how", ["break", "close", "forget", "cancel"])
def test_a_reply_that_nobody_reads_leaves(engine: Engine, how: str) -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.001)
    reply = engine.reply(order(model, max_tokens=1_000_000, streamed=True))
    deltas = iter(reply)
    next(deltas)
    if how == "break":
        for _ in deltas:
            break
        del deltas
    elif how == "close":
        deltas.close()  # type: ignore[attr-defined]
    elif how == "forget":
        del deltas
        gc.collect()
    else:
        reply.cancel()
    until(lambda: idle(engine))


def test_a_cancelled_task_frees_its_row(engine: Engine) -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.001)

    async def main() -> None:
        task = asyncio.create_task(atext_of(engine, order(model, max_tokens=1_000_000)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(atext_of(engine, order(model, max_tokens=1_000_000)), 0.05)

    asyncio.run(main())
    until(lambda: idle(engine))
    steps = model.num_steps
    time.sleep(0.05)
    assert model.num_steps == steps


def test_a_deadline_ends_a_reply_wherever_it_is(engine: Engine) -> None:
    model = ScriptedLanguageModel(endless, max_rows=1, step_seconds=0.001)
    running = engine.reply(order(model, max_tokens=1_000_000, timeout=0.3))
    waiting = engine.reply(order(model, timeout=0.05))
    with pytest.raises(DeadlineExceededError, match="`timeout`=0.05"):
        list(waiting)
    with pytest.raises(TimeoutError, match="`timeout`=0.3"):
        list(running)
    until(lambda: idle(engine))


def test_a_deadline_ends_a_reply_whose_reward_hangs(engine: Engine) -> None:
    release = threading.Event()

    def hang(**_: Any) -> list[float]:
        release.wait(10)
        return [0.0]

    guard = Policy(
        objective=as_reward(hang),
        acceptance=Acceptance(schedule=Constant(0.0)),
        reward_timeout=30,
    )
    model = ScriptedLanguageModel(endless)
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        text_of(engine, order(model, guard, timeout=0.2))
    assert time.monotonic() - begin < 1.1
    assert text_of(engine, order(model)) == "aaaaa"
    release.set()


def test_a_slow_reward_does_not_hold_up_the_others(engine: Engine) -> None:
    others_ended, waited = threading.Event(), []

    def slow(**_: Any) -> list[float]:
        waited.append(others_ended.wait(20))
        return [0.0]

    guard = Policy(
        objective=as_reward(slow),
        acceptance=Acceptance(schedule=Constant(0.0)),
        segment_size=1,
        max_candidates=1,
    )
    model = ScriptedLanguageModel(endless)
    slow_reply = engine.reply(order(model, guard, max_tokens=3))
    for _ in range(20):
        assert text_of(engine, order(model)) == "aaaaa"
    others_ended.set()
    assert "".join(delta.text for delta in slow_reply) == "aaa"
    assert waited == [True] * 3


class Failing(ScriptedLanguageModel):
    """Fails at the wanted rounds, with somebody's words in the message."""

    def __init__(self, *rounds: int) -> None:
        super().__init__(endless)
        self.rounds = set(rounds)
        self.number = 0

    def drafting(self, requests: Any) -> Drafting:
        self.number += 1
        if self.number in self.rounds:
            raise RuntimeError("the secret of the prompt")
        return (yield from super().drafting(requests))


def test_an_engine_survives_a_language_model_that_fails(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    model = Failing(2)
    with pytest.raises(EngineError, match="RuntimeError") as info:
        text_of(engine, order(model))
    assert info.value.__cause__ is None
    assert info.value.__context__ is None
    assert "secret" not in caplog.text + repr(info.value)
    assert text_of(engine, order(model)) == "aaaaa"
    until(lambda: idle(engine))


class Broken(ScriptedLanguageModel):
    """Cannot even be asked how many rows it takes, after it has begun."""

    broken = False

    @property
    def max_rows(self) -> int:
        if self.broken and threading.current_thread().name.startswith("stars"):
            raise ValueError
        return 4


def test_an_engine_survives_a_language_model_that_breaks_between_rounds(engine: Engine) -> None:
    model = Broken(endless, step_seconds=0.001)
    reply = engine.reply(order(model, max_tokens=100_000, streamed=True))
    deltas = iter(reply)
    next(deltas)
    model.broken = True
    with pytest.raises(EngineError):
        list(deltas)
    other = ScriptedLanguageModel(endless)
    assert text_of(engine, order(other)) == "aaaaa"


class Costly(ScriptedLanguageModel):
    """A step takes as long as it has rows, on a clock of its own."""

    def __init__(self) -> None:
        super().__init__(endless)
        self.now = 0.0
        self.moments: list[float] = []

    def drafting(self, requests: Any) -> Drafting:
        drafting = super().drafting(requests)
        while True:
            if requests[0].prefix.lane == "interactive":
                self.moments.append(self.now)
            try:
                tokens = next(drafting)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            self.now += len(requests)
            yield tokens


class Littering(ScriptedLanguageModel):
    """Cannot drop what it computed."""

    def release(self, prefix: Any) -> None:
        raise MemoryError("somebody's words")


def test_an_engine_survives_what_cannot_be_released(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    model = Littering(endless)
    for _ in range(3):
        assert text_of(engine, order(model)) == "aaaaa"
    until(lambda: idle(engine))
    assert "MemoryError" in caplog.text
    assert "words" not in caplog.text


def test_a_reply_that_cannot_be_admitted_fails_alone(engine: Engine) -> None:
    class Unadmitted(ScriptedLanguageModel):
        broken = False

        @property
        def vocabulary(self) -> str:
            if self.broken:
                raise KeyError
            return "words"

    model = Unadmitted(endless, step_seconds=0.001)
    first = engine.reply(order(model, max_tokens=200, streamed=True))
    deltas = iter(first)
    next(deltas)
    model.broken = True
    with pytest.raises(EngineError, match="KeyError"):
        text_of(engine, order(model))
    assert len("".join(delta.text for delta in deltas)) == 199
    until(lambda: idle(engine))


def test_whoever_waits_for_an_engine_that_ends_is_told(engine: Engine) -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.001)
    reply = engine.reply(order(model, max_tokens=100_000, streamed=True))
    deltas = iter(reply)
    next(deltas)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_hear", lambda: 1 / 0)
        with pytest.raises(EngineClosedError):
            list(deltas)
    with pytest.raises(EngineClosedError):
        engine.reply(order(model))


def test_a_quick_reward_is_not_forgotten_while_another_lane_is_waited_for(engine: Engine) -> None:
    def policy_of(seconds: float) -> Policy:
        def reward(**_: Any) -> list[float]:
            time.sleep(seconds)
            return [0.0]

        return Policy(
            objective=as_reward(reward),
            acceptance=Acceptance(schedule=Constant(0.0)),
            segment_size=1,
            max_candidates=1,
        )

    model = ScriptedLanguageModel(endless)
    for _ in range(5):
        slow = engine.reply(order(model, policy_of(2.0), max_tokens=1))
        quick = [
            engine.reply(order(model, policy_of(0.003), max_tokens=2, priority=priority))
            for priority in ("interactive", "batch")
            for _ in range(3)
        ]
        begin = time.monotonic()
        for reply in quick:
            list(reply)
        assert time.monotonic() - begin < 1.5
        slow.cancel()


def test_an_interactive_reply_does_not_wait_for_a_flood_of_batch_rows() -> None:
    """By a clock that counts rows times steps, from the moment it is asked for."""
    model = Costly()
    engine = Engine("fair", clock=lambda: model.now)
    one = order(model, max_tokens=256, segment_size=16)
    text_of(engine, one)
    alone = model.moments[-1] - model.moments[0]
    flood = [
        engine.reply(order(model, max_tokens=10**9, segment_size=16, priority="batch"))
        for _ in range(64)
    ]
    until(lambda: engine.statistics.num_row_rounds > 64)
    for _ in range(5):
        model.moments.clear()
        reply = engine.reply(one)
        with engine._changed:  # the thread has it from here on
            begin = model.now
        list(reply)
        assert model.moments[-1] - begin <= 2 * alone
    for reply in flood:
        reply.cancel()
    engine.close()


def test_a_batch_is_not_starved_by_interactive_replies(engine: Engine) -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.0005)
    stop = threading.Event()

    def chatter() -> None:
        while not stop.is_set():
            text_of(engine, order(model, max_tokens=32))

    threads = [threading.Thread(target=chatter) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert text_of(engine, order(model, priority="batch", timeout=10)) == "aaaaa"
    stop.set()
    for thread in threads:
        thread.join()


def test_a_closed_engine_ends_what_is_in_progress_and_takes_nothing_more() -> None:
    engine = Engine("closing")
    model = ScriptedLanguageModel(endless, max_rows=1, step_seconds=0.001)
    running = engine.reply(order(model, max_tokens=1_000_000))
    waiting = engine.reply(order(model))
    time.sleep(0.02)
    engine.close()
    for reply in (running, waiting):
        with pytest.raises(EngineClosedError):
            list(reply)
    with pytest.raises(EngineClosedError):
        engine.reply(order(model))


def test_engines_are_shared_by_device_and_begun_anew_after_a_shutdown() -> None:
    first = engine_for("test-device")
    assert engine_for("test-device") is first
    shut_down()
    second = engine_for("test-device")
    assert second is not first
    assert text_of(second, order(ScriptedLanguageModel(endless))) == "aaaaa"
    shut_down()


def _child(connection: Any) -> None:
    engine = engine_for("forked")
    connection.send(text_of(engine, order(ScriptedLanguageModel(endless))))
    connection.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_an_engine_of_its_own() -> None:
    parent = engine_for("forked")
    text_of(parent, order(ScriptedLanguageModel(endless)))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs,))
    process.start()
    assert ours.poll(10)
    assert ours.recv() == "aaaaa"
    process.join(10)
    assert process.exitcode == 0
    assert engine_for("forked") is parent
    shut_down()


def test_the_interpreter_exits_while_replies_are_in_progress() -> None:
    code = """
from langchain_stars.engine import Order, engine_for
from langchain_stars.testing import ScriptedLanguageModel
model = ScriptedLanguageModel(lambda text: {"a": 1.0}, step_seconds=0.001)
order = Order(language_model=model, chat=[], prompt_ids=[10], policy=None, max_tokens=1_000_000,
              streamed=True)
reply = engine_for("cpu").reply(order)
next(iter(reply))
deltas = iter(engine_for("cpu").reply(order))
next(deltas)
"""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"timeout": 0.0}, "timeout"),
        ({"max_queue": -1}, "max_queue"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        order(ScriptedLanguageModel(endless), **settings)


def test_the_report_of_a_reply_gives_its_seed(engine: Engine) -> None:
    model = ScriptedLanguageModel(script)
    reply = engine.reply(order(model, seed=None))
    text = "".join(delta.text for delta in reply)
    assert isinstance(reply.report, Report)
    assert text_of(engine, order(model, seed=reply.report.seed)) == text


class Labelled(TableReward):
    """Remembers the partitions and lanes of the replies that it judges."""

    def __init__(self) -> None:
        super().__init__({}, default=1.0)
        self.seen: set[tuple[str, str]] = set()
        score = self.scorer.score

        def remembering(requests: Any) -> Any:
            self.seen |= {(each.subject.partition, each.subject.lane) for each in requests}
            return score(requests)

        self.scorer.score = remembering  # type: ignore[method-assign]


def test_rewards_are_told_whose_prompts_may_be_shared_and_that_a_question_is_nobodys(
    engine: Engine,
) -> None:
    reward = Labelled()
    guard = Policy(objective=reward, acceptance=Acceptance(schedule=Constant(1.0)))
    model = ScriptedLanguageModel(endless)
    text_of(engine, order(model, guard, partition="ann", priority="batch"))
    text_of(engine, order(model, guard))
    engine.judge(reward, [[{"role": "user", "content": "hi"}]])
    assert reward.seen == {("ann", "batch"), ("", "interactive"), ("", "questions")}


@pytest.mark.parametrize("partition", ["ann", ""])
def test_what_a_reward_shares_between_replies_changes_none_of_them(
    engine: Engine, reward_folder: Path, partition: str
) -> None:
    """Threads with one system message, turn after turn, with the store of prompts and without it."""
    model = ScriptedLanguageModel(script)

    def run(prompt_bytes: int) -> tuple[list[str], SequenceClassifier]:
        scorer = SequenceClassifier(reward_folder, prompt_bytes=prompt_bytes)
        guard = Policy(
            objective=SequenceReward(scorer),
            acceptance=Acceptance(schedule=Constant(0.0), beta=0.5, max_attempts=4),
            segment_size=2,
        )
        texts = []
        for thread in range(4):
            chat = [{"role": "system", "content": "You are kind, and you know the stars."}]
            for turn in range(3):
                chat = [*chat, {"role": "user", "content": f"Question {thread}, {turn}"}]
                settings = {"chat": chat, "seed": 10 * thread + turn, "partition": partition}
                texts.append(text_of(engine, order(model, guard, **settings)))
                chat = [*chat, {"role": "assistant", "content": texts[-1]}]
        until(lambda: idle(engine))
        return texts, scorer

    off, without = run(0)
    on, with_store = run(1 << 20)
    assert on == off
    assert len(set(on)) > 4
    counted, plain = with_store.counters, without.counters
    assert counted.prompt_tokens + counted.reused_tokens == plain.prompt_tokens
    assert plain.reused_tokens == 0
    assert (counted.reused_tokens > plain.prompt_tokens / 2) == bool(partition)
    assert counted.reused_tokens == 0 or partition


def test_a_hundred_policies_see_only_their_own_words(engine: Engine) -> None:
    """Each reply may hold its own canary and no other, and a table reward sees only that one."""

    def canary(completion: str, prompt: str) -> dict[str | bytes, float]:
        return {prompt: 0.5, "-": 0.5} if len(completion) < 40 else {"": 1.0}

    model = ScriptedLanguageModel(canary)
    foreign: list[str] = []

    def guard_of(name: str) -> Policy:
        def reward(text: str) -> float:
            if text.replace(name, "").strip("-"):
                foreign.append(name)
            return float(text.count(name))

        return Policy(
            objective=TableReward(reward, name=name),
            acceptance=Acceptance(schedule=Constant(1.0), max_attempts=8),
            segment_size=2,
        )

    names = [f"[canary-{number}]" for number in range(100)]

    def one(name: str) -> Order:
        chat = [{"role": "user", "content": name}]
        return order(model, guard_of(name), chat=chat, max_tokens=12, seed=len(name))

    alone = [text_of(engine, one(name)) for name in names]

    async def together() -> list[str]:
        return await asyncio.gather(*(atext_of(engine, one(name)) for name in names))

    assert asyncio.run(together()) == alone
    assert not foreign
    assert all(
        not text.replace(name, "").strip("-") for text, name in zip(alone, names, strict=True)
    )
