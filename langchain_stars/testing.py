"""Doubles whose law a test writes down, and checks that plug-ins run on themselves.

The doubles run under the real engine, decoder and chat model; nothing of those is replaced.
"""

import inspect
import itertools
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from langchain_stars.language_models.base import (
    Candidate,
    Chat,
    Drafting,
    LanguageModel,
    Prefix,
    Request,
    Sampling,
)
from langchain_stars.randomness import drafting_uniforms
from langchain_stars.rewards.base import (
    Completion,
    Leaf,
    NamedRewardError,
    Raw,
    Reward,
    Scorer,
    ScoreRequest,
    Subject,
)

Script: TypeAlias = Callable[..., Mapping[str | bytes, float]]
"""Returns the next tokens and their probabilities, given the reply so far (and the prompt)."""

_NUM_BYTES = 256


class ScriptedLanguageModel(LanguageModel):
    """A language model whose next tokens and their probabilities a script writes down.

    Args:
        script: `script(completion)` or `script(completion, prompt)`, with the text of the reply so
            far and the contents of the messages, a line each; returns the probabilities of the
            next tokens, which sum to 1. One key is one token, a string or bytes; `""` ends the
            reply. So `segment_size=1` makes keys segments.
        name: What it is called.
        context_length: Most tokens of prompt and reply together; a prompt has one token a byte.
        step_seconds: Seconds that drawing one token for all rows takes, at least 0.
        max_rows: Most replies at once.
        max_candidates: Most candidates of one reply at once.

    Attributes:
        num_steps: Steps of all rounds so far, a token for every candidate each.
    """

    def __init__(
        self,
        script: Script,
        *,
        name: str = "scripted",
        context_length: int = 1_000_000,
        step_seconds: float = 0.0,
        max_rows: int = 64,
        max_candidates: int = 8,
    ) -> None:
        self._script = script
        self._takes_prompt = _num_positional(script) > 1
        self._name = name
        self._context_length = context_length
        self._step_seconds = step_seconds
        self._max_rows = max_rows
        self._max_candidates = max_candidates
        self._nonce = uuid.uuid4().hex
        self._tokens: dict[str | bytes, int] = {}
        self._bytes: list[bytes] = [bytes((value,)) for value in range(_NUM_BYTES)]
        self._lock = threading.Lock()
        self.num_steps = 0

    @property
    def name(self) -> str:
        """What it is called."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Its own: no two scripts are known to be the same."""
        return f"scripted:{self._nonce}"

    @property
    def vocabulary(self) -> str:
        """Its own: tokens get their ids as they are met."""
        return f"scripted:{self._nonce}"

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and reply together."""
        return self._context_length

    @property
    def max_rows(self) -> int:
        """Most replies at once."""
        return self._max_rows

    @property
    def max_candidates(self) -> int:
        """Most candidates of one reply at once."""
        return self._max_candidates

    def round_seconds(self, num_rows: int, count: int, size: int) -> float:
        """Return the same for any number of candidates, so that several are drafted at once."""
        return float(size)

    def encode(self, chat: Chat, *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Return the contents of the messages, a line each, as bytes."""
        return list("\n".join(str(message.get("content") or "") for message in chat).encode()) or [
            10
        ]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[token_id] for token_id in token_ids).decode(errors="replace")

    def draw(self, requests: Sequence[Request]) -> list[list[Candidate]]:
        """Return candidates drawn with the script's probabilities."""
        drafting = self.drafting(requests)
        while True:
            try:
                next(drafting)
            except StopIteration as stop:
                proposals: list[list[Candidate]] = stop.value
                return proposals

    def drafting(self, requests: Sequence[Request]) -> Drafting:
        """Draw one token for every candidate at each step."""
        drawn = [
            [_Draft(request, number) for number in range(request.count)] for request in requests
        ]
        for position in range(max(request.size for request in requests)):
            newest: list[int | None] = []
            for request, drafts in zip(requests, drawn, strict=True):
                tokens = [
                    self._next(request, draft, position) if position < request.size else None
                    for draft in drafts
                ]
                newest.append(tokens[0] if request.streamed else None)
            self.num_steps += 1
            if self._step_seconds:
                time.sleep(self._step_seconds)
            yield newest
            if all(draft.finished for drafts in drawn for draft in drafts):
                break
        return [[draft.candidate() for draft in drafts] for drafts in drawn]

    def _next(self, request: Request, draft: "_Draft", position: int) -> int | None:
        if draft.finished:
            return None
        prefix = request.prefix
        completion = self.decode((*prefix.token_ids, *draft.token_ids))
        if self._takes_prompt:
            table = self._script(completion, self.decode(prefix.prompt_ids))
        else:
            table = self._script(completion)
        tokens, weights = _checked(table)
        weights = _warped(tokens, weights, request.sampling, seen=self._seen(prefix, draft))
        token = _pick(tokens, weights, draft.uniforms[position])
        if token in ("", b""):
            draft.finished = True
            return None
        token_id = self._id_of(token)
        draft.token_ids.append(token_id)
        return token_id

    def _seen(self, prefix: Prefix, draft: "_Draft") -> set[bytes]:
        return {self._bytes[token_id] for token_id in (*prefix.token_ids, *draft.token_ids)}

    def _id_of(self, token: str | bytes) -> int:
        with self._lock:
            token_id = self._tokens.get(token)
            if token_id is None:
                token_id = self._tokens[token] = len(self._bytes)
                self._bytes.append(token if isinstance(token, bytes) else token.encode())
            return token_id


