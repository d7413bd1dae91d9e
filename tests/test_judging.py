"""Who is asked about which candidates, and workers: deadlines, hung calls, limits."""

import dataclasses
import itertools
import logging
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from test_decoder_law import (
    FALSE_ALARM,
    MAX_ATTEMPTS,
    MAX_TOKENS,
    NUM_TESTS,
    REFUSAL,
    REWARDS,
    SEGMENT_SIZE,
    chi_square,
    harmless,
    law,
    policy,
    script,
    spelled,
    value,
)

from langchain_stars import decoder
from langchain_stars.acceptance import Acceptance, Calibrated, Constant, Linear
from langchain_stars.decoder import Policy, Row
from langchain_stars.judging import Inquiry, Workers, judging
from langchain_stars.language_models.base import Prefix, Sampling
from langchain_stars.rewards import as_reward, maximum, minimum
from langchain_stars.rewards.base import (
    Completion,
    Leaf,
    Raw,
    Reward,
    RewardError,
    Scorer,
    ScoreRequest,
    Subject,
)
from langchain_stars.testing import ScriptedLanguageModel, TableReward


class Asked(Leaf):
    """Reads a scorer made of a function of the candidates' texts."""

    def __init__(self, function: Any, *, on_device: bool = False) -> None:
        self.scorer = _Asked(function)
        self.scorer.on_device = on_device  # type: ignore[misc]

    @property
    def name(self) -> str:
        return "asked"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": "asked"}

    def read(self, raw: Raw) -> float:
        return raw[0]


class _Asked(Scorer):
    def __init__(self, function: Any) -> None:
        self._function = function

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": "asked"}

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        return [
            [(value,) for value in self._function([c.text for c in request.candidates])]
            for request in requests
        ]


def inquiry(*leaves: Leaf, texts: Sequence[str] = ("a", "b"), timeout: float = 5.0) -> Inquiry:
    request = ScoreRequest(
        subject=Subject(()),
        accepted=Completion(text="", finished=False, token_ids=()),
        candidates=tuple(Completion(text=text, finished=False) for text in texts),
    )
    return Inquiry(request, leaves, timeout=timeout)


def settle(*inquiries: Inquiry, workers: Workers, seconds: float = 5.0) -> None:
    for _ in judging(inquiries, workers=workers, notify=lambda: None):
        pass
    end = time.monotonic() + seconds
    while not all(one.done for one in inquiries):
        assert time.monotonic() < end, "waited in vain"
        for one in inquiries:
            one.poll()
        time.sleep(0.001)


def test_every_reward_of_every_candidate_is_answered() -> None:
    lengths = Asked(lambda texts: [float(len(text)) for text in texts])
    on_device = TableReward({"a": 1.0, "bb": 2.0})
    one = inquiry(lengths, on_device, texts=("a", "bb"))
    settle(one, workers=Workers())
    assert one.values(0) == {lengths: 1.0, on_device: 1.0}
    assert one.values(1) == {lengths: 2.0, on_device: 2.0}


@pytest.mark.parametrize("on_device", [True, False])
def test_only_the_candidate_whose_own_call_fails_has_no_answer(on_device: bool) -> None:
    calls: list[list[str]] = []

    def function(texts: list[str]) -> list[float]:
        calls.append(texts)
        if "b" in texts:
            raise ValueError("some words of b")
        return [1.0] * len(texts)

    leaf = Asked(function, on_device=on_device)
    one = inquiry(leaf, texts=("a", "b", "c"))
    settle(one, workers=Workers())
    assert [one.values(place) for place in range(3)] == [{leaf: 1.0}, None, {leaf: 1.0}]
    assert calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]


def test_a_failing_reward_is_logged_by_name_and_type_and_without_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def function(texts: list[str]) -> list[float]:
        raise ValueError("-".join(texts))

    caplog.set_level(logging.DEBUG)
    settle(inquiry(Asked(function), texts=("secret",)), workers=Workers())
    assert "asked" in caplog.text
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


def test_the_log_tells_where_a_function_failed(caplog: pytest.LogCaptureFixture) -> None:
    def judge(completions: list[str]) -> list[float]:
        wrong = completions["secret"]  # type: ignore[call-overload]
        return [float(wrong)]

    settle(inquiry(as_reward(judge), texts=("secret",)), workers=Workers())
    assert re.search(r"judge failed: raised TypeError in line \d+ of test_judging.py", caplog.text)
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "code",
    [
        "def secret():\n    return 1 / 0\nsecret()",
        "class Secret(Exception):\n    pass\nraise Secret",
        "raise type('Secret', (KeyError,), {})('secret')",
        "raise type('Secret', (KeyError,), {'__module__': ['secret']})('secret')",
        "raise type('M', (type,), {'__flags__': 0})('Secret', (KeyError,), {})('secret')",
    ],
)
def test_what_is_judged_may_run_and_its_names_are_not_logged(
    code: str, caplog: pytest.LogCaptureFixture
) -> None:
    def runs(completions: Any) -> list[float]:
        exec(completions[0][0]["content"], {"__name__": "somebody's"})
        return [1.0]

    # The reward itself may have no file of its own, as one that is typed in.
    spelled = "def typed(completions):\n    exec(completions[0][0]['content'], {})\n"
    names: dict[str, Any] = {}
    exec(spelled, names)
    for function in (runs, names["typed"]):
        settle(inquiry(as_reward(function), texts=(code,)), workers=Workers())
    assert "failed: raised" in caplog.text
    assert "secret" not in caplog.text.lower()


