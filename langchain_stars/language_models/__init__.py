"""Language models that draft candidates."""

from langchain_stars.language_models.base import (
    Candidate,
    Chat,
    Drafting,
    LanguageModel,
    Prefix,
    Request,
    Sampling,
)

__all__ = ["Candidate", "Chat", "Drafting", "LanguageModel", "Prefix", "Request", "Sampling"]
