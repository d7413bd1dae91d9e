"""The suites that LangChain asks of every chat model, on the bundled models and on a script.

Tests of tools and structured output skip themselves as long as `bind_tools` is LangChain's own.
"""

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_stars import ChatStars, chat_models
from langchain_stars.testing import ScriptedLanguageModel, TableReward

WORDS = ("Hello", ",", " you", " are", " here", "!")


def words(completion: str) -> dict[str | bytes, float]:
    """A sentence of which some words are left out at random."""
    num_said = sum(completion.count(word) for word in WORDS)
    if num_said == len(WORDS):
        return {"": 1.0}
    return {WORDS[num_said]: 0.8, " er": 0.2}


class Bundled:
    """`ChatStars()`, with a seed so that a failure can be repeated."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatStars

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"seed": 1}


class Scripted:
    """A guard that has something to reject."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatStars

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": ScriptedLanguageModel(words),
            "reward": TableReward(lambda text: -float(text.count(" er")), target=0.0, beta=1.0),
            "segment_size": 2,
        }


class TestUnitOfBundled(Bundled, ChatModelUnitTests):
    pass


class TestIntegrationOfBundled(Bundled, ChatModelIntegrationTests):
    @property
    def model_override_value(self) -> str:
        """The same weights by another name."""
        return str(chat_models._BUNDLED_FOLDER / "language_model")


class TestUnitOfScripted(Scripted, ChatModelUnitTests):
    pass


@pytest.mark.filterwarnings(
    "ignore:.*in beta:langchain_core._api.beta_decorator.LangChainBetaWarning"
)
class TestIntegrationOfScripted(Scripted, ChatModelIntegrationTests):
    @property
    def supports_model_override(self) -> bool:
        """A call names another model by its name, and a script has no folder."""
        return False