def test_what_only_looks_like_a_function_fails_like_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Proxy:
        __code__ = "some code"

        def __call__(self, completions: Any) -> Any:
            raise KeyError("secret")

    reward = as_reward(Proxy(), name="proxy")
    settle(inquiry(reward, texts=("secret",)), workers=Workers())
    assert "proxy failed: raised KeyError" in caplog.text
    assert "secret" not in caplog.text


def test_a_reward_that_always_fails_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def function(texts: list[str]) -> list[float]:
        raise ValueError

    for _ in range(20):
        settle(inquiry(Asked(function), texts=("a",)), workers=Workers())
    told = [record.getMessage() for record in caplog.records]
    times = ["", *(f" ({count} times)" for count in (2, 4, 8, 16))]
    assert told == [f"reward asked failed: ValueError{of}" for of in times]


def test_the_words_of_somebody_elses_reward_error_are_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def function(texts: list[str]) -> list[float]:
        raise RewardError("-".join(texts))

    settle(inquiry(Asked(function), texts=("secret",)), workers=Workers())
    assert "failed: RewardError" in caplog.text
    assert "secret" not in caplog.text


def test_calls_that_hang_are_abandoned_counted_and_replaced() -> None:
    release = threading.Event()
    workers = Workers(max_workers=1, max_hung=2)

    def hang(texts: list[str]) -> list[float]:
        release.wait(10)
        return [0.0] * len(texts)

    hung, quick = Asked(hang), Asked(lambda texts: [1.0] * len(texts))
    slow = inquiry(hung, texts=("a",), timeout=0.05)
    settle(slow, workers=workers)
    assert slow.values(0) is None
    assert workers.num_hung == 1
    soon = inquiry(quick, texts=("a",))
    settle(soon, workers=workers)
    assert soon.values(0) == {quick: 1.0}
    settle(inquiry(hung, texts=("a",), timeout=0.05), workers=workers)
    assert workers.num_hung == 2
    refused = inquiry(hung, texts=("a",))
    settle(refused, workers=workers)
    assert refused.values(0) is None
    assert workers.num_hung == 2
    other = inquiry(quick, texts=("a",))
    settle(other, workers=workers)
    assert other.values(0) == {quick: 1.0}
    release.set()
    end = time.monotonic() + 5
    while workers.num_hung:
        assert time.monotonic() < end
        time.sleep(0.002)
    again = inquiry(hung, texts=("a",))
    settle(again, workers=workers)
    assert again.values(0) == {hung: 0.0}


def test_a_call_that_waits_for_a_worker_is_not_late() -> None:
    workers = Workers(max_workers=1)

    def slow(texts: list[str]) -> list[float]:
        time.sleep(0.1)
        return [1.0] * len(texts)

    inquiries = [inquiry(Asked(slow), texts=("a",), timeout=0.2) for _ in range(4)]
    settle(*inquiries, workers=workers)
    assert all(one.values(0) is not None for one in inquiries)


def test_many_calls_at_once_run_at_once() -> None:
    workers = Workers(max_workers=16)
    barrier = threading.Barrier(12)

    def meet(texts: list[str]) -> list[float]:
        barrier.wait(5)
        return [1.0] * len(texts)

    inquiries = [inquiry(Asked(meet), texts=("a",)) for _ in range(12)]
    settle(*inquiries, workers=workers)
    assert all(one.values(0) is not None for one in inquiries)


def test_a_cancelled_inquiry_is_not_answered() -> None:
    release = threading.Event()
    workers = Workers()
    one = inquiry(Asked(lambda texts: release.wait(5) and [1.0]), texts=("a",))
    one.begin(workers, lambda: None)
    assert not one.done
    one.cancel()
    assert one.done
    release.set()


def test_a_reading_that_fails_is_no_answer() -> None:
    class Unreadable(Asked):
        def read(self, raw: Raw) -> float:
            raise KeyError(raw)

    one = inquiry(Unreadable(lambda texts: [1.0] * len(texts)), texts=("a",))
    settle(one, workers=Workers())
    assert one.values(0) is None


def test_a_call_that_finds_no_worker_for_long_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain_stars.judging._IDLE_SECONDS", 0.05)
    release = threading.Event()
    workers = Workers(max_workers=1)
    blocking = inquiry(Asked(lambda texts: release.wait(5) and [1.0]), texts=("a",))
    blocking.begin(workers, lambda: None)
    waiting = inquiry(Asked(lambda texts: [1.0]), texts=("a",), timeout=0.05)
    settle(waiting, workers=workers)
    assert waiting.values(0) is None
    release.set()


