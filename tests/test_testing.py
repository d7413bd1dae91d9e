"""The public checks: what keeps the contracts passes them, and what breaks one is told so."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from langchain_stars.language_models.base import Request
from langchain_stars.rewards import SequenceReward, as_reward
from langchain_stars.testing import (
    ScriptedLanguageModel,
    TableReward,
    check_language_model,
    check_reward,
)


def coin(completion: str) -> dict[str | bytes, float]:
    return {"a": 0.5, "b": 0.5}


def lengths(completions: Sequence[Any], **_: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def test_a_scripted_language_model_keeps_the_contract() -> None:
    check_language_model(ScriptedLanguageModel(coin))


def test_rewards_of_every_kind_keep_the_contract(reward_folder: Path) -> None:
    table = TableReward(lambda text: float(len(text)), name="length")
    classifier = SequenceReward(str(reward_folder), device="cpu")
    for reward in (table, as_reward(lengths), classifier, table + 0.5 * classifier):
        check_reward(reward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_fails_the_check(value: float) -> None:
    with pytest.raises(AssertionError, match="finite"):
        check_reward(TableReward(lambda text: value))


def test_a_reward_that_depends_on_who_is_judged_with_it_fails_the_check() -> None:
    def ranks(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(place) for place in range(len(completions))]

    with pytest.raises(AssertionError, match="judged with it"):
        check_reward(as_reward(ranks))


class Counting(ScriptedLanguageModel):
    """Draws something else when asked for more."""

    def draw(self, requests: Sequence[Request]) -> Any:
        return super().draw([dataclasses.replace(r, seed=r.seed + r.count) for r in requests])


class Neighbourly(ScriptedLanguageModel):
    """Draws something else in company."""

    def draw(self, requests: Sequence[Request]) -> Any:
        return super().draw([dataclasses.replace(r, seed=r.seed + len(requests)) for r in requests])


@pytest.mark.parametrize(("kind", "clause"), [(Counting, "how many"), (Neighbourly, "other rows")])
def test_candidates_that_depend_on_anything_else_fail_the_check(
    kind: type[ScriptedLanguageModel], clause: str
) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_language_model(kind(coin))
