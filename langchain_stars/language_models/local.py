"""The language model that runs on this machine, through transformers.

Knows folders, devices, tokenizers and chat templates, and which way of drafting a model takes;
nothing of rewards, thresholds or LangChain.
"""

import hashlib
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from jinja2 import TemplateError

from langchain_stars.language_models.base import (
    Candidate,
    Chat,
    Drafting,
    LanguageModel,
    Prefix,
    Request,
    Sampling,
)
from langchain_stars.language_models.drafters import (
    Counts,
    Drafter,
    RaggedDrafter,
    RecomputeDrafter,
    SnapshotDrafter,
    asks,
    is_out_of_memory,
    ragged_error,
    replay_error,
    snapshot_error,
)
from langchain_stars.language_models.network import Network
from langchain_stars.language_models.steps import CudaRecorder, Runner, Steps
from langchain_stars.packing import (
    base_of,
    can_pack,
    device_name,
    digest_of,
    free_cached,
    input_device,
    is_quantised,
    pack,
    placed,
    quietly,
    share_weights,
    without_wrapper,
)
from langchain_stars.prompts import PromptStore
from langchain_stars.ragged_cache import ATTENTION
from langchain_stars.templates import TextEncoder, encode_chat, vocabulary_of

_log = logging.getLogger(__name__)

Drafts: TypeAlias = Literal["ragged", "snapshot", "recompute"]
"""How candidates are drafted, from the fastest to the one that every model allows."""

RAGGED_FAMILIES = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "deepseek_v3",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""Families of transformers (`model_type`) whose layers see what position ids and masks say."""

FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Template of a tokenizer that has none: a line `Role: content` for each message, then `Assistant:`."""

_MOST_ROWS = 64
_MOST_CANDIDATES = 16
_ROW_TOKENS = 2048
_UNLIMITED_CONTEXT = 1 << 20
_TIMED_QUERIES = (1, 2, 4, 8, 16, 32)
_TIMED_BESIDE = (64, 128, 256, 512)  # where tokens are cheap until there are hundreds
_TIMING_SECONDS = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What names loaded weights: two language models that agree in it share them."""

    model: str
    revision: str | None
    dtype: str
    device: str
    device_map: str | None
    trust_remote_code: bool
    attention: str
    pack: bool
    identity: int = 0


class _Weights:
    """A model, loaded once when it is first used."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.model: Any = None
        self.users: WeakSet[LocalLanguageModel] = WeakSet()
        self.drafts: dict[str, bool] = {}
        self.seconds: dict[tuple[Drafts, Steps], dict[int, float]] = {}


_REGISTRY: WeakValueDictionary[_Source, _Weights] = WeakValueDictionary()
_LOADED: dict[tuple[Any, ...], "LocalLanguageModel"] = {}
_ALL: WeakSet["LocalLanguageModel"] = WeakSet()
_NUMBERS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_next_number = itertools.count(1)
_REGISTRY_LOCK = threading.RLock()


def _renew() -> None:
    """Replace, in a forked child, what another thread may have held or half written.

    Weights stay: nobody writes them. What was computed for prefixes is computed anew.
    """
    global _REGISTRY_LOCK
    _REGISTRY_LOCK = threading.RLock()
    for weights in list(_REGISTRY.values()):
        weights.lock = threading.RLock()
    for language_model in list(_ALL):
        language_model._tokenizer_lock = threading.Lock()
        language_model._drafter = None
    for attribute in vars(LocalLanguageModel).values():
        if isinstance(attribute, cached_property) and hasattr(attribute, "lock"):
            attribute.lock = threading.RLock()  # before Python 3.12 one for all instances


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _number_of(model: Any) -> int:
    """Return what tells a loaded model from all others; its address may be given out again."""
    with _REGISTRY_LOCK:
        if model not in _NUMBERS:
            _NUMBERS[model] = next(_next_number)
        return _NUMBERS[model]


def load_language_model(model: Any, **settings: Any) -> LanguageModel:
    """Return the language model of that name; the same object for the same name and settings.

    Sharing the object, callers share weights, prompts' caches and rounds. Nothing is loaded yet.

    Args:
        model: Hub id or folder; a language model is returned as it is.
        settings: As of `LocalLanguageModel`.
    """
    if isinstance(model, LanguageModel):
        return model
    if not isinstance(model, str | os.PathLike):
        return LocalLanguageModel(model, **settings)
    settings["device"] = device_name(settings.get("device"))
    key = (os.fspath(model), *sorted((name, repr(value)) for name, value in settings.items()))
    with _REGISTRY_LOCK:
        if key not in _LOADED:
            _LOADED[key] = LocalLanguageModel(model, **settings)
        return _LOADED[key]


