"""Measures the engine beside the plain decoder, its peers and what the machine allows.

Knows shapes, workloads, ratios and gates; nothing of text that anyone wrote. Models have random
weights of a stated shape, and acceptance is forced: every reward really reads every candidate, and
what is decided is a coin of known probability, the same on both sides of a ratio. So costs are
measured at a known acceptance, without weights to download.
"""

import contextlib
import importlib.metadata
import itertools
import logging
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from json import dumps as dump_json
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
    tqdm,
)

from langchain_stars.acceptance import Acceptance, Constant, expected_accepted
from langchain_stars.decoder import Policy, Report
from langchain_stars.engine import Engine, Order, Priority, SyncReply
from langchain_stars.language_models.base import Prefix, Request, Sampling
from langchain_stars.language_models.local import LocalLanguageModel
from langchain_stars.language_models.steps import Steps
from langchain_stars.packing import can_pack, pack, share_weights
from langchain_stars.rewards.base import Completion, Leaf, Raw, Scorer, ScoreRequest, Subject
from langchain_stars.rewards.classifiers import SequenceClassifier

SEGMENT_SIZE = 16
MAX_ATTEMPTS = 20
COMMAND = "langchain-stars benchmark"

Clock: TypeAlias = Literal["wall", "processor"]
"""Seconds that pass, or those that this process computes: the same on a machine of its own."""
CLOCKS: tuple[Clock, ...] = ("wall", "processor")

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_BUCKET = 256
_MANY_ROWS = 64
_NO_LOSS = ">= 0.95"
"""Gate of an optimisation: where it does not help, it does not harm."""
_ALONE = (1,)
_SEVERAL = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of candidates among which a ceiling is looked for."""


# Models


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of a Llama with random weights.

    Attributes:
        layers: Number of layers.
        width: Size of a hidden state; a head has `head_size` of it.
        heads: Query heads.
        kept_heads: Heads of keys and values.
        inner: Size of the hidden layer of an MLP.
        vocab: Number of tokens.
        head_size: Size of a head.
    """

    layers: int
    width: int
    heads: int
    kept_heads: int
    inner: int
    vocab: int = 16000
    head_size: int = 64

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of all layers, without embeddings and heads."""
        heads = 2 * self.heads + 2 * self.kept_heads
        return self.layers * self.width * (heads * self.head_size + 3 * self.inner + 2)

    @property
    def num_streamed_parameters(self) -> int:
        """Parameters that a forward pass of the language model reads."""
        return self.num_layer_parameters + self.width * (self.vocab + 1)

    @property
    def num_parameters(self) -> int:
        """Parameters of the language model."""
        return self.num_streamed_parameters + self.vocab * self.width

    @property
    def num_token_values(self) -> int:
        """Numbers that are kept of a token: keys and values of all layers."""
        return 2 * self.layers * self.kept_heads * self.head_size

    def config(self, **settings: Any) -> LlamaConfig:
        """Return the configuration of transformers; no token ends a reply."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kept_heads,
            head_dim=self.head_size,
            intermediate_size=self.inner,
            vocab_size=self.vocab,
            max_position_embeddings=8192,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            **settings,
        )

    def scaled(self, share: float) -> "Shape":
        """Return a shape whose layers have about `share` of the parameters of these."""
        heads = max(1, round(self.heads * math.sqrt(share)))
        width = heads * self.head_size
        one = Shape(
            layers=1,
            width=width,
            heads=heads,
            kept_heads=max(1, heads // 3) if heads % 3 == 0 else 1,
            inner=round(width * self.inner / self.width),
            vocab=self.vocab,
            head_size=self.head_size,
        )
        layers = share * self.num_layer_parameters / one.num_layer_parameters
        return Shape(**{**asdict(one), "layers": max(1, round(layers))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        language_model: What drafts.
        reward: What judges.
        device: Device of torch.
        dtype: Type of the weights.
        prompt: Tokens of a prompt.
        tokens: Tokens of a reply, a multiple of the segment's.
        pairs: Times that both sides of a ratio are measured, at least 1.
        long_pairs: The same, of what takes long.
        barrier_rows: Rows of the comparison with a barrier.
        barrier_segments: Segments of each of them.
        prompts: Lengths of prompts of the growth curve.
        rows: Numbers of rows of the growth curve.
        shares: Sizes of rewards of the growth curve, relative to the language model.
        held_rows: Numbers of rows that an accelerator is measured with, ascending.
        memory_rounds: Rounds over which memory must not grow.
        clock: What seconds are.
    """

    language_model: Shape
    reward: Shape
    device: str = "cpu"
    dtype: str = "float32"
    prompt: int = 64
    tokens: int = 128
    pairs: int = 5
    long_pairs: int = 3
    barrier_rows: int = _MANY_ROWS
    barrier_segments: int = 9
    prompts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    held_rows: tuple[int, ...] = (1, 8, 32, _MANY_ROWS)
    memory_rounds: int = 24
    clock: Clock = "wall"


CPU_MODEL = Shape(layers=8, width=768, heads=12, kept_heads=4, inner=2048)
CPU_REWARD = Shape(layers=5, width=384, heads=6, kept_heads=2, inner=1024)
"""A token of it costs an eighth of one of the language model."""
GPU_MODEL = Shape(
    layers=32, width=4096, heads=32, kept_heads=8, inner=14336, vocab=128256, head_size=128
)
GPU_REWARD = Shape(layers=16, width=2048, heads=32, kept_heads=8, inner=8192, vocab=128256)
TINY_MODEL = Shape(layers=2, width=32, heads=4, kept_heads=2, inner=64, vocab=1000, head_size=8)
TINY_REWARD = Shape(layers=1, width=16, heads=2, kept_heads=1, inner=32, vocab=1000, head_size=8)

CPU = Scale(language_model=CPU_MODEL, reward=CPU_REWARD)
GPU = Scale(
    language_model=GPU_MODEL, reward=GPU_REWARD, device="cuda", dtype="bfloat16", prompt=512
)
_LESS: dict[str, Any] = {
    "tokens": 64,
    "pairs": 2,
    "long_pairs": 1,
    "barrier_rows": 8,
    "barrier_segments": 3,
    "prompts": (128, 512, 1024),
    "rows": (1, 4, 16),
    "shares": (1 / 8, 1 / 2),
}


def make_tokenizer(vocab: int, *, trailing: bool = False) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer of made-up words; every id decodes to text that encodes to it.

    Args:
        vocab: Number of tokens, at least 27.
        trailing: Whether a word takes the blank behind it, not the one before: the same text is
            then cut elsewhere.
    """
    letters = [*_LETTERS, "Ġ"]
    pairs = [a + b for a, b in itertools.product(_LETTERS, repeat=2)]
    room = vocab - len(letters) - len(pairs)
    words = [
        a + b for a, b in itertools.islice(itertools.product(pairs, repeat=2), max(0, room // 2))
    ]

    def spaced(word: str) -> str:
        return f"{word}Ġ" if trailing else f"Ġ{word}"

    tokens = [*letters, *pairs, *words, *map(spaced, words)]
    tokens += list(map(spaced, pairs))[: vocab - len(tokens)]
    tokens = tokens[:vocab]
    known = set(tokens)
    merges = [(pair[0], pair[1]) for pair in pairs if pair in known]
    merges += [(word[:2], word[2:]) for word in words]
    merges += [("Ġ", token[1:]) for token in tokens if len(token) > 1 and token[0] == "Ġ"]
    merges += [(token[:-1], "Ġ") for token in tokens if len(token) > 1 and token[-1] == "Ġ"]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


# Forced acceptance


def stratified_attempts(probability: float, count: int, *, seed: int) -> list[int]:
    """Return how many attempts each of some segments needs, in an order that `seed` decides.

    They are the quantiles of the geometric law, and their mean is exactly 1 / `probability`
    (rounded to a whole number of attempts in all), so that two runs differ by time alone.

    Args:
        probability: Chance that an attempt is accepted, in (0, 1].
        count: Number of segments, at least 1.
        seed: Decides the order.
    """
    needed = [
        max(1, min(MAX_ATTEMPTS, _quantile(probability, (at + 0.5) / count))) for at in range(count)
    ]
    left = round(count / probability) - sum(needed)
    while left:
        step = 1 if left > 0 else -1
        free = [at for at in range(count) if 1 <= needed[at] + step <= MAX_ATTEMPTS]
        if step < 0:
            free = [at for at in free if needed[at] > 1]
        # The longest is moved: of its place in the tail the quantile says least.
        at = max(free, key=lambda index: needed[index])
        needed[at] += step
        left -= step
    random.Random(seed).shuffle(needed)
    return needed


def _quantile(probability: float, share: float) -> int:
    if probability >= 1:
        return 1
    return math.ceil(math.log1p(-share) / math.log1p(-probability))


class ForcedScorer(Scorer):
    """Has a classifier read every candidate, and answers with coins that are known beforehand.

    Args:
        classifier: What reads; what it says is thrown away.
        needed: For each prompt, by its text, the attempts that each segment needs.
        tokenizer: Counts the tokens of the candidates; if not given, none are counted.

    Attributes:
        num_asked: Candidates read.
        num_own: Tokens of them, as `tokenizer` cuts what each adds to the text before it.
    """

    on_device: ClassVar[bool] = True

    def __init__(
        self,
        classifier: SequenceClassifier,
        needed: Mapping[str, Sequence[int]],
        *,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self._classifier = classifier
        self._tokenizer = tokenizer
        self._needed = needed
        self._asked: WeakKeyDictionary[Subject, dict[int, int]] = WeakKeyDictionary()
        self.num_asked = 0
        self.num_own = 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        """Return 1 for the attempt that is to be accepted and those after it, else 0."""
        self._classifier.score(requests)
        if self._tokenizer is not None:
            self.num_own += sum(map(self._count, requests))
        return [[self._coin(request) for _ in request.candidates] for request in requests]

    def _count(self, request: ScoreRequest) -> int:
        assert self._tokenizer is not None
        begin = len(request.accepted.text)
        return sum(
            len(self._tokenizer.tokenize(candidate.text[begin:]))
            for candidate in request.candidates
        )

    def _coin(self, request: ScoreRequest) -> Raw:
        self.num_asked += 1
        asked = self._asked.setdefault(request.subject, {})
        segment = len(request.accepted.token_ids or ()) // SEGMENT_SIZE
        asked[segment] = asked.get(segment, 0) + 1
        text = str(request.subject.chat[0]["content"])
        return (float(asked[segment] >= self._needed[text][segment]),)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The classifier's."""
        return {"kind": "forced", "scorer": self._classifier.identity}

    @property
    def cost(self) -> float:
        """The classifier's."""
        return self._classifier.cost

    def seconds(self, num_tokens: int) -> float | None:
        """Return the classifier's."""
        return self._classifier.seconds(num_tokens)

    def load(self) -> None:
        """Load the classifier."""
        self._classifier.load()

    def release(self, subject: Subject) -> None:
        """Drop what was read of a reply."""
        self._classifier.release(subject)
        self._asked.pop(subject, None)


class Coin(Leaf):
    """What a forced scorer says, as a reward of 0 or 1."""

    def __init__(self, scorer: ForcedScorer) -> None:
        self.scorer = scorer

    @property
    def name(self) -> str:
        """Coin."""
        return "coin"

    def read(self, raw: Raw) -> float:
        """Return the coin."""
        return raw[0]

    @property
    def identity(self) -> Mapping[str, Any]:
        """The scorer's."""
        return {"scorer": self.scorer.identity}


# Workloads


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured run of one side.

    Attributes:
        seconds: From the first call to the last token.
        num_tokens: Tokens of the replies.
        first_seconds: From the call of the first reply to its first segment.
        steady_seconds: From the first segment of the first reply to its end.
        num_attempts: Attempts judged.
        num_drafted: Tokens drawn.
        num_rounds: Rounds of the engine.
        filled: Rows in flight of rows allowed while replies waited, in [0, 1]; None if none did.
        texts: What was replied.
    """

    seconds: float
    num_tokens: int
    first_seconds: float = math.nan
    steady_seconds: float = math.nan
    num_attempts: int = 0
    num_drafted: int = 0
    num_rounds: int = 0
    filled: float | None = None
    texts: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    ids: tuple[int, ...]


Side: TypeAlias = Callable[[int], Sample]
"""Runs a workload, given the number of the pair."""


class Bench:
    """Models, engines and workloads of one scale.

    Args:
        scale: How much is measured.
        folder: Where the checkpoint of the reward is written.
    """

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.scale = scale
        self._folder = folder
        self._engines: dict[tuple[int, bool, bool], Engine] = {}
        self._classifiers: dict[tuple[Any, ...], SequenceClassifier] = {}
        self.cuda = scale.device.startswith("cuda")

    def now(self) -> float:
        """Return the time, in seconds."""
        return time.process_time() if self.scale.clock == "processor" else time.perf_counter()

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    # Models

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of both models."""
        return make_tokenizer(self.scale.language_model.vocab)

    @cached_property
    def other_tokenizer(self) -> PreTrainedTokenizerFast:
        """One that cuts the same text elsewhere, of as many tokens."""
        return make_tokenizer(self.scale.language_model.vocab, trailing=True)

    def _make(self, kind: Any, shape: Shape, seed: int, **settings: Any) -> Any:
        dtype = getattr(torch, self.scale.dtype)
        device = torch.device(self.scale.device)
        with torch.inference_mode(False), torch.random.fork_rng(), device:
            torch.manual_seed(seed)
            return kind._from_config(
                shape.config(**settings), dtype=dtype, attn_implementation="sdpa"
            ).eval()

    @cached_property
    def peer(self) -> Any:
        """The model as transformers runs it."""
        model = self._make(LlamaForCausalLM, self.scale.language_model, 0)
        return model.requires_grad_(False)

    @cached_property
    def _fast(self) -> Any:
        """The model with its layers as the engine holds them."""
        return _as_held(self.peer)

    @cached_property
    def _fast_reward(self) -> Any:
        return _as_held(self._plain_reward)

    @cached_property
    def language_model(self) -> LocalLanguageModel:
        """The same weights under the engine."""
        return self.new_language_model()

    def new_language_model(self, **settings: Any) -> LocalLanguageModel:
        """Return the same weights with nothing computed yet, and other settings where given."""
        # Without a store of prompts: both sides of a ratio begin with the same ones.
        settings = {"prompt_bytes": 0, **settings}
        return LocalLanguageModel(self.peer, tokenizer=self.tokenizer, **settings)

    def classifier(
        self,
        shape: Shape | None = None,
        *,
        other_tokenizer: bool = False,
        prompt_bytes: int = 0,
        cost: float | None = None,
    ) -> SequenceClassifier:
        """Return the reward model, or one of another shape, tokenizer or setting."""
        shape = shape or self.scale.reward
        key = (shape, other_tokenizer, prompt_bytes, cost)
        if key not in self._classifiers:
            folder = self._folder / f"reward{shape}{other_tokenizer}".replace(" ", "")
            with _without_bars():
                if not folder.is_dir():
                    model = self._make(LlamaForSequenceClassification, shape, 1, num_labels=1)
                    model.save_pretrained(folder)
                    tokenizer = self.other_tokenizer if other_tokenizer else self.tokenizer
                    tokenizer.save_pretrained(folder)
                self._classifiers[key] = SequenceClassifier(
                    folder, device=self.scale.device, cost=cost, prompt_bytes=prompt_bytes
                )
                self._classifiers[key].load()
        return self._classifiers[key]

    def prompt(self, number: int, length: int | None = None) -> _Prompt:
        """Return a prompt; its text encodes to its ids."""
        draw = random.Random(number)
        first = len(_LETTERS) + 1 + len(_LETTERS) ** 2
        words = range(first, self.scale.language_model.vocab)
        words = range(first + len(words) // 2, self.scale.language_model.vocab)
        ids = [draw.choice(words) for _ in range(length or self.scale.prompt)]
        return _Prompt(str(self.tokenizer.decode(ids)), tuple(ids))

    def prompts(self, first: int, count: int, length: int | None = None) -> list[_Prompt]:
        """Return some prompts, numbered from `first`."""
        return [self.prompt(number, length) for number in range(first, first + count)]

    # The engine's side

    def engine(self, max_rows: int, *, barrier: bool = False, lazy: bool = True) -> Engine:
        """Return an engine with so many rows."""
        key = (max_rows, barrier, lazy)
        if key not in self._engines:
            self._engines[key] = Engine(
                self.scale.device, max_rows=max_rows, barrier=barrier, lazy=lazy
            )
        return self._engines[key]

    def policy(
        self,
        prompts: Sequence[_Prompt],
        probability: float,
        *,
        tokens: int,
        seed: int = 0,
        candidates: int | None = None,
        adaptive: bool = True,
        shape: Shape | None = None,
        **of_reward: Any,
    ) -> Policy:
        """Return a guard that accepts attempts with a probability, stratified over all prompts.

        Args:
            prompts: The prompts.
            probability: Chance that an attempt is accepted.
            tokens: Tokens of a reply.
            seed: Decides the coins.
            candidates: Most candidates at once.
            adaptive: Whether fewer may be chosen.
            shape: Of the reward.
            of_reward: More arguments of `classifier`.
        """
        each = math.ceil(tokens / SEGMENT_SIZE)
        needed = stratified_attempts(probability, each * len(prompts), seed=seed)
        decks = {
            prompt.text: needed[at * each : (at + 1) * each] for at, prompt in enumerate(prompts)
        }
        scorer = ForcedScorer(
            self.classifier(shape, **of_reward),
            decks,
            tokenizer=self.other_tokenizer if of_reward.get("other_tokenizer") else None,
        )
        return Policy(
            objective=Coin(scorer),
            acceptance=Acceptance(schedule=Constant(0.5), max_attempts=MAX_ATTEMPTS),
            segment_size=SEGMENT_SIZE,
            max_candidates=candidates,
            adaptive=adaptive,
        )

    def run(
        self,
        prompts: Sequence[_Prompt],
        *,
        policy: Policy | None,
        tokens: int,
        max_rows: int,
        priority: Priority = "interactive",
        barrier: bool = False,
        lazy: bool = True,
        together: bool = True,
        language_model: LocalLanguageModel | None = None,
        partition: str = "",
    ) -> Sample:
        """Have the engine reply to some prompts, at once or one after the other."""
        engine = self.engine(max_rows, barrier=barrier, lazy=lazy)
        before = (
            engine.statistics.num_rounds,
            engine.statistics.num_waiting_rounds,
            engine.statistics.num_waiting_row_rounds,
        )

        def order(prompt: _Prompt) -> Order:
            return Order(
                language_model=language_model or self.language_model,
                chat=[{"role": "user", "content": prompt.text}],
                prompt_ids=prompt.ids,
                policy=policy,
                max_tokens=tokens,
                seed=prompt.ids[0],
                max_queue=len(prompts) + _MANY_ROWS,
                priority=priority,
                partition=partition,
                segment_size=SEGMENT_SIZE,
            )

        orders = [order(prompt) for prompt in prompts]
        firsts: list[float] = []
        told: list[tuple[str, Report]] = []
        begin = self.now()
        if together:
            replies = [engine.reply(each) for each in orders]
            told = [_read(reply, firsts, self.now) for reply in replies]
        else:
            told = [_read(engine.reply(each), firsts, self.now) for each in orders]
        end = self.now()
        after = (
            engine.statistics.num_rounds,
            engine.statistics.num_waiting_rounds,
            engine.statistics.num_waiting_row_rounds,
        )
        rounds, waiting, rows = (late - early for late, early in zip(after, before, strict=True))
        reports = [report for _, report in told]
        return Sample(
            seconds=end - begin,
            num_tokens=sum(report.num_emitted_tokens for report in reports),
            first_seconds=firsts[0] - begin,
            steady_seconds=end - firsts[0],
            num_attempts=sum(report.num_attempts for report in reports),
            num_drafted=sum(report.num_drafted_tokens for report in reports),
            num_rounds=rounds,
            filled=rows / (waiting * max_rows) if waiting else None,
            texts=tuple(text for text, _ in told),
        )

    def side(
        self,
        replies: int,
        probability: float | None = None,
        *,
        tokens: int | None = None,
        candidates: int | None = None,
        adaptive: bool = True,
        shape: Shape | None = None,
        length: int | None = None,
        max_rows: int | None = None,
        way: str = "",
        of_reward: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> Side:
        """Return a side of which each pair has prompts and coins of its own, as all sides have.

        Args:
            replies: Replies of a sample.
            probability: Chance that an attempt is accepted; None is the plain decoder.
            tokens: Tokens of a reply.
            candidates: Most candidates at once.
            adaptive: Whether fewer may be chosen.
            shape: Of the reward.
            length: Tokens of a prompt.
            max_rows: Rows of the engine; one for each reply if not given.
            way: `"concurrent"` asks from a thread for each reply.
            of_reward: More arguments of `classifier`.
            how: More arguments of `run`.
        """
        num_tokens = tokens or self.scale.tokens
        rows = max_rows or replies

        def side(pair: int) -> Sample:
            prompts = self.prompts(1000 * pair, replies, length)
            policy = None
            if probability is not None:
                policy = self.policy(
                    prompts,
                    probability,
                    tokens=num_tokens,
                    seed=pair,
                    candidates=candidates,
                    adaptive=adaptive,
                    shape=shape,
                    **(of_reward or {}),
                )

            def ask(some: Sequence[_Prompt]) -> Sample:
                return self.run(some, policy=policy, tokens=num_tokens, max_rows=rows, **how)

            if way != "concurrent":
                return ask(prompts)
            with ThreadPoolExecutor(replies) as threads:
                begin = self.now()
                samples = list(threads.map(ask, [[prompt] for prompt in prompts]))
            return Sample(
                seconds=self.now() - begin,
                num_tokens=sum(sample.num_tokens for sample in samples),
            )

        return side

    # The peers' sides

    def generating(self, replies: int, *, static: bool = False) -> Side:
        """Return the side of transformers' `generate`, all replies in one batch.

        Args:
            replies: Replies of a sample.
            static: Whether on a static cache, for which it compiles the model on a GPU.
        """
        settings = {"cache_implementation": "static"} if static else {}

        def side(pair: int) -> Sample:
            prompts = self.prompts(1000 * pair, replies)
            begin = self.now()
            ids = torch.tensor([prompt.ids for prompt in prompts], device=self.scale.device)
            with torch.inference_mode(), _quiet():
                output = self.peer.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=self.scale.tokens,
                    pad_token_id=0,
                    **settings,
                )
            num_tokens = output[:, ids.shape[1] :].cpu().numel()
            return Sample(seconds=self.now() - begin, num_tokens=num_tokens)

        return side

    @cached_property
    def _paged(self) -> Any:
        return share_weights(self.peer)

    def batching(self, replies: int) -> Side:
        """Return the side of transformers' continuous batching."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        generation = GenerationConfig(
            do_sample=True,
            max_new_tokens=self.scale.tokens,
            eos_token_id=-1,
            pad_token_id=0,
            top_k=0,
        )
        length = self.scale.prompt + self.scale.tokens
        settings = ContinuousBatchingConfig(
            page_size=16, num_blocks=max(64, replies * (length // 16 + 2))
        )

        def side(pair: int) -> Sample:
            prompts = [list(prompt.ids) for prompt in self.prompts(1000 * pair, replies)]
            begin = self.now()
            with _quiet():
                answers = self._paged.generate_batch(
                    prompts,
                    generation_config=generation,
                    continuous_batching_config=settings,
                )
            return Sample(
                seconds=self.now() - begin,
                num_tokens=sum(len(answer.generated_tokens) for answer in answers.values()),
            )

        return side

    def recomputing(self, probability: float) -> Side:
        """Return the side of CARDS' published loop, one prompt, with segments of a fixed size.

        Every token by a pass over all that was written, whose logits are computed for every
        position; every attempt judged by a pass over the whole text; nothing kept in between,
        and nothing that ends a reply early.

        Source:
            Li et al., COLM 2025, re-implemented from a description of its code; sampling from
            the 40 likeliest tokens, at most 20 attempts.
        """
        reward = self._plain_reward

        def attempt(text: Tensor) -> Tensor:
            for _ in range(SEGMENT_SIZE):
                logits = self.peer(input_ids=text, use_cache=False).logits[:, -1]
                best = logits.float().topk(40)
                drawn = torch.multinomial(best.values.softmax(-1), 1)
                text = torch.cat([text, best.indices.gather(-1, drawn)], dim=-1)
            float(reward(input_ids=text, use_cache=False).logits)
            return text

        @torch.inference_mode()
        def side(pair: int) -> Sample:
            [prompt] = self.prompts(1000 * pair, 1)
            each = math.ceil(self.scale.tokens / SEGMENT_SIZE)
            needed = stratified_attempts(probability, each, seed=pair)
            begin = self.now()
            kept = torch.tensor([prompt.ids], device=self.scale.device)
            reward(input_ids=kept, use_cache=False)  # the threshold begins at the prompt's
            for count in needed:
                for _ in range(count):
                    text = attempt(kept)
                kept = text
            return Sample(
                seconds=self.now() - begin,
                num_tokens=kept.shape[1] - len(prompt.ids),
                num_attempts=sum(needed),
            )

        return side

    @cached_property
    def _plain_reward(self) -> Any:
        return self._make(LlamaForSequenceClassification, self.scale.reward, 1, num_labels=1)

    # What the machine allows

    def step_seconds(
        self, queries: int, *, length: int | None = None, reward: bool = False
    ) -> float:
        """Return the least that a forward pass of so many tokens takes, on transformers' cache.

        Args:
            queries: One token for each row of the language model; the tokens of one row of the
                reward.
            length: Tokens that each row holds; the prompt and half a reply if not given.
            reward: Whether it is the reward that reads.
        """
        key = (queries, length, reward)
        if key not in self._steps:
            self._steps[key] = self._time_step(*key)
        # A pass of fewer tokens is part of it: what seems to take less was disturbed less.
        return max(
            seconds
            for (count, *others), seconds in self._steps.items()
            if 0 < count <= queries and others == [length, reward]
        )

    @cached_property
    def _steps(self) -> dict[tuple[int, int | None, bool], float]:
        return {}

    @torch.inference_mode()
    def _time_step(self, queries: int, length: int | None, reward: bool) -> float:
        model = self._fast_reward.model if reward else self._fast
        device = self.scale.device
        length = length or self.scale.prompt + self.scale.tokens // 2
        rows, width = (1, queries) if reward else (queries, 1)
        cache = DynamicCache(config=model.config)
        model(
            input_ids=torch.ones((rows, length), dtype=torch.long, device=device),
            past_key_values=cache,
        )
        ids = torch.ones((rows, width), dtype=torch.long, device=device)
        times = []
        for _ in range(9):
            begin = self.now()
            output = model(input_ids=ids, past_key_values=cache)
            float(output[0].flatten()[0])
            times.append(self.now() - begin)
            cache.crop(-width)
        return min(times[1:])

    def drafting_seconds(
        self,
        rows: int,
        candidates: int,
        *,
        length: int | None = None,
        language_model: LocalLanguageModel | None = None,
    ) -> float:
        """Return the least time of a token of all candidates as the engine drafts them, sampled.

        Args:
            rows: Rows of a round.
            candidates: Candidates of each.
            length: Tokens that each row holds; the prompt's if not given.
            language_model: What drafts.
        """
        model = language_model or self.language_model
        requests = _requests(self.prompts(0, rows, length), candidates)
        times = []
        for _ in range(5):
            # All are thrown away: what follows the first round drafts behind the same prompts.
            begin = self.now()
            model.draw(requests)
            times.append((self.now() - begin) / (SEGMENT_SIZE - 1))
        for request in requests:
            model.release(request.prefix)
        return min(times[1:])

    def hold(
        self,
        rows: int,
        *,
        length: int,
        language_model: LocalLanguageModel,
        classifier: SequenceClassifier,
    ) -> int:
        """Draft and judge a segment of so many rows at once; return how many were answered."""
        prompts = self.prompts(0, rows, length)
        requests = _requests(prompts, 1)
        subjects = [Subject([{"role": "user", "content": prompt.text}]) for prompt in prompts]
        drafted = language_model.draw(requests)
        texts = [language_model.decode(candidate.token_ids) for [candidate] in drafted]
        answers = classifier.score(
            [
                ScoreRequest(
                    subject=subject,
                    accepted=Completion(text="", finished=False),
                    candidates=(Completion(text=text, finished=False),),
                )
                for subject, text in zip(subjects, texts, strict=True)
            ]
        )
        for request, subject in zip(requests, subjects, strict=True):
            language_model.release(request.prefix)
            classifier.release(subject)
        return sum(math.isfinite(logit) for [(logit,)] in answers)

    def prompt_seconds(self, *, reward: bool = False) -> float:
        """Return what reading a prompt takes: of the reward, with the first segment behind it."""
        key = (0, None, reward)
        if key not in self._steps:
            model = self._fast_reward.model if reward else self._fast
            length = self.scale.prompt + (SEGMENT_SIZE if reward else 0)
            ids = torch.ones((1, length), dtype=torch.long, device=self.scale.device)
            settings = {} if reward else {"logits_to_keep": 1}
            times = []
            with torch.inference_mode():
                for _ in range(7):
                    begin = self.now()
                    float(model(input_ids=ids, use_cache=True, **settings)[0].flatten()[0])
                    times.append(self.now() - begin)
            self._steps[key] = min(times[1:])
        return self._steps[key]

    def plain_round_seconds(self, rows: int) -> float:
        """Return what the forward passes of a segment take without a guard."""
        return SEGMENT_SIZE * self.step_seconds(rows)

    def round_seconds(self, rows: int, candidates: int, probability: float) -> float:
        """Return what the forward passes of a round take, judged at once or one by one.

        Args:
            rows: Rows of the round.
            candidates: Candidates of each.
            probability: Chance that an attempt is accepted.
        """
        kept = expected_accepted(probability, candidates)
        # Behind a segment that was kept, its last token is read for the logits that follow.
        fresh = kept if rows == 1 else 1.0
        at_once = self.step_seconds(rows * candidates * SEGMENT_SIZE, reward=True)
        one_by_one = self.step_seconds(rows * SEGMENT_SIZE, reward=True) * kept / probability
        return (
            fresh * self.step_seconds(rows)
            + (SEGMENT_SIZE - 1) * self.step_seconds(rows * candidates)
            + min(at_once, one_by_one)
        )

    def ceiling(self, rows: int, probability: float, candidates: Sequence[int]) -> float:
        """Return segments a row and second, at most, with the best number of candidates."""
        return max(
            expected_accepted(probability, count) / self.round_seconds(rows, count, probability)
            for count in candidates
        )


def _requests(prompts: Sequence[_Prompt], count: int) -> list[Request]:
    """Return what asks for the first candidates behind some prompts."""
    return [
        Request(
            prefix=Prefix(prompt.ids),
            seed=at,
            segment=0,
            first_attempt=1,
            count=count,
            size=SEGMENT_SIZE,
            sampling=Sampling(),
        )
        for at, prompt in enumerate(prompts)
    ]


def _as_held(model: Any) -> Any:
    """Return a model of the same weights, packed where the engine packs them."""
    fast = share_weights(model)
    if can_pack(fast):
        pack(fast)
    return fast


def _read(reply: SyncReply, firsts: list[float], now: Callable[[], float]) -> tuple[str, Report]:
    parts = []
    seen = False
    for delta in reply:
        if not seen and delta.segment is not None:
            firsts.append(now())
            seen = True
        parts.append(delta.text)
    if reply.report is None:
        raise RuntimeError("a reply ended without a report")
    return "".join(parts), reply.report


# Rows of the table


@dataclass(slots=True, kw_only=True)
class Result:
    """A row of the table.

    Attributes:
        id: Which definition.
        name: What is measured.
        value: Median of the paired ratios; None where it was not measured.
        spread: The least and the greatest of them.
        gate: What must hold of the value; empty where nothing must.
        holds: Whether it does; None where nothing must, or it was not measured.
        ceiling: What the machine allows, from its step times; None where that is not known.
        counts: How often, and of what.
        note: Why it was not measured.
    """

    id: str
    name: str
    value: float | None
    spread: tuple[float, float] | None = None
    gate: str = ""
    holds: bool | None = None
    ceiling: float | None = None
    counts: str = ""
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Curve:
    """How something grows.

    Attributes:
        id: Short name.
        title: What is shown.
        x: Name of the horizontal axis.
        why: The cost model's explanation, a sentence.
        lines: Points of each line, by its name.
    """

    id: str
    title: str
    x: str
    why: str
    lines: dict[str, list[tuple[float, float]]]
    y: str = "milliseconds a token"


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything that was measured.

    Attributes:
        about: Hardware, versions and models, by name.
        rows: The table.
        curves: Growth.
        seconds: What each part of the measurement took.
    """

    about: dict[str, str] = field(default_factory=dict)
    rows: list[Result] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """Return everything as a page of text."""
        lines = [f"{name:<16}{value}" for name, value in self.about.items()]
        if self.rows:
            lines += ["", f"{'id':<5}{'what':<58}{'value':>8}  {'spread':<17}{'gate':<9}holds"]
        for row in self.rows:
            value = "-" if row.value is None else _number(row.value)
            spread = "" if row.spread is None else " .. ".join(map(_number, row.spread))
            holds = {True: "yes", False: "NO", None: ""}[row.holds]
            lines.append(
                f"{row.id:<5}{row.name:<58}{value:>8}  {spread:<17}{row.gate:<9}{holds}".rstrip()
            )
            more = [] if row.ceiling is None else [f"ceiling {_number(row.ceiling)}"]
            more += [part for part in (row.counts, row.note) if part]
            if more:
                lines.append(f"     {'; '.join(more)}")
        for curve in self.curves:
            lines += ["", f"{curve.title}, {curve.y}. {curve.why}"]
            places = sorted({x for points in curve.lines.values() for x, _ in points})
            width = max(map(len, [*curve.lines, curve.x])) + 2
            lines.append(curve.x.ljust(width) + "".join(f"{_number(x):>10}" for x in places))
            for name, points in curve.lines.items():
                of = dict(points)
                values = [f"{_number(of[x]) if x in of else '':>10}" for x in places]
                lines.append((name.ljust(width) + "".join(values)).rstrip())
        if self.seconds:
            took = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
            lines += ["", f"{sum(self.seconds.values()) / 60:.1f} minutes: {took}"]
        return "\n".join(lines)


def _number(value: float) -> str:
    if value == round(value) and abs(value) < 1e6:
        return str(round(value))
    return (
        f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    )


Samples: TypeAlias = dict[str, list[Sample]]


def _holds(value: float, gate: str) -> bool | None:
    if not gate:
        return None
    sign, bound = gate.split()
    if sign == ">=":
        return value >= float(bound)
    return value <= float(bound) if sign == "<=" else value == float(bound)


class Benchmark:
    """Measures the rows that are asked for, each group of sides interleaved in one loop.

    Args:
        bench: Models and workloads.
        only: Rows to measure; all if None.
        progress: Called with the name of what begins and the number of steps; returns a function
            that is called after each step.
    """

    def __init__(
        self,
        bench: Bench,
        *,
        only: Sequence[str] | None = None,
        progress: Callable[[str, int], Callable[[], None]] | None = None,
    ) -> None:
        self.bench = bench
        self.scale = bench.scale
        self.results = Results()
        self._only = only
        self._progress = progress or (lambda name, count: lambda: None)

    @property
    def groups(self) -> dict[str, Callable[[], None]]:
        """What is measured together, in order."""
        return {
            "step times": self._machine,
            "one row": self._one_row,
            "eight rows": self._eight_rows,
            "continuous batching": self._continuous,
            "queue": self._queue,
            "CARDS": self._cards,
            "barrier": self._barrier,
            "counts": self._counts,
            "concurrent calls": self._concurrent,
            "first segment": self._first,
            "memory": self._memory,
            "same tokens": self._same,
            "one row, without": self._one_row_without,
            "eight rows, without": self._eight_rows_without,
            "reward, without": self._reward_without,
            "prompts, without": self._prompts_without,
            "growth": self._growth,
        }

    def wants(self, *identifiers: str) -> bool:
        """Return whether one of some rows is asked for."""
        return self._only is None or any(each in self._only for each in identifiers)

    def run(self) -> Results:
        """Measure."""
        results = self.results
        results.about = about(self.scale)
        if self.scale.device == "cpu":
            torch.set_num_threads(1)
        for rows in (1, 8):
            self.bench.side(rows, 0.5, tokens=2 * SEGMENT_SIZE)(-1)
        for name, group in self.groups.items():
            begin = time.perf_counter()
            before = len(results.rows), len(results.curves), len(results.about)
            group()
            if before != (len(results.rows), len(results.curves), len(results.about)):
                results.seconds[name] = time.perf_counter() - begin
        results.rows.sort(key=lambda row: _IDS.index(row.id))
        return results

    def _measure(
        self, name: str, sides: Mapping[str, Side], pairs: int, *, warm: bool = True
    ) -> Samples:
        """Run all sides in turn, again and again, every other time in the opposite order.

        Args:
            name: Of the group.
            sides: What is run.
            pairs: How often.
            warm: Whether to run each once before; what takes long is warm from other groups.
        """
        for run in sides.values() if warm else ():
            run(-1)
        step = self._progress(name, pairs * len(sides))
        samples: Samples = {side: [] for side in sides}
        for pair in range(pairs):
            order = list(sides) if pair % 2 == 0 else list(sides)[::-1]
            for side in order:
                samples[side].append(sides[side](pair))
                step()
        return samples

    def _add(
        self,
        identifier: str,
        name: str,
        values: Sequence[float],
        gate: str = "",
        *,
        ceiling: float | None = None,
        counts: str = "",
    ) -> None:
        """Add a row; `gate` is written as `>= 0.9`, `<= 1.1` or `= 1`."""
        value = statistics.median(values)
        self.results.rows.append(
            Result(
                id=identifier,
                name=name,
                value=value,
                spread=(min(values), max(values)) if len(values) > 1 else None,
                gate=gate,
                holds=_holds(value, gate),
                ceiling=ceiling,
                counts=counts,
            )
        )

    def _add_ratio(
        self,
        identifier: str,
        name: str,
        samples: Samples,
        over: str,
        under: str,
        gate: str = "",
        *,
        ceiling: float | None = None,
    ) -> None:
        """Add the ratio of two sides' rates, pair by pair."""
        pairs = zip(samples[over], samples[under], strict=True)
        values = [one.rate / other.rate for one, other in pairs]
        counts = ", ".join(
            f"{side} {statistics.median(sample.rate for sample in samples[side]):.1f} tokens/s"
            for side in (over, under)
        )
        num_tokens = sum(sample.num_tokens for sample in samples[over])
        counts += f", {len(values)} pairs, {num_tokens} tokens a side" + _drafted(samples[over])
        self._add(identifier, name, values, gate, ceiling=ceiling, counts=counts)

    def _add_exact(self, identifier: str, name: str, values: Sequence[float], counts: str) -> None:
        """Add values each of which must be 1: the one that is furthest from it."""
        worst = max(values, key=lambda value: abs(value - 1))
        self._add(identifier, name, [worst], "= 1", counts=counts)

    # The groups

    def _machine(self) -> None:
        """Measure step times, which the ceilings follow from."""
        bench = self.bench
        steps = (f"t({n}) = {1e3 * bench.step_seconds(n):.1f}" for n in (1, 2, 4, 8, 16))
        reads = (f"r({n}) = {1e3 * bench.step_seconds(n, reward=True):.1f}" for n in (16, 64, 128))
        self.results.about["step times"] = (
            f"milliseconds of a forward pass of n tokens: language model {', '.join(steps)}; "
            f"reward {', '.join(reads)}"
        )

    def _one_row(self) -> None:
        """C1, C2, C2b and C3 with one row."""
        bench, scale = self.bench, self.scale
        if not self.wants("C1", "C2", "C2b", "C3"):
            return

        def own(probability: float | None = None, candidates: int | None = None) -> Side:
            return bench.side(1, probability, candidates=candidates)

        sides: dict[str, Side] = {"unguarded": own()}
        if self.wants("C1"):
            sides["generate"] = bench.generating(1)
        if self.wants("C2"):
            sides["p=1"] = own(1.0)
        if self.wants("C2b", "C3"):
            sides["p=0.5"] = own(0.5)
        if self.wants("C3"):
            sides |= {"p=0.5, M=1": own(0.5, 1), "p=0.25": own(0.25), "p=0.25, M=1": own(0.25, 1)}
        samples = self._measure("one row", sides, scale.pairs, warm=False)
        plain = bench.plain_round_seconds(1)
        if self.wants("C1"):
            name = "unguarded / generate, 1 row"
            self._add_ratio("C1", name, samples, "unguarded", "generate", ">= 0.97")
        if self.wants("C2"):
            name = "guarded / unguarded, p = 1, 1 row"
            most = bench.ceiling(1, 1.0, _ALONE) * plain
            self._add_ratio("C2", name, samples, "p=1", "unguarded", ">= 0.90", ceiling=most)
        if self.wants("C2b"):
            name = "guarded / unguarded, p = 0.5, 1 row"
            most = bench.ceiling(1, 0.5, _SEVERAL) * plain
            self._add_ratio("C2b", name, samples, "p=0.5", "unguarded", ">= 0.57", ceiling=most)
        if self.wants("C3"):
            for probability, gate in ((0.5, ">= 1.15"), (0.25, ">= 1.75")):
                name = f"chosen M / M = 1, p = {probability}, 1 row"
                most = bench.ceiling(1, probability, _SEVERAL)
                most /= bench.ceiling(1, probability, _ALONE)
                one, other = f"p={probability}", f"p={probability}, M=1"
                self._add_ratio("C3", name, samples, one, other, gate, ceiling=most)

    def _eight_rows(self) -> None:
        """C1 and C2 with eight rows."""
        bench = self.bench
        if not self.wants("C1", "C2"):
            return
        sides: dict[str, Side] = {"unguarded": bench.side(8)}
        if self.wants("C1"):
            sides["generate"] = bench.generating(8)
        if self.wants("C2"):
            sides["p=1"] = bench.side(8, 1.0)
        samples = self._measure("eight rows", sides, self.scale.pairs)
        if self.wants("C1"):
            name = "unguarded / generate, 8 rows"
            self._add_ratio("C1", name, samples, "unguarded", "generate", ">= 0.97")
        if self.wants("C2"):
            name = "guarded / unguarded, p = 1, 8 rows"
            most = bench.ceiling(8, 1.0, _ALONE) * bench.plain_round_seconds(8)
            self._add_ratio("C2", name, samples, "p=1", "unguarded", ">= 0.90", ceiling=most)

    def _continuous(self) -> None:
        """P1: the continuous batching of transformers."""
        if not self.wants("P1"):
            return
        name = "unguarded / transformers continuous batching, 8 rows"
        sides = {"unguarded": self.bench.side(8), "continuous": self.bench.batching(8)}
        try:
            samples = self._measure("continuous", sides, min(2, self.scale.long_pairs))
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            note = f"it could not be run here: {type(error).__name__}"
            self.results.rows.append(Result(id="P1", name=name, value=None, note=note))
            return
        self._add_ratio("P1", name, samples, "unguarded", "continuous")

    def _queue(self) -> None:
        """C2b and C10: eight rows, and a queue that refills them."""
        bench, pairs = self.bench, self.scale.long_pairs
        if not self.wants("C2b", "C10"):
            return
        replies, tokens = (32 if pairs > 1 else 16), min(64, self.scale.tokens)
        sides = {
            "unguarded": bench.side(replies, tokens=tokens, max_rows=8, priority="batch"),
            "p=0.5": bench.side(replies, 0.5, tokens=tokens, max_rows=8, priority="batch"),
        }
        samples = self._measure("queue", sides, pairs, warm=False)
        if self.wants("C2b"):
            name = f"guarded / unguarded, p = 0.5, 8 rows, {replies} replies"
            most = bench.ceiling(8, 0.5, _SEVERAL[:4]) * bench.plain_round_seconds(8)
            self._add_ratio("C2b", name, samples, "p=0.5", "unguarded", ">= 0.45", ceiling=most)
        if self.wants("C10"):
            filled = [sample.filled for sample in samples["p=0.5"] if sample.filled is not None]
            rounds = sum(sample.num_rounds for sample in samples["p=0.5"])
            name = "rows in flight / rows allowed while replies wait, p = 0.5"
            counts = f"8 rows, {replies} replies, {rounds} rounds"
            self._add("C10", name, filled, ">= 0.97", counts=counts)

    def _cards(self) -> None:
        """C4: the loop of CARDS' published code."""
        bench = self.bench
        if not self.wants("C4"):
            return
        sides = {
            "1 row": bench.side(1, 0.5),
            "8 rows": bench.side(8, 0.5),
            "CARDS": bench.recomputing(0.5),
        }
        samples = self._measure("CARDS", sides, min(2, self.scale.long_pairs), warm=False)
        for side, gate in (("1 row", ">= 7.5"), ("8 rows", ">= 20")):
            name = f"guarded, {side} / CARDS-style loop, p = 0.5, {self.scale.tokens} tokens"
            self._add_ratio("C4", name, samples, side, "CARDS", gate)

    def _barrier(self) -> None:
        """C4b: rows that advance apart, and rows that wait for each other."""
        bench, scale = self.bench, self.scale
        if not self.wants("C4b"):
            return
        tokens = scale.barrier_segments * SEGMENT_SIZE
        rows = scale.barrier_rows
        step = self._progress("barrier", 2)
        samples: Samples = {}
        for name, barrier in (("apart", False), ("barrier", True)):
            own = bench.side(rows, 0.5, tokens=tokens, candidates=1, barrier=barrier)
            samples[name] = [own(0)]
            step()
        apart, waiting = (samples[name][0].num_rounds for name in samples)
        counts = f"{waiting} and {apart} rounds, {rows * scale.barrier_segments} segments"
        name = f"barrier / rows apart, in rounds, {rows} rows, p = 0.5, M = 1"
        self._add("C4b", name, [waiting / apart], ">= 2.0", counts=counts)
        name = f"barrier / rows apart, in seconds, {rows} rows, p = 0.5, M = 1"
        self._add_ratio("C4b", name, samples, "apart", "barrier", ">= 1.6")

    def _counts(self) -> None:
        """C5, C6 and C7: tokens forwarded, counted by the models themselves."""
        bench = self.bench
        if not self.wants("C5", "C6", "C7"):
            return
        tokens = 64
        ways = ((1.0, 1, True), (0.5, 1, True), (0.5, 4, True), (0.5, 4, False), (0.25, None, True))
        step = self._progress("counts", len(ways))
        ratios: dict[str, list[float]] = {name: [] for name in ("C5", "C6", "own", "its")}
        notes = []
        for probability, candidates, lazy in ways:
            model, classifier = bench.new_language_model(), bench.classifier()
            before = classifier.counters
            prompts = bench.prompts(0, 2)
            policy = bench.policy(
                prompts,
                probability,
                tokens=tokens,
                candidates=candidates,
                adaptive=candidates is None,
            )
            sample = bench.run(
                prompts,
                policy=policy,
                tokens=tokens,
                max_rows=2,
                lazy=lazy,
                language_model=model,
            )
            counts, after = model.counts, classifier.counters
            # Each reply's first segment follows from its prompt, each later one from the last
            # token kept; each candidate's own last token is drawn and not forwarded.
            forwards = sample.num_tokens // SEGMENT_SIZE - len(prompts)
            forwards += sample.num_drafted // SEGMENT_SIZE * (SEGMENT_SIZE - 1)
            # Judged one by one, what follows the accepted candidate of a round is not read.
            reads = sample.num_attempts * SEGMENT_SIZE if lazy else sample.num_drafted
            read = after.candidate_tokens - before.candidate_tokens
            read += after.refed_tokens - before.refed_tokens
            ratios["C5"].append((counts.accepted + counts.drafted + counts.refed) / forwards)
            ratios["C6"].append(read / reads)
            num_prompt = sum(len(prompt.ids) for prompt in prompts)
            ratios["own"].append(counts.prompt / num_prompt)
            ratios["its"].append((after.prompt_tokens - before.prompt_tokens) / num_prompt)
            notes.append(
                f"{forwards / sample.num_tokens:.2f} and {reads / sample.num_tokens:.2f} at "
                f"p = {probability}, M = {candidates or 'chosen'}{'' if lazy else ', at once'}"
            )
            step()
        counted = f"tokens a kept token, of language model and reward: {'; '.join(notes)}"
        if self.wants("C5"):
            name = "language model's forwards / sum over rounds"
            self._add_exact("C5", name, ratios["C5"], counted)
        if self.wants("C6"):
            self._add_exact("C6", "reward's forwards / sum over rounds", ratios["C6"], counted)
            self._cut_elsewhere()
        if self.wants("C7"):
            name = "prompt tokens forwarded / prompt tokens, "
            self._add_exact("C7", name + "language model", ratios["own"], "2 replies each")
            self._add_exact("C7", name + "reward", ratios["its"], "2 replies each")

    def _cut_elsewhere(self) -> None:
        """C6 of a reward that cuts text elsewhere: what it reads again where segments meet."""
        bench, tokens = self.bench, 64
        classifier = bench.classifier(other_tokenizer=True)
        ratios, notes = [], []
        for probability, candidates in ((1.0, 1), (0.5, None)):
            before, prompts = classifier.counters, bench.prompts(0, 2)
            policy = bench.policy(
                prompts, probability, tokens=tokens, candidates=candidates, other_tokenizer=True
            )
            sample = bench.run(prompts, policy=policy, tokens=tokens, max_rows=2)
            after = classifier.counters
            read = after.candidate_tokens - before.candidate_tokens
            read += after.refed_tokens - before.refed_tokens
            own = sum(
                scorer.num_own for scorer in policy.scorers if isinstance(scorer, ForcedScorer)
            )
            ratios.append(read / own)
            drafted = own / (sample.num_attempts * SEGMENT_SIZE)
            notes.append(f"{read} of {own} at p = {probability}, {drafted:.2f} for each drafted")
        name = "reward's forwards, another tokenizer / tokens of its own"
        self._add("C6", name, [max(ratios)], "<= 1.1", counts="; ".join(notes))

    def _concurrent(self) -> None:
        """C8: calls that arrive together."""
        bench = self.bench
        if not self.wants("C8"):
            return
        tokens = min(64, self.scale.tokens)
        sides = {
            "concurrent": bench.side(8, 1.0, tokens=tokens, way="concurrent"),
            "batch": bench.side(8, 1.0, tokens=tokens, priority="batch"),
            "sequence": bench.side(8, 1.0, tokens=tokens, together=False),
        }
        samples = self._measure("concurrent calls", sides, self.scale.long_pairs, warm=False)
        for other, what, gate in (
            ("batch", "one batch of 8", "<= 1.15"),
            ("sequence", "8 calls in sequence", "<= 0.45"),
        ):
            name = f"seconds of 8 concurrent calls / {what}, p = 1"
            self._add_ratio("C8", name, samples, other, "concurrent", gate)

    def _first(self) -> None:
        """C9: how long one waits for the first words."""
        bench = self.bench
        if not self.wants("C9"):
            return
        tokens = 2 * SEGMENT_SIZE
        sides = {
            "guarded": bench.side(1, 1.0, tokens=tokens),
            "unguarded": bench.side(1, tokens=tokens),
        }
        samples = self._measure("first segment", sides, 2 * self.scale.pairs)
        pairs = list(zip(samples["guarded"], samples["unguarded"], strict=True))
        plain = bench.step_seconds(1) * (SEGMENT_SIZE - 1) + bench.prompt_seconds()
        first = [statistics.median(s.first_seconds for s in samples[side]) for side in sides]
        self._add(
            "C9",
            f"first guarded segment / first {SEGMENT_SIZE} unguarded tokens, p = 1",
            [one.first_seconds / other.first_seconds for one, other in pairs],
            "<= 1.2",
            ceiling=1 + bench.prompt_seconds(reward=True) / plain,
            counts=f"{1e3 * first[0]:.0f} and {1e3 * first[1]:.0f} ms, {len(pairs)} pairs",
        )

    def _memory(self) -> None:
        """C11: what is held for keys and values, and whether it grows."""
        bench, scale = self.bench, self.scale
        if not self.wants("C11"):
            return
        candidates, rows, tokens = 4, 8, 2 * SEGMENT_SIZE
        model, engine = bench.new_language_model(), bench.engine(rows)
        first = engine.statistics.num_rounds
        step = self._progress("memory", scale.memory_rounds)
        held: list[int] = []
        done = 0
        while done < scale.memory_rounds:
            prompts = bench.prompts(1000 * len(held), rows)
            policy = bench.policy(
                prompts, 0.5, tokens=tokens, seed=done, candidates=candidates, adaptive=False
            )
            bench.run(prompts, policy=policy, tokens=tokens, max_rows=rows, language_model=model)
            held.append(model.num_bytes)
            now = min(engine.statistics.num_rounds - first, scale.memory_rounds)
            for _ in range(now - done):
                step()
            done = now
        bucket = -(-(scale.prompt + tokens) // _BUCKET) * _BUCKET
        room = rows * (bucket + SEGMENT_SIZE * candidates)
        itemsize = getattr(torch, scale.dtype).itemsize
        allowed = room * scale.language_model.num_token_values * itemsize
        counts = f"{rows} rows, M = {candidates}, {done} rounds, {max(held) / 2**20:.1f} MiB"
        name = "bytes held of keys and values / bytes that rows need"
        self._add("C11", name, [max(held) / allowed], "<= 1.1", counts=counts)
        name = f"growth of it over {done} rounds, bytes"
        self._add("C11", name, [float(held[-1] - held[0])], "= 0", counts=counts)

    def _same(self) -> None:
        """C12: a row alone and among others."""
        bench, tokens = self.bench, 2 * SEGMENT_SIZE
        if not self.wants("C12"):
            return
        step = self._progress("same tokens", 2)
        texts = []
        for together in (True, False):
            side = bench.side(8, 0.5, tokens=tokens, max_rows=8, together=together)
            texts.append(side(0).texts)
            step()
        equal = sum(one == other for one, other in zip(*texts, strict=True))
        name = "replies that are the same alone and among 8 / all"
        counts = f"8 replies of {tokens} tokens, p = 0.5, {self.scale.dtype}"
        self._add("C12", name, [equal / 8], "= 1", counts=counts)

    # What each optimisation is worth: the same work with it and without it

    def _one_row_without(self) -> None:
        """A1 and A2: weights as they were, and other ways to draft."""
        bench, tokens = self.bench, min(64, self.scale.tokens)
        if not self.wants("A1", "A2"):
            return
        pairs = min(2, self.scale.long_pairs)

        def guarded(tokens: int = tokens, **settings: Any) -> Side:
            model = bench.new_language_model(**settings) if settings else None
            if model is not None:
                model.round_seconds(1, 1, SEGMENT_SIZE)  # loads it, and times its steps
            return bench.side(1, 0.5, tokens=tokens, language_model=model)

        sides = {"with": guarded()}
        if self.wants("A1"):
            sides["without"] = guarded(pack_weights=False)
        if self.wants("A2"):
            sides["snapshot"] = guarded(drafts="snapshot")
        samples = self._measure("one row, without", sides, pairs, warm=False)
        if self.wants("A1"):
            name = "packed weights / plain ones, p = 0.5, 1 row"
            self._add_ratio("A1", name, samples, "with", "without", _NO_LOSS)
        if self.wants("A2"):
            name = "drafts: ragged / snapshot, p = 0.5, 1 row"
            self._add_ratio("A2", name, samples, "with", "snapshot", _NO_LOSS)
            short = SEGMENT_SIZE  # each attempt reads everything anew for every token
            sides = {"with": guarded(short), "recompute": guarded(short, drafts="recompute")}
            samples = self._measure("recomputing", sides, pairs, warm=False)
            name = f"drafts: ragged / recompute, p = 0.5, 1 row, {short} tokens"
            self._add_ratio("A2", name, samples, "with", "recompute", _NO_LOSS)

    def _eight_rows_without(self) -> None:
        """A3 and A4: a number of attempts that is not chosen, and rows that wait."""
        bench, tokens = self.bench, 3 * SEGMENT_SIZE
        if not self.wants("A3", "A4"):
            return
        sides = {"with": bench.side(8, 0.5, tokens=tokens)}
        if self.wants("A3"):
            sides["M = 1"] = bench.side(8, 0.5, tokens=tokens, candidates=1)
            sides["M = 4"] = bench.side(8, 0.5, tokens=tokens, candidates=4, adaptive=False)
        if self.wants("A4"):
            sides["barrier"] = bench.side(8, 0.5, tokens=tokens, barrier=True)
        pairs = min(2, self.scale.long_pairs)
        samples = self._measure("eight rows, without", sides, pairs, warm=False)
        if self.wants("A3"):
            for other, gate in (("M = 1", _NO_LOSS), ("M = 4", "")):
                name = f"chosen M / {other}, p = 0.5, 8 rows"
                self._add_ratio("A3", name, samples, "with", other, gate)
        if self.wants("A4"):
            name = "rows apart / barrier, p = 0.5, 8 rows"
            self._add_ratio("A4", name, samples, "with", "barrier", _NO_LOSS)

    def _reward_without(self) -> None:
        """A5 and A8: a large reward, asked about all candidates at once, or taken for a small one."""
        bench, tokens = self.bench, 3 * SEGMENT_SIZE
        if not self.wants("A5", "A8"):
            return
        shape = self.scale.language_model.scaled(1.0)

        def guarded(**how: Any) -> Side:
            return bench.side(1, 0.5, tokens=tokens, shape=shape, **how)

        sides = {"with": guarded()}
        if self.wants("A5"):
            sides["at once"] = guarded(lazy=False)
        if self.wants("A8"):
            sides["guessed"] = guarded(of_reward={"cost": 0.125})
        samples = self._measure("reward, without", sides, self.scale.long_pairs)
        if self.wants("A5"):
            name = "judged one by one / at once, p = 0.5, reward 1, 1 row"
            self._add_ratio("A5", name, samples, "with", "at once", _NO_LOSS)
        if self.wants("A8"):
            name = "reward's time measured / guessed, p = 0.5, reward 1, 1 row"
            self._add_ratio("A8", name, samples, "with", "guessed", _NO_LOSS)

    def _prompts_without(self) -> None:
        """A6 and A7: prompts that begin as an earlier one did, and no store of prompts."""
        bench, scale = self.bench, self.scale
        length, calls, stored = 8 * scale.prompt, 3, 1 << 28

        def asking(own: int, its: int | None = None) -> Side:
            """Return a side, given the room of the language model's store and the reward's."""
            model = bench.new_language_model(prompt_bytes=own)

            def side(pair: int) -> Sample:
                whole = list(bench.prompt(1000 * pair, length).ids)
                # As the turns of a thread: each prompt is the one before and something new.
                ends = [length - 16 * (calls - at) for at in range(calls + 1)]
                prompts = [
                    _Prompt(str(bench.tokenizer.decode(whole[:end])), tuple(whole[:end]))
                    for end in ends
                ]
                policy = None
                if its is not None:
                    policy = bench.policy(prompts, 1.0, tokens=SEGMENT_SIZE, prompt_bytes=its)
                how: dict[str, Any] = {
                    "policy": policy,
                    "tokens": SEGMENT_SIZE,
                    "max_rows": 1,
                    "together": False,
                    "language_model": model,
                    "partition": str(pair),
                }
                bench.run(prompts[:1], **how)
                return bench.run(prompts[1:], **how)

            return side

        for identifier, what, sides in (
            ("A6", "prompts stored / not, unguarded", (stored, 0, None, None)),
            ("A7", "reward's prompts stored / not, p = 1", (stored, stored, stored, 0)),
        ):
            if self.wants(identifier):
                one, other, its, others = sides
                asked = {"with": asking(one, its), "without": asking(other, others)}
                samples = self._measure("prompts, without", asked, scale.long_pairs)
                name = f"{what}, {length} tokens, 16 new"
                self._add_ratio(identifier, name, samples, "with", "without", _NO_LOSS)

    # Growth

    def _growth(self) -> None:
        """Measure the curves."""
        if not self.wants("growth"):
            return
        bench, scale, tokens = self.bench, self.scale, 3 * SEGMENT_SIZE
        self._grow(
            "prompt",
            "Prompt length, 1 row",
            "tokens of the prompt",
            "A token reads the weights and the keys and values of everything before it: the cost "
            "is a constant and a part that grows with the length, never its square.",
            scale.prompts,
            {
                "unguarded": lambda x: bench.side(1, tokens=tokens, length=int(x)),
                "guarded, p = 1": lambda x: bench.side(1, 1.0, tokens=tokens, length=int(x)),
            },
        )
        self._grow(
            "rows",
            "Rows at once",
            "rows",
            "The weights are read once for all rows, so a token gets cheaper until the "
            "arithmetic, and no more the reading, takes the time.",
            scale.rows,
            {
                "unguarded": lambda x: bench.side(int(x), tokens=tokens),
                "guarded, p = 1": lambda x: bench.side(int(x), 1.0, tokens=tokens),
            },
        )
        self._grow(
            "attempts",
            "Attempts a segment, 1 row",
            "attempts a segment (1 / p)",
            "One at a time, every attempt costs a segment; several at once share the reading of "
            "the weights, so the cost grows like t(M) / (1 - (1 - p)^M).",
            (1, 2, 4, 8),
            {
                "chosen M": lambda x: bench.side(1, 1 / x, tokens=4 * SEGMENT_SIZE),
                "M = 1": lambda x: bench.side(1, 1 / x, tokens=4 * SEGMENT_SIZE, candidates=1),
            },
            whole=True,
        )
        model = scale.language_model
        self._grow(
            "reward",
            "Size of the reward, 1 row",
            "parameters of its layers / the language model's",
            "The reward reads each token once, a whole segment in one pass: its share of the time "
            "is its share of the arithmetic, not of the passes.",
            scale.shares,
            {
                "unguarded": lambda x: bench.side(1, tokens=tokens),
                "guarded, p = 1": lambda x: bench.side(
                    1, 1.0, tokens=tokens, shape=model.scaled(x)
                ),
            },
        )

    def _grow(
        self,
        identifier: str,
        title: str,
        x: str,
        why: str,
        places: Sequence[float],
        sides: Mapping[str, Callable[[float], Side]],
        *,
        whole: bool = False,
    ) -> None:
        """Add a curve: milliseconds a token of all rows, behind the first segment or of it all."""
        step = self._progress(identifier, len(sides) * len(places))
        lines: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for place in places:
            for name, side in sides.items():
                sample = side(place)(0)
                seconds, num_tokens = sample.seconds, sample.num_tokens
                if not whole:
                    seconds = sample.steady_seconds
                    num_tokens -= SEGMENT_SIZE * len(sample.texts)
                lines[name].append((place, 1e3 * seconds / num_tokens))
                step()
        self.results.curves.append(Curve(id=identifier, title=title, x=x, why=why, lines=lines))


# One accelerator


class AcceleratorBenchmark(Benchmark):
    """Measures the rows that want an accelerator."""

    @property
    def groups(self) -> dict[str, Callable[[], None]]:
        """What is measured together, in order."""
        return {
            "G1": self._limit,
            "G2": self._peers,
            "G3": self._judged,
            "G4": self._guarded,
            "G5": self._width,
            "G6": self._wait,
            "G7": self._published,
            "G8": self._trees,
            "G9": self._graphs,
            "G10": self._room,
            "G11": self._waves,
        }

    def _pair(
        self, identifier: str, name: str, sides: Mapping[str, Side], gates: Mapping[str, str]
    ) -> None:
        """Measure some sides, and add a row of the first one's ratio to each of the others."""
        samples = self._measure(f"{identifier} {name}", sides, self.scale.long_pairs)
        first, *others = sides
        for other in others:
            row = f"{first} / {other}, {name}"
            self._add_ratio(identifier, row, samples, first, other, gates.get(other, ""))

    def _limit(self) -> None:
        """G1: the plain decoder beside what the memory allows."""
        scale = self.scale
        bandwidth = _bandwidth(scale.device)
        for rows in (scale.held_rows[0], scale.held_rows[-1]):
            if not self.wants("G1"):
                return
            name = f"unguarded / bandwidth floor, {_rows(rows)}"
            samples = self._measure(name, {"own": self.bench.side(rows)}, scale.long_pairs)
            rates = [sample.rate for sample in samples["own"]]
            if bandwidth is None:
                note = "the bandwidth of the device is not known"
                self.results.rows.append(Result(id="G1", name=name, value=None, note=note))
                continue
            shape, length = scale.language_model, scale.prompt + scale.tokens / 2
            values = shape.num_streamed_parameters + rows * length * shape.num_token_values
            floor = rows * bandwidth / (values * getattr(torch, scale.dtype).itemsize)
            counts = f"{statistics.median(rates):.0f} of {floor:.0f} tokens/s"
            gate = _LIMIT_GATES.get(rows, "")
            self._add("G1", name, [rate / floor for rate in rates], gate, counts=counts)

    def _peers(self) -> None:
        """G2: the plain decoder beside those of transformers."""
        bench, scale = self.bench, self.scale
        for rows in (scale.held_rows[0], scale.held_rows[-1]):
            if self.wants("G2"):
                sides = {
                    "unguarded": bench.side(rows),
                    "generate": bench.generating(rows),
                    "generate, static cache": bench.generating(rows, static=True),
                    "continuous batching": bench.batching(rows),
                }
                self._pair("G2", _rows(rows), sides, _PEER_GATES)

    def _judged(self) -> None:
        """G3: what judging costs."""
        bench, scale = self.bench, self.scale
        for share, shape in (("1/8", scale.reward), ("1", scale.language_model)):
            for rows in (scale.held_rows[0], scale.held_rows[-1]):
                if self.wants("G3"):
                    sides = {
                        "guarded": bench.side(rows, 1.0, candidates=1, shape=shape),
                        "unguarded": bench.side(rows),
                    }
                    name = f"p = 1, M = 1, reward {share}, {_rows(rows)}"
                    gates = {"unguarded": _JUDGED_GATES.get((share, rows), "")}
                    self._pair("G3", name, sides, gates)

    def _guarded(self) -> None:
        """G4: what guarding costs."""
        bench = self.bench
        for rows in self.scale.held_rows:
            if not self.wants("G4"):
                return
            sides = {"unguarded": bench.side(rows)}
            sides |= {f"p = {each}": bench.side(rows, each) for each in (0.25, 0.5, 0.75)}
            samples = self._measure(f"G4 {rows}", sides, self.scale.long_pairs)
            for probability in (0.25, 0.5, 0.75):
                name = f"guarded / unguarded, p = {probability}, {_rows(rows)}"
                gate = _GUARDED_GATES.get((probability, rows), "")
                self._add_ratio("G4", name, samples, f"p = {probability}", "unguarded", gate)

    def _width(self) -> None:
        """G5: how many tokens one step draws for little more than one."""
        if not self.wants("G5"):
            return
        seconds = {1 << at: self.bench.step_seconds(1 << at) for at in range(10)}
        free = [width for width, each in seconds.items() if each <= 1.25 * seconds[1]]
        counts = ", ".join(f"t({width}) = {1e3 * s:.1f} ms" for width, s in seconds.items())
        self._add("G5", _ACCELERATOR["G5"], [float(max(free))], ">= 64", counts=counts)

    def _wait(self) -> None:
        """G6: how long one waits for the first words."""
        if not self.wants("G6"):
            return
        sides = {"guarded": self.bench.side(1, 1.0), "unguarded": self.bench.side(1)}
        samples = self._measure("G6", sides, 2 * self.scale.long_pairs)
        pairs = list(zip(samples["guarded"], samples["unguarded"], strict=True))
        name = "first guarded segment, milliseconds, p = 1, 1 row"
        self._add("G6", name, [1e3 * one.first_seconds for one, _ in pairs], "<= 120")
        name = "first guarded segment / first unguarded tokens, p = 1"
        ratios = [one.first_seconds / other.first_seconds for one, other in pairs]
        self._add("G6", name, ratios, "<= 1.2")

    def _published(self) -> None:
        """G7: the loop of CARDS' published code."""
        if self.wants("G7"):
            sides = {"guarded": self.bench.side(1, 0.5), "CARDS": self.bench.recomputing(0.5)}
            self._pair("G7", "p = 0.5, 1 row", sides, {"CARDS": ">= 8"})

    def _trees(self) -> None:
        """G8: candidates that are branches of a row, and candidates that are rows of a batch."""
        if not self.wants("G8"):
            return
        rows, candidates = self.scale.held_rows[-1] // 4, 4
        length = 4 * self.scale.prompt
        tree = self.bench.drafting_seconds(rows, candidates, length=length)
        expanded = self.bench.step_seconds(rows * candidates, length=length)
        counts = f"{_rows(rows)}, M = {candidates}, {length} tokens: "
        counts += f"{1e3 * tree:.2f} with sampling, and {1e3 * expanded:.2f} ms"
        self._add("G8", _ACCELERATOR["G8"], [tree / expanded], "<= 0.75", counts=counts)

    def _graphs(self) -> None:
        """G9: a step that is played back, and one that is launched piece by piece."""
        if not self.wants("G9"):
            return
        ways: tuple[Steps, ...] = ("eager", "graphs", "compiled")
        if not self.bench.cuda:  # there is nothing to record; the shapes are the same
            ways = ("eager", "static")
        models = {way: self.bench.new_language_model(steps=way) for way in ways}
        times: dict[Steps, list[float]] = {way: [] for way in ways}
        for _ in range(self.scale.long_pairs):
            for way, model in models.items():
                times[way].append(self.bench.drafting_seconds(1, 1, language_model=model))
        for way in ways[1:]:
            ratios = [one / other for one, other in zip(times[way], times["eager"], strict=True)]
            counts = f"{1e3 * min(times[way]):.2f} and {1e3 * min(times['eager']):.2f} ms"
            gate = "<= 0.5" if way == "graphs" else ""
            name = f"{_STEPS_NAMES[way]} step / eager step, 1 row"
            self._add("G9", name, ratios, gate, counts=f"{counts}, with sampling")

    def _room(self) -> None:
        """G10: how many long rows fit beside a reward as large, and what one too many does."""
        if not self.wants("G10"):
            return
        bench, wanted = self.bench, _LONG_ROWS if self.bench.cuda else 4
        length = 4 * self.scale.prompt - SEGMENT_SIZE
        model = bench.new_language_model()
        classifier = bench.classifier(self.scale.language_model)
        rows, most = wanted, 16 * wanted if bench.cuda else wanted
        fitted = answered = 0
        while rows <= most and not model.counts.out_of_memory + classifier.counters.backoffs:
            answered = bench.hold(rows, length=length, language_model=model, classifier=classifier)
            if not model.counts.out_of_memory + classifier.counters.backoffs:
                fitted = answered
            rows += -(-wanted // 4)
        name = f"rows of {length + SEGMENT_SIZE} tokens that fit, with a reward as large"
        counts = f"then {answered} rows were answered, {model.counts.out_of_memory} and "
        counts += f"{classifier.counters.backoffs} times out of memory"
        self._add("G10", name, [float(fitted)], f">= {wanted}", counts=counts)

    def _waves(self) -> None:
        """G11: candidates judged one by one, and all at once."""
        if self.wants("G11"):
            rows, shape = self.scale.held_rows[-1], self.scale.language_model
            sides = {
                name: self.bench.side(rows, 0.5, shape=shape, lazy=lazy)
                for name, lazy in (("judged one by one", True), ("at once", False))
            }
            name = f"p = 0.5, reward 1, {_rows(rows)}"
            self._pair("G11", name, sides, {"at once": ">= 1"})


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


_LIMIT_GATES = {1: ">= 0.70", _MANY_ROWS: ">= 0.50"}
_PEER_GATES = {
    "generate": ">= 3",
    "generate, static cache": ">= 0.9",
    "continuous batching": ">= 0.9",
}
_JUDGED_GATES = {
    ("1/8", 1): ">= 0.93",
    ("1/8", _MANY_ROWS): ">= 0.85",
    ("1", 1): ">= 0.85",
    ("1", _MANY_ROWS): ">= 0.60",
}
_GUARDED_GATES = {
    (0.5, 1): ">= 0.90",
    (0.5, 8): ">= 0.85",
    (0.5, _MANY_ROWS): ">= 0.65",
    # These are 0.85 of what the cost model says of one H200.
    (0.25, 1): ">= 0.83",
    (0.25, 8): ">= 0.77",
    (0.25, 32): ">= 0.58",
    (0.25, _MANY_ROWS): ">= 0.43",
    (0.5, 32): ">= 0.72",
    (0.75, 1): ">= 0.84",
    (0.75, 8): ">= 0.82",
    (0.75, 32): ">= 0.78",
    (0.75, _MANY_ROWS): ">= 0.74",
}
_LONG_ROWS = 150
_STEPS_NAMES = {"graphs": "CUDA-graph", "compiled": "compiled", "static": "static"}

_ACCELERATOR = {
    "G1": "unguarded / bandwidth floor, 1 and 64 rows",
    "G2": "unguarded / generate, static cache, continuous batching",
    "G3": "guarded / unguarded, p = 1, M = 1, reward 1/8 and 1",
    "G4": "guarded / unguarded, p = 0.25 to 0.75, 1 to 64 rows",
    "G5": "largest n with t(n) <= 1.25 t(1)",
    "G6": "first guarded segment, 1 row",
    "G7": "guarded / CARDS, p = 0.5, 1 row",
    "G8": "tree drafting / batch-expanded, seconds a step",
    "G9": "CUDA-graph step / eager step, 1 row",
    "G10": "rows of 2048 tokens that fit, with a reward as large",
    "G11": "judged one by one / at once, p = 0.5, reward 1, 64 rows",
}
"""What wants an accelerator, as it is named where there is none."""

_ACCELERATOR_GATES = {
    "G1": ">= 0.70; >= 0.50",
    "G2": ">= 3; >= 0.9; >= 0.9",
    "G3": ">= 0.93 to >= 0.60",
    "G4": "p = 0.5: >= 0.90 (1 row), >= 0.85 (8), >= 0.65 (64)",
    "G5": ">= 64",
    "G6": "<= 120 ms; <= 1.2",
    "G7": ">= 8",
    "G8": "<= 0.75",
    "G9": "<= 0.5",
    "G10": ">= 150",
    "G11": ">= 1",
}
_CPU_IDS = (
    *("C1", "C2", "C2b", "C3", "C4", "C4b", *(f"C{at}" for at in range(5, 13)), "P1"),
    *(f"A{at}" for at in range(1, 9)),
)
_IDS = (*_CPU_IDS, *_ACCELERATOR)


def _drafted(samples: Sequence[Sample]) -> str:
    """Return how many candidates were drafted and judged for each segment, as words."""
    if not any(sample.num_drafted and sample.num_attempts for sample in samples):
        return ""
    segments = sum(sample.num_tokens for sample in samples) / SEGMENT_SIZE
    drafted = sum(sample.num_drafted for sample in samples) / SEGMENT_SIZE
    judged = sum(sample.num_attempts for sample in samples)
    return (
        f", {segments:.0f} segments of {judged / segments:.2f} attempts, "
        f"{drafted / segments:.2f} drafted"
    )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the progress bars of transformers from the screen."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the logs of a peer out of the table."""
    loggers = [logging.getLogger(name) for name in ("transformers", "ContinuousBatchingLogger")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _bandwidth(device: str) -> float | None:
    """Return the bytes a second that a device can read, as its driver says; None if unknown."""
    if not device.startswith("cuda"):
        return None
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "memory_clock_rate", None)
    width = getattr(properties, "memory_bus_width", None)
    return 2e3 * clock * width / 8 if clock and width else None


def about(scale: Scale) -> dict[str, str]:
    """Return hardware, versions and models, by name."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("langchain-stars", "torch", "transformers")
    }
    machine = f"{_processor()}, {os.cpu_count()} cores, {_memory()}, {platform.system()}"
    if scale.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(scale.device)
        machine = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {machine}"
    else:
        machine += f", 1 torch thread, {torch.backends.cpu.get_cpu_capability()}"
    model, reward = scale.language_model, scale.reward
    share = reward.num_layer_parameters / model.num_streamed_parameters
    load = (
        f", load average {os.getloadavg()[0]:.1f} at the beginning"
        if hasattr(os, "getloadavg")
        else ""
    )
    return {
        "machine": machine + load,
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "language model": f"Llama, random weights, {_shape(model)}, {scale.dtype}",
        "reward": f"the same with one label, {_shape(reward)}, a token costs {share:.3f} of one "
        "of the language model",
        "load": f"prompt {scale.prompt}, {scale.tokens} new tokens, segments of {SEGMENT_SIZE}, "
        "temperature 1, acceptance forced with coins stratified to a mean of exactly 1 / p "
        "attempts, the same on both sides",
        "reading": "median of paired ratios, both sides in turn; least .. greatest of them; "
        + {
            "wall": "seconds that passed",
            "processor": "seconds of processor time, so that others on the machine count little",
        }[scale.clock],
    }


def _shape(shape: Shape) -> str:
    return (
        f"{shape.num_parameters / 1e6:.0f}M parameters ({shape.layers} layers of {shape.width}, "
        f"{shape.heads} heads on {shape.kept_heads}, {shape.vocab} tokens)"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return "memory unknown"
    return f"{pages * size / 2**30:.0f} GiB"


def measure(
    *,
    only: Sequence[str] | None = None,
    quick: bool = False,
    clock: Clock = "wall",
    scale: Scale | None = None,
    progress: Callable[[str, int], Callable[[], None]] | None = None,
) -> Results:
    """Measure the rows that are asked for.

    Args:
        only: Rows; all if None. `"growth"` are the curves.
        quick: Whether less is measured, in some minutes: to see that it runs.
        clock: What seconds are; others who use the machine meanwhile disturb `"processor"` less.
        scale: Models and sizes; those for this machine if not given.
        progress: As of `Benchmark`.

    Raises:
        ValueError: `only` names no row.
    """
    for name in only or ():
        if name not in (*_IDS, "growth"):
            raise ValueError(f"`only` must name rows of {', '.join(_IDS)} or growth, got {name}")
    small = {**(_LESS if quick else {}), "clock": clock}
    results = Results()
    if only is None or not set(only) <= set(_ACCELERATOR):
        results = _in_folder(Benchmark, scale or Scale(**{**_fields(CPU), **small}), only, progress)
    if only is None or set(only) & set(_ACCELERATOR):
        if torch.cuda.is_available():
            larger = Scale(**{**_fields(GPU), **small, "prompt": GPU.prompt, "clock": "wall"})
            more = _in_folder(AcceleratorBenchmark, larger, only, progress)
            results.rows += more.rows
            results.about |= {f"cuda {name}": value for name, value in more.about.items()}
            results.seconds |= more.seconds
        else:
            results.rows += [
                Result(
                    id=identifier,
                    name=name,
                    value=None,
                    note=f"not run: no GPU; gate on one H200 {_ACCELERATOR_GATES[identifier]}; "
                    f"the command: {COMMAND} --only {identifier}",
                )
                for identifier, name in _ACCELERATOR.items()
                if only is None or identifier in only
            ]
    return results


def _fields(scale: Scale) -> dict[str, Any]:
    return {name: getattr(scale, name) for name in scale.__slots__}


def _in_folder(
    kind: type[Benchmark],
    scale: Scale,
    only: Sequence[str] | None,
    progress: Callable[[str, int], Callable[[], None]] | None,
) -> Results:
    with tempfile.TemporaryDirectory(prefix="langchain_stars_benchmark_") as folder:
        bench = Bench(scale, Path(folder))
        try:
            return kind(bench, only=only, progress=progress).run()
        finally:
            bench.close()


def draw(results: Results, path: str | os.PathLike[str]) -> None:
    """Draw the table's ratios beside their gates, and the curves.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [row for row in results.rows if row.value is not None and row.gate]
    num_lines = -(-len(results.curves) // 2)
    heights = [0.3 * max(len(rows), 1) + 1.4, *([4.6 * num_lines] if num_lines else [])]
    figure = _figure()(figsize=(13, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_ratios(parts[0].subplots(), rows, results.about.get("machine", ""))
    if num_lines:
        panels = parts[1].subplots(num_lines, 2, squeeze=False).flat
        for axes, curve in itertools.zip_longest(panels, results.curves):
            if curve is None:
                axes.set_axis_off()
            else:
                _draw_curve(axes, curve)
    figure.savefig(path, dpi=120)


def _draw_ratios(axes: Any, rows: Sequence[Result], title: str) -> None:
    for at, row in enumerate(reversed(rows)):
        assert row.value is not None
        bound = float(row.gate.split()[1]) or 1.0
        low, high = row.spread or (row.value, row.value)
        axes.plot([low / bound, high / bound], [at, at], color="tab:blue", linewidth=2)
        axes.plot([row.value / bound], [at], "o", color="tab:blue" if row.holds else "tab:red")
        if row.ceiling is not None:
            axes.plot([row.ceiling / bound], [at], "|", color="black", markersize=12)
    axes.set_yticks(
        range(len(rows)), [f"{row.name}  ({row.gate})  {row.id}" for row in reversed(rows)]
    )
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel("value / gate (bar: spread; stroke: what the machine allows)")
    axes.set_title(title, fontsize=9)


def _draw_curve(axes: Any, curve: Curve) -> None:
    for name, points in curve.lines.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    places = sorted({x for points in curve.lines.values() for x, _ in points})
    axes.set_xticks(places, [_number(x) for x in places])
    axes.minorticks_off()
    axes.set_xlabel(curve.x)
    axes.set_ylabel(curve.y)
    axes.set_title("\n".join([curve.title, *textwrap.wrap(curve.why, 78)]), fontsize=9)
    axes.legend()


def _figure() -> Any:
    """Return matplotlib's class of figures."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'matplotlib is needed for the picture: pip install "langchain-stars[benchmark]"'
        ) from error
    return Figure


# The command


def main(
    *,
    only: str | None = None,
    json: str | None = None,
    picture: str | None = None,
    quick: bool = False,
    clock: Clock = "wall",
) -> int:
    """Measure, write the table to standard output, and return the exit status.

    Args:
        only: Rows, as `"C1,C3"`; all if None.
        json: Where to save everything as JSON.
        picture: Where to save a picture.
        quick: Whether less is measured.
        clock: As of `measure`.

    Raises:
        ImportError: A picture is wanted and matplotlib is not installed.
        ValueError: `only` names no row.
    """
    if picture:
        _figure()  # told before half an hour is spent
    results = measure(
        only=only.split(",") if only else None, quick=quick, clock=clock, progress=_bar
    )
    sys.stdout.write(results.as_text() + "\n")
    if json:
        Path(json).write_text(dump_json(results.as_json(), indent=2) + "\n")
    if picture:
        draw(results, picture)
    return 0


def _bar(name: str, count: int) -> Callable[[], None]:
    """Show a progress bar on standard error; a terminal only."""
    bar = tqdm(total=count, desc=name, leave=False, disable=None)

    def step() -> None:
        bar.update()
        if bar.n >= count:
            bar.close()

    return step
