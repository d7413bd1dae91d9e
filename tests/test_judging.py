"""Workers that call rewards: deadlines, hung calls, limits."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from langchain_stars.judging import Inquiry, Workers, judging
from langchain_stars.rewards.base import (
    Completion,
    Leaf,
    Raw,
    Scorer,
    ScoreRequest,
    Subject,
)
from langchain_stars.testing import TableReward


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


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
@pytest.mark.parametrize("on_device", [True, False])
def test_whatever_a_reward_raises_only_rejects(error: type[BaseException], on_device: bool) -> None:
    def function(texts: list[str]) -> list[float]:
        raise error

    one = inquiry(Asked(function, on_device=on_device), texts=("a",))
    settle(one, workers=Workers())
    assert one.values(0) is None


@pytest.mark.parametrize("on_device", [True, False])
def test_a_wrong_number_of_answers_is_no_answer(on_device: bool) -> None:
    one = inquiry(Asked(lambda texts: [1.0] * (len(texts) - 1), on_device=on_device))
    settle(one, workers=Workers())
    assert [one.values(place) for place in range(2)] == [None, None]
