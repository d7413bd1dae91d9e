"""Guarded decoding for LangChain: replies judged segment by segment, before anyone sees them.

Importing the package loads nothing; each name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_stars.chat_models import ChatStars
    from langchain_stars.decoder import GuardExhausted
    from langchain_stars.guarded_chat import create_guarded_chat
    from langchain_stars.rewards import RewardError, as_reward, maximum, minimum

    __version__: str

__all__ = [
    "ChatStars",
    "GuardExhausted",
    "RewardError",
    "__version__",
    "as_reward",
    "create_guarded_chat",
    "maximum",
    "minimum",
]

_MODULES = {
    "ChatStars": "chat_models",
    "GuardExhausted": "decoder",
    "RewardError": "rewards",
    "as_reward": "rewards",
    "create_guarded_chat": "guarded_chat",
    "maximum": "rewards",
    "minimum": "rewards",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("langchain-stars")
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names too that are not imported yet."""
    return sorted({*globals(), *__all__})