def test_where_no_thread_can_be_had_calls_wait_for_one_or_are_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("langchain_stars.judging._IDLE_SECONDS", 0.05)
    workers, start = Workers(), threading.Thread.start

    def exhausted(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def asked(timeout: float = 5.0) -> Inquiry:
        return inquiry(Asked(lambda texts: [1.0]), texts=("a",), timeout=timeout)

    monkeypatch.setattr(threading.Thread, "start", exhausted)
    late = asked(0.05)
    settle(late, workers=workers)
    assert late.values(0) is None
    waiting = asked()
    waiting.begin(workers, lambda: None)
    monkeypatch.setattr(threading.Thread, "start", start)
    settle(waiting, asked(), workers=workers)
    assert waiting.values(0) is not None


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
@pytest.mark.parametrize("on_device", [True, False])
def test_whatever_a_reward_raises_only_rejects(error: type[BaseException], on_device: bool) -> None:
    def function(texts: list[str]) -> list[float]:
        raise error

    one = inquiry(Asked(function, on_device=on_device), texts=("a",))
    settle(one, workers=Workers())
    assert one.values(0) is None


@pytest.mark.parametrize("on_device", [True, False])
def test_a_scorer_that_can_neither_answer_nor_say_its_name_fails_alone(on_device: bool) -> None:
    class Nameless(_Asked):
        @property
        def identity(self) -> Mapping[str, Any]:
            raise OSError("a path of somebody's")

    def function(texts: list[str]) -> list[float]:
        raise ValueError

    nameless, other = Asked(function), Asked(lambda texts: [1.0], on_device=True)
    nameless.scorer = Nameless(function)
    nameless.scorer.on_device = on_device  # type: ignore[misc]
    inquiries = [inquiry(leaf, texts=("a",)) for leaf in (nameless, other)]
    settle(*inquiries, workers=Workers())
    assert [one.values(0) for one in inquiries] == [None, {other: 1.0}]


@pytest.mark.parametrize("on_device", [True, False])
def test_a_wrong_number_of_answers_is_no_answer(on_device: bool) -> None:
    one = inquiry(Asked(lambda texts: [1.0] * (len(texts) - 1), on_device=on_device))
    settle(one, workers=Workers())
    assert [one.values(place) for place in range(2)] == [None, None]


# Asked no more than decides


TEXTS = [
    "".join(letters)
    for length in range(MAX_TOKENS + 1)
    for letters in itertools.product("abc", repeat=length)
]


def extent(function: Callable[[str, bool], float]) -> tuple[float, float]:
    values = [function(text, finished) for text in TEXTS for finished in (False, True)]
    return min(values), max(values)


class Part(Leaf):
    """A reward in two known bounds, whose scorer counts what it is asked, and costs what it is told."""

    def __init__(
        self,
        name: str,
        function: Callable[[str, bool], float],
        *,
        on_device: bool = True,
        cost: float = 1.0,
        range: tuple[float, float] | None = None,
    ) -> None:
        self._range = range or extent(function)
        self.asked: list[tuple[str, ...]] = []
        self.scorer = _Part(name, function, self.asked, cost)
        self.scorer.on_device = on_device  # type: ignore[misc]
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self._name}

    @property
    def range(self) -> tuple[float, float]:
        return self._range

    def read(self, raw: Raw) -> float:
        return raw[0]

    @property
    def num_asked(self) -> int:
        return sum(map(len, self.asked))


class _Part(Scorer):
    def __init__(self, name: str, function: Any, asked: list[tuple[str, ...]], cost: float) -> None:
        self._name = name
        self._function = function
        self._asked = asked
        self._cost = cost

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self._name}

    @property
    def cost(self) -> float:
        return self._cost

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        self._asked += (tuple(each.text for each in request.candidates) for request in requests)
        return [
            [(self._function(each.text, each.finished),) for each in request.candidates]
            for request in requests
        ]


def rest(text: str, finished: bool) -> float:
    return 0.1 * sum(REWARDS[letter] for letter in text)


def most(text: str, finished: bool) -> float:
    return value(text, finished) - rest(text, finished)


def sometimes(function: Callable[[str, bool], float], *endings: str) -> Any:
    """Fail on the texts with some endings: by an error, or by what is no number."""

    def failing(text: str, finished: bool) -> float:
        if text.endswith(endings):
            if len(text) % 2:
                return math.nan
            raise ValueError
        return function(text, finished)

    return failing


def parts_of(
    *, workers: Sequence[str] = (), failing: bool = False, costs: Sequence[float] = (1.0, 2.0)
) -> dict[str, Part]:
    functions: dict[str, Any] = {"harmless": harmless, "most": most, "rest": rest}
    if failing:
        functions = {
            "harmless": sometimes(harmless, "cb"),
            "most": sometimes(most, "ba", "bb"),
            "rest": sometimes(rest, "ba", "cb", "aa", "cc"),
        }
    return {
        name: Part(
            name,
            function,
            on_device=name not in workers,
            cost=dict(zip(("most", "rest"), costs, strict=True)).get(name, 1.5),
            # What fails where it is tried out has the range that it would have.
            range=extent(whole),
        )
        for (name, function), whole in zip(functions.items(), (harmless, most, rest), strict=True)
    }


def guard_of(parts: Mapping[str, Part], on_exhausted: str, **settings: Any) -> Policy:
    settings = {"count": 3, "schedule": "constant"} | settings
    guard = policy(settings.pop("schedule"), on_exhausted, count=settings.pop("count"))
    return dataclasses.replace(
        guard,
        objective=parts["most"] + parts["rest"],
        constraints=(parts["harmless"] >= 0.5,),
        **settings,
    )


