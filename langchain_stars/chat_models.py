"""The chat model: LangChain's messages in, judged messages out.

The one file that speaks LangChain messages. Knows messages, settings and errors; nothing of
rounds, candidates, tensors or devices.
"""

import asyncio
import contextlib
import functools
import json
import os
import uuid
import warnings
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextvars import ContextVar
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAPIError,
    ModelInvalidRequestError,
    ModelNotFoundError,
    ModelRateLimitError,
    ModelTimeoutError,
)
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import (
    ConfigDict,
    Field,
    InstanceOf,
    PrivateAttr,
    field_serializer,
    field_validator,
    model_validator,
)

from langchain_stars.acceptance import DEFAULT_ALPHA, Acceptance, Linear, OnExhausted
from langchain_stars.decoder import DEFAULT_REFUSAL, Delta, GuardExhausted, Policy, Report, Segment
from langchain_stars.engine import (
    AsyncReply,
    DeadlineExceededError,
    EngineError,
    Order,
    Priority,
    QueueFullError,
    SyncReply,
    engine_for,
)
from langchain_stars.language_models.base import LanguageModel, Sampling
from langchain_stars.rewards.algebra import Constraint
from langchain_stars.rewards.base import Reward, digest
from langchain_stars.rewards.expressions import resolve_constraint, resolve_reward
from langchain_stars.templates import with_two_roles

__all__ = [
    "BUNDLED",
    "ChatStars",
    "GuardExhausted",
    "LanguageModelError",
    "LanguageModelNotFoundError",
    "LanguageModelTimeoutError",
    "TooManyRepliesError",
]

BUNDLED = "bundled"
"""Name of the small language model that comes with the package."""

_PROVIDER = "langchain-stars"
_BUNDLED_FOLDER = Path(__file__).resolve().parent / "bundled"
_VERSION = version("langchain-stars")
_MAX_HORIZON = 128
_MAX_CONCURRENCY = 128

_priority: ContextVar[Priority] = ContextVar("langchain_stars_priority", default="interactive")

Chat: TypeAlias = list[dict[str, Any]]


class LanguageModelError(ModelAPIError, EngineError):
    """The language model or the engine failed; carries names, counts and types only."""


class LanguageModelNotFoundError(ModelNotFoundError, ValueError):
    """There is no such language model, or it cannot be loaded."""


class LanguageModelTimeoutError(ModelTimeoutError, DeadlineExceededError):
    """The reply was not finished within its `timeout`."""


class TooManyRepliesError(ModelRateLimitError, QueueFullError):
    """As many replies wait as may; worth another try later."""


