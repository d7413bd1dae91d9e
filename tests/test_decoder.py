"""The rule, line by line, on toy models: ends, floors, failures, hold-back, counts."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from test_decoder_law import MAX_TOKENS, SEGMENT_SIZE, decode, policy, script, value

from langchain_stars.acceptance import Acceptance, Constant, Linear
from langchain_stars.decoder import (
    Delta,
    GuardExhausted,
    Policy,
    ReplyFailedError,
    Report,
    Row,
    advance,
    settle,
)
from langchain_stars.judging import Workers
from langchain_stars.language_models.base import Prefix, Sampling
from langchain_stars.rewards.base import Subject
from langchain_stars.rewards.callables import as_reward
from langchain_stars.testing import ScriptedLanguageModel, TableReward


def guard(reward: Any, *, target: float = 0.0, **settings: Any) -> Policy:
    acceptance = {
        key: settings.pop(key)
        for key in ("max_attempts", "on_exhausted", "beta")
        if key in settings
    }
    return Policy(
        objective=reward,
        acceptance=Acceptance(schedule=Constant(target), **acceptance),
        segment_size=settings.pop("segment_size", 1),
        adaptive=False,
        max_candidates=settings.pop("count", 2),
        refusal_message="(refused)",
        **settings,
    )


def certain(*tokens: str | bytes) -> Callable[[str], dict[str | bytes, float]]:
    """Return a script that says the tokens one after the other and ends."""

    def script_of(completion: str) -> dict[str | bytes, float]:
        said = b""
        for token in tokens:
            if completion == said.decode(errors="replace"):
                return {token: 1.0}
            said += token if isinstance(token, bytes) else token.encode()
        return {"": 1.0}

    return script_of


def drive(row: Row, model: ScriptedLanguageModel, workers: Workers) -> None:
    """Run a row to its end, waiting for rewards in workers."""
    while not row.ended:
        if row.inquiry is not None:
            settle(row)
            time.sleep(0.001)
            continue
        for _ in advance(model, [row], workers=workers, notify=lambda: None):
            pass


def reply(
    a_policy: Policy | None,
    a_script: Any = script,
    *,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    stop: tuple[str, ...] = (),
) -> tuple[list[Delta], Report | Exception]:
    events: list[Any] = []
    model = ScriptedLanguageModel(a_script)
    row = Row(
        prefix=Prefix([10]),
        subject=Subject(({"role": "user", "content": "hi"},)),
        policy=a_policy,
        sampling=Sampling(),
        seed=seed,
        max_tokens=max_tokens,
        decode=model.decode,
        tell=events.append,
        stop=stop,
        segment_size=SEGMENT_SIZE,
    )
    drive(row, model, Workers())
    return events[:-1], events[-1]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


# Ends


def test_a_candidate_that_ends_the_reply_is_judged_as_finished() -> None:
    asked: list[tuple[str, bool]] = []

    def reward(text: str, finished: bool) -> float:
        asked.append((text, finished))
        return 0.0

    deltas, report = reply(guard(TableReward(reward), segment_size=4), certain("a", "b"))
    assert asked == [("ab", True)]
    assert text_of(deltas) == "ab"
    assert isinstance(report, Report)
    assert report.finish_reason == "stop"


def test_the_last_token_allowed_leaves_the_reply_open() -> None:
    asked: list[tuple[str, bool]] = []

    def reward(text: str, finished: bool) -> float:
        asked.append((text, finished))
        return 0.0

    deltas, report = reply(
        guard(TableReward(reward), segment_size=2, count=1),
        certain("a", "b", "c", "d"),
        max_tokens=3,
    )
    assert asked == [("ab", False), ("abc", False)]
    assert text_of(deltas) == "abc"
    assert isinstance(report, Report)
    assert report.finish_reason == "length"


def test_an_incomplete_character_at_the_last_token_is_judged_as_it_is_shown() -> None:
    asked: list[str] = []
    deltas, _ = reply(
        guard(TableReward(lambda text: asked.append(text) or 0.0), count=1),
        lambda text: {b"\xe2": 1.0} if text == "a" else {"a": 1.0},
        max_tokens=2,
    )
    assert asked == ["a", "a\ufffd"]
    assert text_of(deltas) == "a\ufffd"


def test_a_stop_string_that_began_in_accepted_text_cuts_the_whole_completion() -> None:
    asked: list[tuple[str, bool]] = []

    def reward(text: str, finished: bool) -> float:
        asked.append((text, finished))
        return 0.0

    deltas, report = reply(
        guard(TableReward(reward), count=1),
        certain("a", "S", "T", "b"),
        max_tokens=9,
        stop=("ST",),
    )
    assert asked == [("a", False), ("aS", False), ("a", True)]
    assert [delta.text for delta in deltas] == ["a", "", ""]
    assert isinstance(report, Report)
    assert report.finish_reason == "stop"
    assert [segment.num_tokens for segment in report.segments] == [1, 1, 1]


def test_the_open_prefix_is_restored_where_the_completion_cut_at_a_stop_string_is_rejected() -> (
    None
):
    def two_ways(text: str) -> dict[str | bytes, float]:
        return {"aS": {"T": 0.5, "u": 0.5}, "a": {"S": 1.0}, "": {"a": 1.0}}.get(text, {"": 1.0})  # type: ignore[return-value]

    def reward(text: str, finished: bool) -> float:
        return -1.0 if text == "a" and finished else 0.0

    for seed in range(20):
        deltas, report = reply(
            guard(TableReward(reward), count=2), two_ways, max_tokens=9, stop=("ST",), seed=seed
        )
        assert text_of(deltas) == "aSu"
        assert isinstance(report, Report)


# Floors


@pytest.mark.parametrize("on_exhausted", ["fallback", "best", "refuse"])
def test_a_floor_holds_whatever_the_objective_says(on_exhausted: str) -> None:
    likes_c = TableReward(lambda text: 10.0 * text.count("c"), name="likes c")
    no_c = TableReward(lambda text: -float("c" in text), name="no c") >= 0
    guarded = dataclasses.replace(
        guard(likes_c, target=50.0, on_exhausted=on_exhausted, max_attempts=4), constraints=(no_c,)
    )
    replies = decode(guarded, range(100))
    assert not any("c" in text.replace("(refused)", "") for text, _ in replies)


def test_constraints_alone_accept_when_all_floors_hold_and_refuse_when_none_can() -> None:
    only_a = TableReward(lambda text: float(set(text) <= {"a"}), name="only a") >= 1
    some = Policy(constraints=(only_a,), segment_size=1, refusal_message="(refused)")
    for text, report in decode(some, range(60)):
        assert isinstance(report, Report)
        assert set(text.split("\n\n(")[0].split("(")[0]) <= {"a"}
    never = Policy(
        constraints=(TableReward(lambda text: 0.0, name="never") >= 1,), refusal_message="(refused)"
    )
    deltas, report = reply(never)
    assert text_of(deltas) == "(refused)"
    assert isinstance(report, Report)
    assert (report.finish_reason, report.num_attempts) == ("refusal", 20)


def test_the_report_names_what_rejected_most() -> None:
    likes_c = TableReward(lambda text: float(text.count("c")), name="likes c")
    no_b = TableReward(lambda text: -float("b" in text), name="no b") >= 0
    guarded = dataclasses.replace(guard(likes_c, target=1.0, segment_size=1), constraints=(no_b,))
    bounds = set()
    for _, report in decode(guarded, range(60)):
        assert isinstance(report, Report)
        bounds |= {segment.bound for segment in report.segments}
    assert bounds == {"likes c", "no b >= 0", None}


# Failures


FAILURES: dict[str, Callable[[str], float]] = {
    "raises": lambda text: 1 / 0,
    "nan": lambda text: math.nan,
    "infinite": lambda text: math.inf,
    "none": lambda text: None,  # type: ignore[return-value,arg-type]
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_reward_that_fails_three_times_in_a_row_ends_the_reply(
    kind: str, count: int, on_device: bool
) -> None:
    function = FAILURES[kind]
    reward: Any = (
        TableReward(function)
        if on_device
        else as_reward(lambda completions, **_: [function(c[0]["content"]) for c in completions])
    )
    deltas, report = reply(guard(reward, count=count))
    assert text_of(deltas) == "(refused)"
    assert isinstance(report, Report)
    assert (report.finish_reason, report.num_attempts, report.num_failures) == ("refusal", 3, 3)
    _, error = reply(guard(reward, count=count, on_exhausted="raise"))
    assert isinstance(error, GuardExhausted)
    assert (error.num_attempts, error.num_failures) == (3, 3)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert error.__traceback__ is None


def test_what_fails_does_not_depend_on_how_many_are_judged_at_once() -> None:
    """A reward that fails on some texts rejects those, and not their neighbours in a round."""

    def sometimes(text: str) -> float:
        if text.endswith("b"):
            raise ValueError
        return value(text, False)

    def policy_of(count: int, on_device: bool) -> Policy:
        reward: Any = (
            TableReward(sometimes)
            if on_device
            else as_reward(
                lambda completions, **_: [sometimes(c[0]["content"]) for c in completions]
            )
        )
        return guard(reward, target=1.0, beta=0.5, count=count, max_attempts=6)

    def run(count: int, on_device: bool) -> list[tuple[str, int, int]]:
        found = []
        for seed in range(40):
            deltas, report = reply(policy_of(count, on_device), seed=seed)
            assert isinstance(report, Report)
            found.append((text_of(deltas), report.num_attempts, report.num_failures))
        return found

    expected = run(1, on_device=True)
    assert run(4, on_device=True) == expected
    assert run(1, on_device=False) == expected
    assert run(4, on_device=False) == expected
    assert any(failures for *_, failures in expected)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_reward_that_returns_the_wrong_number_rejects(number: int) -> None:
    deltas, report = reply(guard(as_reward(lambda **_: [1.0] * number), count=2))
    assert isinstance(report, Report)
    if number == 1:  # right for each of them alone
        assert report.finish_reason in ("stop", "length")
    else:
        assert (report.finish_reason, report.num_failures) == ("refusal", 3)
        assert text_of(deltas) == "(refused)"


def test_a_reward_that_hangs_past_its_deadline_rejects_and_is_counted() -> None:
    def hang(**_: Any) -> list[float]:
        time.sleep(0.5)
        return [1.0]

    begin = time.monotonic()
    deltas, report = reply(guard(as_reward(hang), count=1, reward_timeout=0.05))
    assert time.monotonic() - begin < 2
    assert text_of(deltas) == "(refused)"
    assert isinstance(report, Report)
    assert report.num_failures == 3


def test_a_prompt_reward_that_fails_asks_for_the_target() -> None:
    def reward(text: str) -> float:
        return math.nan if not text else 1.0

    schedule = Linear(target=1.0, alpha=0.5, horizon=4)
    guarded = Policy(
        objective=TableReward(reward), acceptance=Acceptance(schedule=schedule), segment_size=1
    )
    _, report = reply(guarded)
    assert isinstance(report, Report)
    assert report.prompt_reward is None
    assert report.num_failures == 1
    assert all(segment.threshold == 1.0 for segment in report.segments)


def test_rewards_in_workers_give_the_replies_that_rewards_on_the_device_give() -> None:
    def in_worker(completions: list[Any], finished: list[bool], **_: Any) -> list[float]:
        return [value(c[0]["content"], f) for c, f in zip(completions, finished, strict=True)]

    on_device = policy("linear", "fallback", count=2)
    assert on_device.objective is not None
    worker = dataclasses.replace(on_device, objective=as_reward(in_worker, name="value"))
    for seed in range(25):
        a, report_a = reply(on_device, seed=seed)
        b, report_b = reply(worker, seed=seed)
        assert text_of(a) == text_of(b)
        assert isinstance(report_a, Report)
        assert isinstance(report_b, Report)
        assert report_a.segments == report_b.segments


# Hold-back


def test_what_is_held_back_is_not_shown_before_its_followers_are_accepted() -> None:
    flat = TableReward(lambda text: 0.0)
    deltas, _ = reply(guard(flat, holdback=2), certain(*"abcde"), max_tokens=5)
    assert [delta.text for delta in deltas] == ["a", "b", "c", "d", "e"]
    assert [delta.segment.index for delta in deltas if delta.segment] == [0, 1, 2, 3, 4]


def test_held_segments_are_taken_back_before_the_reply_gives_up() -> None:
    """After `x` nothing is good enough, after `y` all is: the reply finds its way back."""

    def fork(text: str) -> dict[str | bytes, float]:
        if not text:
            return {"x": 0.5, "y": 0.5}
        return {"a": 0.5, "b": 0.5} if len(text) < 3 else {"": 1.0}

    def reward(text: str) -> float:
        return -1.0 if text.startswith("x") and len(text) > 1 else 0.0

    refusals = {holdback: 0 for holdback in (0, 1)}
    for holdback in refusals:
        for seed in range(40):
            guarded = guard(
                TableReward(reward),
                holdback=holdback,
                max_attempts=30,
                on_exhausted="refuse",
                max_takebacks=8,
            )
            deltas, report = reply(guarded, fork, seed=seed)
            assert isinstance(report, Report)
            refusals[holdback] += report.finish_reason == "refusal"
            if holdback:
                assert "x" not in text_of(deltas)
            assert report.num_drafted_tokens >= report.num_rejected_tokens
    assert refusals[0] > 10
    assert refusals[1] == 0


def test_takebacks_are_bounded() -> None:
    def reward(text: str) -> float:
        return -1.0 if len(text) > 1 else 0.0

    guarded = guard(
        TableReward(reward), holdback=1, max_attempts=4, on_exhausted="refuse", max_takebacks=2
    )
    deltas, report = reply(guarded, lambda text: {"a": 0.5, "b": 0.5})
    assert isinstance(report, Report)
    assert report.num_takebacks == 2
    assert report.finish_reason == "refusal"
    assert text_of(deltas) == "(refused)"
    assert report.segments == ()
    assert report.num_emitted_tokens == 0


# Counts


def test_the_counts_of_a_report_add_up() -> None:
    for (text, report), count in zip(
        decode(policy("linear", "fallback", count=1), range(60)), range(60), strict=True
    ):
        assert isinstance(report, Report), count
        if report.finish_reason == "refusal":
            continue
        assert sum(segment.num_tokens for segment in report.segments) == len(text)
        assert report.num_emitted_tokens == len(text)
        ended = report.finish_reason == "stop"
        assert report.num_drafted_tokens == report.num_rejected_tokens + len(text) + ended
        assert report.num_attempts == sum(segment.attempts for segment in report.segments)
        assert [segment.index for segment in report.segments] == list(range(len(report.segments)))
        assert report.num_fallbacks == sum(s.outcome == "fallback" for s in report.segments)


def test_deltas_of_an_unguarded_reply_come_token_by_token_and_add_up() -> None:
    events: list[Any] = []
    model = ScriptedLanguageModel(certain("a", b"\xe2", b"\x82\xac", "E", "N", "b", "END", "x"))
    row = Row(
        prefix=Prefix([10]),
        subject=Subject(()),
        policy=None,
        sampling=Sampling(),
        seed=0,
        max_tokens=20,
        decode=model.decode,
        tell=events.append,
        stop=("END",),
        segment_size=5,
        streamed=True,
    )
    drive(row, model, Workers())
    *deltas, report = events
    assert [delta.text for delta in deltas if delta.text] == ["a", "€", "ENb"]
    assert isinstance(report, Report)
    assert report.finish_reason == "stop"


# What goes wrong in one reply


def test_taking_back_a_fallback_leaves_the_pool_as_it_was() -> None:
    """Each attempt is in the pool once, so that the second draw has the weights of the rule."""
    pools: list[list[int]] = []
    take = Row._take_back

    def spy(row: Row) -> None:
        take(row)
        assert row._visit is not None
        pools.append([judged.number for judged in row._visit.pool])

    def reward(text: str) -> float:
        return -float(len(text))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Row, "_take_back", spy)
        guarded = guard(
            TableReward(reward), target=1.0, beta=1.0, holdback=1, max_attempts=3, count=1
        )
        for seed in range(10):
            _, report = reply(guarded, lambda text: {"a": 0.5, "b": 0.5}, seed=seed)
            assert isinstance(report, Report)
            assert report.num_fallbacks == sum(s.outcome == "fallback" for s in report.segments)
    assert pools
    assert all(len(pool) == len(set(pool)) for pool in pools)


class Silent(ScriptedLanguageModel):
    """Draws nothing for one of its rows."""

    def drafting(self, requests: Any) -> Any:
        proposals = yield from super().drafting(requests)
        return [
            [dataclasses.replace(one, token_ids=(), finished=False) for one in candidates]
            if request.seed == 1
            else candidates
            for request, candidates in zip(requests, proposals, strict=True)
        ]


class Fading(ScriptedLanguageModel):
    """Draws nothing for the third attempt of a segment."""

    def drafting(self, requests: Any) -> Any:
        proposals = yield from super().drafting(requests)
        return [
            [
                dataclasses.replace(one, token_ids=(), finished=False) if one.attempt == 3 else one
                for one in candidates
            ]
            for candidates in proposals
        ]


def test_a_reply_fails_when_its_turn_comes_to_an_attempt_without_tokens_and_not_before() -> None:
    def run(count: int) -> list[tuple[str, type]]:
        guarded = policy("linear", "refuse", count=count)
        replies = decode(guarded, range(60), model=Fading(script))
        return [(text, type(last)) for text, last in replies]

    one = run(1)
    assert run(4) == one
    assert {kind for _, kind in one} == {Report, ReplyFailedError}


def test_a_row_that_nothing_is_drawn_for_fails_alone() -> None:
    replies = decode(None, range(3), model=Silent(script))
    expected = decode(None, range(3))
    assert isinstance(replies[1][1], ReplyFailedError)
    assert [replies[0], replies[2]] == [expected[0], expected[2]]


def test_a_schedule_or_a_reward_that_breaks_ends_its_own_reply_only() -> None:
    class Broken(Constant):
        def threshold(self, num_tokens: int, prompt_reward: float | None) -> float:
            raise KeyError("somebody's words")

    events: dict[int, list[Any]] = {0: [], 1: []}
    model = ScriptedLanguageModel(script)
    flat = TableReward(lambda text: 0.0)
    rows = [
        Row(
            prefix=Prefix([10]),
            subject=Subject(()),
            policy=Policy(
                objective=flat, acceptance=Acceptance(schedule=schedule), segment_size=SEGMENT_SIZE
            ),
            sampling=Sampling(),
            seed=5,
            max_tokens=MAX_TOKENS,
            decode=model.decode,
            tell=events[place].append,
        )
        for place, schedule in enumerate([Broken(0.0), Constant(0.0)])
    ]
    while not all(row.ended for row in rows):
        waiting = [row for row in rows if not row.ended]
        for _ in advance(model, waiting, workers=Workers(), notify=lambda: None):
            pass
    assert isinstance(events[0][-1], ReplyFailedError)
    assert "words" not in str(events[0][-1])
    assert isinstance(events[1][-1], Report)