def transcripts(
    guard: Policy,
    seeds: Sequence[int],
    *,
    lazy: bool,
    model: ScriptedLanguageModel | None = None,
) -> list[tuple[Any, ...]]:
    """Return text and report, or error, of each reply, decoded together."""
    model, workers = model or ScriptedLanguageModel(script), Workers()
    events: dict[int, list[Any]] = {seed: [] for seed in seeds}
    rows = [
        Row(
            prefix=Prefix([10]),
            subject=Subject(({"role": "user", "content": ""},)),
            policy=guard,
            sampling=Sampling(),
            seed=seed,
            max_tokens=MAX_TOKENS,
            decode=model.decode,
            tell=events[seed].append,
        )
        for seed in seeds
    ]
    end = time.monotonic() + 60
    while rows:
        assert time.monotonic() < end
        ready = [row for row in rows if decoder.settle(row) and not row.ended]
        for _ in decoder.advance(model, ready, workers=workers, notify=lambda: None, lazy=lazy):
            pass
        rows = [row for row in rows if not row.ended]
    found = []
    for of_seed in events.values():
        *deltas, last = of_seed
        text = "".join(delta.text for delta in deltas)
        if isinstance(last, decoder.Report):
            # How many were drafted is no part of a reply: it depends on the rounds.
            last = dataclasses.replace(last, num_drafted_tokens=0, policy=None)
        found.append((text, last if isinstance(last, decoder.Report) else str(last)))
    return found


@pytest.mark.parametrize("failing", [False, True], ids=["sound", "failing"])
@pytest.mark.parametrize(
    "workers", [(), ("rest",), ("harmless",), ("harmless", "rest"), ("most", "rest")]
)
@pytest.mark.parametrize("on_exhausted", ["fallback", "best", "refuse", "raise"])
def test_a_reply_does_not_depend_on_who_is_asked_no_more_nor_on_what_anybody_costs(
    on_exhausted: str, workers: tuple[str, ...], failing: bool
) -> None:
    seeds = range(40)
    all_asked = parts_of(workers=workers, failing=failing)
    expected = transcripts(guard_of(all_asked, on_exhausted), seeds, lazy=False)
    for costs in ((1.0, 2.0), (2.0, 1.0)):
        for count in (1, 3):
            parts = parts_of(workers=workers, failing=failing, costs=costs)
            guard = guard_of(parts, on_exhausted, count=count)
            assert transcripts(guard, seeds, lazy=True) == expected
            if count == 3:
                fewer = sum(parts[name].num_asked < all_asked[name].num_asked for name in parts)
                assert fewer >= (1 if len(workers) < 2 else 0)


@pytest.mark.parametrize("schedule", ["linear", "calibrated"])
def test_held_replies_do_not_depend_on_who_is_asked_no_more(schedule: str) -> None:
    """Attempts that were rejected on a bound outlast what is taken back."""
    for on_exhausted in ("fallback", "best", "refuse"):
        settings = {"schedule": schedule, "holdback": 1, "max_takebacks": 3}
        eager, lazy = parts_of(), parts_of()
        expected = transcripts(guard_of(eager, on_exhausted, **settings), range(80), lazy=False)
        guard = guard_of(lazy, on_exhausted, **settings)
        assert transcripts(guard, range(80), lazy=True) == expected
        assert any(report.num_takebacks for _, report in expected)
        assert lazy["rest"].num_asked < lazy["most"].num_asked < eager["most"].num_asked


@pytest.mark.parametrize("on_exhausted", ["fallback", "refuse"])
def test_replies_judged_on_bounds_have_the_law_of_the_rule(on_exhausted: str) -> None:
    """False alarm: FALSE_ALARM / NUM_TESTS for each of the 2 cases."""
    parts = parts_of()
    guard = guard_of(parts, on_exhausted)
    seen = Counter(
        spelled(text, report) if isinstance(report, decoder.Report) else f"{text}!"
        for text, report in transcripts(guard, range(700_000, 701_500), lazy=True)
    )
    assert chi_square(seen, law("constant", on_exhausted)) > FALSE_ALARM / NUM_TESTS
    assert parts["rest"].num_asked < parts["most"].num_asked < parts["harmless"].num_asked


def test_what_a_constraint_rejects_is_asked_of_nobody_else() -> None:
    parts = parts_of()
    transcripts(guard_of(parts, "fallback"), range(60), lazy=True)
    asked = [text for texts in parts["harmless"].asked for text in texts]
    assert any("cc" in text for text in asked)
    for name in ("most", "rest"):
        assert not any("cc" in text for texts in parts[name].asked for text in texts)


@pytest.mark.parametrize("on_exhausted", ["fallback", "best", "refuse"])
@pytest.mark.parametrize("worker", [False, True])
def test_missing_values_are_had_once_and_only_where_one_of_the_rejected_is_kept(
    on_exhausted: str, worker: bool
) -> None:
    """The threshold is out of reach, as the cheap part alone shows."""
    parts = parts_of(workers=("rest",) if worker else ())
    cheap = Part("cheap", lambda text, finished: -10.0, range=(-10.0, 0.0))
    guard = dataclasses.replace(
        guard_of(parts, on_exhausted, count=1),
        objective=cheap + parts["rest"],
        constraints=(),
    )
    [(text, report)] = transcripts(guard, [3], lazy=True)
    calls = parts["rest"].asked
    assert cheap.num_asked == report.num_attempts
    if on_exhausted == "refuse":
        assert calls == []
        assert text == REFUSAL
        return
    assert report.num_fallbacks == len(report.segments) == len(calls)
    assert [len(texts) for texts in calls] == [MAX_ATTEMPTS] * len(calls)
    assert report.segments[0].reward == pytest.approx(
        -10 + max(rest(each, False) for each in calls[0])
    ) or (on_exhausted == "fallback")