class ChatStars(BaseChatModel):
    """A chat model that runs on this machine and judges its reply before anyone sees it.

    The language model drafts the next few tokens, rewards judge them together with all that is
    already kept, and the first draft that is good enough is kept; only what is kept is streamed,
    traced or returned. `ChatStars()` runs the small models that come with the package.

    What judges is what is named. Where neither `reward` nor `constraints` is given, the bundled
    rewards judge: helpfulness as the objective, and safety as a constraint with its own floor.
    Where one is given, the other is not assumed. `reward=None` or `constraints=[]` alone takes
    away its half of the bundled guard; both together, or `unguarded()`, take away all of it, and
    the replies then say `guarded: False` in their metadata.

    Every field but those of loading can be given again for one call, as in
    `invoke(..., temperature=0)` or `bind(seed=1)`. Those of the guard may only make it stricter.

    Attributes:
        model: Hub id, folder or a language model; `"bundled"` is the one of the package.
        reward: The objective: a reward, or a function in TRL's convention. See
            `langchain_stars.rewards`.
        constraints: What must hold always, as in `[safety() >= 0.8]`.
        target: Reward asked of a whole reply, in reward units; if not given, the reward's own.
            `langchain-stars calibrate` measures one.
        alpha: Where the threshold starts, from 0 (the prompt's reward) to 1 (`target`); the
            reward's own if not given, else 0.5.
        beta: Softness of acceptance, in reward units, at least 0; 0 is a hard cut. If not given,
            the reward's own, or 0 where it has none.
        horizon: Tokens, at least 1, from which `target` itself is asked; if not given, the
            smaller of `max_tokens` and 128.
        schedule: Thresholds of another kind, instead of `target`, `alpha` and `horizon`.
        segment_size: Tokens that are judged at once, at least 1.
        max_attempts: Attempts of a segment, at least 1.
        num_candidates: `"auto"`, or the most attempts drafted at once; changes the speed only.
        on_exhausted: What happens when no attempt is accepted: `"fallback"` draws from those that
            meet every constraint, `"best"` takes the best of those, `"refuse"` ends the reply
            with `refusal_message` (as the first two do where none meets them), `"raise"` raises
            `GuardExhausted`.
        holdback: Accepted segments that are not shown yet and can be taken back, at least 0.
        max_takebacks: How often in a reply they are, at least 0.
        refusal_message: The application's words where a reply ends without a segment.
        reward_timeout: Seconds that a reward which runs in a worker has for a call.
        temperature: Divides the logits; 0 takes the likeliest token. Not `beta`. This and the
            next four are the checkpoint's own (of its `generation_config.json`) if not given; if
            it has none, tokens are drawn with the probabilities that the model gives them.
        top_p: Share of probability kept, in (0, 1].
        top_k: Number of tokens kept, at least 1.
        min_p: Least probability kept, relative to the likeliest token, in [0, 1].
        repetition_penalty: Above 1 makes tokens less likely that have occurred.
        max_tokens: Most tokens of a reply, at least 1.
        stop: Strings that end a reply; they are not part of it. Also `stop_sequences`.
        seed: Decides every draw of a reply; None takes a new one each time, and reports it.
        timeout: Seconds that a reply may take once its models are loaded; None is no limit.
        max_queue: Most replies that may wait for this one to be taken, at least 0.
        partition: Name of those who may share what is computed for a prompt, such as the turns of
            one thread or the users of one tenant; nobody shares under an empty name.
        device: `"cpu"`, `"cuda"`, ...; None takes the best there is.
        dtype: Type of the weights; None is the checkpoint's, and float32 on a CPU.
        device_map: As in transformers, to spread a large model over devices.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code of the checkpoint may run.
        attention: Attention implementation of transformers; None takes the fastest.
        chat_template: Used instead of the tokenizer's.
        context_length: Most tokens of prompt and reply; None takes the model's own limit.
        model_kwargs: More settings for loading, as in transformers' `from_pretrained`.
        streaming: Whether `invoke` streams inside, for callbacks.
        on_segment: Called with each segment that is kept and its text, in the caller's thread.
    """

    model: str | InstanceOf[LanguageModel] = BUNDLED
    reward: InstanceOf[Reward] | None = Field(default=None, exclude=True, repr=False)
    constraints: list[InstanceOf[Constraint]] = Field(
        default_factory=list, exclude=True, repr=False
    )
    target: float | None = None
    alpha: float | None = None
    beta: float | None = None
    horizon: int | None = None
    schedule: Any = Field(default=None, exclude=True, repr=False)
    segment_size: int = 16
    max_attempts: int = 20
    num_candidates: Literal["auto"] | int = "auto"
    on_exhausted: OnExhausted = "fallback"
    holdback: int = 0
    max_takebacks: int = 2
    refusal_message: str = DEFAULT_REFUSAL
    reward_timeout: float | None = 30.0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int = Field(default=256, ge=1)
    stop: list[str] = Field(default_factory=list, alias="stop_sequences")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    timeout: float | None = Field(default=None, gt=0)
    max_queue: int = Field(default=1024, ge=0)
    partition: str = ""
    device: str | None = None
    dtype: str | None = None
    device_map: Any = None
    revision: str | None = None
    trust_remote_code: bool = False
    attention: str | None = None
    chat_template: str | None = None
    context_length: int | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    streaming: bool | None = None
    on_segment: Callable[[Segment, str], None] | None = Field(
        default=None, exclude=True, repr=False
    )

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    _files: dict[str, list[list[Any]] | None] = PrivateAttr(default_factory=dict)
    _identified: bool = PrivateAttr(default=False)

    # Settings are checked where they enter

    @model_validator(mode="before")
    @classmethod
    def _fill_stars_guard(cls, values: Any) -> Any:
        """Let the bundled rewards judge where none is named; warn of settings nobody knows."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        known = {*cls.model_fields, *(field.alias for field in cls.model_fields.values())}
        unknown = sorted(set(values) - known - _TOLERATED)
        if unknown:
            warnings.warn(
                f"ChatStars has no setting {', '.join(f'`{name}`' for name in unknown)}; "
                "it is ignored",
                stacklevel=2,
            )
        named_reward = values.get("reward") is not None
        constraints = values.get("constraints")
        if "reward" not in values and (constraints is None or constraints == []):
            values["reward"] = _bundled_reward()
        if constraints is None:
            values["constraints"] = [] if named_reward else [_bundled_constraint()]
        return values

    @field_validator("model", mode="before")
    @classmethod
    def _read_model(cls, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if not isinstance(value, str | LanguageModel):
            raise ValueError(
                f"`model` must be a hub id, a folder or a language model, got "
                f"{type(value).__name__}; wrap a loaded model of transformers as "
                "`LocalLanguageModel(model, tokenizer=tokenizer)`"
            )
        return value

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        """Take what torch has for it, by its name."""
        return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value

    @field_validator("reward", mode="before")
    @classmethod
    def _read_reward(cls, value: Any) -> Any:
        return value if value is None else resolve_reward(value)

    @field_validator("constraints", mode="before")
    @classmethod
    def _read_constraints(cls, value: Any) -> Any:
        return _as_constraints(value)

    @field_validator("stop", mode="before")
    @classmethod
    def _read_stop(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: list[str]) -> list[str]:
        if any(not string for string in value):
            raise ValueError("`stop` must not hold an empty string")
        return value

    @model_validator(mode="after")
    def _check_stars_settings(self) -> "ChatStars":
        Sampling(**self._sampling())
        self._policy()
        if isinstance(self.num_candidates, int) and self.num_candidates < 1:
            raise ValueError(
                f"`num_candidates` must be 'auto' or at least 1, got {self.num_candidates}"
            )
        if isinstance(self.model, LanguageModel):
            given = [name for name in _LOADING if getattr(self, name) != _default_of(name)]
            if given:
                raise ValueError(
                    f"`{given[0]}` belongs to a `model` that is named; give it to the language "
                    "model itself where that is an object"
                )
        elif not self.model:
            raise ValueError("`model` must name a hub id or a folder, got an empty name")
        return self

    @model_validator(mode="after")
    def _set_stars_version(self) -> "ChatStars":
        self._add_version(_PROVIDER, _VERSION)
        return self

    def _resolve_model_profile(self) -> ModelProfile | None:
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            tool_calling=False,
            structured_output=False,
            temperature=True,
        )
        length = self.context_length
        if isinstance(self.model, LanguageModel):
            length = self.model.context_length
        elif length is None:
            length = _context_length_of(_folder_of(self.model))
        if length is not None:
            profile["max_input_tokens"] = length
            profile["max_output_tokens"] = length
        return profile

    @field_serializer("model")
    def _write_model(self, value: str | LanguageModel) -> str:
        return _name_of(value)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield what decides, by name: no weights, no objects."""
        for name, value in super().__repr_args__():
            yield name, _name_of(value) if name == "model" else value

    # What the settings mean

    @property
    def guarded(self) -> bool:
        """Whether anything judges the replies."""
        return self.reward is not None or bool(self.constraints)

    def unguarded(self) -> "ChatStars":
        """Return a chat model on the same weights whose replies nobody judges, and which says so.

        It is spelled `ChatStars(reward=None, constraints=[])` where there is none yet.
        """
        return self._copy(
            {"reward": None, "constraints": [], "target": None, "beta": None, "schedule": None}
        )

    def unload(self) -> None:
        """Free the weights of the model and of its rewards, for all that share them.

        The next call loads them again. A reply that is in progress goes on with what it has.
        """
        self._language_model().unload()
        policy = self._policy()
        for scorer in policy.scorers if policy else ():
            scorer.unload()

    def _copy(self, changes: Mapping[str, Any]) -> "ChatStars":
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**settings, **changes})

    def _sampling(self) -> dict[str, Any]:
        """Return the settings of sampling that are given."""
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        return {name: value for name, value in given.items() if value is not None}

    def _policy(self) -> Policy | None:
        """Return the guard; None where nothing judges."""
        if self.reward is None:
            for name in ("target", "schedule"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` asks something of a `reward`, and there is none")
            if not self.constraints:
                return None
        return Policy(
            objective=self.reward,
            constraints=tuple(self.constraints),
            acceptance=Acceptance(
                schedule=self._schedule(),
                beta=self._guard_setting("beta"),
                max_attempts=self.max_attempts,
                on_exhausted=self.on_exhausted,
            ),
            segment_size=self.segment_size,
            max_candidates=None if self.num_candidates == "auto" else self.num_candidates,
            holdback=self.holdback,
            max_takebacks=self.max_takebacks,
            refusal_message=self.refusal_message,
            reward_timeout=self.reward_timeout,
        )

    def _schedule(self) -> Any:
        if self.reward is None:
            return None
        if self.schedule is not None:
            if self.target is not None:
                raise ValueError("`target` and `schedule` exclude each other; give one of them")
            if not callable(getattr(self.schedule, "threshold", None)):
                raise ValueError(
                    f"`schedule` must be a schedule such as `Constant(0.5)`, got "
                    f"{type(self.schedule).__name__}"
                )
            return self.schedule
        target = self._guard_setting("target")
        if target is None:
            raise ValueError(
                f"`target` must be given: the reward {self.reward.name} does not say which value "
                "a good reply has. Give `target=...`, or measure one with `langchain-stars "
                "calibrate`"
            )
        return Linear(
            target=target,
            alpha=self._guard_setting("alpha"),
            horizon=self._guard_setting("horizon"),
        )

    def _guard_setting(self, name: str) -> Any:
        """Return a setting of the guard as it holds, where it is not given itself too."""
        value = getattr(self, name)
        if value is not None:
            return value
        if name == "horizon":
            return min(self.max_tokens, _MAX_HORIZON)
        if name == "target":
            return self.reward.target if self.reward is not None else None
        if name == "beta":
            own = self.reward.beta if self.reward is not None else None
            return 0.0 if own is None else own
        if name == "alpha":
            own = self.reward.alpha if self.reward is not None else None
            return DEFAULT_ALPHA if own is None else own
        return None

    def _language_model(self) -> LanguageModel:
        """Return the language model, the same object for the same name and settings."""
        if isinstance(self.model, LanguageModel):
            return self.model
        from langchain_stars.language_models import load_language_model

        settings = {
            name: getattr(self, name)
            for name in _LOADING
            if name != "model_kwargs" and getattr(self, name) != _default_of(name)
        }
        try:
            return load_language_model(
                str(_folder_of(self.model) or self.model), **(self.model_kwargs | settings)
            )
        except (OSError, ValueError) as error:
            raise LanguageModelNotFoundError(str(error)) from error

    def _model_identity(self) -> dict[str, Any]:
        """Return what decides the weights, without loading them."""
        if isinstance(self.model, LanguageModel):
            return {"fingerprint": self.model.fingerprint}
        identity: dict[str, Any] = {"name": self.model}
        identity |= {name: _plain(getattr(self, name)) for name in _LOADING}
        files = self._model_files()
        return identity if files is None else identity | {"files": files}

    def _model_files(self) -> list[list[Any]] | None:
        """Return name, size and time of each file of the folder that is named, read once."""
        name = str(self.model)
        if name not in self._files:
            folder = _folder_of(name)
            self._files[name] = None
            if folder is not None and folder.is_dir():
                self._files[name] = [
                    [entry.name, entry.stat().st_size, entry.stat().st_mtime_ns]
                    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
                    if entry.is_file()
                ]
        return self._files[name]

    async def _aidentify(self) -> None:
        """Read in a thread what LangChain asks for on the event loop: which files decide."""
        if not self._identified:
            await asyncio.to_thread(self._fingerprint)
            self._identified = True

    def _reply_identity(self) -> dict[str, Any]:
        """Return everything that decides a reply but its prompt, as JSON."""
        policy = self._policy()
        return {
            "version": _VERSION,
            "model": self._model_identity(),
            "policy": policy.identity if policy else None,
            "segment_size": self.segment_size,
            "sampling": self._sampling(),
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "seed": self.seed,
            "partition": self.partition,
        }

    def _fingerprint(self) -> str:
        """Return a digest of what decides a reply; never the same for rewards without a version."""
        identity = self._reply_identity()
        policy = self._policy()
        if policy is not None and not all(leaf.versioned for leaf in policy.leaves):
            identity["once"] = uuid.uuid4().hex
        return digest(identity)

    # What LangChain asks of a chat model

    @property
    def _llm_type(self) -> str:
        return _PROVIDER

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What decides a reply: the settings that people look for, and a digest of all of them."""
        policy = self._policy()
        return {
            "model": _name_of(self.model),
            **self._sampling(),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "guarded": self.guarded,
            "policy": policy.fingerprint if policy else None,
            "fingerprint": self._fingerprint(),
        }

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return the key of a call in LangChain's cache: a digest of all that decides it.

        Settings that a call brings are counted by what they mean: the text of two rewards may be
        the same and they may judge differently.
        """
        return f"{_PROVIDER}:{self._for_call(stop, kwargs)._fingerprint()}"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        def of_call(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(self, name) if value is None else value

        params = LangSmithParams(
            ls_provider=_PROVIDER,
            ls_model_name=_name_of(of_call("model")),
            ls_model_type="chat",
            ls_max_tokens=of_call("max_tokens"),
        )
        if of_call("temperature") is not None:
            params["ls_temperature"] = of_call("temperature")
        strings = stop or kwargs.get("stop_sequences") or self.stop
        if strings:
            params["ls_stop"] = list(strings)
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text, by the model's own tokenizer; loads that."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._language_model().encode_text(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return the number of tokens of a thread as the model reads it, its template included.

        Args:
            messages: The thread.
            tools: Tools to count as the template writes them.
        """
        chat = _chat_of(messages)
        if not chat:
            return 0
        schemas = [convert_to_openai_tool(tool) for tool in tools or ()]
        return len(_encode(self._language_model(), chat, tools=schemas or None))

    # One call

    def _for_call(self, stop: list[str] | None, settings: Mapping[str, Any]) -> "ChatStars":
        """Return the chat model with the settings of one call.

        Raises:
            NotImplementedError: The call brings tools.
            TypeError: There is no such setting.
            ValueError: A setting is out of range, or would loosen the guard.
        """
        changes = {"stop" if n == "stop_sequences" else n: v for n, v in settings.items()}
        if stop is not None:
            changes["stop"] = stop
        for name in _TOOL_SETTINGS:
            if changes.pop(name, None):
                raise NotImplementedError(f"ChatStars does not call tools, and was given `{name}`")
        unknown = sorted(set(changes) - _PER_CALL - _PASSED_BY_LANGCHAIN)
        unknown = [name for name in unknown if changes[name] is not None]
        if unknown:
            raise TypeError(
                f"ChatStars has no setting `{unknown[0]}` for a call; it has "
                f"{', '.join(sorted(_PER_CALL))}"
            )
        if "reward" in changes and changes["reward"] is None and self.reward is not None:
            raise ValueError("`reward` may not be taken away for a call; see `unguarded()`")
        changes = {n: v for n, v in changes.items() if v is not None and n in _PER_CALL}
        if not changes:
            return self
        if "constraints" in changes:
            changes["constraints"] = self._more_constraints(changes["constraints"])
        if "model" in changes and changes["model"] != self.model:
            # What was said of one model, of its revision and its code, does not hold for another.
            changes = {name: _default_of(name) for name in _LOADING if name != "device"} | changes
            if isinstance(changes["model"], LanguageModel):
                changes["device"] = None
        if "max_tokens" in changes and self.horizon is None and "horizon" not in changes:
            with contextlib.suppress(TypeError):  # the validation below says what is wrong
                if changes["max_tokens"] > self.max_tokens:
                    changes["horizon"] = self._guard_setting("horizon")
        changed = self._copy(changes)
        if self.guarded:
            for name in _TIGHTER:
                if name in changes:
                    self._check_tighter(name, changed)
        return changed

    def _more_constraints(self, value: Any) -> list[Constraint]:
        """Return the constraints of a call: those of the chat model, and what the call adds."""
        added = _as_constraints(value)
        if not added and self.constraints:
            raise ValueError("`constraints` may not be taken away for a call; see `unguarded()`")
        for constraint in added:
            for own in self.constraints:
                same = own.reward.identity == constraint.reward.identity
                if same and constraint.floor < own.floor:
                    raise ValueError(
                        f"`constraints` may only get tighter for a call: {own.name} holds "
                        f"already, got {constraint.name}"
                    )
        return [*self.constraints, *(c for c in added if c not in self.constraints)]

    def _check_tighter(self, name: str, changed: "ChatStars") -> None:
        old, new = self._guard_setting(name), changed._guard_setting(name)
        if name in ("reward", "target", "beta", "alpha", "horizon") and self.reward is None:
            return
        rule = _TIGHTER[name]
        if name == "on_exhausted":
            holds = _STRICTNESS[new] >= _STRICTNESS[old]
        elif rule == "at least":
            holds = new >= old
        elif rule == "at most":
            holds = old is None or new <= old
        else:
            holds = new is old or new == old
        if not holds:
            asked = f"{old!r}" if not isinstance(old, Reward) else old.name
            raise ValueError(
                f"`{name}` may only tighten the guard for a call: it must be {rule} {asked}, got "
                f"{new.name if isinstance(new, Reward) else repr(new)}; make another ChatStars "
                "for a looser guard"
            )

    def _order(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        settings: Mapping[str, Any],
        *,
        streamed: bool,
    ) -> tuple["ChatStars", Order]:
        """Return the chat model as it is for this call, and what the engine is asked for.

        Loads what is not loaded yet.
        """
        chat_model = self._for_call(stop, settings)
        chat = _chat_of(messages)
        if not chat:
            raise ValueError("`messages` must hold at least one message, got none")
        last = chat[-1]
        if last["role"] == "assistant":
            if last.get("tool_calls"):
                raise ValueError(
                    "the last message calls tools; add a message with the result of each"
                )
            if not last["content"]:
                chat = chat[:-1]
        policy = chat_model._policy()
        language_model = chat_model._language_model()
        try:
            language_model.load()
            context_length = language_model.context_length
        except (OSError, ValueError) as error:
            raise LanguageModelNotFoundError(str(error)) from error
        if policy is not None:
            policy.load()
        prompt_ids = _encode(language_model, chat)
        room = context_length - len(prompt_ids)
        if room < 1:
            raise ContextOverflowError(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room for a reply in the "
                f"{context_length} tokens of `model` {_name_of(chat_model.model)}; shorten the "
                "thread, for example with `trim_messages`"
            )
        return chat_model, Order(
            language_model=language_model,
            chat=chat,
            prompt_ids=prompt_ids,
            policy=policy,
            sampling=replace(language_model.sampling, **chat_model._sampling()),
            max_tokens=min(chat_model.max_tokens, room),
            stop=tuple(chat_model.stop),
            seed=chat_model.seed,
            timeout=chat_model.timeout,
            max_queue=chat_model.max_queue,
            priority=_priority.get(),
            partition=chat_model.partition,
            segment_size=chat_model.segment_size,
            streamed=streamed,
        )

    def _read(self, order: Order) -> Generator[Delta | Report, None, None]:
        """Yield what the engine tells of one reply; the report comes last."""
        failure: Exception | None = None
        reply: SyncReply | None = None
        told = _Told(self.on_segment)
        try:
            reply = engine_for(order.language_model.device).reply(order)
            for delta in reply:
                told.tell(delta)
                yield delta
        except EngineError as error:
            failure = _as_langchain(error)
        finally:
            if reply is not None:
                reply.cancel()
        if failure is not None:  # raised here, so that it has no context
            raise failure
        assert reply is not None
        assert reply.report is not None
        yield reply.report

    async def _aread(self, order: Order) -> AsyncGenerator[Delta | Report, None]:
        """Await what `_read` yields; a cancelled task gives its row free."""
        failure: Exception | None = None
        reply: AsyncReply | None = None
        told = _Told(self.on_segment)
        try:
            reply = engine_for(order.language_model.device).areply(order)
            async for delta in reply:
                told.tell(delta)
                yield delta
        except EngineError as error:
            failure = _as_langchain(error)
        finally:
            if reply is not None:
                reply.cancel()
        if failure is not None:
            raise failure
        assert reply is not None
        assert reply.report is not None
        yield reply.report

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chat_model, order = self._order(messages, stop, kwargs, streamed=False)
        told = list(chat_model._read(order))
        return chat_model._result(order, told)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chat_model, order = await asyncio.to_thread(
            self._order, messages, stop, kwargs, streamed=False
        )
        async with contextlib.aclosing(chat_model._aread(order)) as events:
            told = [event async for event in events]
        return chat_model._result(order, told)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        chat_model, order = self._order(messages, stop, kwargs, streamed=True)
        with contextlib.closing(chat_model._read(order)) as events:
            for event in events:
                chunk = chat_model._chunk(order, event)
                if chunk is not None:
                    if run_manager is not None:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        chat_model, order = await asyncio.to_thread(
            self._order, messages, stop, kwargs, streamed=True
        )
        async with contextlib.aclosing(chat_model._aread(order)) as events:
            async for event in events:
                chunk = chat_model._chunk(order, event)
                if chunk is not None:
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    # Messages out

    def _result(self, order: Order, told: Sequence[Delta | Report]) -> ChatResult:
        report = told[-1]
        assert isinstance(report, Report)
        message = AIMessage(
            content="".join(event.text for event in told if isinstance(event, Delta)),
            response_metadata=self._metadata(order, report),
            usage_metadata=_usage(report),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunk(self, order: Order, event: Delta | Report) -> ChatGenerationChunk | None:
        """Return what is streamed of an event; None where it has no text."""
        if isinstance(event, Delta):
            if not event.text:
                return None
            return ChatGenerationChunk(message=AIMessageChunk(content=event.text))
        return ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                response_metadata=self._metadata(order, event),
                usage_metadata=_usage(event),
                chunk_position="last",
            )
        )

    def _metadata(self, order: Order, report: Report) -> dict[str, Any]:
        """Return what became of a reply: plain values, and never a word of what was rejected.

        Segments have an `id`, and what is not a whole number stands in a list, so that LangChain
        can add up the last chunks of several replies.
        """
        reply = digest([self._reply_identity(), report.seed, list(order.prompt_ids)])
        counts = {
            name: getattr(report, name) for name in Report.__slots__ if name.startswith("num_")
        }
        return {
            "model_name": _name_of(self.model),
            "model_provider": _PROVIDER,
            "finish_reason": report.finish_reason,
            "stars": {
                "policy": report.policy,
                "guarded": report.policy is not None,
                "seed": report.seed,
                "prompt_reward": [] if report.prompt_reward is None else [report.prompt_reward],
                "segments": [
                    {"id": f"{reply}-{segment.index}", **segment.as_dict()}
                    for segment in report.segments
                ],
                **counts,
            },
        }

    # Many replies at once

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Return the replies to several inputs; they share rounds, and let single calls by."""
        with _as_batch(len(inputs) > 1):
            return super().batch(
                inputs,
                self._roomy(config, len(inputs)),
                return_exceptions=return_exceptions,
                **kwargs,
            )

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Await what `batch` returns."""
        with _as_batch(len(inputs) > 1):
            return await super().abatch(
                inputs,
                self._roomy(config, len(inputs)),
                return_exceptions=return_exceptions,
                **kwargs,
            )

    def batch_as_completed(  # type: ignore[override]  # the overloads differ in one literal
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, AIMessage | Exception]]:
        """Yield the replies to several inputs, with their places, as they are finished."""
        replies: Iterator[tuple[int, AIMessage | Exception]] = super().batch_as_completed(  # type: ignore[call-overload]
            inputs,
            self._roomy(config, len(inputs)),
            return_exceptions=return_exceptions,
            **kwargs,
        )
        with _as_batch(len(inputs) > 1):  # every call is made at the first step
            first = next(replies, None)
        if first is not None:
            yield first
            yield from replies

    async def abatch_as_completed(  # type: ignore[override]  # the overloads differ in one literal
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, AIMessage | Exception]]:
        """Await what `batch_as_completed` yields."""
        replies: AsyncIterator[tuple[int, AIMessage | Exception]] = super().abatch_as_completed(  # type: ignore[call-overload]
            inputs,
            self._roomy(config, len(inputs)),
            return_exceptions=return_exceptions,
            **kwargs,
        )
        with _as_batch(len(inputs) > 1):
            first = await anext(replies, None)
        if first is not None:
            yield first
            async for reply in replies:
                yield reply

    def generate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        """Return the replies to some threads, one after the other; see `batch` for all at once."""
        with _as_batch(len(messages) > 1):
            return super().generate(messages, *args, **kwargs)

    async def agenerate(
        self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any
    ) -> LLMResult:
        """Await the replies to some threads; they share rounds."""
        await self._aidentify()
        with _as_batch(len(messages) > 1):
            return await super().agenerate(messages, *args, **kwargs)

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        """Yield the reply as it is kept; a cancelled task gives its row free."""
        await self._aidentify()
        chunks = super().astream(input, config, **kwargs)
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]  # it is a generator
            async for chunk in chunks:
                yield chunk

    def _roomy(self, config: Any, num_inputs: int) -> Any:
        """Return the configuration of a batch, with as many calls at once as can share rounds."""
        rows = self.model.max_rows if isinstance(self.model, LanguageModel) else 1
        room = max(1, min(num_inputs, _MAX_CONCURRENCY, rows + self.max_queue))
        if config is None or isinstance(config, Mapping):
            config = dict(config or {})
            if config.get("max_concurrency") is None:
                config["max_concurrency"] = room
            return config
        configs = [dict(each) for each in config]
        if configs and configs[0].get("max_concurrency") is None:
            configs[0]["max_concurrency"] = room
        return configs


_LOADING = (
    "device",
    "dtype",
    "device_map",
    "revision",
    "trust_remote_code",
    "attention",
    "chat_template",
    "context_length",
    "model_kwargs",
)
"""Settings of a language model that is named."""

_PER_CALL = (
    frozenset(ChatStars.model_fields)
    - frozenset(BaseChatModel.model_fields)
    - frozenset(_LOADING)
    - {"streaming"}
)

_TOLERATED = frozenset({"api_key", "base_url", "max_retries"})
"""Settings of other chat models that mean nothing here."""

_PASSED_BY_LANGCHAIN = frozenset(
    {"stream", "ls_structured_output_format", "structured_output_format"}
)

_TOOL_SETTINGS = ("tools", "tool_choice", "response_format", "functions", "function_call")

_STRICTNESS: Mapping[str, int] = {"fallback": 0, "best": 1, "refuse": 2, "raise": 2}

_TIGHTER: Mapping[str, str] = {
    "reward": "exactly",
    "target": "at least",
    "alpha": "at least",
    "beta": "at most",
    "horizon": "at most",
    "schedule": "exactly",
    "segment_size": "exactly",
    "max_attempts": "at least",
    "on_exhausted": "at least",
    "holdback": "at least",
    "max_takebacks": "at least",
    "reward_timeout": "at most",
}
"""What a call may make of the guard: each setting only on the stricter side of its own."""


class _Told:
    """Passes segments on with their text, in the order in which they are kept."""

    def __init__(self, on_segment: Callable[[Segment, str], None] | None) -> None:
        self._on_segment = on_segment
        self._text = ""

    def tell(self, delta: Delta) -> None:
        """Pass a segment on, with the text since the one before."""
        if self._on_segment is None:
            return
        self._text += delta.text
        if delta.segment is not None:
            text, self._text = self._text, ""
            self._on_segment(delta.segment, text)


@contextlib.contextmanager
def _as_batch(many: bool) -> Iterator[None]:
    """Have the calls made inside let single ones by, where they are many."""
    if not many:
        yield
        return
    token = _priority.set("batch")
    try:
        yield
    finally:
        _priority.reset(token)


def _as_langchain(error: EngineError) -> Exception:
    """Return an error of the engine as one of LangChain's family too."""
    if isinstance(error, DeadlineExceededError):
        return LanguageModelTimeoutError(str(error))
    if isinstance(error, QueueFullError):
        return TooManyRepliesError(str(error))
    return LanguageModelError(str(error))


def _usage(report: Report) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=report.num_prompt_tokens,
        output_tokens=report.num_emitted_tokens,
        total_tokens=report.num_prompt_tokens + report.num_emitted_tokens,
    )


