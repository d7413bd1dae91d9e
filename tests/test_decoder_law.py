"""The decoder's law, by enumeration: whole replies of a toy model, each with its exact chance.

The twin below is written from the rule in words and shares no code with the decoder. Where a
frequency is compared with a law, the chance that the test fails by accident is stated.
"""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from langchain_stars import decoder
from langchain_stars.acceptance import Acceptance, Calibrated, Constant, Linear, Schedule
from langchain_stars.decoder import Delta, Event, GuardExhausted, Policy, Report, Row, advance
from langchain_stars.judging import Workers
from langchain_stars.language_models.base import Prefix, Sampling
from langchain_stars.rewards.base import Subject
from langchain_stars.testing import ScriptedLanguageModel, TableReward

FALSE_ALARM = 1e-6
"""Chance, over all tests of this file together, that one fails although the law holds."""

NUM_TESTS = 40
"""An upper bound of the chi-square tests in this file; each has FALSE_ALARM / NUM_TESTS."""

SEGMENT_SIZE = 2
MAX_TOKENS = 5
MAX_ATTEMPTS = 3
BETA = 0.7
REFUSAL = "#"

REWARDS = {"a": 0.4, "b": -0.5, "c": 1.0}
BIGRAMS = {"ab": 0.9, "bc": 0.6, "ca": -1.3, "cc": -0.8, "ba": 0.5}


def script(completion: str) -> dict[str | bytes, float]:
    """Three tokens and an end, with chances that depend on the last token."""
    return {
        "": {"a": 0.4, "b": 0.35, "c": 0.2, "": 0.05},
        "a": {"a": 0.2, "b": 0.5, "c": 0.2, "": 0.1},
        "b": {"a": 0.3, "b": 0.3, "c": 0.3, "": 0.1},
        "c": {"a": 0.45, "b": 0.25, "c": 0.1, "": 0.2},
    }[completion[-1:]]  # type: ignore[return-value]


def value(text: str, finished: bool) -> float:
    """A reward with interactions, on which the whole prefix matters."""
    singles = sum(REWARDS[letter] for letter in text)
    pairs = sum(BIGRAMS.get(text[i : i + 2], 0.0) for i in range(len(text) - 1))
    return singles + pairs + (0.3 if finished and len(text) > 2 else 0.0)


def harmless(text: str, finished: bool) -> float:
    """A constraint: two c in a row are out, and so is an early end after b."""
    return 0.0 if "cc" in text or (finished and text.endswith("b") and len(text) < 3) else 1.0


SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(1.2),
    "linear": Linear(target=2.5, alpha=0.25, horizon=6),
    "calibrated": Calibrated(thresholds=(0.5, 1.6, 2.4), segment_size=SEGMENT_SIZE),
}


def policy(schedule: str, on_exhausted: str, *, count: int, beta: float = BETA) -> Policy:
    return Policy(
        objective=TableReward(value, name="value"),
        constraints=(TableReward(harmless, name="harmless") >= 0.5,),
        acceptance=Acceptance(
            schedule=SCHEDULES[schedule],
            beta=beta,
            max_attempts=MAX_ATTEMPTS,
            on_exhausted=on_exhausted,  # type: ignore[arg-type]
        ),
        segment_size=SEGMENT_SIZE,
        max_candidates=count,
        adaptive=False,
        refusal_message=REFUSAL,
    )


# The twin


def candidates(text: str, size: int) -> Iterator[tuple[str, bool, float]]:
    """Yield what a segment can add, whether it ends the reply, and its chance."""

    def walk(added: str, chance: float) -> Iterator[tuple[str, bool, float]]:
        if len(added) == size:
            yield added, False, chance
            return
        for token, weight in script(text + added).items():
            if token == "":
                yield added, True, chance * weight
            else:
                yield from walk(added + str(token), chance * weight)

    yield from walk("", 1.0)


def threshold(schedule: str, num_tokens: int) -> float:
    planned = num_tokens + SEGMENT_SIZE
    if schedule == "constant":
        return 1.2
    if schedule == "calibrated":
        return (0.5, 1.6, 2.4)[min(2, math.ceil(planned / SEGMENT_SIZE) - 1)]
    start = 0.75 * value("", False) + 0.25 * 2.5
    return min(2.5, start + min(1.0, planned / 6) * (2.5 - start))


