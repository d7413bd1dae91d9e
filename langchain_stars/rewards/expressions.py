"""Rewards from what a user writes down: a function, a name, or arithmetic in a string.

Knows names and operators; what they mean is told by the other files of this room.
"""

import ast
import os
import re
from collections.abc import Callable
from typing import Any

from langchain_stars.rewards.algebra import Constraint, maximum, minimum
from langchain_stars.rewards.base import Reward
from langchain_stars.rewards.callables import as_reward

_BUNDLED = ("safety", "helpfulness", "sentiment")
_FUNCTIONS: dict[str, Callable[..., Reward]] = {"minimum": minimum, "maximum": maximum}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMPARISON = re.compile(r"(.+?)\s*(>=|<=)\s*([^<>=]+)", re.DOTALL)


def resolve_reward(reward: Any) -> Reward:
    """Return the reward that is meant.

    Args:
        reward: A reward; a function in TRL's convention; the name of a bundled reward; a hub id
            or folder of a reward model with one label; or a string that adds up such names with
            numbers: `"helpfulness + 0.5 * sentiment"`, `"minimum(safety, 'org/model')"`.

    Raises:
        TypeError: It is none of these.
        ValueError: The string cannot be understood.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, Constraint):
        raise TypeError(
            f"`reward` must be a reward, got the constraint {reward.name}: give it in `constraints`"
        )
    if isinstance(reward, os.PathLike):
        return _model(os.fspath(reward))
    if isinstance(reward, str):
        return _from_text(reward)
    if callable(reward) and not isinstance(reward, type):
        return as_reward(reward)
    raise TypeError(
        "`reward` must be a reward, a function, a hub id, a folder or the name of a bundled "
        f"reward, got {type(reward).__name__}"
    )


def resolve_constraint(constraint: Any) -> Constraint:
    """Return the constraint that is meant.

    Args:
        constraint: A constraint, or a string such as `"safety >= 0.8"`; without a floor, that
            of the reward.

    Raises:
        TypeError: It is neither.
        ValueError: The string cannot be understood, or there is no floor.
    """
    if isinstance(constraint, Constraint):
        return constraint
    if isinstance(constraint, str):
        return parse_constraint(constraint)
    remedy = "; write `reward >= floor`" if isinstance(constraint, Reward) else ""
    raise TypeError(f"a constraint is wanted, got {type(constraint).__name__}{remedy}")


def parse_constraint(text: str) -> Constraint:
    """Return the constraint that a string means: `"safety >= 0.8"`, `"org/toxicity <= 0.1"`.

    Without a floor, it is the one that the reward brings.

    Raises:
        ValueError: The string cannot be understood, or there is no floor.
    """
    match = _COMPARISON.fullmatch(text.strip())
    if match is None:
        reward = _from_text(text)
        if reward.floor is None:
            raise ValueError(
                f"the constraint {text!r} names no floor, and the reward brings none: "
                "write, say, `safety >= 0.8`"
            )
        return reward >= reward.floor
    written, operator, number = match.groups()
    try:
        floor = float(number)
    except ValueError:
        raise ValueError(
            f"the constraint {text!r} must compare a reward with a number, got {number!r}"
        ) from None
    reward = _from_text(written)
    return reward >= floor if operator == ">=" else reward <= floor


def _from_text(text: str) -> Reward:
    text = text.strip()
    if text in _BUNDLED or _is_model(text):
        return _named(text)
    if ">=" in text or "<=" in text:
        raise ValueError(f"the reward {text!r} is a constraint: give it in `constraints`")
    try:
        value = _evaluate(ast.parse(text, mode="eval").body, text)
    except SyntaxError:
        raise ValueError(_unknown(text)) from None
    except ZeroDivisionError:
        raise ValueError(f"the reward {text!r} divides by 0") from None
    except (RecursionError, MemoryError, OverflowError):
        raise ValueError(
            f"the reward, a text of {len(text)} characters, is nested too deeply, has too many "
            "terms or too large a number"
        ) from None
    if not isinstance(value, Reward):
        raise ValueError(f"the reward {text!r} is only a number")
    return value


def _evaluate(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _named(node.value)
    if isinstance(node, ast.Name):
        return _named(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, text)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, text), _evaluate(node.right, text)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            return function(*(_evaluate(argument, text) for argument in node.args))
    raise ValueError(_unknown(text))


def _named(name: str) -> Reward:
    if name in _BUNDLED:
        from langchain_stars.rewards import bundled

        reward: Reward = getattr(bundled, name)()
        return reward
    if _is_model(name):
        return _model(name)
    raise ValueError(_unknown(name))


def _is_model(name: str) -> bool:
    """Return whether a name is a folder or has the form of a hub id (`safety/2` is a division)."""
    return os.path.isdir(name) or (
        _HUB_ID.fullmatch(name) is not None and name.split("/")[0] not in _BUNDLED
    )


def _model(name: str) -> Reward:
    from langchain_stars.rewards.classifiers import SequenceReward

    return SequenceReward(name)


def _unknown(text: str) -> str:
    return (
        f"the reward {text!r} is none of {', '.join(_BUNDLED)}, no hub id (`org/name`), no folder "
        "that exists, and no sum or `minimum(...)` of these"
    )
