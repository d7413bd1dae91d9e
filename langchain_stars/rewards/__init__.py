"""What judges replies: reward models, classifiers, functions, and arithmetic on them.

Knows chats, completions and numbers; nothing of language models, thresholds or LangChain. One
file a kind of reward.
"""

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
    "Subject",
    "as_reward",
    "maximum",
    "minimum",
]