class _Draft:
    """A candidate in the making."""

    def __init__(self, request: Request, number: int) -> None:
        self.attempt = request.first_attempt + number
        self.uniforms = drafting_uniforms(
            request.size, seed=request.seed, segment=request.segment, attempt=self.attempt
        )
        self.token_ids: list[int] = []
        self.finished = False

    def candidate(self) -> Candidate:
        return Candidate(
            attempt=self.attempt, token_ids=tuple(self.token_ids), finished=self.finished
        )


class TableReward(Leaf):
    """A reward that a table writes down.

    Args:
        table: Reward of a completion, by its text; or a function of the text, or of the text and
            whether the reply is finished.
        default: Reward of a text that the table does not hold; None makes the reward fail there.
        name: What it is called.
        target: Reward that a good reply reaches, where a policy gives none.
        beta: Softness that suits it, where a policy gives none.
        alpha: Where thresholds should start, where a policy does not say.
    """

    def __init__(
        self,
        table: Mapping[str, float] | Callable[..., float],
        *,
        default: float | None = None,
        name: str = "table",
        target: float | None = None,
        beta: float | None = None,
        alpha: float | None = None,
    ) -> None:
        self.scorer = _TableScorer(table, default, name)
        self._name = name
        self._target = target
        self._beta = beta
        self._alpha = alpha

    @property
    def name(self) -> str:
        """What it is called."""
        return self._name

    @property
    def target(self) -> float | None:
        """Reward that a good reply reaches, where it is known."""
        return self._target

    @property
    def beta(self) -> float | None:
        """Softness that suits it, where it is known."""
        return self._beta

    @property
    def alpha(self) -> float | None:
        """Where thresholds should start, where it is known."""
        return self._alpha

    @property
    def identity(self) -> Mapping[str, Any]:
        """That of its table."""
        return self.scorer.identity

    def read(self, raw: Raw) -> float:
        """Return the number in the table."""
        return raw[0]


class _TableScorer(Scorer):
    on_device = True

    def __init__(
        self,
        table: Mapping[str, float] | Callable[..., float],
        default: float | None,
        name: str,
    ) -> None:
        self._table = table
        self._default = default
        self._name = name
        self._takes_finished = callable(table) and _num_positional(table) > 1
        self._nonce = uuid.uuid4().hex

    @property
    def identity(self) -> Mapping[str, Any]:
        if callable(self._table):
            return {"kind": "table", "name": self._name, "function": self._nonce}
        return {
            "kind": "table",
            "name": self._name,
            "table": dict(self._table),
            "default": self._default,
        }

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Raw]]:
        return [
            [(self._look_up(completion),) for completion in request.candidates]
            for request in requests
        ]

    def _look_up(self, completion: Completion) -> float:
        if callable(self._table):
            if self._takes_finished:
                return self._table(completion.text, completion.finished)
            return self._table(completion.text)
        value = self._table.get(completion.text, self._default)
        if value is None:
            raise NamedRewardError(f"the table of {self._name} does not hold this text")
        return value


