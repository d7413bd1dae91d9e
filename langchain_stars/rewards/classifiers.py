"""Sequence classifiers as rewards: scalar reward models and classifiers with labels.

Knows checkpoints, chat templates, logits and labels; nothing of thresholds. A causal classifier
keeps what it has read of every reply and reads the candidates of a round in one forward pass; an
encoder reads each text anew. Both give, for the same token ids, what the plain model gives.
"""

import bisect
import copy
import itertools
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from langchain_stars.packing import (
    base_of,
    can_pack,
    digest_of,
    input_device,
    is_quantised,
    pack,
    placed,
    quietly,
)
from langchain_stars.ragged_cache import ATTENTION
from langchain_stars.rewards.base import (
    Chat,
    Completion,
    Leaf,
    NamedRewardError,
    Raw,
    Scorer,
    ScoreRequest,
    Subject,
    digest,
    within,
)
from langchain_stars.rewards.packed import Counters, PackedModel, Reading, out_of_memory
from langchain_stars.templates import (
    TextEncoder,
    encode_chat,
    text_of,
    vocabulary_of,
    with_two_roles,
)

_log = logging.getLogger(__name__)

View: TypeAlias = Literal["chat", "pair", "hh", "reply"]
"""What a classifier is shown of a chat; see `SequenceClassifier.view`."""

Closed: TypeAlias = Literal["finished", "always", "never"]
"""Which replies end with the tokens that close a message; see `SequenceClassifier.closed`."""

Activation: TypeAlias = Literal["none", "softmax", "sigmoid"]
"""What becomes of logits before they are worth anything."""

# Causal families whose position ids and masks are taken as they are given, found equal to plain
# recomputation. Each is checked again when it is loaded.
_KEEPING = frozenset(
    {
        "gemma",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
_SENTINEL = "REPLYGOESHERE"
_COST = 0.125  # of a classifier that could not be timed
_TIMED_TOKENS = (1, 4, 16, 64)
_TIMED_PROMPT = 32
_TIMING_SECONDS = 0.1
_NEVER = 10**6  # tokenizers without a limit give a number far beyond this one


class SequenceReward(Leaf):
    """What a sequence classifier says of a reply, as one number.

    A model with one label is a reward model: its logit is the reward. For a model with several,
    `labels` says what each is worth; the reward is the sum of worth times probability (softmax
    where one label holds, sigmoid where several can, as its `problem_type` says). A worth may be
    negative, and must be for a model of which more is worse: `labels={"toxic": -1.0}`.

    Args:
        model: Hub id, folder, or the scorer of another reward of the same model. Rewards of the
            same model and settings share one scorer, which runs once for all of them.
        labels: What each label is worth; those not named are worth 0. Keys are names of the model's
            own labels, or their indices. None for a model with one label.
        name: What reports call it; what comes last in the model's name if not given.
        activation: What becomes of logits; as `problem_type` says if not given.
        range: Least and greatest reward, where the labels do not tell; what is outside rejects.
        target: The reward of a good reply.
        beta: The softness of acceptance that suits its scale, at least 0.
        alpha: Where thresholds should start, from 0 (the prompt's reward) to 1 (`target`); 1 where
            the reward of the empty reply is none of the reply's.
        floor: The least reward of an acceptable reply.
        **settings: Those of `SequenceClassifier`.

    Attributes:
        scorer: The model.

    Raises:
        TypeError: `settings` are given with a scorer.
        ValueError: A label does not exist (told when the model is loaded, and at once where it
            is a folder), or a setting is out of range.
    """

    def __init__(
        self,
        model: "str | os.PathLike[str] | SequenceClassifier",
        *,
        labels: Mapping[str, float] | Mapping[int, float] | None = None,
        name: str | None = None,
        activation: Activation | None = None,
        range: tuple[float, float] | None = None,
        target: float | None = None,
        beta: float | None = None,
        alpha: float | None = None,
        floor: float | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(model, SequenceClassifier):
            if settings:
                raise TypeError(
                    f"{', '.join(settings)}: settings belong to the scorer, not beside it"
                )
            classifier = model
        else:
            classifier = SequenceClassifier.shared(model, **settings)
        for argument, value in (("target", target), ("beta", beta), ("floor", floor)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"`{argument}` must be finite, got {value}")
        if beta is not None and beta < 0:
            raise ValueError(f"`beta` must be at least 0, got {beta}")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1], got {alpha}")
        if range is not None and not range[0] < range[1]:
            raise ValueError(f"`range` must be two numbers in order, got {range}")
        if activation not in (None, "none", "softmax", "sigmoid"):
            raise ValueError(
                f"`activation` must be 'none', 'softmax' or 'sigmoid', got {activation!r}"
            )
        for label, worth in (labels or {}).items():
            if isinstance(worth, bool) or not math.isfinite(worth):
                raise ValueError(f"`labels` must say what {label!r} is worth, got {worth}")
        self.scorer = self.classifier = classifier
        self._labels = dict(labels) if labels is not None else None
        self._name = name or Path(classifier.name).name
        self._activation = activation
        self._given_range = range
        self._target = target
        self._beta = beta
        self._alpha = alpha
        self._floor = floor
        self._reading: tuple[tuple[float, ...], Activation] | None = None
        if os.path.isdir(classifier.name):
            self._resolve()

    @property
    def name(self) -> str:
        """The name that it was given, or the last part of the model's."""
        return self._name

    @property
    def target(self) -> float | None:
        """The reward of a good reply, as given."""
        return self._target

    @property
    def beta(self) -> float | None:
        """The softness, as given."""
        return self._beta

    @property
    def alpha(self) -> float | None:
        """Where thresholds should start, as given."""
        return self._alpha

    @property
    def floor(self) -> float | None:
        """The least reward of an acceptable reply, as given."""
        return self._floor

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model, what each label is worth, and how logits are read."""
        worths, activation = self._resolve()
        return {"scorer": self.scorer.identity, "worths": list(worths), "activation": activation}

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest reward: those given, or what the worths of the labels allow."""
        if self._given_range is not None:
            return self._given_range
        worths, activation = self._resolve()
        if activation == "none":
            return (-math.inf, math.inf)
        if activation == "softmax":
            return (min(worths), max(worths))
        low, high = 0.0, 0.0
        for worth in worths:
            low, high = low + min(worth, 0.0), high + max(worth, 0.0)
        return (low, high)

    def load(self) -> None:
        """Load the model, and check the labels against its own."""
        self.scorer.load()
        self._resolve()

    def read(self, raw: Raw) -> float:
        """Return the reward that logits mean; the least one, where there are several windows."""
        worths, activation = self._resolve()
        count = len(worths)
        windows = [raw[begin : begin + count] for begin in range(0, len(raw), count)]
        values = [_worth(logits, worths, activation) for logits in windows]
        if any(math.isnan(value) for value in values):
            return math.nan
        return within(min(values), self.range)  # probabilities add up to 1 but for rounding

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SequenceReward) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        labels = None if self._labels is None else tuple(sorted(self._labels.items(), key=repr))
        numbers = (self._given_range, self._target, self._beta, self._alpha, self._floor)
        return (id(self.scorer), labels, self._name, self._activation, numbers)

    def _resolve(self) -> tuple[tuple[float, ...], Activation]:
        """Return what each label is worth, by index, and the activation."""
        if self._reading is None:
            names = self.classifier.labels
            activation = self._activation or self.classifier.activation
            self._reading = (_worths(self._labels, names, self.classifier.name), activation)
        return self._reading


def _worths(
    labels: Mapping[Any, float] | None, names: Sequence[str], model: str
) -> tuple[float, ...]:
    if labels is None:
        if len(names) == 1:
            return (1.0,)
        raise ValueError(
            f"`labels` must say what the labels of {model} are worth; it has {', '.join(names)}"
        )
    worths = [0.0] * len(names)
    for label, worth in labels.items():
        if isinstance(label, int) and 0 <= label < len(names):
            worths[label] = float(worth)
        elif isinstance(label, str) and label in names:
            worths[names.index(label)] = float(worth)
        else:
            raise ValueError(
                f"`labels` names {label!r}, which {model} does not have; it has {', '.join(names)}"
            )
    if not any(worths):
        raise ValueError(f"`labels` must give one of {', '.join(names)} a worth that is not 0")
    return tuple(worths)


def _worth(logits: Sequence[float], worths: Sequence[float], activation: Activation) -> float:
    if not all(map(math.isfinite, logits)):  # the model broke, even where this one is worth 0
        return math.nan
    if activation == "softmax":
        greatest = max(logits)
        powers = [math.exp(logit - greatest) for logit in logits]
        total = sum(powers)
        values = [power / total for power in powers]
    elif activation == "sigmoid":
        values = [_sigmoid(logit) for logit in logits]
    else:
        values = list(logits)
    return sum(worth * value for worth, value in zip(worths, values, strict=True))


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)