def test_an_attempt_whose_missing_value_cannot_be_had_is_not_kept() -> None:
    def rest_of_a(text: str, finished: bool) -> float:
        if not text.startswith("a"):
            raise ValueError
        return rest(text, finished)

    def guard(last: Any) -> tuple[Policy, Part]:
        part = Part("rest", last, range=(-2.0, 2.0))
        cheap = Part("cheap", lambda text, finished: -10.0, range=(-10.0, 0.0), cost=0.1)
        whole = dataclasses.replace(
            guard_of(parts_of(), "fallback"), objective=cheap + part, constraints=()
        )
        return whole, part

    sometimes_had = transcripts(guard(rest_of_a)[0], range(40), lazy=True)
    assert sometimes_had == transcripts(guard(rest_of_a)[0], range(40), lazy=False)
    assert {text[0] for text, _ in sometimes_had} == {"a", REFUSAL}
    never = Part("never", lambda text, finished: math.nan if text else 0.0, range=(-1.0, 1.0))
    cheap = Part("cheap", lambda text, finished: -10.0, range=(-10.0, 0.0), cost=0.1)
    whole = dataclasses.replace(
        guard_of(parts_of(), "best"), objective=cheap + never, constraints=()
    )
    for lazy in (True, False):
        for text, report in transcripts(whole, range(5), lazy=lazy):
            assert text == REFUSAL
            assert (report.num_attempts, report.num_failures) == (MAX_ATTEMPTS, 0)


class Head(Leaf):
    """One of the numbers of a scorer, in the range that it is said to have."""

    def __init__(self, scorer: "_Random", head: int, range: tuple[float, float]) -> None:
        self.scorer = scorer
        self._head = head
        self._range = range

    @property
    def name(self) -> str:
        return f"{self.scorer.identity['name']}.{self._head}"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self.name}

    @property
    def range(self) -> tuple[float, float]:
        return self._range

    def read(self, raw: Raw) -> float:
        return raw[self._head]


class _Random(Scorer):
    """Says what it likes of each text, always the same; fails on some of them, in every way."""

    def __init__(self, key: str, *, scale: float, rate: float, cost: float) -> None:
        self._key = key
        self._scale = scale
        self._rate = rate
        self._cost = cost

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self._key}

    @property
    def cost(self) -> float:
        return self._cost

    def score(self, requests: Sequence[ScoreRequest]) -> Any:
        answers: Any = []
        for request in requests:
            answers.append([self._one(each) for each in request.candidates])
            if any(
                self._rng(each, "count").random() < self._rate / 4 for each in request.candidates
            ):
                answers[-1] = answers[-1][1:]
        return answers

    def _rng(self, completion: Completion, what: str) -> random.Random:
        return random.Random(f"{self._key} {what} {completion.text} {completion.finished}")

    def _one(self, completion: Completion) -> Any:
        rng = self._rng(completion, "value")
        values = tuple(round(rng.uniform(-self._scale, self._scale), 2) for _ in range(2))
        if rng.random() >= self._rate:
            return values
        broken = (math.nan, math.inf, 100.0)  # the last is out of range where that is finite
        kind = rng.choice([*broken, "none", "short", "error"])
        if kind == "error":
            raise ValueError
        return {"none": None, "short": ()}.get(kind, (kind, values[1]))  # type: ignore[call-overload]


def random_guard(seed: int, *, count: int, costs: int = 0) -> Policy:
    """Return a policy that `seed` decides; how many are drafted and what is paid, the others do."""
    rng, prices = random.Random(seed), random.Random(costs)
    heads: list[Reward] = []
    for number in range(rng.randint(1, 4)):
        scale = rng.choice([0.5, 1.0, 3.0])
        scorer = _Random(
            f"{seed}.{number}",
            scale=scale,
            rate=rng.choice([0.0, 0.0, 0.15, 0.5]),
            cost=prices.random(),
        )
        scorer.on_device = rng.random() < 0.6  # type: ignore[misc]
        ends = [(-scale, scale), (-math.inf, math.inf), (-math.inf, scale), (-scale, math.inf)]
        heads += (Head(scorer, head, rng.choice(ends)) for head in range(rng.choice([1, 2])))

    def expression() -> Reward:
        one, other, third = (rng.choice(heads) for _ in range(3))
        return rng.choice(
            [
                one,
                one + rng.choice([-1, 0.1, 2]) * other,
                minimum(one, other, 0.3),
                maximum(one, other) + 0.1 * third,
                minimum(one + other, 2 * one) - 0.3 * third,
            ]
        )

    target = rng.choice([-0.5, 0.0, 0.5, 1.0, 2.0])
    schedules = [
        Constant(target),
        Linear(target=target, alpha=rng.choice([0.0, 0.5, 1.0]), horizon=6),
        Calibrated(thresholds=(target, target + 0.3), segment_size=2),
    ]
    return Policy(
        objective=expression(),
        constraints=tuple(
            expression() >= rng.choice([-1.0, -0.5, 0.0, 0.2]) for _ in range(rng.choice([0, 1, 2]))
        ),
        acceptance=Acceptance(
            schedule=rng.choice(schedules),
            beta=rng.choice([0.0, 0.3, 1.0]),
            max_attempts=rng.choice([1, 3, 5, 8]),
            on_exhausted=rng.choice(["fallback", "fallback", "best", "refuse", "raise"]),
        ),
        segment_size=rng.choice([1, 2, 3]),
        max_candidates=count,
        adaptive=False,
        holdback=rng.choice([0, 0, 1, 2]),
        max_takebacks=rng.choice([1, 2, 4]),
        refusal_message=REFUSAL,
    )