class LocalLanguageModel(LanguageModel):
    """A decoder-only model of transformers, from the hub or a folder, on this machine.

    Construction is cheap: the tokenizer is read when text is first encoded, the weights when
    tokens are first drawn. Weights are shared by all that name the same model, revision, type and
    device, in this process, and freed with the last of them.

    A tokenizer without a chat template gets a plain one, `Role: content` line by line.

    Args:
        model: Hub id or folder; or a loaded model of transformers, with `tokenizer`. Adapters of
            PEFT and quantised checkpoints load as they do in transformers. A loaded model keeps
            its own attention and layers; its weights are shared.
        tokenizer: Of a loaded model; else the checkpoint's own is read.
        revision: Branch, tag or commit on the hub.
        dtype: `"auto"`, `"bfloat16"`, ... or a torch type. `"auto"` is the checkpoint's, and on a
            CPU float32: most CPUs are slower in shorter types, and sums in those depend on how
            many rows are computed together.
        device: `"cpu"`, `"cuda"` (the current one), `"cuda:1"`, `"mps"`; None takes the best there
            is.
        device_map: As in transformers, to spread a large model; then `device` is left to it.
        trust_remote_code: Whether code of the checkpoint may run.
        attention: Attention implementation; the default reads keys and values once for all
            query heads that share them. Models whose attention scores are capped run `"eager"`.
        pack_weights: Whether, on a CPU in float32, the weights of linear layers are laid out anew
            when they are loaded: several candidates then take about the time of one. Of a model
            given as an object the packed weights are a copy.
        prompt_bytes: Most memory, at least 0, for prompts that later requests may begin with; 0
            keeps none. Only requests that name a `partition` share, and only with those that name
            the same. Keys and values that were computed in another batch differ in the last bits.
        drafts: How candidates are drafted; None takes the fastest way that a check at load finds
            right: `"ragged"` keeps keys and values once a reply, `"snapshot"` copies the model's
            own cache (for recurrent models), `"recompute"` keeps nothing.
        steps: How the steps of a round are run, where candidates are drafted the ragged way.
            `"eager"` computes no row and reads no slot without need; `"static"` fills rows, branches
            and slots up to shapes that come again; `"graphs"` records those as CUDA graphs, which
            spares nearly all of the host's time in a step; `"compiled"` has torch compile them (for
            a while whenever a shape is new, and without packed weights), and on CUDA records that.
            `"auto"` is `"graphs"` on one CUDA device and `"eager"` elsewhere. Where memory ends, or
            a model cannot be recorded or compiled, its steps become eager, with a warning.
        chat_template: Used instead of the tokenizer's.
        context_length: Most tokens of prompt and reply; None takes the model's own limit. A model
            whose rotary positions change beyond some length, for a whole batch at once (longrope),
            drafts fast up to that one.
        drafted_control_tokens: Control tokens that may be drafted all the same, such as one that
            begins a tool call.
        settings: More arguments of `from_pretrained`, such as `quantization_config`.

    Raises:
        ValueError: `model` names no folder, or a setting is out of range.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
        dtype: "str | torch.dtype" = "auto",
        device: "str | torch.device | None" = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        attention: str = ATTENTION,
        pack_weights: bool = True,
        prompt_bytes: int = 1 << 28,
        drafts: Drafts | None = None,
        steps: Steps = "auto",
        chat_template: str | None = None,
        context_length: int | None = None,
        drafted_control_tokens: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        if drafts not in (None, "ragged", "snapshot", "recompute"):
            raise ValueError(f"`drafts` must be ragged, snapshot, recompute or None, got {drafts}")
        if steps not in get_args(Steps):
            raise ValueError(f"`steps` must be one of {', '.join(get_args(Steps))}, got {steps}")
        if prompt_bytes < 0:
            raise ValueError(f"`prompt_bytes` must be at least 0, got {prompt_bytes}")
        if context_length is not None and context_length < 2:
            raise ValueError(f"`context_length` must be at least 2, got {context_length}")
        model = without_wrapper(model)
        self._given = None if isinstance(model, str | os.PathLike) else model
        if isinstance(model, str | os.PathLike):
            name = _checked_name(os.fspath(model))
        else:
            if tokenizer is None:
                raise ValueError("`tokenizer` must be given with a loaded model, got None")
            name = getattr(model.config, "_name_or_path", "") or type(model).__name__
            device = device or input_device(model)
        self._name = name
        self._device = device_name(device)
        if steps == "graphs" and not self._device.startswith("cuda"):
            raise ValueError(f"`steps` can be graphs on a CUDA device only, got {self._device}")
        self._steps: Steps = steps
        self._settings = settings
        self._device_map = device_map
        if isinstance(dtype, torch.dtype):
            dtype = str(dtype).removeprefix("torch.")
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be auto or name a type of torch, got {dtype}")
        self._source = _Source(
            model=name + (repr(sorted(settings.items(), key=str)) if settings else ""),
            revision=revision,
            dtype=dtype,
            device=self._device,
            device_map=None if device_map is None else repr(device_map),
            trust_remote_code=trust_remote_code,
            attention=attention,
            pack=pack_weights and steps != "compiled",  # what is packed cannot be compiled
            identity=0 if self._given is None else _number_of(model),
        )
        self._drafts = drafts
        self._prompt_bytes = prompt_bytes
        self._chat_template = chat_template
        self._given_context_length = context_length
        self._drafted_control_tokens = frozenset(drafted_control_tokens)
        self._given_tokenizer = tokenizer
        self._tokenizer_lock = threading.Lock()
        self._drafter: Drafter | None = None
        self._shared: _Weights | None = None
        self._most_candidates = _MOST_CANDIDATES
        self._most_rows: int | None = None
        self.counts = Counts()
        _ALL.add(self)

    def __repr__(self) -> str:
        return f"LocalLanguageModel({self._name!r}, device={self._device!r})"

    @property
    def name(self) -> str:
        """Hub id, folder or class of the model."""
        return self._name

    @property
    def device(self) -> str:
        """Device of its work, as torch names it."""
        return self._device

    @property
    def num_bytes(self) -> int:
        """Memory held for keys and values, in bytes."""
        return self._drafter.num_bytes if self._drafter is not None else 0

    @property
    def drafts(self) -> Drafts:
        """How candidates are drafted; loads the weights."""
        return _name_of(self._loaded())

    @property
    def steps(self) -> Steps:
        """How the steps of a round are run, `"auto"` resolved; loads the weights."""
        drafter = self._loaded()
        if not isinstance(drafter, RaggedDrafter) or drafter.runner is None:
            return "eager"
        if drafter.runner.records and not drafter.runner.compiles:
            return "graphs"
        return "compiled" if drafter.runner.compiles else "static"

    @property
    def max_rows(self) -> int:
        """Most replies at once, by the memory that was free when the weights had been loaded."""
        if self._most_rows is None:
            return self._rows_that_fit()
        return self._most_rows

    def _rows_that_fit(self) -> int:
        free = _free_bytes(self._device)
        if free is None:
            return _MOST_ROWS
        config = self._config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 1
        hidden = getattr(config, "hidden_size", None) or 1
        size = getattr(config, "head_dim", None) or hidden // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        layers = getattr(config, "num_hidden_layers", None) or 1
        row = 2 * layers * kept * size * _itemsize(self._dtype)
        row *= min(self.context_length, _ROW_TOKENS)
        return max(1, min(_MOST_ROWS, int(0.8 * free / row)))

    @property
    def max_candidates(self) -> int:
        """Most candidates of a reply at once; fewer once memory has run out."""
        return self._most_candidates

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, with a chat template."""
        tokenizer = self._given_tokenizer
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = self._read(AutoTokenizer, name=self._tokenizer_name)
        if self._chat_template is not None or not tokenizer.chat_template:
            if self._chat_template is None:
                _log.warning("%s has no chat template; a plain one is used", self._name)
            tokenizer.chat_template = self._chat_template or FALLBACK_TEMPLATE
        return tokenizer

    @cached_property
    def _config(self) -> Any:
        if self._given is not None:
            return self._given.config
        from transformers import AutoConfig

        return self._read(AutoConfig, name=self._base_name)

    @cached_property
    def _base_name(self) -> str:
        """Whose configuration the model has: of an adapter, its base's."""
        return base_of(self._name, revision=self._source.revision)

    @cached_property
    def _tokenizer_name(self) -> str:
        folder = Path(self._name)
        if self._base_name == self._name or (folder / "tokenizer_config.json").is_file():
            return self._name
        return self._base_name

    @cached_property
    def _dtype(self) -> torch.dtype:
        """What the weights are in, where they are not quantised."""
        if self._given is not None:
            return _dtype_of(self._given)
        if self._source.dtype != "auto":
            named = getattr(torch, self._source.dtype)
            assert isinstance(named, torch.dtype)
            return named
        if self._device == "cpu" and self._device_map is None:
            return torch.float32
        own = getattr(self._config, "dtype", None) or torch.float32
        own = getattr(torch, own) if isinstance(own, str) else own
        assert isinstance(own, torch.dtype)
        return own

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, type, tokenizer, settings and sampling; very large weights by samples."""
        digest = hashlib.sha256()
        source = self._source
        for part in (source.revision, str(self._dtype), source.attention, self.vocabulary):
            digest.update(repr(part).encode())
        digest.update(repr(sorted(self._drafted_control_tokens)).encode())
        digest.update(repr((self.sampling, self.context_length)).encode())
        digest.update(repr(self.tokenizer.chat_template).encode())
        folder = Path(self._name)
        if self._given is not None:
            for parameter_name, parameter in self._given.state_dict().items():
                digest.update(f"{parameter_name}{tuple(parameter.shape)}".encode())
                for tensor in _plain_parts(parameter):
                    sample = tensor.flatten()[:: max(1, tensor.numel() // 64)]
                    digest.update(repr(sample.float().tolist()).encode())
        elif folder.is_dir():
            digest.update(digest_of(folder).encode())
            if self._base_name != self._name and Path(self._base_name).is_dir():
                digest.update(digest_of(Path(self._base_name)).encode())
        else:
            commit = getattr(self._config, "_commit_hash", None)
            digest.update(f"{self._name}@{commit}".encode())
        if self._settings:
            digest.update(source.model.encode())
        return digest.hexdigest()[:16]

    @cached_property
    def vocabulary(self) -> str:
        """Hash of the tokenizer's ordinary tokens and of how it decodes them."""
        with self._tokenizer_lock:
            return vocabulary_of(self.tokenizer)

    @cached_property
    def context_length(self) -> int:
        """Most tokens of prompt and reply together."""
        if self._given_context_length is not None:
            return self._given_context_length
        config = self._config.get_text_config()
        for attribute in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            length = getattr(config, attribute, None)
            if isinstance(length, int) and length > 0:
                return length
        return _UNLIMITED_CONTEXT

    @cached_property
    def sampling(self) -> Sampling:
        """As the checkpoint's generation config says; what it does not say changes nothing."""
        if self._given is not None:
            config = getattr(self._given, "generation_config", None)
        else:
            from transformers import GenerationConfig

            try:
                config = GenerationConfig.from_pretrained(
                    self._base_name, revision=self._source.revision or "main"
                )
            except OSError:  # many checkpoints have none
                config = None
        said = {field.name: getattr(config, field.name, None) for field in fields(Sampling)}
        said["top_k"] = said["top_k"] or None  # 0 keeps all
        return Sampling(**{name: value for name, value in said.items() if value is not None})

    def encode(self, chat: Chat, *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Return the token ids of a chat by its template; a last assistant message is continued."""
        open_end = bool(chat) and chat[-1].get("role") == "assistant"
        with self._tokenizer_lock:
            return encode_chat(
                self.tokenizer,
                chat,
                add_generation_prompt=not open_end,
                continue_final_message=open_end,
                tools=tools,
            )

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text by itself; control tokens in it are text."""
        with self._tokenizer_lock:
            return TextEncoder(self.tokenizer).encode([text])[0]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without control tokens."""
        with self._tokenizer_lock:
            text: str = self.tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text

    def draw(self, requests: Sequence[Request]) -> list[list[Candidate]]:
        """Return the candidates that are asked for."""
        drafting = self.drafting(requests)
        while True:
            try:
                next(drafting)
            except StopIteration as stop:
                proposals: list[list[Candidate]] = stop.value
                return proposals

    def drafting(self, requests: Sequence[Request]) -> Drafting:
        """Draft them in pieces: a chunk of a prompt or one token of every candidate each."""
        if len({id(request.prefix) for request in requests}) < len(requests):
            raise ValueError("`requests` must have a prefix each, got one prefix twice")
        lanes: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            lanes.setdefault(request.prefix.lane, []).append(at)
        proposals: list[list[Candidate]] = [[] for _ in requests]
        for places in lanes.values():
            drafting = self._backing_off([requests[at] for at in places])
            drafted = yield from _spread(drafting, places, len(requests))
            for at, candidates in zip(places, drafted, strict=True):
                proposals[at] = candidates
        return proposals

    def load(self) -> None:
        """Load the weights and find out how candidates can be drafted."""
        self._loaded()

    def release(self, prefix: Prefix) -> None:
        """Free the row of a reply that has ended."""
        if self._drafter is not None:
            self._drafter.release(prefix)

    def unload(self) -> None:
        """Free the weights, for all that share them, and everything computed."""
        weights = self._weights()
        with weights.lock:  # what is being loaded is loaded first, and freed then
            with _REGISTRY_LOCK:
                if _REGISTRY.get(self._source) is weights:
                    del _REGISTRY[self._source]
                users = list(weights.users)
            weights.model = None
            for user in users:
                user._drafter = user._shared = None
        free_cached(self._device)

    def round_seconds(self, num_rows: int, count: int, size: int) -> float:
        """Return the time of a round, from forward passes measured when this is first asked."""
        drafter = self._loaded()
        num_rows, count = drafter.padded(num_rows, count)
        if isinstance(drafter, RaggedDrafter):
            return self._seconds(num_rows) + (size - 1) * self._seconds(num_rows * count)
        return num_rows * (self._seconds(1) + (size - 1) * self._seconds(count))

    def _seconds(self, queries: int) -> float:
        """Return how long a forward pass of some queries is thought to take."""
        weights = self._weights()
        with weights.lock:
            way = self.drafts, self.steps
            table = weights.seconds.get(way)
            if table is None:
                table = weights.seconds[way] = _time_steps(self._loaded())
        return _interpolate(table, queries)

    def _backing_off(self, requests: Sequence[Request]) -> Drafting:
        """Draft; where memory ends, fewer candidates at once, then fewer rows."""
        drafter = self._loaded()
        shown = [0] * len(requests)
        try:
            return (yield from _counting(drafter.round(requests), shown))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        self.counts.out_of_memory += 1
        widest = max(request.count for request in requests)
        _log.warning("out of memory: %d rows x %d candidates", len(requests), widest)
        free_cached(self._device)
        everywhere = range(len(requests))
        if drafter.spare():
            return (yield from _skipping(self._backing_off(requests), shown))
        if widest > 1:
            self._most_candidates = max(1, min(self._most_candidates, widest // 2))
            fewer = [replace(r, count=(r.count + 1) // 2) for r in requests]
            first = yield from _skipping(self._backing_off(fewer), shown)
            wide = [at for at in everywhere if requests[at].count > 1]
            rest = [
                replace(
                    requests[at],
                    first_attempt=requests[at].first_attempt + fewer[at].count,
                    count=requests[at].count - fewer[at].count,
                    streamed=False,
                )
                for at in wide
            ]
            second = yield from self._backing_off(rest)
            for at, candidates in zip(wide, second, strict=True):
                first[at] = first[at] + candidates
            return first
        if len(requests) == 1:
            raise MemoryError("one reply alone does not fit into the memory of the device")
        proposals: list[list[Candidate]] = []
        half = (len(requests) + 1) // 2
        for places in (everywhere[:half], everywhere[half:]):
            drafter.forget(requests[0].prefix.lane)  # the other rows' keys and values make room
            drafting = self._backing_off([requests[at] for at in places])
            proposals += yield from _skipping(_spread(drafting, places, len(requests)), shown)
        return proposals

    def _weights(self) -> _Weights:
        """Return the weights shared with others; whoever shares them keeps them in the registry."""
        with _REGISTRY_LOCK:
            weights = _REGISTRY.get(self._source)
            if weights is None:
                weights = _REGISTRY[self._source] = _Weights()
            weights.users.add(self)
            self._shared = weights
            return weights

    def _loaded(self) -> Drafter:
        """Return the drafter; load the weights and choose it, if that has not been done."""
        while (drafter := self._drafter) is None:
            weights = self._weights()
            with weights.lock:
                if weights is not self._weights():
                    continue  # they were unloaded meanwhile
                if self._drafter is None:
                    if weights.model is None:
                        weights.model = self._load()
                    self._drafter = self._choose(self._network(weights.model), weights)
                    self._most_rows = self._rows_that_fit()
                return self._drafter
        return drafter

    def _load(self) -> Any:
        began = time.perf_counter()
        if self._given is not None:
            model = self._given
            if getattr(model, "hf_device_map", None) is None:
                model = share_weights(model)  # what is changed below is not the caller's
        else:
            from transformers import AutoModelForCausalLM

            _check_weights(self._name)
            arguments: dict[str, Any] = dict(self._settings)
            if self._device_map is not None:
                arguments["device_map"] = self._device_map
            elif "quantization_config" in arguments or is_quantised(self._config):
                arguments |= placed(self._device)
            own_dtype = self._source.dtype == "auto" and self._device_map is not None
            with quietly():
                model = self._read(
                    AutoModelForCausalLM,
                    dtype="auto" if own_dtype else self._dtype,
                    use_safetensors=True,
                    **arguments,
                )
            if self._device_map is None and not is_quantised(model):
                model = model.to(self._device)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        self._set_attention(model)
        model = model.eval()
        if self._source.pack and can_pack(model):
            _log.debug("packed %d linear layers of %s", pack(model), self._name)
        _log.info("loaded %s in %.1f s", self._name, time.perf_counter() - began)
        return model

    def _set_attention(self, model: Any) -> None:
        """Set the attention that was asked for, or one that the model can do with masks."""
        wanted = self._source.attention
        if getattr(self._config.get_text_config(), "attn_logit_softcapping", None) is not None:
            wanted = "eager"
        for attention in (wanted, "eager"):
            if type(model)._supports_attention_backend or attention in ("sdpa", "eager"):
                try:
                    model.set_attn_implementation(attention)
                    return
                except (ValueError, ImportError) as error:
                    _log.info("%s cannot attend by %s: %s", self._name, attention, type(error))

    def _read(self, kind: Any, name: str | None = None, **arguments: Any) -> Any:
        """Read a part of the checkpoint; say what to do where it is not there."""
        source = self._source
        try:
            return kind.from_pretrained(
                name or self._name,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
                **arguments,
            )
        except OSError as error:
            raise ValueError(
                f"`model` could not be read: {self._name} ({kind.__name__}: {type(error).__name__})."
                " Name a folder that holds config.json, tokenizer and *.safetensors files, or a"
                " model of the hub that this machine can reach; weights in *.bin files are not"
                " loaded: save them with `save_pretrained` first."
            ) from error

    def _network(self, model: Any) -> Network:
        import inspect

        config = model.config.get_text_config()
        vocab = int(config.vocab_size)
        device = torch.device(self._device)
        if self._device_map is not None or is_quantised(model):
            device = input_device(model)
        accepted = inspect.signature(type(model).forward).parameters
        ends, hidden = self._control_ids(model, vocab)
        marks = torch.zeros((2, vocab), dtype=torch.bool)
        marks[0, sorted(ends)] = True
        marks[1, sorted(hidden)] = True
        marks[1, len(self.tokenizer) :] = True
        implementation = getattr(model.config, "_attn_implementation", None)
        return Network(
            model=model,
            device=device,
            dtype=_dtype_of(model),
            num_layers=int(config.num_hidden_layers),
            windows=_windows(config) or {},
            maskless=implementation in (ATTENTION, "sdpa"),
            keeps="logits_to_keep" in accepted,
            context_length=self.context_length,
            ends=marks[0].to(device),
            hidden=marks[1].to(device),
            cache_name="cache_params" if "cache_params" in accepted else "past_key_values",
            chunk=512 if device.type == "cpu" else 2048,
            groups=_groups(config) if implementation == ATTENTION else 1,
            asynchronous=device.type != "cpu",
        )

    def _control_ids(self, model: Any, vocab: int) -> tuple[set[int], set[int]]:
        """Return the token ids that end a reply, and those that are never drafted.

        A reply ends with the end tokens of the generation config, the config and the tokenizer,
        and with what the chat template writes after an assistant's text. Every other special
        token, and every added one that the template writes around messages, is not drafted.
        """
        tokenizer = self.tokenizer
        ends: set[int] = set()
        for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            ends |= set(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        hidden = {token_id for token_id, token in added.items() if token.special}
        hidden |= set(tokenizer.all_special_ids)
        marker = "zqx"
        chat = [
            {"role": "user", "content": marker},
            {"role": "assistant", "content": marker},
            {"role": "user", "content": marker},
        ]
        try:
            rendered = tokenizer.apply_chat_template(chat, tokenize=False)
        except TemplateError:  # it takes no such chat, and says nothing of what ends a reply
            rendered = ""
        if rendered.count(marker) == len(chat):
            after = tokenizer.encode(rendered.split(marker)[2], add_special_tokens=False)
            ends |= set(after[:1]) & set(added)
        hidden |= set(tokenizer.encode(rendered, add_special_tokens=False)) & set(added)
        allowed = set(tokenizer.convert_tokens_to_ids(sorted(self._drafted_control_tokens)))
        inside = set(range(vocab))
        return ends & inside, (hidden - ends - allowed) & inside

    def _choose(self, network: Network, weights: _Weights) -> Drafter:
        """Return the fastest drafter that a check finds right, or the one asked for."""
        ways: dict[str, type[Drafter]] = {
            "ragged": RaggedDrafter,
            "snapshot": SnapshotDrafter,
            "recompute": RecomputeDrafter,
        }
        for way, drafter in ways.items():
            if self._drafts not in (None, way):
                continue
            if way not in weights.drafts:
                weights.drafts[way] = self._is_right(way, network)
            if weights.drafts[way] and not (way == "ragged" and self._rows_mix(network)):
                if drafter is RaggedDrafter:
                    runner = self._runner(network)
                    if runner is not None and runner.records and not runner.compiles:
                        self._check_replay(network, runner)
                    prompts = PromptStore(self._prompt_bytes)
                    return RaggedDrafter(network, self.counts, prompts, runner)
                return drafter(network, self.counts)
            if self._drafts is not None:
                raise ValueError(
                    f"`drafts` cannot be {way} for {self._name}: it computes otherwise"
                )
            if way == "ragged" and _is_recurrent(network.model.config):
                continue
            _log.warning("%s cannot draft the %s way; a slower one is taken", self._name, way)
        raise AssertionError("recomputing is always right")

    def _runner(self, network: Network) -> Runner | None:
        """Return what runs steps whose shapes stay; None where they are to be run eagerly."""
        places = getattr(network.model, "hf_device_map", None) or {}
        alone = network.device.type == "cuda" and len(set(places.values())) <= 1
        if self._steps == "eager" or (self._steps == "auto" and not alone):
            return None
        recorder = None
        if alone and self._steps != "static":
            recorder = CudaRecorder(network.device)
        return Runner(self._name, compiles=self._steps == "compiled", recorder=recorder)

    def _check_replay(self, network: Network, runner: Runner) -> None:
        """Let a runner record a few steps; give it up where they compute otherwise, or cannot be."""
        try:
            if asks(network):
                runner.give_up("the model asks the device what it has computed")
                return
            error = replay_error(network, runner)
        except (MemoryError, RuntimeError) as failure:
            runner.give_up(type(failure).__name__)
            return
        _log.debug("%s: error of recorded steps %.1e of the logits' scale", self._name, error)
        if error > _most_error(network):
            runner.give_up("recorded ones compute otherwise")

    def _rows_mix(self, network: Network) -> bool:
        """Whether the length of one row changes what is computed for the others of a round."""
        longest = _longest_alike(network.model.config.get_text_config())
        if network.context_length <= longest:
            return False
        _log.warning(
            "%s computes all rows otherwise where one is longer than %d tokens: they are not drafted"
            " together, unless `context_length` is no more than that",
            self._name,
            longest,
        )
        return True

    def _is_right(self, way: str, network: Network) -> bool:
        if way == "recompute":
            return True
        config = network.model.config.get_text_config()
        if way == "ragged" and (
            config.model_type not in RAGGED_FAMILIES or _windows(config) is None
        ):
            return False
        try:
            error = ragged_error(network) if way == "ragged" else snapshot_error(network)
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as failure:
            _log.info("%s: the %s check failed: %s", self._name, way, type(failure).__name__)
            return False
        except RuntimeError as failure:
            if is_out_of_memory(failure):
                raise
            _log.info("%s: the %s check failed: %s", self._name, way, type(failure).__name__)
            return False
        most = _most_error(network)
        _log.debug("%s: error of the %s way %.1e of the logits' scale", self._name, way, error)
        return error <= most


def _checked_name(name: str) -> str:
    """Return the folder or the hub id that a name names.

    Raises:
        ValueError: It can be neither.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"`model` must be a folder that holds config.json, got {name}")
        return str(path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(
            f"`model` must be a hub id (owner/name) or a folder that exists, got {name!r}"
        )
    return name


def _check_weights(name: str) -> None:
    """Refuse a folder whose weights are not in safetensors files."""
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = "only *.bin files" if any(folder.glob("*.bin")) else "none"
        raise ValueError(
            f"`model` must hold its weights in *.safetensors files, got {found} in {name}. Files of"
            " the other kind can run code when they are read. Where you trust them, convert them"
            " once: AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)"
            ".save_pretrained(folder)"
        )


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return what a tensor consists of: a quantised one, of several; one that is elsewhere, none."""
    if tensor.is_meta:
        return []
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def _free_bytes(device: str) -> int | None:
    """Return how much memory is free on a device; None where that is not known."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:  # Linux, with what its caches would give back
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _dtype_of(model: Any) -> torch.dtype:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    assert isinstance(dtype, torch.dtype)
    return dtype


def _most_error(network: Network) -> float:
    """Return how far a way of computing may be from another, in units of the logits' range."""
    try:
        rounds = torch.get_float32_matmul_precision() != "highest"  # as with TF32
    except RuntimeError:  # it was said in two ways
        rounds = True
    return 2e-5 if network.dtype == torch.float32 and not rounds else 5e-2


def _groups(config: Any) -> int:
    """Return how many query heads share a key head; 1 where that is not the same at every layer."""
    heads = getattr(config, "num_attention_heads", None)
    kept = getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int) or not isinstance(kept, int) or not kept:
        return 1
    return heads // kept