class SequenceClassifier(Scorer):
    """A `...ForSequenceClassification` checkpoint, run on the engine's device.

    Its answers are logits, one for each label; rewards read them. Texts are encoded so that no
    control token typed by a user or drafted by a model is one, and are never cut: a reply that is
    too long is answered with NaN, which rejects it, unless `windows` are asked for.

    Args:
        model: Hub id or folder, of an adapter of PEFT too; a quantised checkpoint loads as it does
            in transformers.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        device: Device of torch; the first GPU if there is one and none is given.
        dtype: Type of the weights, as in `"bfloat16"`, or of torch. If not given, the checkpoint's,
            and on a CPU float32: most CPUs are slower in shorter types.
        device_map: As in transformers, to spread a large model; then `device` is left to it.
        quantization_config: As in transformers, for a model that is quantised when it is loaded.
        chat_template: Used instead of the tokenizer's.
        view: What it is shown. `"chat"`: the chat in its own template, the default where it has
            one. `"pair"`: two texts, the messages (joined by blank lines) and the reply, the
            default without a template. `"hh"`: the same with the messages as `Human:` and
            `Assistant:` turns, for models trained on HH-RLHF. `"reply"`: the reply alone.
        closed: Which replies end with what closes a message in its template (or a text in the
            other views): `"finished"` ones, as is right for a model that tells both apart;
            `"always"` or `"never"`. In an encoder's pair the last separator is always there.
        windows: Whether a reply that is too long is judged window by window, by the worst of
            them: half of each overlaps the one before. Not with kept KV: it is read anew.
        max_length: Most tokens that it can read; what its tokenizer and configuration say if not
            given.
        max_tokens: Most tokens of a forward pass, padding included, at least 16.
        use_cache: Whether keys and values of a reply are kept from one judgement to the next, where
            the model can; else every reply is read anew, which is slower and says the same.
        pack_weights: Whether, on a CPU in float32, the weights of linear layers are laid out anew
            for its matrix products, which is faster and takes the same memory.
        prompt_bytes: Most memory, at least 0, for prompts that later replies may begin with; 0
            keeps none. Only replies of a named partition share (see `Subject`), and only with
            those of the same. Keys and values that were computed in another batch differ in the
            last bits. A model that reads every text anew keeps none.
        cost: What a token costs, relative to one of the language model, at least 0. If not given,
            the time of reading is measured, once for a loaded model. It decides nothing but speed.

    Attributes:
        name: Hub id or folder.
        view: As given; None before it has been loaded where it was not.
        closed: As given.

    Raises:
        ValueError: A setting is out of range.
    """

    on_device: ClassVar[bool] = True

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: "str | torch.device | None" = None,
        dtype: "str | torch.dtype | None" = None,
        device_map: Any = None,
        quantization_config: Any = None,
        chat_template: str | None = None,
        view: View | None = None,
        closed: Closed = "finished",
        windows: bool = False,
        max_length: int | None = None,
        max_tokens: int = 4096,
        use_cache: bool = True,
        pack_weights: bool = True,
        prompt_bytes: int = 1 << 28,
        cost: float | None = None,
    ) -> None:
        if view not in (None, "chat", "pair", "hh", "reply"):
            raise ValueError(f"`view` must be 'chat', 'pair', 'hh' or 'reply', got {view!r}")
        if closed not in ("finished", "always", "never"):
            raise ValueError(f"`closed` must be 'finished', 'always' or 'never', got {closed!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}")
        if max_tokens < 16:
            raise ValueError(f"`max_tokens` must be at least 16, got {max_tokens}")
        if prompt_bytes < 0:
            raise ValueError(f"`prompt_bytes` must be at least 0, got {prompt_bytes}")
        if cost is not None and not cost >= 0:
            raise ValueError(f"`cost` must be at least 0, got {cost}")
        if isinstance(dtype, torch.dtype):
            dtype = str(dtype).removeprefix("torch.")
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be the name of a type of torch, got {dtype!r}")
        self.name = os.fspath(model)
        self.view = self._given_view = view
        self.closed = closed
        self._device = str(device or _default_device())
        self._source = _Source(
            self.name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            device=self._device,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization_config,
            pack_weights=pack_weights,
        )
        self._chat_template = chat_template
        self._windows = windows
        self._max_length = max_length
        self._max_tokens = max_tokens
        self._use_cache = use_cache
        self._prompt_bytes = prompt_bytes
        self._cost = cost
        self._lock = threading.RLock()
        self._loaded: _Loaded | None = None
        self._runner: _Runner | None = None
        _all_scorers.add(self)

    @classmethod
    def shared(cls, model: str | os.PathLike[str], **settings: Any) -> "SequenceClassifier":
        """Return the scorer of a model with some settings: the same one as long as it is used."""
        key = (os.fspath(model), repr(sorted(settings.items())))
        with _registry_lock:
            scorer = _scorers.get(key)
            if scorer is None:
                scorer = _scorers[key] = cls(model, **settings)
            return scorer

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits; reads the configuration."""
        id2label = self._source.config.id2label
        return tuple(str(id2label[index]) for index in sorted(id2label))

    @property
    def activation(self) -> Activation:
        """What becomes of logits, by the number of labels and `problem_type`."""
        problem_type = self._source.config.problem_type
        if problem_type == "multi_label_classification":
            return "sigmoid"
        if problem_type == "regression" or len(self.labels) == 1:
            return "none"
        return "softmax"

    @property
    def identity(self) -> Mapping[str, Any]:
        """The checkpoint and the settings that decide the logits."""
        return {
            "kind": "classifier",
            **self._source.identity,
            "chat_template": digest(self._chat_template) if self._chat_template else None,
            "view": self._given_view,
            "closed": self.closed,
            "windows": self._windows,
            "max_length": self._max_length,
        }

    @property
    def device(self) -> str:
        """Device of torch that it runs on."""
        return self._device

    @property
    def cost(self) -> float:
        """What a token costs, relative to one of the language model, where that is not measured."""
        return _COST if self._cost is None else self._cost

    def seconds(self, num_tokens: int) -> float | None:
        """Return how long reading some tokens takes, from passes measured when this is first asked.

        None where `cost` was given, or the model could not be measured.
        """
        if self._cost is not None:
            return None
        with self._lock:
            self.load()
            assert self._loaded is not None
            keeps = isinstance(self._runner, _KeepingRunner)
            table = self._loaded.seconds.get(keeps)
            if table is None:
                table = self._loaded.seconds[keeps] = _time_readings(self._loaded, keeps)
        return _interpolated(table, num_tokens) if table else None

    @property
    def counters(self) -> Counters:
        """What was computed since it was loaded."""
        with self._lock:
            return Counters(**asdict(self._runner.counters)) if self._runner else Counters()

    def load(self) -> None:
        """Load the model and its tokenizer, once for the process; any thread may call it."""
        with self._lock:
            if self._runner is None:
                self._loaded = loaded = _load(self._source)
                with loaded.tokenizer_lock:
                    writer = _Writer(
                        loaded,
                        view=self._given_view,
                        closed=self.closed,
                        max_length=self._max_length,
                        chat_template=self._chat_template,
                    )
                self.view = writer.view
                if loaded.keeps and self._use_cache and not self._windows:
                    self._runner = _KeepingRunner(
                        loaded, writer, self._max_tokens, self._prompt_bytes
                    )
                else:
                    self._runner = _Runner(loaded, writer, self._max_tokens, self._windows)

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        """Return the logits of each candidate; NaN where it is too long.

        Raises:
            RewardError: A chat cannot be written in the model's template.
        """
        with self._lock:  # until it has answered nobody unloads it
            self.load()
            assert self._runner is not None
            with torch.inference_mode():
                return self._runner.score(requests)

    def release(self, subject: Subject) -> None:
        """Drop what was read of a reply; others of its partition may begin with it."""
        if self._runner is None:  # said without the lock, which is held while it is loaded
            return
        with self._lock, torch.inference_mode():
            if self._runner is not None:
                self._runner.release(subject)

    def unload(self) -> None:
        """Free what was read and, where no other scorer uses it, the model."""
        with self._lock:
            self._loaded = self._runner = None

    def _renew(self) -> None:
        """Go on in a forked child: without what another thread held, or had read by half."""
        self._lock = threading.RLock()
        self._source.renew()
        self._runner = None  # the weights stay
        if self._loaded is not None:
            self._loaded.tokenizer_lock = threading.Lock()


# Checkpoints


class _Source:
    """Where a checkpoint comes from, and how it is loaded."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        trust_remote_code: bool,
        device: str,
        dtype: str | None,
        device_map: Any,
        quantization_config: Any,
        pack_weights: bool,
    ) -> None:
        self.model = model
        self.device = device
        self.device_map = device_map
        self.pack_weights = pack_weights
        self._revision = revision
        self._trust_remote_code = trust_remote_code
        self._dtype = dtype
        self._quantization_config = quantization_config
        self._lock = threading.Lock()
        self._base: str | None = None
        self._config: Any = None
        self._identity: dict[str, Any] | None = None

    def renew(self) -> None:
        """Replace the lock, which another thread may have held when this process was forked."""
        self._lock = threading.Lock()

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells the loaded model from others."""
        loading = (self.device, self._dtype, repr(self.device_map), repr(self._quantization_config))
        return (self.model, self._revision, self._trust_remote_code, *loading, self.pack_weights)

    @property
    def base(self) -> str:
        """What an adapter was made for; else the model itself."""
        if self._base is None:
            self._base = base_of(self.model, revision=self._revision)
        return self._base

    def read(self, kind: Any, name: str | None = None, **arguments: Any) -> Any:
        """Read a part of the checkpoint; say what to do where it cannot be read."""
        name = name or self.model
        try:
            return kind.from_pretrained(
                name,
                revision=self._revision if name == self.model else None,
                trust_remote_code=self._trust_remote_code,
                **arguments,
            )
        except OSError as error:
            raise ValueError(
                f"the reward model {self.model} cannot be read ({kind.__name__}): name a folder that "
                "holds config.json, tokenizer and *.safetensors files, or a model of the hub that "
                "this machine can reach; weights in *.bin files are not loaded: save them with "
                "`save_pretrained` first"
            ) from error

    def read_model(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Read the model; return it, and what its checkpoint lacked."""
        if self.device_map is not None:
            arguments["device_map"] = self.device_map
        elif self._quantization_config is not None or is_quantised(self.config):
            arguments |= placed(self.device)
        if self._quantization_config is not None:
            arguments["quantization_config"] = self._quantization_config
        adapted = self.base != self.model
        model, info = self.read(
            AutoModelForSequenceClassification,
            self.base,
            **({"config": self.config} if adapted else {}),
            dtype=self.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
        if adapted:
            revision = {"revision": self._revision}
            lacking = model.load_adapter(self.model, adapter_kwargs=revision).missing_keys
            # What the base lacks, such as its head, an adapter may bring.
            own = {key for key in info["missing_keys"] if key in dict(model.named_parameters())}
            info = {**info, "missing_keys": own | set(lacking)}
        if self.device_map is None and not is_quantised(model):
            model = model.to(self.device)
        return model, info

    def read_tokenizer(self) -> Any:
        """Read the tokenizer: an adapter's own where it has one."""
        has_one = self.base == self.model or (Path(self.model) / "tokenizer_config.json").is_file()
        return self.read(AutoTokenizer, None if has_one else self.base)

    def _num_labels(self) -> int | None:
        """Return how many labels the head of an adapter has; None where it brings none."""
        if self.base == self.model:
            return None
        settings, weights = (
            cached_file(self.model, name, revision=self._revision)
            for name in ("adapter_config.json", "adapter_model.safetensors")
        )
        assert settings is not None  # what is not there is an error
        heads = json.loads(Path(settings).read_text()).get("modules_to_save") or ()
        with safe_open(weights, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        sizes = (
            shape[0]
            for key, shape in shapes.items()
            if len(shape) == 2 and any(f".{head}." in key for head in heads)
        )
        return min(sizes, default=None)

    @property
    def dtype(self) -> str:
        """Name of the type of the weights, or `"auto"`."""
        if self._dtype is not None:
            return self._dtype
        return "float32" if self.device == "cpu" and self.device_map is None else "auto"

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        with self._lock:
            if self._config is None:
                labels = self._num_labels()
                settings = {} if labels is None else {"num_labels": labels}
                self._config = self.read(AutoConfig, self.base, **settings)
            return self._config

    @property
    def identity(self) -> dict[str, Any]:
        """Hub id and commit, or a digest of what the folder holds; and type of the weights."""
        if self._identity is None:
            folder = Path(self.model)
            if folder.is_dir():
                of_source: dict[str, Any] = {"name": folder.name, "digest": digest_of(folder)}
                if self.base != self.model:
                    base = Path(self.base)
                    of_source["base"] = digest_of(base) if base.is_dir() else self.base
            else:
                commit = getattr(self.config, "_commit_hash", None)
                of_source = {"name": self.model, "revision": commit or self._revision}
            quantised = self._quantization_config
            self._identity = {
                **of_source,
                "dtype": str(self.config.dtype) if self.dtype == "auto" else self.dtype,
                "quantization": None if quantised is None else digest(repr(quantised)),
            }
        return self._identity


@dataclass(eq=False)
class _Loaded:
    """A model and its tokenizer, shared by the scorers of the process that name them.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        vocabulary: Fingerprint of the tokenizer.
        keeps: Whether what it has read of a reply is kept.
        encodes: Whether it reads a text whole, so that separators around it are part of it.
        seconds: How long reading a number of tokens takes, by whether what was read is kept.
        tokenizer_lock: Held by who encodes: whether control tokens are text is the tokenizer's
            own state, and its copies share it.
    """

    model: Any
    tokenizer: Any
    vocabulary: str
    keeps: bool
    encodes: bool
    seconds: dict[bool, dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer_lock = threading.Lock()


_registry_lock = threading.Lock()
_scorers: "weakref.WeakValueDictionary[Any, SequenceClassifier]" = weakref.WeakValueDictionary()
_models: "weakref.WeakValueDictionary[Any, _Loaded]" = weakref.WeakValueDictionary()
_model_locks: dict[Any, threading.Lock] = {}
_all_scorers: "weakref.WeakSet[SequenceClassifier]" = weakref.WeakSet()


def _renew() -> None:
    """Replace, in a forked child, the locks that threads of the parent may have held."""
    global _registry_lock
    _registry_lock = threading.Lock()
    _model_locks.clear()
    for scorer in list(_all_scorers):
        scorer._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _load(source: _Source) -> _Loaded:
    """Return a model from the registry, loading it where nobody uses it yet."""
    key = source.key
    with _registry_lock:
        lock = _model_locks.setdefault(key, threading.Lock())
    with lock:
        loaded = _models.get(key)
        if loaded is None:
            loaded = _models[key] = _load_anew(source)
        return loaded


def _load_anew(source: _Source) -> _Loaded:
    config = source.config
    keeps = _may_keep(config)
    with quietly():
        model, info = source.read_model(**({"attn_implementation": ATTENTION} if keeps else {}))
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{source.model} is no classifier: its checkpoint has no {', '.join(missing[:3])}"
        )
    tokenizer = source.read_tokenizer()
    model = model.eval().requires_grad_(False)
    if source.pack_weights and can_pack(model):
        pack(model)
    encodes = _encodes(model)
    loaded = _Loaded(model, tokenizer, vocabulary_of(tokenizer), keeps, encodes)
    if keeps:
        difference = _difference(loaded)
        tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
        if not difference <= tolerance:
            _log.warning(
                "%s: kept KV differs from plain recomputation by %.1e; it reads every reply anew",
                source.model,
                difference,
            )
            loaded.keeps = False
    elif not encodes:
        _log.warning(
            "%s: no KV is kept of a %s; it reads every reply anew", source.model, config.model_type
        )
    return loaded


def _encodes(model: Any) -> bool:
    """Return whether what a model makes of a token depends on those behind it.

    It is tried out. Where a family cannot be tried so, its kind decides: one that is known to fill
    in masks or to decode what it has encoded.
    """
    first, *others = (token_id for token_id in range(8) if token_id != model.config.pad_token_id)
    texts = [[first, *others[:3]], [first, *others[3:6]]]
    try:
        with torch.inference_mode():
            one, other = (
                model.base_model(torch.tensor([text], device=input_device(model)))[0][0, 0].float()
                for text in texts
            )
        scale, difference = one.abs().max().item(), (one - other).abs().max().item()
    except Exception:  # whatever a family wants beside token ids
        scale = difference = math.nan
    if not (math.isfinite(difference) and math.isfinite(scale)):
        config = model.config
        return bool(
            config.is_encoder_decoder or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        )
    tolerance = 1e-4 if model.dtype == torch.float32 else 1e-2
    return bool(difference > tolerance * scale)


def _may_keep(config: Any) -> bool:
    """Return whether a family keeps KV as we do, and its settings do not speak against it."""
    return (
        config.model_type in _KEEPING
        and not _stretches(config)
        and not getattr(config, "use_bidirectional_attention", False)
        and set(_windows_of(config)) <= {"", "full_attention", "sliding_attention"}
    )


def _stretches(config: Any) -> bool:
    """Return whether positions depend on the length of the longest text of a batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(rope.get("rope_type", ""))} | {
        str(of_kind.get("rope_type", "")) for of_kind in rope.values() if isinstance(of_kind, dict)
    }
    return bool(kinds & {"dynamic", "longrope"})


def _windows_of(config: Any) -> dict[str, int | None]:
    """Return the sliding window of each kind of layer, None where a layer sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def _packed(loaded: _Loaded, max_tokens: int, prompt_bytes: int = 0) -> PackedModel:
    model, config = loaded.model, loaded.model.config
    return PackedModel(
        model.base_model,
        model.score,
        num_layers=config.num_hidden_layers,
        windows=_windows_of(config),
        pad_token_id=config.pad_token_id,
        device=input_device(model),
        max_tokens=max_tokens,
        prompt_bytes=prompt_bytes,
    )


class _Probe:
    """Stands for a reply when a model is checked or timed."""


def _some_ids(loaded: _Loaded, count: int, seed: int) -> list[int]:
    """Return token ids of which none is padding."""
    config = loaded.model.config
    ordinary = [
        token_id
        for token_id in range(min(config.vocab_size, 64))
        if token_id != config.pad_token_id
    ]
    return [ordinary[(seed + 7 * index + index * index) % len(ordinary)] for index in range(count)]


def _difference(loaded: _Loaded) -> float:
    """Return how far kept KV is from plain recomputation, relative to the logits' size."""
    model, some = loaded.model, partial(_some_ids, loaded)
    probes = [_Probe(), _Probe()]
    prompts = [some(9, 1), some(5, 2)]
    first = [[some(4, 3), some(6, 4)], [some(3, 5), some(1, 6)]]
    accepted = [first[0][1], first[1][0]]
    second = [[kept + some(3, 7), kept + some(2, 8)] for kept in accepted]
    packed = _packed(loaded, 64)
    greatest = 0.0
    try:
        with torch.inference_mode():
            for kept, candidates in (([[], []], first), (accepted, second)):
                outputs = packed.read(
                    [
                        Reading(
                            subject=probe,
                            lane="",
                            prompt_ids=prompt,
                            accepted_ids=of_kept,
                            candidates=of_candidates,
                        )
                        for probe, prompt, of_kept, of_candidates in zip(
                            probes, prompts, kept, candidates, strict=True
                        )
                    ]
                )
                for prompt, of_candidates, of_outputs in zip(
                    prompts, candidates, outputs, strict=True
                ):
                    for ids, output in zip(of_candidates, of_outputs, strict=True):
                        alone = torch.tensor([prompt + ids], device=input_device(model))
                        plain = model(alone).logits[0].float().cpu()
                        scale = max(1.0, plain.abs().max().item())
                        greatest = max(greatest, (plain - output).abs().max().item() / scale)
    except Exception as error:  # whatever a family does that was not foreseen: it recomputes
        _log.warning(
            "%s: the check of kept KV failed: %s", model.config.model_type, type(error).__name__
        )
        return math.inf
    return greatest if math.isfinite(greatest) else math.inf


def _time_readings(loaded: _Loaded, keeps: bool) -> dict[int, float]:
    """Measure how long reading a few tokens behind a short prompt takes, in seconds.

    The shortest of several times counts: whatever else the machine does only adds to it. On a CPU
    the time is this thread's own. Nothing, where the model does not read as many.
    """
    device = input_device(loaded.model)
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    ids = _some_ids(loaded, _TIMED_PROMPT + max(_TIMED_TOKENS), 1)
    limit = _limit(loaded, None)
    if limit is not None and limit < len(ids):
        return {}
    packed, probe = _packed(loaded, len(ids)) if keeps else None, _Probe()

    def read(count: int) -> None:  # and wait for the device
        if packed is not None:
            reading = Reading(
                subject=probe,
                lane="",
                prompt_ids=ids[:_TIMED_PROMPT],
                accepted_ids=(),
                candidates=[ids[_TIMED_PROMPT : _TIMED_PROMPT + count]],
            )
            packed.read([reading])
        else:
            text = torch.tensor([ids[: _TIMED_PROMPT + count]], device=device)
            loaded.model(input_ids=text).logits.cpu()

    def seconds(count: int) -> float:
        began = clock()
        read(count)
        return clock() - began

    try:
        with torch.inference_mode():
            for count in _TIMED_TOKENS:
                read(count)
            began = time.perf_counter()
            table = {count: seconds(count) for count in _TIMED_TOKENS}
            while time.perf_counter() - began < _TIMING_SECONDS:
                for count, least in table.items():
                    table[count] = min(least, seconds(count))
    except Exception as error:  # whatever a family does that was not foreseen, or no memory
        _log.info("%s was not timed: %s", loaded.model.config.model_type, type(error).__name__)
        return {}
    longest = itertools.accumulate(table.values(), max)  # more tokens never take less
    return dict(zip(table, longest, strict=True))


def _interpolated(table: Mapping[int, float], count: int) -> float:
    """Return the time of a number of tokens, straight between and beyond the measured ones."""
    sizes = sorted(table)
    at = min(max(bisect.bisect_left(sizes, count), 1), len(sizes) - 1)
    low, high = sizes[at - 1], sizes[at]
    return table[low] + (table[high] - table[low]) / (high - low) * (count - low)


# From chats to token ids


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What stands before a reply.

    Attributes:
        lead: Control tokens before the messages, kept where the messages must be cut.
        ids: The messages.
        middle: Control tokens between messages and reply.
        before: Text that is encoded with the reply: what it continues.
    """

    lead: tuple[int, ...]
    ids: tuple[int, ...]
    middle: tuple[int, ...]
    before: str

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Everything before the reply."""
        return self.lead + self.ids + self.middle


class _Writer:
    """Writes chats and replies as the classifier is to see them.

    Attributes:
        view: What it is shown.
        closing: Tokens that close a finished reply.
        tail: Tokens that follow every reply, finished or not.
        types: Token types before and from the reply on; None where the model has none.
        max_length: Most tokens that the model can read; None if there is no limit.
    """

    def __init__(
        self,
        loaded: _Loaded,
        *,
        view: View | None,
        closed: Closed,
        max_length: int | None,
        chat_template: str | None,
    ) -> None:
        self._tokenizer = loaded.tokenizer
        if chat_template is not None:
            self._tokenizer = copy.copy(loaded.tokenizer)
            self._tokenizer.chat_template = chat_template
        self._loaded = loaded
        self._closed = closed
        self._encoder = TextEncoder(self._tokenizer)
        has_template = bool(getattr(self._tokenizer, "chat_template", None))
        self.view: View = view or ("chat" if has_template else "pair")
        self.types: tuple[int, int] | None = None
        self.max_length = _limit(loaded, max_length)
        self._lead: tuple[int, ...] = ()
        self._middle: tuple[int, ...] = ()
        self.tail: tuple[int, ...] = ()
        if self.view == "chat":
            if not has_template:
                raise ValueError("`view='chat'` needs a chat template, and the tokenizer has none")
            self._read_template()
        else:
            self._read_separators(loaded.encodes)

    def prompt(self, chat: Chat) -> _Prompt:
        """Return what stands before the reply to a chat."""
        if self.view != "chat":
            messages, before = _split(chat)
            ids: list[int] = []
            if self.view != "reply":
                with self._loaded.tokenizer_lock:
                    [ids] = self._encoder.encode([_joined(messages, self.view)], begins=True)
            return _Prompt(self._lead, tuple(ids), self._middle, before)
        failure = ""
        for spell in (tuple, with_two_roles):
            try:
                messages, before = _split(spell(chat))
                with self._loaded.tokenizer_lock:
                    ids = encode_chat(
                        self._tokenizer, messages, add_generation_prompt=self._generation_prompt
                    )
            except Exception as error:  # a template may raise what it likes, and name the messages
                failure = type(error).__name__
                continue
            return _Prompt((), (*ids, *self._header), (), self._space + before)
        raise NamedRewardError(f"the chat template failed on {len(chat)} messages: {failure}")

    def replies(
        self, subjects: Sequence[tuple[str, _Prompt]], completions: Sequence[Completion]
    ) -> list[tuple[int, ...]]:
        """Return the ids of each completion, open, in the vocabulary of the classifier.

        Args:
            subjects: The vocabulary of its token ids and the prompt of each completion.
            completions: The completions.
        """
        texts: list[str] = []
        straight: list[tuple[int, ...] | None] = []
        for (vocabulary, prompt), completion in zip(subjects, completions, strict=True):
            ids = completion.token_ids
            if (
                vocabulary != self._loaded.vocabulary
                or prompt.before.strip(" ")
                or not self._may_share
            ):
                ids = None
            straight.append(ids)
            if ids is None:
                texts.append(prompt.before + completion.text)
        with self._loaded.tokenizer_lock:
            encoded = iter(self._encoder.encode(texts, begins=self.view != "chat"))
        return [tuple(next(encoded)) if ids is None else ids for ids in straight]

    def closing(self, completion: Completion) -> tuple[int, ...]:
        """Return the tokens that close a completion, or none."""
        closes = self._closed == "always" or (self._closed == "finished" and completion.finished)
        return self._end if closes else ()

    def _read_template(self) -> None:
        """Find out what the template writes between a chat and a reply, and after it."""
        chat = [{"role": "user", "content": "Hi"}]
        reply = {"role": "assistant", "content": _SENTINEL}
        write = self._tokenizer.apply_chat_template
        whole = write([*chat, reply], tokenize=False)
        at = whole.rfind(_SENTINEL)
        for generation_prompt in (True, False):
            begin = write(chat, tokenize=False, add_generation_prompt=generation_prompt)
            if at >= 0 and whole[:at].startswith(begin):
                break
        else:
            raise ValueError(
                "the chat template does not write a reply behind the chat; choose another `view`"
            )
        self._generation_prompt = generation_prompt
        header = whole[len(begin) : at]
        bare = header.rstrip(" ")
        # A space before the reply belongs to its first token.
        self._space = header[len(bare) :]
        self._header: tuple[int, ...] = ()
        self._end: tuple[int, ...] = ()
        if bare:
            self._header = tuple(self._encoder.encode([bare], plain=False)[0])
        end = whole[at + len(_SENTINEL) :]
        if end:
            self._end = tuple(self._encoder.encode([end], plain=False)[0])
        self._may_share = not self._space or self._encoder.adds_space

    def _read_separators(self, encodes: bool) -> None:
        """Find out which control tokens the tokenizer puts around one text or two."""
        self._may_share = True
        texts = ["a"] if self.view == "reply" else ["a", "b"]
        encoded = self._tokenizer(*texts, return_token_type_ids=True)
        ids = tuple(encoded["input_ids"])
        parts = [tuple(part) for part in self._encoder.encode(texts, begins=True)]
        begin = _find(ids, parts[0], 0)
        end = begin + len(parts[0])
        self._lead = ids[:begin]
        if len(parts) > 1:
            second = _find(ids, parts[1], end)
            self._middle = ids[end:second]
            end = second + len(parts[1])
        tail = ids[end:]
        types = encoded.get("token_type_ids")
        if types is not None and encodes:
            self.types = (types[0], types[end - 1])
        # What follows is part of the form for an encoder; for a causal model it ends the text.
        self.tail, self._end = (tail, ()) if encodes else ((), tail)
        if not encodes:
            self._middle = ()  # a second beginning in the middle of a text
        if self.view == "reply":
            self._lead, self._middle = (), self._lead


def _find(ids: tuple[int, ...], part: tuple[int, ...], start: int) -> int:
    for begin in range(start, len(ids) - len(part) + 1):
        if ids[begin : begin + len(part)] == part:
            return begin
    raise ValueError(
        "the tokenizer encodes a pair of texts in an unknown way; choose another `view`"
    )


def _limit(loaded: _Loaded, max_length: int | None) -> int | None:
    config = loaded.model.config
    limits = [max_length, getattr(config, "max_position_embeddings", None)]
    if limits[1] is not None and config.model_type in _OFFSET_POSITIONS:
        limits[1] -= (config.pad_token_id or 0) + 1
    if loaded.tokenizer.model_max_length < _NEVER:
        limits.append(int(loaded.tokenizer.model_max_length))
    known = [limit for limit in limits if limit is not None and limit > 0]
    return min(known) if known else None


# Families that count positions from behind the id of the padding token.
_OFFSET_POSITIONS = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})


