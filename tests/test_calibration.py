"""Thresholds from the model's own replies."""

from pathlib import Path
from typing import Any

import pytest
from test_decoder_law import script, value

from langchain_stars.acceptance import Acceptance, Linear
from langchain_stars.calibration import Calibration, calibrate
from langchain_stars.decoder import Policy, Report
from langchain_stars.engine import Engine, Order
from langchain_stars.rewards.base import Reward
from langchain_stars.testing import ScriptedLanguageModel, TableReward

CHATS = [[{"role": "user", "content": f"prompt {number}"}] for number in range(12)]


def found(reward: Reward, engine: Engine, **settings: Any) -> Calibration:
    model = ScriptedLanguageModel(script)
    return calibrate(
        model,
        reward,
        CHATS,
        **{"segment_size": 1, "max_tokens": 6, "num_samples": 20, "engine": engine, **settings},
    )


@pytest.fixture(scope="module")
def engine() -> Any:
    an_engine = Engine("calibration")
    yield an_engine
    an_engine.close()


def attempts_under(policy: Policy, engine: Engine) -> float:
    model = ScriptedLanguageModel(script)
    attempts = segments = 0
    for seed in range(300):
        chat = CHATS[seed % len(CHATS)]
        reply = engine.reply(
            Order(
                language_model=model,
                chat=chat,
                prompt_ids=model.encode(chat),
                policy=policy,
                max_tokens=6,
                seed=10_000 + seed,
            )
        )
        for _ in reply:
            pass
        assert isinstance(reply.report, Report)
        attempts += reply.report.num_attempts
        segments += len(reply.report.segments)
    return attempts / segments


@pytest.mark.parametrize("mean_attempts", [1.5, 2.5])
def test_the_linear_schedule_takes_about_the_attempts_asked_for(
    mean_attempts: float, engine: Engine
) -> None:
    """A guard changes the prefixes it meets, so the two agree only roughly."""
    reward = TableReward(value, name="value")
    calibration = found(reward, engine, mean_attempts=mean_attempts)
    schedule = Linear(
        target=calibration.target, alpha=calibration.alpha, horizon=calibration.horizon
    )
    policy = Policy(
        objective=reward,
        acceptance=Acceptance(schedule=schedule, beta=calibration.beta),
        segment_size=1,
    )
    assert 1 < attempts_under(policy, engine) < 2 * mean_attempts


def test_higher_prices_buy_higher_thresholds(engine: Engine) -> None:
    reward = TableReward(value, name="value")
    cheap = found(reward, engine, mean_attempts=1.3)
    dear = found(reward, engine, mean_attempts=4.0)
    assert dear.target > cheap.target
    assert all(a > b for a, b in zip(dear.thresholds, cheap.thresholds, strict=True))
    assert cheap.positions == dear.positions


def test_what_is_saved_is_loaded(tmp_path: Path, engine: Engine) -> None:
    calibration = found(TableReward(value, name="value"), engine)
    calibration.save(tmp_path / "policy.json")
    assert Calibration.load(tmp_path / "policy.json") == calibration
    assert calibration.schedule.thresholds == calibration.thresholds
    assert list(tmp_path.iterdir()) == [tmp_path / "policy.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "target": 0}'])
def test_another_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"`path` must name.*other\.json"):
        Calibration.load(tmp_path / "other.json")


def test_a_reward_that_always_fails_is_named(engine: Engine) -> None:
    with pytest.raises(ValueError, match="broken"):
        found(TableReward(lambda text: 1 / 0, name="broken"), engine)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"mean_attempts": 1.0}, "mean_attempts"),
        ({"num_samples": 1}, "num_samples"),
        ({"beta": -1.0}, "beta"),
    ],
)
def test_a_setting_out_of_range_is_named(
    settings: dict[str, Any], name: str, engine: Engine
) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        found(TableReward(value), engine, **settings)