def _itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _windows(config: Any) -> dict[str, int | None] | None:
    """Return the kinds of attention layers and their windows; None if there are unknown kinds."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"attention": window}
    known = {"full_attention": None, "sliding_attention": window}
    if not set(kinds) <= set(known):
        return None
    return {kind: known[kind] for kind in sorted(set(kinds))}


def _longest_alike(config: Any) -> int:
    """Return up to which length of the longest row all rows are computed in one way.

    Beyond it some kinds of rotary positions change their frequencies, and for the whole batch.
    """
    said = getattr(config, "rope_parameters", None) or {}
    longest = _UNLIMITED_CONTEXT
    for each in (said, *said.values()):  # for all layers, or by their kinds
        if isinstance(each, Mapping) and each.get("rope_type") in ("dynamic", "longrope"):
            own = each.get("original_max_position_embeddings") or config.max_position_embeddings
            longest = min(longest, int(own))
    return longest


def _is_recurrent(config: Any) -> bool:
    """Whether it is no news that a model keeps states that cannot be taken back."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    return bool(kinds - {"full_attention", "sliding_attention", "chunked_attention"})


def _name_of(drafter: Drafter) -> Drafts:
    if isinstance(drafter, RaggedDrafter):
        return "ragged"
    return "snapshot" if isinstance(drafter, SnapshotDrafter) else "recompute"