def law(schedule: str, on_exhausted: str, *, beta: float = BETA) -> dict[str, float]:
    """Return the chance of every whole reply; a refusal ends in `#`, an exception in `!`."""
    replies: dict[str, float] = defaultdict(float)

    def end(text: str, chance: float) -> None:
        replies[text + ("!" if on_exhausted == "raise" else "\n\n#" if text else "#")] += chance

    def walk(text: str, chance: float) -> None:
        size = min(SEGMENT_SIZE, MAX_TOKENS - len(text))
        tau = threshold(schedule, len(text))
        kinds = []
        for added, finished, weight in candidates(text, size):
            reward = value(text + added, finished)
            holds = harmless(text + added, finished) >= 0.5
            if beta:
                odds = min(1.0, math.exp((reward - tau) / beta)) if holds else 0.0
            else:
                odds = float(reward >= tau) if holds else 0.0
            kinds.append((added, finished, weight, reward, holds, odds))
        accepted = sum(weight * odds for *_, weight, _, _, odds in kinds)
        within = sum((1 - accepted) ** n for n in range(MAX_ATTEMPTS))
        kept: dict[tuple[str, bool], float] = defaultdict(float)
        for added, finished, weight, _, _, odds in kinds:
            kept[added, finished] += weight * odds * within
        if on_exhausted in ("refuse", "raise"):
            end(text, chance * (1 - accepted) ** MAX_ATTEMPTS)
        else:
            for drawn in itertools.product(kinds, repeat=MAX_ATTEMPTS):
                odds_of_all = math.prod(kind[2] * (1 - kind[5]) for kind in drawn)
                if odds_of_all == 0:
                    continue
                pool = [kind for kind in drawn if kind[4]]
                if not pool:
                    end(text, chance * odds_of_all)
                elif on_exhausted == "best" or not beta:
                    best = max(pool, key=lambda kind: kind[3])  # the first of the best
                    kept[best[0], best[1]] += odds_of_all
                else:
                    total = sum(math.exp(kind[3] / beta) for kind in pool)
                    for kind in pool:
                        kept[kind[0], kind[1]] += odds_of_all * math.exp(kind[3] / beta) / total
        for (added, finished), odds in kept.items():
            if odds == 0:
                continue
            longer = text + added
            if finished or len(longer) == MAX_TOKENS:
                replies[longer + ("." if finished else "")] += chance * odds
            else:
                walk(longer, chance * odds)

    walk("", 1.0)
    assert abs(sum(replies.values()) - 1) < 1e-9
    return replies


# The decoder


def decode(
    a_policy: Policy | None,
    seeds: Sequence[int],
    *,
    num_rows: int = 32,
    model: ScriptedLanguageModel | None = None,
    max_tokens: int = MAX_TOKENS,
    stop: Sequence[str] = (),
    lazy: bool = False,
) -> list[tuple[str, Report | Exception]]:
    """Return the reply for each seed, decoded by the real decoder, `num_rows` at a time."""
    model = model or ScriptedLanguageModel(script)
    workers = Workers()
    outcomes: dict[int, list[Event]] = {}
    waiting = list(reversed(seeds))
    rows: list[Row] = []
    while rows or waiting:
        while waiting and len(rows) < num_rows:
            seed = waiting.pop()
            outcomes[seed] = []
            rows.append(
                Row(
                    prefix=Prefix([10]),
                    subject=Subject(({"role": "user", "content": ""},)),
                    policy=a_policy,
                    sampling=Sampling(),
                    seed=seed,
                    max_tokens=max_tokens,
                    decode=model.decode,
                    tell=outcomes[seed].append,
                    stop=stop,
                    segment_size=SEGMENT_SIZE,
                )
            )
        for _ in advance(model, rows, workers=workers, notify=lambda: None, lazy=lazy):
            pass
        rows = [row for row in rows if not row.ended]
    replies = []
    for seed in seeds:
        *deltas, last = outcomes[seed]
        assert all(isinstance(delta, Delta) for delta in deltas)
        assert not isinstance(last, Delta)
        replies.append(("".join(delta.text for delta in deltas if isinstance(delta, Delta)), last))
    return replies


def spelled(text: str, last: Report | Exception) -> str:
    if isinstance(last, GuardExhausted):
        return text + "!"
    assert isinstance(last, Report)
    return text + ("." if last.finish_reason == "stop" else "")