def check_language_model(
    language_model: LanguageModel, chat: Chat = ({"role": "user", "content": "Hello"},)
) -> None:
    """Check that a language model keeps the contract of `LanguageModel`.

    A candidate must follow from its own request and number alone: not from how many are drawn at
    once, from other rows, from what was drawn before, or from what was taken back.

    Raises:
        AssertionError: It does not; the message says which clause.
    """
    sampling = Sampling()
    prompt_ids = language_model.encode(chat)
    _require(bool(prompt_ids), "`encode` returns at least one token")
    _require(language_model.encode(chat) == prompt_ids, "`encode` is a function")
    _require(isinstance(language_model.decode(prompt_ids), str), "`decode` returns text")
    _require(language_model.decode([]) == "", "`decode` of nothing is nothing")
    for name in ("name", "fingerprint", "vocabulary"):
        _require(bool(getattr(language_model, name)), f"`{name}` is not empty")
    prefixes: list[Prefix] = []

    def begin() -> Prefix:
        prefixes.append(Prefix(prompt_ids))
        return prefixes[-1]

    def ask(prefix: Prefix, first: int, count: int, size: int = 4, segment: int = 0) -> Request:
        return Request(
            prefix=prefix,
            seed=7,
            segment=segment,
            first_attempt=first,
            count=count,
            size=size,
            sampling=sampling,
        )

    try:
        together = language_model.draw([ask(begin(), 1, 3)])[0]
        _require([c.attempt for c in together] == [1, 2, 3], "attempts are numbered in order")
        for candidate in together:
            _require(1 <= candidate.num_drawn <= 4, "a candidate has 1 to `size` tokens")
        alone = begin()
        one_by_one = [language_model.draw([ask(alone, number, 1)])[0][0] for number in (1, 2, 3)]
        _require(one_by_one == together, "candidates do not depend on how many are drawn at once")
        others = [begin() for _ in range(3)]
        among = language_model.draw(
            [ask(others[0], 5, 2), ask(others[1], 1, 3), ask(others[2], 9, 1)]
        )
        _require(among[1] == together, "candidates do not depend on other rows")
        kept = together[1]
        if not kept.finished:
            first, second = others[1], begin()
            first.token_ids = kept.token_ids
            second.token_ids = kept.token_ids
            _require(
                language_model.draw([ask(first, 1, 2, segment=1)])
                == language_model.draw([ask(second, 1, 2, segment=1)]),
                "an accepted candidate continues like the same tokens fed afresh",
            )
            first.token_ids = ()
            _require(
                language_model.draw([ask(first, 1, 3)])[0] == together,
                "tokens that are taken back leave no trace",
            )
    finally:
        for prefix in prefixes:
            language_model.release(prefix)


def check_reward(
    reward: Reward,
    chat: Chat = ({"role": "user", "content": "Hello"},),
    texts: Sequence[str] = ("Hello", "Hello, how are you", "I do not know"),
) -> None:
    """Check that a reward keeps the contract of `Reward` on some texts that it can judge.

    Raises:
        AssertionError: It does not; the message says which clause.
    """
    reward.load()
    json.dumps(dict(reward.identity))
    _require(bool(reward.name), "`name` is not empty")
    _require(bool(reward.leaves), "there is at least one reading of a scorer")
    subject = Subject(chat)
    empty = Completion(text="", finished=False, token_ids=())

    def values(completions: Sequence[Completion]) -> list[float]:
        request = ScoreRequest(subject=subject, accepted=empty, candidates=tuple(completions))
        answers: dict[Leaf, list[float]] = {}
        for leaf in reward.leaves:
            of_request = leaf.scorer.score([request])
            _require(len(of_request) == 1, "a scorer answers every request")
            _require(len(of_request[0]) == len(completions), "and every candidate of it")
            answers[leaf] = [leaf.read(raw) for raw in of_request[0]]
        return [
            reward.combine({leaf: answers[leaf][place] for leaf in reward.leaves})
            for place in range(len(completions))
        ]

    try:
        for finished in (False, True):
            completions = [Completion(text=text, finished=finished) for text in texts]
            together = values(completions)
            _require(all(map(math.isfinite, together)), "rewards are finite")
            alone = list(itertools.chain.from_iterable(values([c]) for c in completions))
            _require(
                all(
                    math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)
                    for a, b in zip(together, alone, strict=True)
                ),
                "a reward does not depend on who is judged with it",
            )
            low, high = reward.bounds({})
            _require(
                all(low - 1e-6 <= value <= high + 1e-6 for value in together),
                "rewards lie within their bounds",
            )
    finally:
        for leaf in reward.leaves:
            leaf.scorer.release(subject)