def _split(chat: Chat) -> tuple[Chat, str]:
    """Return the messages before the reply, and the text that the reply continues."""
    if chat and chat[-1].get("role") == "assistant":
        return chat[:-1], text_of(chat[-1].get("content"))
    return chat, ""


def _joined(chat: Chat, view: View) -> str:
    texts = [(message.get("role"), text_of(message.get("content"))) for message in chat]
    if view == "pair":
        return "\n\n".join(text for _, text in texts)
    turns = [
        f"\n\n{'Assistant' if role == 'assistant' else 'Human'}: {text}"
        for role, text in texts
        if role != "system"
    ]
    return "".join(turns) + "\n\nAssistant:"


# Running the model


class _Runner:
    """Reads every text anew: encoders, and causal models of which no KV is kept.

    Attributes:
        counters: What was computed.
    """

    def __init__(
        self, loaded: _Loaded, writer: _Writer, max_tokens: int, windows: bool = False
    ) -> None:
        self._loaded = loaded
        self._writer = writer
        self._max_tokens = max_tokens
        self._windows = windows
        self._num_labels = int(loaded.model.config.num_labels)
        self._prompts: weakref.WeakKeyDictionary[Subject, _Prompt] = weakref.WeakKeyDictionary()
        self.counters = Counters()
        self._alone = _stretches(loaded.model.config) or not self._batches()

    def release(self, subject: Subject) -> None:
        """Drop what is kept of a reply."""
        self._prompts.pop(subject, None)

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        """Return the logits of each candidate, window after window."""
        written = self._write(requests)
        texts: list[tuple[list[int], list[int]]] = []
        pieces: list[list[list[int]]] = []
        for request, of_request in zip(requests, written, strict=True):
            prompt = self._prompt(request.subject)
            counts: list[list[int]] = []
            for completion, ids in zip(request.candidates, of_request, strict=True):
                body = [*ids, *self._writer.closing(completion)]
                cut = self._cut(prompt, body)
                counts.append(list(range(len(texts), len(texts) + len(cut))))
                texts += cut
                self.counters.candidate_tokens += sum(len(piece) for _, piece in cut)
                self.counters.prompt_tokens += sum(len(piece) for piece, _ in cut)
            pieces.append(counts)
        logits = self._run(texts)
        nothing = (math.nan,) * self._num_labels
        num_long = sum(not of_candidate for of_request in pieces for of_candidate in of_request)
        answers = [
            [
                tuple(value for index in of_candidate for value in logits[index]) or nothing
                for of_candidate in of_request
            ]
            for of_request in pieces
        ]
        self._warn(answers, num_long)
        return answers

    def _prompt(self, subject: Subject) -> _Prompt:
        prompt = self._prompts.get(subject)
        if prompt is None:
            prompt = self._prompts[subject] = self._writer.prompt(subject.chat)
        return prompt

    def _write(self, requests: Sequence[ScoreRequest]) -> list[list[tuple[int, ...]]]:
        """Return the ids of each request's candidates, open."""
        subjects = [
            (request.subject.vocabulary, self._prompt(request.subject))
            for request in requests
            for _ in request.candidates
        ]
        completions = [candidate for request in requests for candidate in request.candidates]
        ids = iter(self._writer.replies(subjects, completions))
        return [[next(ids) for _ in request.candidates] for request in requests]

    def _cut(self, prompt: _Prompt, body: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return what is read, as ids before the reply and from it on; nothing if it is too long."""
        head, tail = list(prompt.all_ids), list(self._writer.tail)
        limit = self._writer.max_length
        if limit is None or len(head) + len(body) + len(tail) <= limit:
            return [(head, body + tail)]
        room = limit - len(tail)
        if not self._windows or room < 4:
            return []
        if len(head) > room // 2:  # the end of the messages, behind what opens the text
            fixed = len(prompt.lead) + len(prompt.middle)
            last = list(prompt.ids[-max(room // 2 - fixed, 1) :])
            head = [*prompt.lead, *last, *prompt.middle]
        width = max(room - len(head), 2)
        begins = list(range(0, max(len(body) - width, 0), max(width // 2, 1)))
        begins.append(max(len(body) - width, 0))
        return [(head, body[begin : begin + width] + tail) for begin in begins]

    def _run(self, texts: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, ...]]:
        """Return the logits of each text, in batches of about the same length."""
        lengths = [len(head) + len(body) for head, body in texts]
        pending = sorted(range(len(texts)), key=lengths.__getitem__)
        logits: dict[int, tuple[float, ...]] = {}
        while pending:
            count = 1
            while (
                not self._alone
                and count < len(pending)
                and (count + 1) * lengths[pending[count]] <= self._max_tokens
            ):
                count += 1
            batch = pending[:count]
            try:
                outputs = self._forward([texts[index] for index in batch])
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or count == 1:
                    raise
                self._max_tokens = max(count * lengths[batch[-1]] // 2, 1)
                self.counters.backoffs += 1
                _log.warning(
                    "out of memory: at most %d tokens at once from now on", self._max_tokens
                )
                continue
            logits.update(zip(batch, outputs, strict=True))
            pending = pending[count:]
        return [logits[index] for index in range(len(texts))]

    def _forward(self, texts: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, ...]]:
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        pad = next(
            (
                token_id
                for token_id in (model.config.pad_token_id, tokenizer.pad_token_id)
                if token_id is not None
            ),
            0,
        )
        width = max(len(head) + len(body) for head, body in texts)
        ids = torch.full((len(texts), width), pad)
        seen = torch.zeros((len(texts), width), dtype=torch.long)
        types = torch.zeros((len(texts), width), dtype=torch.long)
        for row, (head, body) in enumerate(texts):
            count = len(head) + len(body)
            ids[row, :count] = torch.tensor(head + body)
            seen[row, :count] = 1
            if self._writer.types is not None:
                first, second = self._writer.types
                types[row, :count] = torch.tensor([first] * len(head) + [second] * len(body))
        inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": seen}
        if self._writer.types is not None:
            inputs["token_type_ids"] = types
        device = input_device(model)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        self.counters.forwards += 1
        return [tuple(of_text) for of_text in model(**inputs).logits.float().cpu().tolist()]

    def _batches(self) -> bool:
        """Return whether a text among longer ones gets the logits that it gets alone."""
        token_ids = [
            token_id
            for token_id in range(min(self._loaded.model.config.vocab_size, 64))
            if token_id != self._loaded.model.config.pad_token_id
        ][-8:]
        texts = [(token_ids[:3], token_ids[3:5]), (token_ids[:5], token_ids[3:])]
        try:
            with torch.inference_mode():
                together, alone = self._forward(texts)[0], self._forward(texts[:1])[0]
        except Exception as error:  # whatever a family does that was not foreseen: one at a time
            _log.warning(
                "texts are read one at a time: a batch fails with %s", type(error).__name__
            )
            return False
        scale = max(1.0, *(abs(value) for value in alone))
        tolerance = 1e-3 if self._loaded.model.dtype == torch.float32 else 5e-2
        return all(
            abs(one - other) <= tolerance * scale
            for one, other in zip(together, alone, strict=True)
        )

    def _warn(self, answers: Sequence[Sequence[Raw]], num_long: int) -> None:
        model_type = self._loaded.model.config.model_type
        if num_long:
            _log.warning(
                "%d replies are too long for %s, which reads at most %s tokens: rejected",
                num_long,
                model_type,
                self._writer.max_length,
            )
        num_rejected = sum(
            not all(map(math.isfinite, raw)) for of_request in answers for raw in of_request
        )
        if num_rejected > num_long:
            _log.warning(
                "%d replies have no finite logits of %s: rejected",
                num_rejected - num_long,
                model_type,
            )


class _KeepingRunner(_Runner):
    """Keeps what it has read of every reply, and reads the candidates of a round at once."""

    def __init__(
        self, loaded: _Loaded, writer: _Writer, max_tokens: int, prompt_bytes: int
    ) -> None:
        super().__init__(loaded, writer, max_tokens)
        self._packed = _packed(loaded, max_tokens, prompt_bytes)
        self.counters = self._packed.counters

    def _batches(self) -> bool:
        return True

    def release(self, subject: Subject) -> None:
        """Drop what was read of a reply."""
        super().release(subject)
        self._packed.release(subject)

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        """Return the logits of each candidate; NaN where it is too long."""
        with_accepted = [
            ScoreRequest(
                subject=request.subject,
                accepted=request.accepted,
                candidates=(request.accepted, *request.candidates),
            )
            for request in requests
        ]
        limit = self._writer.max_length
        answers: list[list[Raw]] = []
        readings: list[Reading] = []
        places: list[tuple[int, int]] = []
        num_long = 0
        for index, (request, (accepted, *candidates)) in enumerate(
            zip(requests, self._write(with_accepted), strict=True)
        ):
            prompt = self._prompt(request.subject)
            answers.append([(math.nan,) * self._num_labels] * len(candidates))
            fitting: list[tuple[int, ...]] = []
            for place, (completion, ids) in enumerate(
                zip(request.candidates, candidates, strict=True)
            ):
                ids += self._writer.closing(completion) + self._writer.tail
                if limit is None or len(prompt.all_ids) + len(ids) <= limit:
                    fitting.append(ids)
                    places.append((index, place))
                else:
                    num_long += 1
            if fitting:
                readings.append(
                    Reading(
                        subject=request.subject,
                        lane=request.subject.lane,
                        prompt_ids=prompt.all_ids,
                        accepted_ids=accepted,
                        candidates=fitting,
                        partition=request.subject.partition,
                    )
                )
        outputs = [output for of_reading in self._packed.read(readings) for output in of_reading]
        for (index, place), output in zip(places, outputs, strict=True):
            if len(output) == self._num_labels:  # else there was nothing to read
                answers[index][place] = tuple(output.tolist())
        self._warn(answers, num_long)
        return answers