def chi_square(observed: Counter[str], expected: dict[str, float]) -> float:
    """Return the chance of a deviation as large as this; cells that expect under 5 are pooled."""
    total = sum(observed.values())
    assert set(observed) <= {text for text, chance in expected.items() if chance > 0}
    statistic, cells, rare_seen, rare_expected = 0.0, 0, 0, 0.0
    for text, chance in expected.items():
        if chance * total < 5:
            rare_seen += observed[text]
            rare_expected += chance * total
        else:
            statistic += (observed[text] - chance * total) ** 2 / (chance * total)
            cells += 1
    if rare_expected >= 5:
        statistic += (rare_seen - rare_expected) ** 2 / rare_expected
        cells += 1
    return float(
        torch.special.gammaincc(
            torch.tensor((cells - 1) / 2.0, dtype=torch.float64),
            torch.tensor(statistic / 2.0, dtype=torch.float64),
        )
    )


def frequencies(
    a_policy: Policy, *, num_replies: int, first_seed: int = 0, num_rows: int = 32
) -> Counter[str]:
    seeds = range(first_seed, first_seed + num_replies)
    return Counter(spelled(*reply) for reply in decode(a_policy, seeds, num_rows=num_rows))


CASES = [
    (schedule, on_exhausted)
    for schedule in SCHEDULES
    for on_exhausted in ("fallback", "best", "refuse", "raise")
]


@pytest.mark.parametrize(("schedule", "on_exhausted"), CASES)
def test_replies_have_the_law_of_the_rule(schedule: str, on_exhausted: str) -> None:
    """False alarm: FALSE_ALARM / NUM_TESTS for each of the 12 cases."""
    seen = frequencies(policy(schedule, on_exhausted, count=1), num_replies=1500)
    assert chi_square(seen, law(schedule, on_exhausted)) > FALSE_ALARM / NUM_TESTS


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 32])
def test_replies_have_the_law_of_the_rule_however_they_are_scheduled(
    count: int, num_rows: int
) -> None:
    """False alarm: FALSE_ALARM / NUM_TESTS for each of the 6 cases, with seeds of their own."""
    seen = frequencies(
        policy("linear", "fallback", count=count),
        num_replies=2500,
        first_seed=10_000 * count + 100_000 * num_rows,
        num_rows=num_rows,
    )
    assert chi_square(seen, law("linear", "fallback")) > FALSE_ALARM / NUM_TESTS


@pytest.mark.parametrize(
    ("count", "lazy", "num_rows"),
    [(1, False, 1), (2, True, 32), (4, False, 1), (4, True, 32), (8, False, 32)],
)
@pytest.mark.parametrize(("schedule", "on_exhausted"), CASES)
def test_a_reply_does_not_depend_on_how_many_are_drafted_or_judged_at_once(
    schedule: str, on_exhausted: str, count: int, lazy: bool, num_rows: int
) -> None:
    """So the law that is checked for one at a time, above, is that of every way to schedule it."""
    seeds = range(150)
    one = decode(policy(schedule, on_exhausted, count=1), seeds, num_rows=7)
    guard = policy(schedule, on_exhausted, count=count)
    many = decode(guard, seeds, num_rows=num_rows, lazy=lazy)
    assert [text for text, _ in one] == [text for text, _ in many]
    for (_, a), (_, b) in zip(one, many, strict=True):
        if isinstance(a, Report):
            assert isinstance(b, Report)
            assert a.segments == b.segments
            assert a.num_rejected_tokens == b.num_rejected_tokens
        else:
            assert str(a) == str(b)


def test_a_hard_cut_has_the_law_of_the_rule() -> None:
    """beta = 0, with best-of-pool fallbacks. False alarm: FALSE_ALARM / NUM_TESTS."""
    seen = frequencies(policy("constant", "fallback", count=2, beta=0.0), num_replies=1500)
    assert chi_square(seen, law("constant", "fallback", beta=0.0)) > FALSE_ALARM / NUM_TESTS


# The test has power: mutants of the decoder fail it


def best_of_the_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the candidates of a round that are accepted, keep the best and not the first."""
    choose = Row.choose

    def mutant(self: Row) -> None:
        assert self.inquiry is not None
        inquiry, proposed = self.inquiry, self._proposed
        rated = []
        for place, candidate, text in proposed:
            judged, bound = self._judge(place, candidate, text, inquiry)
            if isinstance(judged, decoder._Judged) and bound is None:
                rated.append((judged.reward, place))
        if rated:
            self._proposed = [proposed[max(rated)[1]]]
        choose(self)

    monkeypatch.setattr(Row, "choose", mutant)


def one_u_for_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide on every attempt of a segment with the same number."""
    draw = decoder.acceptance_uniform
    monkeypatch.setattr(
        decoder,
        "acceptance_uniform",
        lambda *, seed, segment, attempt: draw(seed=seed, segment=segment, attempt=1),
    )


