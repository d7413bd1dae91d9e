"""What judges replies: reward models, classifiers, functions, and arithmetic on them.

Knows chats, completions and numbers; nothing of language models, thresholds or LangChain. One
file a kind of reward. Those that run models are imported when they are first named.
"""

import importlib
from typing import TYPE_CHECKING, Any

from langchain_stars.rewards.algebra import Constraint, maximum, minimum
from langchain_stars.rewards.base import (
    Chat,
    Completion,
    Leaf,
    Raw,
    Reward,
    RewardError,
    Scorer,
    ScoreRequest,
    Subject,
)
from langchain_stars.rewards.callables import as_reward
from langchain_stars.rewards.expressions import (
    parse_constraint,
    resolve_constraint,
    resolve_reward,
)

if TYPE_CHECKING:
    from langchain_stars.rewards.bundled import helpfulness, safety, sentiment
    from langchain_stars.rewards.classifiers import SequenceClassifier, SequenceReward

__all__ = [
    "Chat",
    "Completion",
    "Constraint",
    "Leaf",
    "Raw",
    "Reward",
    "RewardError",
    "ScoreRequest",
    "Scorer",
    "SequenceClassifier",
    "SequenceReward",
    "Subject",
    "as_reward",
    "helpfulness",
    "maximum",
    "minimum",
    "parse_constraint",
    "resolve_constraint",
    "resolve_reward",
    "safety",
    "sentiment",
]

_MODULES = {
    "SequenceClassifier": "classifiers",
    "SequenceReward": "classifiers",
    "helpfulness": "bundled",
    "safety": "bundled",
    "sentiment": "bundled",
}


def __getattr__(name: str) -> Any:
    """Import a name from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