class Spread(ScriptedLanguageModel):
    """Says that it runs where candidates are judged all at once."""

    device = "cuda"


@pytest.mark.parametrize("seed", range(24))
def test_no_guard_gives_other_replies_where_it_is_faster(seed: int) -> None:
    """Guards made by chance, of rewards that fail in every way: texts, segments and counts."""
    seeds = range(10 * seed, 10 * seed + 6)
    expected = transcripts(random_guard(seed, count=1), seeds, lazy=False)
    for costs, (count, lazy, model) in enumerate(
        [(5, False, Spread), (1, True, Spread), (5, True, Spread), (5, True, ScriptedLanguageModel)]
    ):
        guard = random_guard(seed, count=count, costs=costs)
        assert transcripts(guard, seeds, lazy=lazy, model=model(script)) == expected


def test_what_can_no_more_be_kept_is_asked_of_nobody() -> None:
    """The threshold is out of reach, as the second shows; the first has failed."""

    def broken(text: str, finished: bool) -> float:
        if text:
            raise ValueError
        return 0.0

    parts = [
        Part("broken", broken, range=(-1.0, 1.0), cost=0.1),
        Part("cheap", lambda text, finished: -10.0, range=(-10.0, 0.0), cost=0.2),
        Part("rest", rest, cost=0.3),
    ]
    guard = dataclasses.replace(
        guard_of(parts_of(), "fallback"),
        objective=parts[0] + parts[1] + parts[2],
        constraints=(),
    )
    [(text, report)] = transcripts(guard, [3], lazy=True)
    assert text == REFUSAL
    assert [part.num_asked for part in parts[1:]] == [report.num_attempts, 0]


class Bounded(Part):
    """Tells bounds of somebody's own, whatever they are worth."""

    def __init__(self, name: str, function: Any, told: Callable[[], Any], **settings: Any) -> None:
        super().__init__(name, function, **settings)
        self._told = told

    def bounds(self, values: Mapping[Leaf, float]) -> tuple[float, float]:
        bounds: tuple[float, float] = self._told()
        return bounds


@pytest.mark.parametrize("told", [(math.nan, math.nan), (1.0,), None, ("a", "b"), (5.0, -5.0)])
@pytest.mark.parametrize("on_exhausted", ["fallback", "best", "refuse"])
def test_bounds_that_lie_let_nothing_through_and_reject_alike_whoever_is_asked(
    on_exhausted: str, told: Any
) -> None:
    """The last of them rejects what would hold, and that is then never kept."""
    replies = []
    for lazy in (True, False):
        parts = parts_of()
        for name, function in (("harmless", harmless), ("most", most)):
            parts[name] = Bounded(name, function, lambda: told)
        guard = guard_of(parts, on_exhausted)
        replies.append(transcripts(guard, range(30), lazy=lazy))
        assert not any("cc" in text for text, _ in replies[-1])
    assert replies[0] == replies[1]
    if told == (5.0, -5.0):
        assert {text for text, _ in replies[0]} == {REFUSAL}
    else:
        assert replies[0] == transcripts(guard_of(parts_of(), on_exhausted), range(30), lazy=True)


def ask(*leaves: Leaf, texts: Sequence[str] = ("a", "b"), **settings: Any) -> Inquiry:
    one = inquiry(*leaves, texts=texts)
    return Inquiry(one.request, leaves, timeout=5.0, **settings)


def test_workers_wait_for_the_device_only_where_that_can_reject() -> None:
    begun = threading.Event()

    def slow(texts: list[str]) -> list[float]:
        begun.set()
        return [1.0] * len(texts)

    def waits(texts: list[str]) -> list[float]:
        return [float(begun.wait(2.0))] * len(texts)

    for spares in (False, True):
        begun.clear()
        on_device, in_worker = Asked(waits, on_device=True), Asked(slow)
        one = ask(
            in_worker,
            on_device,
            lazy=True,
            spares_workers=spares,
            rejects=lambda place, known: None,
        )
        settle(one, workers=Workers(), seconds=10)
        assert one.values(0) == {on_device: float(not spares), in_worker: 1.0}


