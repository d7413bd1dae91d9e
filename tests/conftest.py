"""Small random models for the tests, made once a run and loaded from folders as a user would.

Run with: python -m pytest. Nothing needs a network, a GPU or a model of the hub.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything reads them: no hub, no cache of the user's, no tracing of what tests say.
_HUB_CACHE = tempfile.mkdtemp(prefix="langchain_stars_tests_")
atexit.register(shutil.rmtree, _HUB_CACHE, ignore_errors=True)
os.environ.update(
    HF_HOME=_HUB_CACHE,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    LANGCHAIN_TRACING_V2="false",
    LANGSMITH_TRACING="false",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
import pytest_socket
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from langchain_stars import judging
from langchain_stars.language_models import Sampling

transformers_logging.disable_progress_bar()

# pytest-socket guards the tests; this guards what test modules do while they are imported.
pytest_socket.disable_socket(allow_unix_socket=True)
torch.set_num_threads(1)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Could you tell me how to bake a loaf of bread at home?",
    "Mix the flour, water, salt and yeast; let it rest for an hour.",
    "I am sorry to hear that. Would you like to talk about it?",
    "Stars are born in clouds of gas, and they shine for billions of years.",
    "The weather was awful yesterday, but today it is wonderful!",
    "No, I cannot help with that. Is there anything else?",
    'She said: "It costs 25 euros, or 30 with the train ticket."',
)
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.5, top_k=20, repetition_penalty=1.3),
    Sampling(temperature=0.0),
    Sampling(min_p=0.05, repetition_penalty=0.8),
)
OTHER_SENTENCES = (
    "La casa es grande y el perro es bueno; mañana lloverá.",
    "¿Puedes decirme dónde está la estación de tren, por favor?",
    "Le chat dort sur la chaise pendant que nous parlons.",
    "Ich habe gestern ein gutes Buch gelesen und Brot gekauft.",
)
CONTROL_TOKENS = (
    "<|begin|>",
    "<|end|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|tool_call|>",
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- elif message['content'] is iterable %}
{%- for part in message['content'] %}{{ part['text'] }}{% endfor %}
{%- endif %}
{%- for call in message.get('tool_calls') or [] %}
{{- '<|tool_call|>' + (call.function | tojson) }}
{%- endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 8}
# What each family (transformers' `model_type`) calls the few numbers that make it small. A sliding
# window is shorter than most prompts of the tests, so that it matters.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 12},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma3_text": _GROUPED
    | {
        "num_hidden_layers": 3,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    # ALiBi: the distance of two tokens is that of their slots, not of their position ids.
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    # Recurrent state: nothing of it can be taken back.
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "qwen3_next": _GROUPED
    | {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
        "mlp_only_layers": [0, 1],
    },
    # Encoders, for classifiers only.
    "bert": _SMALL,
    "distilbert": {
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 512,
    },
}


def make_tokenizer(
    sentences: tuple[str, ...] = SENTENCES, *, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with control tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in CONTROL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(CONTROL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(
    family: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    num_labels: int | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Return a random model in fp32: a causal one, or a classifier if `num_labels` is given.

    The weights are ten times larger than usual, so that its choices depend on what it reads.
    """
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"initializer_range": 0.2} | FAMILIES[family] | settings,
        **({} if num_labels is None else {"num_labels": num_labels}),
    )
    auto = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=torch.float32).eval()


FolderMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the language model, and of most rewards."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts the same text elsewhere."""
    return make_tokenizer(OTHER_SENTENCES, vocab_size=330)


@pytest.fixture(scope="session")
def make_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    other_tokenizer: PreTrainedTokenizerFast,
) -> FolderMaker:
    """Returns a function that saves a model with its tokenizer and returns the folder.

    `make_folder("qwen2")` is a language model, `make_folder("llama", num_labels=1)` a classifier,
    `make_folder(..., other=True)` one with the other tokenizer. More keywords are settings of the
    model's configuration. The same call returns the same folder: leave it as it is.
    """
    made: dict[str, Path] = {}

    def make(family: str = "llama", *, other: bool = False, **settings: Any) -> Path:
        key = repr((family, other, sorted(settings.items())))
        if key not in made:
            its_tokenizer = other_tokenizer if other else tokenizer
            folder = tmp_path_factory.mktemp(family)
            make_model(family, its_tokenizer, **settings).save_pretrained(folder)
            its_tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def language_model_folder(make_folder: FolderMaker) -> Path:
    """A two-layer Llama with grouped queries."""
    return make_folder("llama")


@pytest.fixture(scope="session")
def reward_folder(make_folder: FolderMaker) -> Path:
    """A causal classifier with one label and the language model's tokenizer."""
    return make_folder("llama", num_labels=1, seed=1)


@pytest.fixture(scope="session")
def labelled_reward_folder(make_folder: FolderMaker) -> Path:
    """A causal classifier with three labels and a tokenizer of its own."""
    return make_folder(
        "qwen2",
        num_labels=3,
        other=True,
        seed=2,
        id2label={0: "harmful", 1: "neutral", 2: "helpful"},
        label2id={"harmful": 0, "neutral": 1, "helpful": 2},
    )


@pytest.fixture(autouse=True)
def _failures_are_told_anew() -> None:
    """A failure that an earlier test met is told again."""
    judging.failures.clear()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device that a test runs on; `cuda` is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)