def _relay(
    drafting: Drafting, change: Callable[[Sequence[int | None]], Sequence[int | None]]
) -> Drafting:
    """Pass a drafting on, and what it streams through `change`."""
    try:
        while True:
            try:
                tokens = next(drafting)
            except StopIteration as stop:
                drafted: list[list[Candidate]] = stop.value
                return drafted
            yield change(tokens)
    finally:
        drafting.close()


def _spread(drafting: Drafting, places: Sequence[int], length: int) -> Drafting:
    """Put what some requests stream to their places among all."""

    def spread(tokens: Sequence[int | None]) -> Sequence[int | None]:
        everywhere: list[int | None] = [None] * length
        for at, token in zip(places, tokens, strict=False):
            everywhere[at] = token
        return everywhere if tokens else ()

    return _relay(drafting, spread)


def _counting(drafting: Drafting, shown: list[int]) -> Drafting:
    """Count the tokens that each request has streamed."""

    def count(tokens: Sequence[int | None]) -> Sequence[int | None]:
        for at, token in enumerate(tokens):
            shown[at] += token is not None
        return tokens

    return _relay(drafting, count)


def _skipping(drafting: Drafting, shown: Sequence[int]) -> Drafting:
    """Leave out the tokens that were streamed before the round was begun again."""
    left = list(shown)

    def skip(tokens: Sequence[int | None]) -> Sequence[int | None]:
        new = list(tokens)
        for at, token in enumerate(new):
            if token is not None and left[at]:
                left[at] -= 1
                new[at] = None
        return new

    return _relay(drafting, skip)