def replies(
    language_model: ScriptedLanguageModel, *, max_tokens: int, prompt: str = ""
) -> Iterator[tuple[tuple[str | bytes, ...], float]]:
    """Yield every unguarded reply of at most `max_tokens` tokens, as its keys, and its probability.

    A reply that the script ends has `""` as its last key.
    """
    script, takes_prompt = language_model._script, language_model._takes_prompt

    def walk(
        keys: tuple[str | bytes, ...], chance: float
    ) -> Iterator[tuple[tuple[str | bytes, ...], float]]:
        if len(keys) == max_tokens or (keys and keys[-1] in ("", b"")):
            yield keys, chance
            return
        text = b"".join(k if isinstance(k, bytes) else k.encode() for k in keys).decode(
            errors="replace"
        )
        tokens, weights = _checked(script(text, prompt) if takes_prompt else script(text))
        for token, weight in zip(tokens, weights, strict=True):
            if weight > 0:
                yield from walk((*keys, token), chance * weight)

    yield from walk((), 1.0)


def _require(holds: bool, clause: str) -> None:
    if not holds:
        raise AssertionError(f"does not hold: {clause}")


def _num_positional(function: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(
        parameter.kind in kinds and parameter.default is inspect.Parameter.empty
        for parameter in parameters
    )


def _checked(table: Mapping[str | bytes, float]) -> tuple[list[str | bytes], list[float]]:
    tokens, weights = list(table), [float(weight) for weight in table.values()]
    total = math.fsum(weights)
    if not tokens or min(weights) < 0 or abs(total - 1) > 1e-6:
        raise ValueError(f"probabilities must be at least 0 and sum to 1, got a sum of {total}")
    return tokens, weights


def _warped(
    tokens: list[str | bytes], weights: list[float], sampling: Sampling, *, seen: set[bytes]
) -> list[float]:
    """Return the weights after the warpers, in the order of transformers."""
    logits = [math.log(weight) if weight > 0 else -math.inf for weight in weights]
    if sampling.repetition_penalty != 1:
        logits = [
            logit * sampling.repetition_penalty
            if (token if isinstance(token, bytes) else token.encode()) in seen
            else logit
            for token, logit in zip(tokens, logits, strict=True)
        ]
    if sampling.temperature == 0:
        best = max(range(len(logits)), key=lambda index: (logits[index], -index))
        return [float(index == best) for index in range(len(logits))]
    top = max(logits)
    warped = [math.exp((logit - top) / sampling.temperature) for logit in logits]
    order = sorted(range(len(warped)), key=lambda index: (-warped[index], index))
    if sampling.top_k is not None:
        for index in order[sampling.top_k :]:
            warped[index] = 0.0
    if sampling.top_p < 1:
        total, before = math.fsum(warped), 0.0
        for index in order:
            if before >= sampling.top_p * total:
                warped[index] = 0.0
            before += warped[index]
    if sampling.min_p > 0:
        floor = sampling.min_p * max(warped)
        warped = [weight if weight >= floor else 0.0 for weight in warped]
    return warped


def _pick(tokens: list[str | bytes], weights: list[float], u: float) -> str | bytes:
    left = u * math.fsum(weights)
    for token, weight in zip(tokens, weights, strict=True):
        left -= weight
        if left <= 0 and weight > 0:
            return token
    return max(zip(weights, tokens, strict=True), key=lambda pair: pair[0])[1]
