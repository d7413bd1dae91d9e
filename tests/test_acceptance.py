"""Thresholds, odds, exhaustion: numbers only."""

import math
import random

import pytest

from langchain_stars.acceptance import (
    Acceptance,
    Calibrated,
    Constant,
    Linear,
    expected_accepted,
)
from langchain_stars.randomness import acceptance_uniform, drafting_uniforms, uniforms


def test_the_linear_threshold_starts_between_prompt_and_target_and_ends_at_the_target() -> None:
    linear = Linear(target=3.0, alpha=0.5, horizon=64)
    assert linear.threshold(16, 1.0) == pytest.approx(2.0 + 0.25 * 1.0)
    assert linear.threshold(64, 1.0) == 3.0
    assert linear.threshold(640, 1.0) == 3.0
    assert Linear(target=3.0, alpha=0.0, horizon=64).threshold(32, 1.0) == pytest.approx(2.0)
    assert Linear(target=3.0, alpha=1.0).threshold(1, -100.0) == 3.0


def test_a_prompt_above_the_target_asks_for_the_target() -> None:
    assert Linear(target=3.0, alpha=0.5, horizon=64).threshold(16, 9.0) == 3.0


@pytest.mark.parametrize("prompt_reward", [None, math.nan, math.inf, -math.inf])
def test_a_prompt_without_a_finite_reward_asks_for_the_target(prompt_reward: float | None) -> None:
    assert Linear(target=3.0, alpha=0.5).threshold(16, prompt_reward) == 3.0


def test_calibrated_thresholds_go_by_position_and_stay_at_the_last() -> None:
    calibrated = Calibrated(thresholds=(1.0, 2.0), segment_size=16)
    assert [calibrated.threshold(n, None) for n in (16, 17, 32, 48)] == [1.0, 2.0, 2.0, 2.0]


def test_soft_acceptance_has_the_odds_of_the_rule() -> None:
    """Binomial, 20,000 draws; a deviation of 5 sigma happens by chance once in a million."""
    acceptance = Acceptance(schedule=Constant(1.0), beta=0.5)
    chance = math.exp((0.6 - 1.0) / 0.5)
    draws = [acceptance_uniform(seed=s, segment=0, attempt=1) for s in range(20_000)]
    share = sum(acceptance.bar(1.0, u) <= 0.6 for u in draws) / len(draws)
    assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / len(draws))
    assert all(acceptance.bar(1.0, u) <= 1.0 for u in draws)


def test_large_shortfalls_and_small_u_do_not_overflow() -> None:
    acceptance = Acceptance(schedule=Constant(0.0), beta=1e-9)
    assert -1e300 < acceptance.bar(0.0, 2.0**-53) <= 0.0
    assert acceptance.choose_from_pool([1e300, -1e300], 1.0) == 0


def test_ties_in_the_pool_go_to_the_lowest_number() -> None:
    assert Acceptance(schedule=Constant(0.0), beta=0.0).choose_from_pool([1, 2, 2], 0.9) == 1
    best = Acceptance(schedule=Constant(0.0), beta=1.0, on_exhausted="best")
    assert best.choose_from_pool([1, 2, 2], 0.01) == 1


def test_the_pool_is_drawn_from_with_tilted_weights() -> None:
    """Binomial, 20,000 draws, 5 sigma."""
    acceptance = Acceptance(schedule=Constant(0.0), beta=0.7)
    weights = [math.exp(r / 0.7) for r in (0.0, 0.5, -1.0)]
    random.seed(0)
    seen = [0, 0, 0]
    for u in uniforms(b"test", 20_000, seed=3):
        seen[acceptance.choose_from_pool([0.0, 0.5, -1.0], u)] += 1
    for count, weight in zip(seen, weights, strict=True):
        chance = weight / sum(weights)
        assert abs(count / 20_000 - chance) < 5 * math.sqrt(chance * (1 - chance) / 20_000)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Acceptance(schedule=None, beta=-1), "beta"),
        (lambda: Acceptance(schedule=None, beta=math.nan), "beta"),
        (lambda: Acceptance(schedule=None, max_attempts=0), "max_attempts"),
        (lambda: Acceptance(schedule=None, on_exhausted="shrug"), "on_exhausted"),  # type: ignore[arg-type]
        (lambda: Linear(target=1.0, alpha=1.1), "alpha"),
        (lambda: Linear(target=math.inf), "target"),
        (lambda: Linear(target=1.0, horizon=0), "horizon"),
        (lambda: Constant(math.nan), "target"),
        (lambda: Calibrated(thresholds=(), segment_size=1), "thresholds"),
        (lambda: Calibrated(thresholds=(1.0,), segment_size=0), "segment_size"),
    ],
)
def test_a_setting_out_of_range_is_named(make: object, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()  # type: ignore[operator]


def test_numbers_follow_from_their_key_and_not_from_how_many_are_drawn() -> None:
    many = drafting_uniforms(40, seed=1, segment=2, attempt=3)
    assert drafting_uniforms(5, seed=1, segment=2, attempt=3) == many[:5]
    assert all(0 < u <= 1 for u in many)
    others = [
        drafting_uniforms(40, seed=2, segment=2, attempt=3),
        drafting_uniforms(40, seed=1, segment=3, attempt=3),
        drafting_uniforms(40, seed=1, segment=2, attempt=4),
        uniforms(b"accept", 40, 1, 2, 3),
    ]
    assert all(not set(many) & set(other) for other in others)


def test_uniform_numbers_are_uniform() -> None:
    """Chi-square with 63 degrees of freedom; 141 is exceeded by chance once in ten million."""
    numbers = [u for seed in range(800) for u in uniforms(b"test", 8, seed)]
    cells = [0] * 64
    for u in numbers:
        cells[min(63, int(u * 64))] += 1
    assert sum((cell - 100) ** 2 / 100 for cell in cells) < 141


def test_the_gain_of_more_candidates_is_the_chance_of_at_least_one() -> None:
    assert expected_accepted(0.5, 1) == 0.5
    assert expected_accepted(0.5, 3) == pytest.approx(1 - 0.125)
