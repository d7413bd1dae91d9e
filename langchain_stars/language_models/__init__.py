"""Language models that draft candidates.

`load_language_model(model, *, revision=None, dtype="auto", device=None, ...) -> LanguageModel` gives
the language model of a hub id or folder: the same object for the same name and settings, and
nothing is loaded before it is used. A language model is returned as it is. The settings are those
of `LocalLanguageModel`, which can also be made directly, from a loaded model of transformers too:
`LocalLanguageModel(model, tokenizer=tokenizer)`.

Importing this package imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from langchain_stars.language_models.base import (
    Candidate,
    Chat,
    Drafting,
    LanguageModel,
    Prefix,
    Request,
    Sampling,
)

if TYPE_CHECKING:
    from langchain_stars.language_models.local import LocalLanguageModel, load_language_model

__all__ = [
    "Candidate",
    "Chat",
    "Drafting",
    "LanguageModel",
    "LocalLanguageModel",
    "Prefix",
    "Request",
    "Sampling",
    "load_language_model",
]

_OF_LOCAL = ("LocalLanguageModel", "load_language_model")


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    if name not in _OF_LOCAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.local"), name)
    globals()[name] = value
    return value