# Settings


def _default_of(name: str) -> Any:
    return ChatStars.model_fields[name].get_default(call_default_factory=True)


def _name_of(model: Any) -> str:
    return model.name if isinstance(model, LanguageModel) else str(model)


def _folder_of(model: str) -> Path | None:
    """Return the folder that a name means; None for a model of the hub."""
    if model == BUNDLED:
        return _BUNDLED_FOLDER / "language_model"
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else None


def _context_length_of(folder: Path | None) -> int | None:
    """Return the context length that a folder's configuration names."""
    if folder is None:
        return None
    length = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def _plain(value: Any) -> Any:
    """Return a setting as JSON."""
    return json.loads(json.dumps(value, sort_keys=True, default=repr))


def _bundled_reward() -> Reward:
    from langchain_stars.rewards import bundled

    return _made(bundled.helpfulness)


def _bundled_constraint() -> Constraint:
    from langchain_stars.rewards import bundled

    return _with_floor(_made(bundled.safety))


@functools.cache
def _made(make: Callable[[], Reward]) -> Reward:
    """Return a bundled reward, always the same, so that its weights are loaded once."""
    return make()


def _as_constraints(value: Any) -> list[Constraint]:
    if isinstance(value, Constraint | Reward | str):
        value = [value]
    if not isinstance(value, Sequence):
        raise ValueError(
            f"`constraints` must be a list such as `[safety() >= 0.8]`, got {type(value).__name__}"
        )
    return [_with_floor(each) for each in value]