def _interpolate(table: Mapping[int, float], queries: int) -> float:
    """Return the time of a number of queries, straight between and beyond the measured ones."""
    sizes = sorted(table)
    if queries in table or len(sizes) == 1:
        return table.get(queries, table[sizes[0]] * max(1.0, queries / sizes[0]))
    above = next((at for at, size in enumerate(sizes) if size > queries), len(sizes) - 1)
    low, high = sizes[max(0, above - 1)], sizes[max(1, above)]
    slope = max(0.0, (table[high] - table[low]) / (high - low))
    return table[low] + slope * (queries - low)


def _time_steps(drafter: Drafter) -> dict[int, float]:
    """Measure forward passes of a few sizes behind a short prefix, in seconds.

    The shortest of several times counts: whatever else the machine does only adds to it. On a CPU
    the time is this thread's own, so that others who run meanwhile do not count.
    """
    clock = time.perf_counter if drafter.network.asynchronous else time.thread_time
    steps = {queries: drafter.stepping(queries) for queries in _TIMED_QUERIES}
    if drafter.network.asynchronous and isinstance(drafter, RaggedDrafter):
        for queries in _TIMED_BESIDE:
            try:
                rows = queries // _MOST_CANDIDATES
                step = drafter.stepping(_MOST_CANDIDATES, rows=rows)
                step().tolist()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                break  # what does not fit need not be timed
            steps[queries] = step

    def seconds(queries: int) -> float:
        began = clock()
        steps[queries]().tolist()  # waits for the device
        return clock() - began

    began = time.perf_counter()
    seconds(1)
    if seconds(1) > _TIMING_SECONDS / 4:  # a large model on a CPU
        steps = {queries: steps[queries] for queries in _TIMED_QUERIES[::2]}
    table = {queries: seconds(queries) for queries in steps}
    while time.perf_counter() - began < _TIMING_SECONDS:
        for queries, least in table.items():
            table[queries] = min(least, seconds(queries))
    longest = itertools.accumulate(table.values(), max)  # more tokens never take less
    return dict(zip(table, longest, strict=True))