def fallback_from_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget, at exhaustion, the attempts of earlier rounds."""
    choose = Row.choose

    def mutant(self: Row) -> None:
        self._current.pool.clear()
        choose(self)

    monkeypatch.setattr(Row, "choose", mutant)


def attempts_counted_per_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a round of several candidates count as one attempt."""
    choose = Row.choose

    def mutant(self: Row) -> None:
        visit = self._current
        before = visit.attempts
        visit.first += len(self._proposed) - 1
        visit.attempts = -1_000
        choose(self)
        if self._visit is visit:
            visit.attempts = before + 1
            if visit.attempts >= MAX_ATTEMPTS:
                self._exhaust()

    monkeypatch.setattr(Row, "choose", mutant)


@pytest.mark.parametrize(
    ("mutant", "count", "on_exhausted", "num_replies"),
    [
        (best_of_the_accepted, 3, "fallback", 1500),
        (one_u_for_all_attempts, 2, "refuse", 1500),
        (fallback_from_the_last_round, 2, "fallback", 6000),
        (attempts_counted_per_round, 2, "refuse", 1500),
    ],
)
def test_mutants_of_the_decoder_do_not_have_the_law(
    mutant: Callable[[pytest.MonkeyPatch], None],
    count: int,
    on_exhausted: str,
    num_replies: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each mutant is told from the rule at the very level that the rule passes."""
    mutant(monkeypatch)
    seen = frequencies(policy("linear", on_exhausted, count=count), num_replies=num_replies)
    assert chi_square(seen, law("linear", on_exhausted)) < FALSE_ALARM / NUM_TESTS


def test_an_accepting_guard_gives_the_unguarded_reply() -> None:
    guard = Policy(
        objective=TableReward(lambda text: 0.0, name="flat"),
        acceptance=Acceptance(schedule=Constant(0.0)),
        segment_size=SEGMENT_SIZE,
    )
    seeds = range(200)
    guarded, unguarded = decode(guard, seeds), decode(None, seeds)
    assert [text for text, _ in guarded] == [text for text, _ in unguarded]


def test_an_unguarded_reply_has_the_law_of_the_language_model() -> None:
    """False alarm: FALSE_ALARM / NUM_TESTS."""

    def walk(text: str, chance: float) -> Iterator[tuple[str, float]]:
        for added, finished, weight in candidates(text, MAX_TOKENS):
            yield text + added + ("." if finished else ""), chance * weight

    expected: dict[str, float] = defaultdict(float)
    for text, chance in walk("", 1.0):
        expected[text] += chance
    seen = Counter(spelled(*reply) for reply in decode(None, range(3000)))
    assert chi_square(seen, expected) > FALSE_ALARM / NUM_TESTS


def held_back(count: int, **settings: Any) -> Policy:
    return dataclasses.replace(policy("constant", "refuse", count=count), holdback=1, **settings)


@pytest.mark.parametrize(("count", "lazy"), [(2, False), (4, False), (4, True)])
def test_taking_back_does_not_depend_on_how_many_are_drafted_at_once(
    count: int, lazy: bool
) -> None:
    seeds = range(300)
    one = decode(held_back(1), seeds)
    many = decode(held_back(count), seeds, lazy=lazy)
    assert [text for text, _ in one] == [text for text, _ in many]
    assert any(isinstance(last, Report) and last.num_takebacks for _, last in one)


def test_a_lazy_reward_is_asked_about_no_candidate_after_the_one_that_is_kept() -> None:
    def asked(lazy: bool) -> int:
        count = 0

        def counting(text: str, finished: bool) -> float:
            nonlocal count
            count += bool(text) or finished
            return value(text, finished)

        guard = dataclasses.replace(
            policy("linear", "fallback", count=3),
            objective=TableReward(counting, name="value"),
            constraints=(),
        )
        replies = decode(guard, range(60), lazy=lazy)
        attempts = sum(last.num_attempts for _, last in replies if isinstance(last, Report))
        assert count == attempts if lazy else count > attempts
        return attempts

    assert asked(True) == asked(False)