def _with_floor(value: Any) -> Constraint:
    """Return the constraint that is meant; of a reward alone, at the floor that it brings."""
    if isinstance(value, Reward) and value.floor is not None:
        return value >= value.floor
    return resolve_constraint(value)


# Messages in

_ROLES: Mapping[str, str] = {
    "ai": "assistant",
    "assistant": "assistant",
    "developer": "system",
    "function": "tool",
    "human": "user",
    "system": "system",
    "tool": "tool",
    "user": "user",
}

_SKIPPED_BLOCKS = frozenset({"thinking", "redacted_thinking", "reasoning"})
_CALL_BLOCKS = frozenset({"tool_use", "tool_call", "function_call", "tool_call_chunk"})


def _chat_of(messages: Sequence[BaseMessage]) -> Chat:
    """Return a thread as dictionaries for a chat template.

    Templates want one system message, in front, and no role twice in a row: system messages are
    joined in front, neighbours of one role become one message. Contents become text.

    Raises:
        ValueError: A message holds something other than text; the error names its kind only.
    """
    system: list[str] = []
    chat: Chat = []
    for index, message in enumerate(messages):
        converted = _message_of(message, index)
        if converted["role"] == "system":
            system.append(converted["content"])
        elif chat and converted["role"] == chat[-1]["role"] != "tool":
            _join(chat[-1], converted)
        else:
            chat.append(converted)
    if any(system):
        chat.insert(0, {"role": "system", "content": "\n\n".join(filter(None, system))})
    return chat