def test_a_policy_knows_whether_the_device_can_reject() -> None:
    near, bounded = Part("near", most), Part("bounded", rest, on_device=False)
    far = as_reward(lambda **_: [0.0], name="far")

    def spares(**settings: Any) -> bool:
        return dataclasses.replace(policy("constant", "refuse", count=1), **settings).spares_workers

    assert not spares(objective=near + far, constraints=())
    assert spares(objective=near + bounded, constraints=())
    assert spares(objective=far, constraints=(near >= 0,))
    assert not spares(objective=far, constraints=(bounded >= 0,))
    assert spares(objective=minimum(near, far), constraints=())
    assert not spares(objective=maximum(near, far), constraints=())


def test_scorers_are_asked_in_order_and_only_about_what_is_not_rejected() -> None:
    calls: list[tuple[str, list[str]]] = []

    def asked(name: str, on_device: bool = True) -> Asked:
        def function(texts: list[str]) -> list[float]:
            calls.append((name, texts))
            return [float(text >= name) for text in texts]

        return Asked(function, on_device=on_device)

    a, b, c = asked("a"), asked("b"), asked("c", on_device=False)
    for lazy in (True, False):
        calls.clear()
        one = ask(
            c,
            a,
            b,
            texts=("a", "b", "c"),
            order=[b.scorer, a.scorer],
            lazy=lazy,
            spares_workers=True,
            rejects=lambda place, known: "below" if 0.0 in known.values() else None,
        )
        settle(one, workers=Workers())
        assert [one.rejection(place) for place in range(3)] == ["below", "below", None]
        assert one.values(2) == {a: 1.0, b: 1.0, c: 1.0}
        if lazy:
            assert calls == [("b", ["a", "b", "c"]), ("a", ["b", "c"]), ("c", ["b", "c"])]
            assert one.values(0) is None
            assert one.known(0) == {b: 0.0}
            assert list(one.answers(0)) == [b.scorer]
        else:
            assert sorted(calls) == [(name, ["a", "b", "c"]) for name in "abc"]


def test_who_rejects_does_not_depend_on_who_answers_first() -> None:
    """A worker that has answered spares no earlier stage, which may reject by another name."""
    on_device, in_worker = Asked(None, on_device=True), Asked(lambda texts: [0.0] * len(texts))
    one = ask(
        on_device,
        in_worker,
        lazy=True,
        rejects=lambda place, known: next((leaf.scorer.name for leaf in known), None),
    )
    on_device.scorer.name, in_worker.scorer.name = "device", "worker"  # type: ignore[attr-defined]
    one.begin(Workers(), lambda: None)
    end = time.monotonic() + 5
    while not one.done:
        assert time.monotonic() < end
        one.poll()
    assert one.rejection(0) is None
    assert one.ask(on_device.scorer) == [0, 1]
    one.answered(on_device.scorer, {0: (0.0,), 1: None})
    assert [one.rejection(place) for place in range(2)] == ["device", "worker"]


def test_replies_whose_rewards_come_in_another_order_still_share_calls() -> None:
    calls: list[str] = []
    a, b = (
        Asked(lambda texts, name=name: calls.append(name) or [0.0], on_device=True) for name in "ab"
    )
    one, other = ask(a, b, texts=("a",)), ask(b, texts=("a",))
    settle(other, one, workers=Workers())
    assert calls == ["a", "b", "b"]  # one call, which answers two requests
    crossed = [ask(a, b, texts=("a",)), ask(b, a, texts=("a",))]
    settle(*crossed, workers=Workers())
    assert all(each.values(0) == {a: 0.0, b: 0.0} for each in crossed)


def test_a_value_out_of_the_range_that_a_reading_promises_is_no_answer() -> None:
    liar = Part("liar", lambda text, finished: 5.0 if text == "a" else 0.5, range=(0.0, 1.0))
    one = ask(liar)
    settle(one, workers=Workers())
    assert [one.values(place) for place in range(2)] == [None, {liar: 0.5}]


def test_after_three_failures_in_a_row_a_function_is_asked_no_more_and_only_then() -> None:
    calls: list[str] = []

    def failing(texts: list[str]) -> list[float]:
        calls.extend(texts)
        raise ValueError

    def asked(rejected: str, *others: Leaf, in_turn: bool = True) -> list[str]:
        calls.clear()
        first = Asked(lambda texts: [float(t in rejected) for t in texts], on_device=True)
        one = ask(
            first,
            Asked(failing),
            *others,
            texts=tuple("abcdef"),
            lazy=True,
            spares_workers=True,
            in_turn=in_turn,
            rejects=lambda place, known: "rejected" if known.get(first) else None,
        )
        settle(one, workers=Workers())
        return calls[6 - len(rejected) :]

    assert asked("") == list("abc")
    assert asked("c") == list("abdef")  # the third of these follows the second, but c lies between
    assert asked("", Asked(lambda texts: [1.0] * len(texts))) == list("abcdef")
    assert asked("", in_turn=False) == list("abcdef")  # rejected attempts, of which one is kept


@pytest.mark.parametrize("lazy", [True, False])
def test_what_just_reaches_the_threshold_and_the_floor_is_accepted(lazy: bool) -> None:
    guard = Policy(
        objective=Part("even", lambda text, finished: 0.5, range=(0.0, 0.5)),
        constraints=(Part("level", lambda text, finished: 0.1, range=(0.0, 0.1)) >= 0.1,),
        acceptance=Acceptance(schedule=Constant(0.5), max_attempts=1, on_exhausted="raise"),
        segment_size=SEGMENT_SIZE,
    )
    for _, report in transcripts(guard, range(5), lazy=lazy):
        assert {segment.outcome for segment in report.segments} == {"accepted"}


