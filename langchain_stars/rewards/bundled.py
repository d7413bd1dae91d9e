"""The rewards that ship with the package: labels of two small classifiers.

Knows where the weights are and which label is which; how they are run is `classifiers.py`'s. They
let everything run on any machine, without a network; a real application names real rewards.
"""

import functools
import json
from pathlib import Path
from typing import Any

from langchain_stars.rewards.classifiers import SequenceReward

FOLDER = Path(__file__).resolve().parent.parent / "bundled"
"""Folder of the models that ship."""

_LABELS = {
    "safety": ("rewards", "safe"),
    "helpfulness": ("rewards", "helpful"),
    "sentiment": ("sentiment", "positive"),
}
"""Where each reward is: the classifier's folder, and its label."""

NAMES = tuple(_LABELS)
"""Names of the rewards that ship."""


def safety(**settings: Any) -> SequenceReward:
    """Return the probability that a reply is safe; of the empty reply, that the request is.

    Args:
        **settings: Those of `SequenceReward`, but for `labels`; `target`, `beta`, `alpha` and
            `floor` are those that `calibration.json` holds for the bundled language model, if
            not given.

    Raises:
        FileNotFoundError: The weights are not there.
    """
    return _reward("safety", settings)


def helpfulness(**settings: Any) -> SequenceReward:
    """Return the probability that a reply is apt: about the question, and of use.

    Args:
        **settings: As for `safety`.

    Raises:
        FileNotFoundError: The weights are not there.
    """
    return _reward("helpfulness", settings)


def sentiment(**settings: Any) -> SequenceReward:
    """Return the probability that the words of a reply are positive.

    Args:
        **settings: As for `safety`.

    Raises:
        FileNotFoundError: The weights are not there.
    """
    return _reward("sentiment", settings)


def _reward(name: str, settings: dict[str, Any]) -> SequenceReward:
    place, label = _LABELS[name]
    folder = FOLDER / place
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the reward {name!r} needs the bundled weights, and {folder} does not hold them: "
            "install the package anew, or name a reward of your own"
        )
    known = _calibration(FOLDER / "calibration.json").get(name, {})
    numbers = {key: known.get(key) for key in ("target", "beta", "alpha", "floor")}
    return SequenceReward(folder, **{"name": name, **numbers, **settings, "labels": {label: 1.0}})


@functools.cache
def _calibration(path: Path) -> dict[str, dict[str, float]]:
    """Return target, beta and floor of each reward, as measured on the bundled language model."""
    if not path.is_file():
        return {}
    rewards: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))["rewards"]
    return rewards