def _message_of(message: BaseMessage, index: int) -> dict[str, Any]:
    role = _role_of(message, index)
    text, calls = _content_of(message, role, index)
    converted: dict[str, Any] = {"role": role, "content": text}
    if message.name:
        converted["name"] = message.name
    if isinstance(message, ToolMessage):
        converted["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage) and message.tool_calls:
        calls = [_call(call["id"], call["name"], call["args"]) for call in message.tool_calls]
    if calls:
        converted["tool_calls"] = calls
    return converted


def _role_of(message: BaseMessage, index: int) -> str:
    for kind, role in (
        (SystemMessage, "system"),
        (HumanMessage, "user"),
        (AIMessage, "assistant"),
        (ToolMessage, "tool"),
        (FunctionMessage, "tool"),
    ):
        if isinstance(message, kind):
            return role
    named = message.role.lower() if isinstance(message, ChatMessage) else message.type
    if named not in _ROLES:
        raise ValueError(
            f"message {index} has the role {named!r}; ChatStars knows "
            f"{', '.join(sorted(set(_ROLES.values())))}"
        )
    return _ROLES[named]


def _content_of(message: BaseMessage, role: str, index: int) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of a message, and the tool calls that its blocks hold."""
    if isinstance(message.content, str):
        return message.content, []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        kind = "text" if isinstance(block, str) else str(block.get("type"))
        if isinstance(block, str):
            texts.append(block)
        elif kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "refusal" and isinstance(block.get("refusal"), str):
            texts.append(block["refusal"])
        elif kind in _CALL_BLOCKS and role == "assistant":
            arguments = block.get("input", block.get("args", block.get("arguments")))
            calls.append(_call(block.get("id"), block.get("name"), arguments))
        elif kind not in _SKIPPED_BLOCKS:
            raise ValueError(
                f"message {index} ({role}) holds a block of type {kind!r}; ChatStars reads text "
                "only: leave it out, or put it into words"
            )
    return "\n".join(texts), calls


def _call(call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    return {"type": "function", "id": call_id, "function": function}


def _join(first: dict[str, Any], second: Mapping[str, Any]) -> None:
    """Make one message of two neighbours of one role."""
    first["content"] = "\n\n".join(filter(None, (first["content"], second["content"])))
    if first.get("name") != second.get("name"):
        first.pop("name", None)
    if second.get("tool_calls"):
        first["tool_calls"] = [*first.get("tool_calls", []), *second["tool_calls"]]


def _encode(
    language_model: LanguageModel, chat: Chat, *, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Return the prompt; where the template refuses some roles, that of the chat without them.

    Raises:
        ModelInvalidRequestError: The template refuses the chat all the same.
    """
    failure = ""
    for spell in (tuple, with_two_roles):
        try:
            return language_model.encode(list(spell(chat)), tools=tools)
        except Exception as error:  # a template may raise anything
            failure = type(error).__name__
    raise ModelInvalidRequestError(
        f"the chat template of {language_model.name} refuses a thread of the roles "
        f"{', '.join(message['role'] for message in chat)}: {failure}"
    )