def test_an_attempt_that_is_out_of_reach_has_not_failed_however_many_are_drafted() -> None:
    """The function promises at most 1: where u asks for more, its failure is not what rejects."""

    def guard(count: int) -> Policy:
        def failing(text: str, finished: bool) -> float:
            if text.endswith(("a", "b")):
                raise ValueError
            return 1.0

        return Policy(
            objective=Part("failing", failing, on_device=False, range=(0.0, 1.0)),
            acceptance=Acceptance(schedule=Constant(1.5), beta=1.0, max_attempts=8),
            segment_size=2,
            max_candidates=count,
            adaptive=False,
        )

    expected = transcripts(guard(1), range(60), lazy=False)
    assert any(report.num_failures > 2 for _, report in expected)
    for count, lazy in ((8, False), (8, True), (1, True)):
        assert transcripts(guard(count), range(60), lazy=lazy) == expected


def test_only_three_failures_with_nothing_between_them_end_a_reply() -> None:
    """What becomes of each attempt is told by what the reward has been asked."""
    ends: set[tuple[bool, int]] = set()
    for seed in range(60):
        part = Part(
            "part", lambda text, finished: math.nan if "a" in text else 0.0, range=(0.0, 1.0)
        )
        guard = Policy(
            objective=part,
            acceptance=Acceptance(schedule=Constant(1.0), max_attempts=8, on_exhausted="refuse"),
            segment_size=SEGMENT_SIZE,
            max_candidates=1,
        )
        [(_, report)] = transcripts(guard, [seed], lazy=True)
        failed = ["a" in text for (text,) in part.asked]
        in_a_row = [failed[at : at + 3] == [True] * 3 for at in range(len(failed))]
        assert report.num_attempts == (in_a_row.index(True) + 3 if any(in_a_row) else 8)
        assert report.num_failures == sum(failed)
        ends.add((any(in_a_row), sum(failed)))
    assert {(True, 3), (True, 4), (False, 3), (False, 4)} <= ends


class Timed(Part):
    """Says how long it takes."""

    def __init__(self, name: str, function: Any, *, seconds: float | None, **settings: Any) -> None:
        super().__init__(name, function, **settings)
        self.scorer.seconds = lambda num_tokens: seconds  # type: ignore[method-assign]


def test_what_takes_less_time_is_asked_first_and_more_is_drafted_for_it() -> None:
    """Seconds where they were measured, else the cost in steps of the language model: 1 s each."""

    def run(of_most: float | None, of_rest: float | None) -> tuple[list[Any], int, int, int]:
        parts = parts_of(costs=(1.5, 1.0)) | {
            "most": Timed("most", most, seconds=of_most, cost=1.5),
            "rest": Timed("rest", rest, seconds=of_rest, cost=1.0),
        }
        guard = dataclasses.replace(guard_of(parts, "fallback"), adaptive=True, max_candidates=3)
        found = transcripts(guard, range(40), lazy=True)
        return found, *(parts[name].num_asked for name in ("harmless", "most", "rest"))

    replies, _, of_most, of_rest = run(0.1, 0.2)
    assert of_rest < of_most
    expected = run(None, None)
    assert expected[0] == replies
    assert expected[3] >= expected[2]
    odd = (math.nan, math.inf, -1.0, "long")
    for times in (
        (1.0, None),
        (None, 2.0),
        (1e-9, 1e-9),
        (1e9, 1e9),
        *((1.0, each) for each in odd),
    ):
        assert run(*times)[0] == replies  # type: ignore[arg-type]


def test_fewer_are_drafted_at_once_where_judging_takes_long() -> None:
    model = ScriptedLanguageModel(script)
    asked: list[int] = []

    def drafted(seconds: float) -> int:
        part = Timed("value", value, seconds=seconds)
        part.scorer.seconds = lambda count: asked.append(count) or seconds  # type: ignore[method-assign, func-returns-value]
        guard = dataclasses.replace(
            policy("constant", "refuse", count=3), objective=part, constraints=(), adaptive=True
        )
        rows = [
            Row(
                prefix=Prefix([10]),
                subject=Subject(()),
                policy=guard,
                sampling=Sampling(),
                seed=seed,
                max_tokens=MAX_TOKENS,
                decode=model.decode,
                tell=lambda event: None,
            )
            for seed in range(4)
        ]
        for row in rows:
            row.prepare()
        [count] = set(decoder._counts(model, rows, lazy=False))
        return count

    assert drafted(1e-9) > 1
    assert drafted(1e9) == 1
    assert asked == [4 * SEGMENT_SIZE] * 2  # once for all rows


def test_a_scorer_that_cannot_tell_how_long_it_takes_still_judges() -> None:
    parts = parts_of()

    def unknown(num_tokens: int) -> float:
        raise OSError("a path of somebody's")

    expected = transcripts(guard_of(parts, "fallback"), range(10), lazy=True)
    for part in parts.values():
        part.scorer.seconds = unknown  # type: ignore[method-assign]
    guard = dataclasses.replace(guard_of(parts, "fallback"), adaptive=True)
    assert transcripts(guard, range(10), lazy=True) == expected
