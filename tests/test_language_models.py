"""The local language model draws what plain recomputation draws, whatever it keeps and shares."""

import contextlib
import gc
import json
import multiprocessing
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLINGS, make_model, make_tokenizer
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from langchain_stars.language_models import (
    Candidate,
    LocalLanguageModel,
    Prefix,
    Request,
    Sampling,
    load_language_model,
)
from langchain_stars.language_models.drafters import RaggedDrafter
from langchain_stars.language_models.local import _REGISTRY, FALLBACK_TEMPLATE
from langchain_stars.language_models.masks import TreeMask, causal_masks
from langchain_stars.language_models.sampling import Sampler
from langchain_stars.packing import PackedLinear, can_pack, device_name, digest_of, quietly
from langchain_stars.prompts import PromptStore
from langchain_stars.ragged_cache import RaggedCache
from langchain_stars.randomness import drafting_uniforms
from langchain_stars.testing import check_language_model

FolderMaker = Callable[..., Path]

RAGGED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2", "opt")
SNAPSHOT = ("mamba", "qwen3_next", "bloom")


# The slow twin


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """What transformers' `generate` would apply, in its order."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors


class Plain:
    """Draws one candidate at a time, recomputing everything, with the warpers of transformers."""

    def __init__(self, folder: Path, language_model: LocalLanguageModel) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        network = language_model._loaded().network
        self.hidden, self.ends = network.hidden, set(network.ends.nonzero().flatten().tolist())

    @torch.inference_mode()
    def draw(self, request: Request) -> list[Candidate]:
        return [self._candidate(request, request.first_attempt + at) for at in range(request.count)]

    def _candidate(self, request: Request, attempt: int) -> Candidate:
        numbers = drafting_uniforms(
            request.size, seed=request.seed, segment=request.segment, attempt=attempt
        )
        before = [*request.prefix.prompt_ids, *request.prefix.token_ids]
        drawn: list[int] = []
        processors = warpers(request.sampling)
        for number in numbers:
            ids = torch.tensor([before + drawn])
            logits = self.model(input_ids=ids).logits[:, -1]
            scores = processors(ids, logits.masked_fill(self.hidden, -torch.inf))[0]
            if request.sampling.temperature == 0:
                token = int(scores.argmax())
            else:
                cumulative = scores.double().softmax(-1).cumsum(-1)
                token = int((cumulative >= number * cumulative[-1]).nonzero()[0])
            if token in self.ends:
                return Candidate(attempt=attempt, token_ids=tuple(drawn), finished=True)
            drawn.append(token)
        return Candidate(attempt=attempt, token_ids=tuple(drawn), finished=False)


class Session:
    """Some replies of one lane, and what a decoder might do with them."""

    def __init__(
        self, seed: int, lengths: Sequence[int], *, vocab: int = 300, lane: str = "interactive"
    ) -> None:
        self.random = random.Random(seed)
        self.prefixes = [
            Prefix([self.random.randrange(10, vocab) for _ in range(length)], lane=lane)
            for length in lengths
        ]
        self.attempts = [1] * len(lengths)
        self.segments = [0] * len(lengths)
        self.rejected: list[list[Candidate]] = [[] for _ in lengths]

    def request(self, at: int, count: int, size: int = 5, **settings: Any) -> Request:
        return Request(
            prefix=self.prefixes[at],
            seed=100 + at,
            segment=self.segments[at],
            first_attempt=self.attempts[at],
            count=count,
            size=size,
            sampling=SAMPLINGS[at % len(SAMPLINGS)],
            **settings,
        )

    def act(self, at: int, candidates: Sequence[Candidate]) -> None:
        """Keep one of the candidates, an older one or a part of one; or none; or take some back."""
        prefix = self.prefixes[at]
        deed = self.random.choice(["keep", "keep", "keep", "reject", "old", "part", "back"])
        if deed == "old" and not self.rejected[at]:
            deed = "keep"
        if deed == "back" and not prefix.token_ids:
            deed = "reject"
        if deed == "reject":
            self.rejected[at] += candidates
            self.attempts[at] += len(candidates)
            return
        if deed == "back":
            left = self.random.randrange(len(prefix.token_ids))
            prefix.token_ids = prefix.token_ids[:left]
        else:
            pool = self.rejected[at] if deed == "old" else candidates
            ids = self.random.choice(pool).token_ids
            if deed == "part":
                ids = ids[: self.random.randrange(len(ids) + 1)]
            prefix.token_ids += ids
        self.segments[at] += 1
        self.attempts[at] = 1
        self.rejected[at] = []


@pytest.fixture
def load(make_folder: FolderMaker) -> Iterator[Callable[..., LocalLanguageModel]]:
    """Loads a language model of its own, and frees it after the test."""
    made: list[LocalLanguageModel] = []

    def load(family: str = "llama", **settings: Any) -> LocalLanguageModel:
        folder = make_folder(family, **settings.pop("shape", {}))
        made.append(LocalLanguageModel(folder, device="cpu", **settings))
        return made[-1]

    yield load
    for language_model in made:
        language_model.unload()


def plainly(language_model: LocalLanguageModel) -> Plain:
    return Plain(Path(language_model.name), language_model)


def ask(prefix: Prefix, *, count: int = 1, size: int = 4, **settings: Any) -> Request:
    arguments: dict[str, Any] = {
        "seed": 7,
        "segment": 0,
        "first_attempt": 1,
        "sampling": Sampling(),
    }
    return Request(prefix=prefix, count=count, size=size, **(arguments | settings))


# Exactness


@pytest.mark.parametrize("family", [*RAGGED, *SNAPSHOT])
def test_candidates_are_those_of_plain_recomputation(
    family: str, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(family)
    assert language_model.drafts == ("ragged" if family in RAGGED else "snapshot")
    plain = plainly(language_model)
    session = Session(1, [20, 1, 33, 14, 20])
    for _ in range(7):
        asked = [at for at in range(5) if session.random.random() < 0.8] or [0]
        requests = [session.request(at, session.random.choice([1, 2, 3])) for at in asked]
        proposals = language_model.draw(requests)
        assert proposals == [plain.draw(request) for request in requests]
        for at, candidates in zip(asked, proposals, strict=True):
            session.act(at, candidates)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_one_candidate_of_one_row_needs_no_mask_and_is_exact(
    family: str, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(family)
    plain = plainly(language_model)
    prefix = Prefix(range(20, 29))
    for segment in range(4):
        request = ask(prefix, size=6, segment=segment)
        [[candidate]] = language_model.draw([request])
        assert [candidate] == plain.draw(request)
        prefix.token_ids += candidate.token_ids


@pytest.mark.parametrize("drafts", ["snapshot", "recompute"])
def test_every_way_of_drafting_draws_the_same(
    drafts: str, load: Callable[..., LocalLanguageModel]
) -> None:
    fast, slow = load(), load(drafts=drafts)
    assert (fast.drafts, slow.drafts) == ("ragged", drafts)
    one, other = Session(2, [9, 17]), Session(2, [9, 17])
    for _ in range(6):
        drawn = []
        for session, language_model in ((one, fast), (other, slow)):
            proposals = language_model.draw([session.request(at, 2 + at) for at in range(2)])
            for at in range(2):
                session.act(at, proposals[at])
            drawn.append(proposals)
        assert drawn[0] == drawn[1]


def test_a_model_with_alibi_is_not_given_position_ids(
    load: Callable[..., LocalLanguageModel], caplog: pytest.LogCaptureFixture
) -> None:
    language_model = load("bloom")
    assert language_model.drafts == "snapshot"
    assert "cannot draft the ragged way" in caplog.text
    plain = plainly(language_model)
    recomputing = load("bloom", drafts="recompute")
    request = ask(Prefix(range(30, 45)), count=3)
    assert recomputing.draw([request]) == language_model.draw([request]) == [plain.draw(request)]


def test_a_model_that_disregards_position_ids_fails_the_check(
    load: Callable[..., LocalLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    families = frozenset({"bloom"})
    monkeypatch.setattr("langchain_stars.language_models.local.RAGGED_FAMILIES", families)
    assert load("bloom").drafts == "snapshot"
    with pytest.raises(ValueError, match="`drafts` cannot be ragged"):
        load("bloom", drafts="ragged").load()


def test_products_that_may_be_rounded_are_not_taken_for_another_way_of_computing(
    load: Callable[..., LocalLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an application allows TF32: any two shapes differ by more than exact sums do."""
    linear = torch.nn.functional.linear

    def rounded(states: torch.Tensor, *weights: Any) -> torch.Tensor:
        products = linear(states, *weights)
        return products + 1e-4 * products.abs().amax() * (states.shape[-2] % 3)

    monkeypatch.setattr(torch.nn.functional, "linear", rounded)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert load(pack_weights=False).drafts == "ragged"
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(ValueError, match="`drafts` cannot be ragged"):
        load(pack_weights=False, drafts="ragged", attention="sdpa").load()


ROTARY = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_no_reply_depends_on_how_long_another_is(
    kind: str, load: Callable[..., LocalLanguageModel], caplog: pytest.LogCaptureFixture
) -> None:
    """Some rotary positions change their frequencies by the longest row of a batch."""
    rotary = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    model = make_model(
        "llama", make_tokenizer(), rope_parameters=rotary | ROTARY[kind], max_position_embeddings=64
    )
    models = [
        LocalLanguageModel(model, tokenizer=make_tokenizer(), context_length=length)
        for length in (64, 512)
    ]
    assert [each.drafts for each in models] == ["ragged", "snapshot"]
    assert caplog.text.count("computes all rows otherwise where one is longer than 64 tokens") == 1
    short = [[ask(Prefix(range(20, 40)), size=12)] for _ in range(2)]
    beside = ask(Prefix(range(20, 130)), size=12, seed=5)
    assert models[1].draw([*short[0], beside])[:1] == models[1].draw(short[1])
    with pytest.raises(ValueError, match="`drafts` cannot be ragged"):
        LocalLanguageModel(
            model, tokenizer=make_tokenizer(), drafts="ragged", context_length=512
        ).load()


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba"])
def test_the_contract_of_language_models_holds(
    family: str, load: Callable[..., LocalLanguageModel]
) -> None:
    check_language_model(load(family))


def test_rows_that_join_leave_and_wait_stay_exact(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load()
    plain = plainly(language_model)
    chance = random.Random(5)
    live: list[Prefix] = []
    for turn in range(25):
        while len(live) < 2 or (len(live) < 9 and chance.random() < 0.5):
            live.append(Prefix([chance.randrange(10, 300) for _ in range(chance.randrange(1, 40))]))
        asked = [prefix for prefix in live if chance.random() < 0.6] or live[:1]
        chance.shuffle(asked)
        requests = [
            ask(prefix, count=chance.choice([1, 1, 2, 4]), size=3, segment=turn, seed=len(prefix))
            for prefix in asked
        ]
        proposals = language_model.draw(requests)
        assert proposals == [plain.draw(request) for request in requests]
        for prefix, candidates in zip(asked, proposals, strict=True):
            if chance.random() < 0.7:
                prefix.token_ids += chance.choice(candidates).token_ids
        for prefix in [prefix for prefix in live if chance.random() < 0.25]:
            live.remove(prefix)
            if chance.random() < 0.5:  # else nobody says so, and it is noticed all the same
                language_model.release(prefix)


def test_lanes_draw_at_the_same_time_without_touching_each_other(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load()
    plain = plainly(language_model)
    lanes = [Session(3, [12, 7]), Session(4, [30, 5], lane="batch")]
    for turn in range(4):
        requests = [[lane.request(at, 1 + turn % 3) for at in range(2)] for lane in lanes]
        draftings = {at: language_model.drafting(of_lane) for at, of_lane in enumerate(requests)}
        proposals: dict[int, list[list[Candidate]]] = {}
        while draftings:
            for at, drafting in list(draftings.items()):
                try:
                    next(drafting)
                except StopIteration as stop:
                    proposals[at] = stop.value
                    del draftings[at]
        for at, lane in enumerate(lanes):
            assert proposals[at] == [plain.draw(request) for request in requests[at]]
            for row, candidates in enumerate(proposals[at]):
                lane.act(row, candidates)


def test_a_lane_has_one_round_at_a_time(load: Callable[..., LocalLanguageModel]) -> None:
    language_model = load()
    drafting = language_model.drafting([ask(Prefix([20, 21]))])
    next(drafting)
    with pytest.raises(RuntimeError, match="one at a time"):
        language_model.draw([ask(Prefix([22]))])
    drafting.close()
    assert len(language_model.draw([ask(Prefix([22]))])) == 1


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_drafting_may_be_closed_between_any_two_steps(
    family: str, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(family)
    plain = plainly(language_model)
    prefixes = [Prefix(range(20, 40)), Prefix(range(50, 57))]
    network = language_model._loaded().network
    network.chunk = 6
    for steps in range(12):
        requests = [ask(prefix, count=2, segment=steps) for prefix in prefixes]
        drafting = language_model.drafting(requests)
        for _ in range(steps):
            if next(drafting, None) is None:
                break
        drafting.close()
        if steps % 4 == 3:
            proposals = language_model.draw(requests)
            assert proposals == [plain.draw(request) for request in requests]
            for prefix, candidates in zip(prefixes, proposals, strict=True):
                prefix.token_ids += candidates[1].token_ids
        elif steps % 4 == 1:
            language_model.release(prefixes[1])


def test_a_prompt_fed_in_chunks_is_the_prompt_fed_at_once(
    load: Callable[..., LocalLanguageModel],
) -> None:
    for family in ("llama", "gemma3_text", "gpt2"):
        language_model = load(family)
        plain = plainly(language_model)
        language_model._loaded().network.chunk = 7
        prefixes = [Prefix(range(20, 20 + length)) for length in (25, 24, 7, 50, 15)]
        requests = [ask(prefix, count=2) for prefix in prefixes]
        assert language_model.draw(requests) == [plain.draw(request) for request in requests]
        assert language_model.counts.prompt == 25 + 24 + 7 + 50 + 15


def test_every_attention_draws_the_same(load: Callable[..., LocalLanguageModel]) -> None:
    requests = [ask(Prefix(range(20, 31)), count=3), ask(Prefix(range(40, 60)), count=1)]
    drawn = [
        load("qwen2", attention=attention).draw(requests)
        for attention in ("packed_sdpa", "sdpa", "eager")
        if attention != "packed_sdpa"
    ]
    assert drawn[0] == drawn[1] == load("qwen2").draw(requests)


def test_masks_hide_what_the_definition_hides() -> None:
    lengths, branches, steps = [3, 11, 0], 2, 7
    windows = {"full_attention": None, "sliding_attention": 4}
    limit = max(lengths) + branches * steps
    held = torch.ones(3, dtype=torch.long)
    tree = TreeMask(windows, held, branches, limit, dtype=torch.float32)
    tree.advance()
    held.copy_(torch.tensor(lengths))
    tree.begin()
    for step in range(steps):
        tree.advance()
        masks = tree.read(0, 3, limit)
        assert isinstance(masks, dict)
        for kind, window in windows.items():
            for row, length in enumerate(lengths):
                for branch in range(branches):
                    position = length + step
                    slots = dict(enumerate(range(length)))
                    slots |= {length + t * branches + branch: length + t for t in range(step + 1)}
                    seen = {
                        slot
                        for slot, at in slots.items()
                        if window is None or at > position - window
                    }
                    got = (masks[kind][row, 0, branch] == 0).nonzero().flatten().tolist()
                    assert set(got) == seen
    masks = causal_masks(windows, torch.tensor([2, 0]), 3, 6, dtype=torch.float32)
    assert isinstance(masks, dict)
    assert (masks["full_attention"][0, 0, 1] == 0).tolist() == [True] * 4 + [False] * 2
    assert (masks["sliding_attention"][0, 0, 2] == 0).tolist() == [False] + [True] * 4 + [False]


# Sampling


def test_warpers_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    settings = [
        *SAMPLINGS,
        Sampling(top_p=0.3),
        Sampling(top_p=0.999),
        Sampling(top_k=1),
        Sampling(temperature=0.3, top_k=300, top_p=0.5, min_p=0.02, repetition_penalty=2.0),
        Sampling(temperature=3.0, min_p=1.0),
    ]
    for vocab, spread in ((1000, 3.0), (1000, 0.1), (50, 2.0)):
        logits = spread * torch.randn(len(settings), 3, vocab)
        ids = torch.randint(0, vocab, (len(settings), 3, 12))
        seen = torch.zeros(logits.shape, dtype=torch.bool).scatter_(2, ids, True)
        for chosen in (settings, settings[:1], settings[5:7]):
            places = [settings.index(sampling) for sampling in chosen]
            sampler = Sampler(chosen, hidden=None, device=torch.device("cpu"))
            scores = sampler.warp(logits[places], seen[places])
            for row, at in enumerate(places):
                wanted = torch.stack(
                    [
                        warpers(chosen[row])(ids[at, b, None], logits[at, b, None])[0]
                        for b in range(3)
                    ]
                )
                torch.testing.assert_close(scores[row], wanted)


def test_sampling_has_the_law_of_the_warped_softmax() -> None:
    """Chi-square at a false-alarm chance of 1e-6; the seed is fixed, so it holds always or never."""
    torch.manual_seed(1)
    logits = torch.randn(1, 1, 40)
    sampler = Sampler(
        [Sampling(temperature=0.8, top_p=0.9)], hidden=None, device=torch.device("cpu")
    )
    scores = sampler.warp(logits)
    count = 20_000
    numbers = torch.tensor(
        [drafting_uniforms(1, seed=3, segment=0, attempt=at)[0] for at in range(count)],
        dtype=torch.float64,
    )
    picked = sampler.pick(scores, numbers[None])[0]
    wanted = scores[0, 0].double().softmax(-1)
    found = torch.bincount(picked, minlength=40)
    assert int(found[wanted == 0].sum()) == 0
    kept = wanted > 0
    chi_square = float(((found - count * wanted)[kept] ** 2 / (count * wanted)[kept]).sum())
    freedom = int(kept.sum()) - 1
    # Upper 1e-6 point by the cube-root normal approximation (Wilson and Hilferty).
    limit = freedom * (1 - 2 / (9 * freedom) + 4.7534 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < limit
    tilted = float(((found.roll(1) - count * wanted)[kept] ** 2 / (count * wanted)[kept]).sum())
    assert tilted > limit  # the test would notice another law


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    sampler = Sampler([Sampling()], hidden=None, device=torch.device("cpu"))
    scores = torch.full((1, 1, 9), -torch.inf)
    scores[0, 0, [2, 5]] = torch.tensor([1.0, -80.0])
    numbers = torch.tensor([[2.0**-53, 0.5, 1 - 2.0**-53, 1.0]], dtype=torch.float64)
    assert set(sampler.pick(scores, numbers)[0].tolist()) <= {2, 5}
    tiny = torch.zeros((1, 1, 9))
    assert sampler.pick(tiny, numbers)[0].tolist()[0] == 0
    assert sampler.pick(tiny, numbers)[0].tolist()[-1] == 8


def test_branches_share_what_they_share_and_are_penalised_for_their_own(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load()
    plain = plainly(language_model)
    sampling = Sampling(repetition_penalty=3.0)
    request = ask(Prefix(range(30, 45)), count=4, size=8, sampling=sampling)
    assert language_model.draw([request]) == [plain.draw(request)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_temperature_0_gives_the_tokens_of_generate(
    family: str, penalty: float, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(family)
    network = language_model._loaded().network
    model = AutoModelForCausalLM.from_pretrained(language_model.name)
    prompt = list(range(40, 57))
    wanted = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=penalty,
        suppress_tokens=network.hidden.nonzero().flatten().tolist(),
    )[0, len(prompt) :].tolist()
    prefix = Prefix(prompt)
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty)
    for segment in range(3):
        [[candidate]] = language_model.draw(
            [ask(prefix, size=8, segment=segment, sampling=sampling)]
        )
        prefix.token_ids += candidate.token_ids
        if candidate.finished:
            break
    ended = [token for token in wanted if not network.ends[token]]
    assert list(prefix.token_ids) == ended


def test_control_tokens_are_never_drafted_and_end_tokens_are_never_kept(
    load: Callable[..., LocalLanguageModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    language_model = load()
    control = set(tokenizer.all_special_ids)
    # So hot that every token is as likely as any other: control tokens would come often.
    hot = Sampling(temperature=1e4)
    prefixes = [Prefix([20 + at]) for at in range(8)]
    proposals = language_model.draw([ask(p, count=8, size=60, sampling=hot) for p in prefixes])
    drawn = [candidate for candidates in proposals for candidate in candidates]
    assert any(candidate.finished for candidate in drawn)
    assert not control & {token for candidate in drawn for token in candidate.token_ids}
    allowing = load(drafted_control_tokens=["<|tool_call|>"])
    proposals = allowing.draw([ask(p, count=8, size=60, sampling=hot) for p in prefixes])
    kept = {token for of_row in proposals for c in of_row for token in c.token_ids}
    assert kept & control == {tokenizer.convert_tokens_to_ids("<|tool_call|>")}


# What is computed


def test_token_forwards_are_exactly_those_of_the_rule(
    load: Callable[..., LocalLanguageModel],
) -> None:
    """With S segments of k tokens and A attempts in all: (S - 1) + (k - 1) * A, and no prompt twice."""
    language_model = load()
    size, attempts, segments = 4, 0, 0
    prefix = Prefix(range(20, 40))
    network = language_model._loaded().network
    network.ends.zero_()
    for count, keeps in ((1, True), (2, False), (3, True), (1, False), (1, True), (4, True)):
        [candidates] = language_model.draw(
            [ask(prefix, count=count, size=size, segment=segments, first_attempt=attempts + 1)]
        )
        attempts += count
        if keeps:
            prefix.token_ids += candidates[-1].token_ids
            segments += 1
    counts = language_model.counts
    assert counts.prompt == 20
    assert counts.accepted == segments - 1
    assert counts.drafted == (size - 1) * attempts
    assert counts.refed == counts.idle == counts.reused == 0


def test_prompts_are_forwarded_once_whatever_the_attempts(
    load: Callable[..., LocalLanguageModel],
) -> None:
    for family in ("llama", "mamba"):
        language_model = load(family)
        prefixes = [Prefix(range(20, 20 + length)) for length in (5, 30, 11)]
        for turn in range(6):
            proposals = language_model.draw(
                [ask(p, count=2, segment=turn // 2, first_attempt=1 + turn) for p in prefixes]
            )
            if turn % 2:
                for prefix, candidates in zip(prefixes, proposals, strict=True):
                    prefix.token_ids += candidates[0].token_ids
        assert language_model.counts.prompt == 46
        assert language_model.counts.refed == 0


def test_an_older_attempt_is_fed_again_and_counted(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load()
    language_model._loaded().network.ends.zero_()
    prefix = Prefix(range(20, 40))
    [[old]] = language_model.draw([ask(prefix)])
    language_model.draw([ask(prefix, first_attempt=2)])
    prefix.token_ids = old.token_ids
    language_model.draw([ask(prefix, segment=1)])
    assert (language_model.counts.refed, language_model.counts.accepted) == (3, 1)


@pytest.mark.parametrize("steps", ["eager", "static"])
def test_memory_does_not_grow_with_rounds(
    steps: str, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(shape={"num_hidden_layers": 1}, steps=steps)
    held: list[int] = []
    for turn in range(1000):
        prefixes = [Prefix(range(20, 30 + at)) for at in range(4)]
        language_model.draw([ask(prefix, count=2, size=3, seed=turn) for prefix in prefixes])
        held.append(language_model.num_bytes)
        if turn % 2:
            for prefix in prefixes:
                language_model.release(prefix)
            del prefix
        del prefixes
    assert len(set(held[4:])) == 1
    config = language_model._config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert held[-1] <= 1.1 * 4 * (256 + 2 * (3 if steps == "eager" else 8)) * per_token


def test_rooms_of_long_replies_are_not_kept_for_short_ones(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load()
    long = [Prefix([20 + at % 300 for at in range(400)]) for _ in range(6)]
    language_model.draw([ask(prefix) for prefix in long])
    large = language_model.num_bytes
    for prefix in long:
        language_model.release(prefix)
    language_model.draw([ask(Prefix([20, 21]))])
    assert language_model.num_bytes < large / 4


def test_replies_that_are_gone_leave_their_rows(load: Callable[..., LocalLanguageModel]) -> None:
    language_model = load()
    for turn in range(20):
        language_model.draw([ask(Prefix([20 + turn, 21]))])
    drafter = language_model._loaded()
    assert isinstance(drafter, RaggedDrafter)
    [pool] = drafter._pools.values()
    assert pool.cache is not None
    assert pool.cache.num_rows == 1


@pytest.mark.parametrize("failing_call", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_where_memory_ends_once_the_round_is_done_in_parts(
    family: str,
    failing_call: int,
    load: Callable[..., LocalLanguageModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    language_model = load(family)
    requests = [
        ask(Prefix(range(20, 32)), count=1, size=6, streamed=True),
        ask(Prefix(range(50, 70)), count=3, size=4),
        ask(Prefix(range(80, 95)), count=1, size=5),
    ]
    wanted = language_model.draw([replace(r, prefix=Prefix(r.prefix.prompt_ids)) for r in requests])
    model = language_model._loaded().network.model
    forward, calls = model.forward, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise torch.OutOfMemoryError("made by the test")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    streamed: list[int] = []
    drafting = language_model.drafting(requests)
    while True:
        try:
            tokens = next(drafting)
        except StopIteration as stop:
            proposals = stop.value
            break
        streamed += [token for token in tokens[:1] if token is not None]
    assert proposals == wanted
    assert streamed == list(wanted[0][0].token_ids)
    assert language_model.counts.out_of_memory == 1
    assert language_model.max_candidates == 1
    assert language_model.draw(requests) == wanted


def test_where_one_candidate_a_row_is_too_much_the_rows_are_split(
    load: Callable[..., LocalLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = load()
    requests = [ask(Prefix(range(20, 30 + at)), count=2) for at in range(5)]
    wanted = language_model.draw([replace(r, prefix=Prefix(r.prefix.prompt_ids)) for r in requests])
    model = language_model._loaded().network.model
    forward = model.forward

    def small(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > 2:
            raise MemoryError
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    assert language_model.draw(requests) == wanted
    monkeypatch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        language_model.draw([ask(Prefix([30, 31]))])
    monkeypatch.setattr(model, "forward", forward)
    assert language_model.draw(requests) == wanted


def test_other_errors_of_the_model_are_passed_on_and_leave_it_usable(
    load: Callable[..., LocalLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = load()
    request = ask(Prefix(range(20, 30)), count=2)
    wanted = language_model.draw([replace(request, prefix=Prefix(range(20, 30)))])
    model = language_model._loaded().network.model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("odd")))
    with pytest.raises(RuntimeError, match="odd"):
        language_model.draw([request])
    monkeypatch.setattr(model, "forward", forward)
    assert language_model.draw([request]) == wanted


def test_streamed_tokens_are_those_of_the_first_candidate(
    load: Callable[..., LocalLanguageModel],
) -> None:
    for family in ("llama", "mamba"):
        language_model = load(family)
        requests = [
            ask(Prefix(range(20, 30)), count=1, size=9, streamed=True),
            ask(Prefix(range(40, 45)), count=2, size=4),
            ask(Prefix(range(60, 67)), count=1, size=6, streamed=True),
        ]
        streamed: list[list[int]] = [[], [], []]
        drafting = language_model.drafting(requests)
        steps = 0
        while True:
            try:
                tokens = next(drafting)
            except StopIteration as stop:
                proposals = stop.value
                break
            assert len(tokens) in (0, 3)
            steps += 1
            for at, token in enumerate(tokens):
                if token is not None:
                    streamed[at].append(token)
        assert streamed[0] == list(proposals[0][0].token_ids)
        assert streamed[1] == []
        assert streamed[2] == list(proposals[2][0].token_ids)
        assert steps >= 9


def test_a_round_ends_when_all_its_candidates_have(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load()
    network = language_model._loaded().network
    network.ends.fill_(True)
    [[one, other]] = language_model.draw([ask(Prefix([20, 21, 22]), count=2, size=50)])
    assert one.finished
    assert other.token_ids == ()
    assert language_model.counts.forwards == 1


def test_replies_end_where_the_context_does(load: Callable[..., LocalLanguageModel]) -> None:
    language_model = load("gpt2", context_length=20)
    language_model._loaded().network.ends.zero_()
    long, short = Prefix(range(30, 48)), Prefix(range(30, 33))
    proposals = language_model.draw([ask(long, size=5, count=2), ask(short, size=5)])
    assert [len(c.token_ids) for of_row in proposals for c in of_row] == [2, 2, 5]
    with pytest.raises(ValueError, match="leaves no room"):
        language_model.draw([ask(Prefix(range(30, 50)))])
    with pytest.raises(ValueError, match="at least one token"):
        language_model.draw([ask(Prefix([]))])


def test_a_prefix_is_asked_for_once_a_round(load: Callable[..., LocalLanguageModel]) -> None:
    prefix = Prefix([20, 21])
    with pytest.raises(ValueError, match="one prefix twice"):
        load().draw([ask(prefix), ask(prefix, first_attempt=2)])


def test_the_time_of_a_round_is_measured_and_kept(load: Callable[..., LocalLanguageModel]) -> None:
    language_model = load()
    assert 0 < language_model.round_seconds(1, 1, 4) < 1
    table = language_model._weights().seconds["ragged", "eager"]
    table.clear()
    table.update({1: 1.0, 2: 3.0, 4: 3.0, 8: 5.0})
    assert language_model.round_seconds(1, 1, 4) == 4.0
    assert language_model.round_seconds(1, 4, 4) == 1.0 + 3 * 3.0
    assert language_model.round_seconds(2, 3, 2) == 3.0 + 4.0
    assert language_model.round_seconds(8, 2, 2) == 5.0 + 9.0


# Prompts shared by requests


def test_a_prompt_that_begins_like_another_of_its_partition_is_not_forwarded_again(
    load: Callable[..., LocalLanguageModel],
) -> None:
    for family in ("llama", "gemma3_text"):
        language_model = load(family)
        plain = plainly(language_model)
        system = list(range(20, 50))

        def turn(
            *ids: int, partition: str = "one", model: LocalLanguageModel = language_model
        ) -> tuple[Prefix, list[Candidate], int]:
            before = model.counts.reused
            prefix = Prefix([*range(20, 50), *ids], partition=partition)
            [candidates] = model.draw([ask(prefix, count=2)])
            return prefix, candidates, model.counts.reused - before

        assert turn(60, 61)[2] == 0
        prefix, candidates, reused = turn(70, 71, 72)
        assert reused == len(system)
        assert candidates == plain.draw(ask(prefix, count=2))
        assert turn(60, 61)[2] == len(system) + 1  # all but the last, which is fed
        assert turn(60, 61, partition="other")[2] == 0
        assert turn(60, 61, partition="")[2] == 0
        # The thread goes on: what was kept of the reply is known too.
        prefix.token_ids += candidates[1].token_ids
        language_model.draw([ask(prefix, segment=1)])
        language_model.release(prefix)
        longer, candidates, reused = turn(70, 71, 72, *prefix.token_ids, 80, 81)
        assert reused == len(prefix)
        assert candidates == plain.draw(ask(longer, count=2))
        # And it is no prompt's fault if somebody else's row lies at the same place.
        other = Prefix(range(90, 130), partition="one")
        assert language_model.draw([ask(other)]) == [plain.draw(ask(other))]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_long_prompt_that_is_partly_known_is_fed_beside_one_that_is_not(
    family: str, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(family)
    plain = plainly(language_model)
    numbers = random.Random(2)
    long, other = ([numbers.randrange(20, 300) for _ in range(size)] for size in (255, 137))
    known = Prefix(long[:140], partition="one")
    language_model.draw([ask(known)])
    language_model.release(known)
    requests = [ask(Prefix(long, partition="one")), ask(Prefix(other))]
    assert language_model.draw(requests) == [plain.draw(request) for request in requests]
    assert language_model.counts.reused == 140


def test_without_a_store_every_prompt_is_forwarded(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load(prompt_bytes=0)
    for _ in range(2):
        language_model.draw([ask(Prefix(range(20, 60), partition="one"))])
    assert (language_model.counts.prompt, language_model.counts.reused) == (80, 0)
    with pytest.raises(ValueError, match="`prompt_bytes` must be"):
        load(prompt_bytes=-1)


def test_the_store_is_bounded_and_drops_what_was_not_used_for_longest() -> None:
    def states(count: int) -> list[torch.Tensor]:
        return [torch.zeros(count)]  # 4 bytes a token

    store = PromptStore(4 * 100)
    prompts = {name: [at * 1000 + n for n in range(30)] for at, name in enumerate("abcd")}
    for name in "abc":
        store.put("p", prompts[name], states(30))
    assert store.find("p", prompts["a"])[0] == 30
    store.put("p", prompts["d"], states(30))
    assert [store.find("p", prompts[name])[0] for name in "abcd"] == [30, 0, 30, 30]
    assert store.num_bytes == 4 * 90
    # A longer one takes the place of what it continues; one too large is left out.
    store.put("p", [*prompts["a"], 1, 2], states(32))
    assert store.num_bytes == 4 * 92
    store.put("p", range(101), states(101))
    assert store.num_bytes == 4 * 92
    assert store.find("q", prompts["a"]) == (0, [])
    assert store.find("p", prompts["a"][:15])[0] == 0  # too few to be worth it
    store.clear()
    assert (store.num_bytes, store.find("p", prompts["a"])[0]) == (0, 0)


def test_stored_prompts_are_given_up_before_anything_is_split(
    load: Callable[..., LocalLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = load()
    request = ask(Prefix(range(20, 60), partition="one"), count=2)
    wanted = language_model.draw([request])
    model = language_model._loaded().network.model
    forward, failures = model.forward, [MemoryError()]

    def failing(**arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return forward(**arguments)

    monkeypatch.setattr(model, "forward", failing)
    assert language_model.draw([request]) == wanted
    assert language_model.counts.out_of_memory == 1
    assert language_model.max_candidates == 16
    drafter = language_model._loaded()
    assert isinstance(drafter, RaggedDrafter)
    assert drafter.prompts.num_bytes == 0


def test_a_prompt_that_finds_no_memory_is_not_stored_and_its_row_is_freed(
    load: Callable[..., LocalLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = load()
    prefix = Prefix(range(20, 60), partition="one")
    wanted = language_model.draw([ask(Prefix(range(20, 60)))])

    def take(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("made by the test")

    with monkeypatch.context() as patched:
        patched.setattr(RaggedCache, "take", take)
        assert language_model.draw([ask(prefix)]) == wanted
        assert language_model.counts.out_of_memory == 1
        language_model.release(prefix)
        assert language_model.counts.out_of_memory == 2
    drafter = language_model._loaded()
    assert isinstance(drafter, RaggedDrafter)
    [pool] = drafter._pools.values()
    assert not any(row is not None and row.prefix() is prefix for row in pool._rows)
    assert drafter.prompts.num_bytes == 0
    assert language_model.draw([ask(Prefix(range(20, 60), partition="one"))]) == wanted
    assert drafter.prompts.num_bytes > 0


# Logits that are not finite


@pytest.mark.parametrize("odd", ["nan", "inf", "cut"])
def test_where_scores_are_not_finite_no_token_is_picked_and_others_are(odd: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for samplings in (SAMPLINGS[:3], SAMPLINGS[3:4] * 3, SAMPLINGS[2:]):
        sampler = Sampler(samplings, hidden=None, device=torch.device("cpu"))
        seen = torch.zeros((3, 1, 40), dtype=torch.bool) if sampler.remembers else None
        logits = torch.randn((3, 2, 40), generator=generator)
        numbers = torch.rand((3, 2), generator=generator, dtype=torch.float64)
        wanted = sampler.pick(sampler.warp(logits, seen), numbers)
        assert wanted.min() >= 0
        if odd == "cut":
            logits[1, 0] = -torch.inf
        else:
            logits[1, 0, 7] = float(odd)
        wanted[1, 0] = -1
        assert torch.equal(sampler.pick(sampler.warp(logits, seen), numbers), wanted)
        wanted[:, 1] = sampler.pick(sampler.warp(logits[:, :1], seen), numbers)[:, 1]
        assert wanted[:, 1].tolist()[1] == -1
        assert (wanted[[0, 2], 1] >= 0).all()


@pytest.mark.parametrize("drafts", ["ragged", "snapshot", "recompute"])
def test_a_reply_without_finite_logits_fails_alone_and_leaves_nothing_behind(
    drafts: str, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(drafts=drafts)
    plain = plainly(language_model)
    network = language_model._loaded().network
    odd = int(network.hidden.nonzero()[-1])  # never drafted
    embedding = network.model.get_input_embeddings().weight[odd]
    healthy = embedding.clone()
    lost = [Candidate(attempt=at, token_ids=(), finished=False) for at in (1, 2)]
    assert [candidate.num_drawn for candidate in lost] == [0, 0]
    for at, sampling in enumerate(SAMPLINGS):
        embedding.fill_(torch.nan)
        long = [20, 21, odd, *range(22, 40)]
        failing = Prefix(long, partition=str(at))
        requests = [
            ask(prefix, count=2, sampling=sampling, streamed=prefix is failing)
            for prefix in (Prefix(range(50, 60)), failing, Prefix(range(70, 95)))
        ]
        for _ in range(2):
            proposals = language_model.draw(requests)
            assert proposals == [plain.draw(requests[0]), lost, plain.draw(requests[2])]
        drafting = language_model.drafting([ask(failing, count=2, size=9)])
        for _ in range(3):
            next(drafting, None)
        drafting.close()
        # Its row is another's, and its prompt is nobody's.
        language_model.release(failing)
        after = ask(Prefix(range(100, 103)), count=3, size=8, sampling=sampling)
        assert language_model.draw([after]) == [plain.draw(after)]
        embedding.copy_(healthy)
        same = ask(Prefix(long, partition=str(at)), count=2, sampling=sampling)
        assert language_model.draw([same]) == [plain.draw(same)]


@pytest.mark.parametrize("steps", ["eager", "static"])
def test_a_prompt_without_finite_states_leaves_nothing_where_its_round_is_closed(
    steps: str, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(steps=steps)
    plain = plainly(language_model)
    network = language_model._loaded().network
    network.chunk = 6
    odd = int(network.hidden.nonzero()[-1])  # never drafted
    embedding = network.model.get_input_embeddings().weight[odd]
    healthy = embedding.clone()
    for fed in (2, 3, 5):
        failing = Prefix([20, 21, odd, *range(22, 60)], partition=str(fed))
        beside = Prefix(range(70, 72))
        embedding.fill_(torch.nan)
        drafting = language_model.drafting([ask(failing, count=2), ask(beside, count=2)])
        for _ in range(fed):
            next(drafting)
        drafting.close()
        embedding.copy_(healthy)
        language_model.release(failing)
        # Its row is another's, and its prompt is nobody's.
        requests = [
            ask(Prefix(range(100, 103)), count=3, size=8),
            ask(beside, count=2),
            ask(Prefix([20, 21, odd, *range(22, 60)], partition=str(fed))),
        ]
        assert language_model.draw(requests) == [plain.draw(request) for request in requests]
        for request in requests:
            language_model.release(request.prefix)


@pytest.mark.parametrize("drafts", ["ragged", "snapshot", "recompute"])
def test_a_candidate_without_finite_logits_leaves_the_reply_as_it_was(
    drafts: str, load: Callable[..., LocalLanguageModel]
) -> None:
    language_model = load(drafts=drafts)
    plain = plainly(language_model)
    request = ask(Prefix(range(20, 40)), count=2, size=6)
    one, other = plain.draw(request)
    odd = next(token for token in other.token_ids[:-1] if token not in one.token_ids)
    assert odd not in request.prefix.prompt_ids
    network = language_model._loaded().network
    network.model.get_input_embeddings().weight[odd] = torch.nan
    [drawn] = language_model.draw([request])
    assert drawn[1] == Candidate(attempt=2, token_ids=(), finished=False)
    assert drawn[0] in (one, replace(drawn[1], attempt=1))
    if drafts != "ragged":  # whose branches lie in one row
        assert drawn[0] == one
    assert language_model.draw([replace(request, count=1)]) == [[one]]


# Forking


def _child(connection: Any, language_model: LocalLanguageModel, request: Request) -> None:
    drafted = language_model.draw([request])
    language_model._given_tokenizer = language_model.__dict__.pop("tokenizer")
    connection.send((drafted, language_model.encode_text("Hello"), language_model.drafts))
    connection.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_in_a_round_with_locks_held_draws_and_encodes(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load()
    wanted = language_model.draw([ask(Prefix(range(20, 30)), count=2)])
    encoded = language_model.encode_text("Hello")
    under_way = language_model.drafting([ask(Prefix(range(40, 60)))])
    next(under_way)
    locks = [language_model._tokenizer_lock, language_model._weights().lock]
    locks += [lock for lock in [getattr(LocalLanguageModel.tokenizer, "lock", None)] if lock]
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            forked.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(10)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    request = ask(Prefix(range(20, 30)), count=2)
    process = context.Process(target=_child, args=(theirs, language_model, request))
    process.start()
    forked.set()
    answered = ours.poll(20)
    if not answered:
        process.kill()
    other.join(10)
    process.join(10)
    assert answered
    assert ours.recv() == (wanted, encoded, "ragged")
    assert process.exitcode == 0
    under_way.close()
    assert language_model.draw([request]) == wanted  # the parent's work is as it was


# Loading


def test_one_name_is_one_language_model_and_other_settings_are_another(
    make_folder: FolderMaker,
) -> None:
    folder = make_folder("llama")
    one = load_language_model(str(folder), device="cpu")
    assert load_language_model(str(folder), device="cpu") is one
    assert load_language_model(one) is one
    other = load_language_model(str(folder), device="cpu", context_length=100)
    assert other is not one
    one.load()
    other.load()
    assert isinstance(one, LocalLanguageModel)
    assert isinstance(other, LocalLanguageModel)
    assert one._loaded().network.model is other._loaded().network.model
    assert one.fingerprint != other.fingerprint
    model = one._loaded().network.model
    request = ask(Prefix(range(20, 30)))
    wanted = one.draw([request])
    one.unload()
    assert one.draw([request]) == other.draw([request]) == wanted
    assert one._loaded().network.model is not model
    one.unload()


def test_one_device_has_one_name(
    make_folder: FolderMaker,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert device_name("cpu:0") == device_name(torch.device("cpu", 0)) == "cpu"
    assert device_name("mps:0") == "mps"
    model = AutoModelForCausalLM.from_pretrained(make_folder("llama"), dtype="bfloat16")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one = load_language_model(str(tmp_path), device="cpu")
    assert load_language_model(str(tmp_path), device="cpu:0") is one
    other = LocalLanguageModel(tmp_path, device="cpu:0")
    assert isinstance(one, LocalLanguageModel)
    assert other.device == "cpu"
    assert other._dtype == torch.float32
    assert other._loaded().network.model is one._loaded().network.model
    one.unload()
    with pytest.raises(ValueError, match="`device` must name a device of torch, got tpu9"):
        LocalLanguageModel(tmp_path, device="tpu9")
    # A machine with GPUs, of which nothing has been used yet; then one has been chosen.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_name(name) for name in (None, "cuda", "cuda:1")] == ["cuda:0"] * 2 + ["cuda:1"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_name("cuda") == "cuda:3"


def test_a_loaded_model_is_used_as_it_is(
    make_folder: FolderMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = make_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = LocalLanguageModel(model, tokenizer=tokenizer)
    read = LocalLanguageModel(folder, device="cpu")
    request = ask(Prefix(range(20, 30)), count=2)
    assert given.draw([request]) == read.draw([request])
    assert given.device == "cpu"
    own = given._loaded().network.model
    weights = [each.model.embed_tokens.weight.data_ptr() for each in (own, model)]
    assert weights[0] == weights[1]
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="`tokenizer` must be given"):
        LocalLanguageModel(model)
    read.unload()


def test_a_model_that_is_gone_leaves_nothing_to_one_at_its_address(
    make_folder: FolderMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    gc.collect()
    before = len(_REGISTRY)
    for _ in range(3):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(make_folder("llama"), num_hidden_layers=1)
        )
        language_model = LocalLanguageModel(model, tokenizer=tokenizer)
        own = language_model._loaded().network.model
        weights = [each.model.embed_tokens.weight.data_ptr() for each in (own, model)]
        assert weights[0] == weights[1]
        sharing = LocalLanguageModel(model, tokenizer=tokenizer)
        assert sharing._loaded().network.model is own
        assert len(_REGISTRY) == before + 1
        gone = weakref.ref(own)
        del language_model, sharing, own, model
        gc.collect()
        assert gone() is None
        assert len(_REGISTRY) == before


def test_what_is_unloaded_while_it_is_loaded_is_unloaded(
    make_folder: FolderMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = LocalLanguageModel(make_folder("llama"), device="cpu")
    other = LocalLanguageModel(make_folder("llama"), device="cpu")
    load, begun, going_on = language_model._load, threading.Event(), threading.Event()

    def slowly() -> Any:
        begun.set()
        assert going_on.wait(30)
        return load()

    monkeypatch.setattr(language_model, "_load", slowly)
    loading = threading.Thread(target=language_model.load)
    loading.start()
    assert begun.wait(30)
    unloading = threading.Thread(target=other.unload)
    unloading.start()
    unloading.join(0.2)
    going_on.set()
    loading.join(30)
    unloading.join(30)
    assert language_model._drafter is None
    assert language_model._source not in _REGISTRY
    language_model.load()
    assert other._loaded().network.model is language_model._loaded().network.model
    other.unload()
    assert language_model._drafter is None


def test_a_given_model_may_be_cast_or_moved_later() -> None:
    """What has been recorded on a GPU reads the weights where they were."""
    tokenizer = make_tokenizer()
    model = make_model("llama", tokenizer, tie_word_embeddings=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    language_model = LocalLanguageModel(model, tokenizer=tokenizer, pack_weights=False)
    request = ask(Prefix(range(20, 40)))
    before = language_model.draw([request])
    ours = language_model._loaded().network.model
    assert ours.model.layers[0].mlp.up_proj.weight.data_ptr() == weight.data_ptr()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    model.to(torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert weight.requires_grad
    assert language_model.draw([request]) == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_weights_draw_the_same_and_leave_a_given_model_as_it_was(
    family: str,
    make_folder: FolderMaker,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("langchain_stars.packing._LEAST_WEIGHTS", 1)
    folder = make_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    kinds = {type(module) for module in model.modules()}
    packed = LocalLanguageModel(model, tokenizer=tokenizer)
    plain = LocalLanguageModel(folder, device="cpu", pack_weights=False)
    session = Session(6, [21, 4, 13])
    for _ in range(3):
        requests = [session.request(at, 1 + at) for at in range(3)]
        proposals = packed.draw(requests)
        assert proposals == plain.draw(requests)
        for at in range(3):
            session.act(at, proposals[at])
    own = packed._loaded().network.model
    layers = [module for module in own.modules() if isinstance(module, PackedLinear)]
    assert len(layers) >= 8
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert {type(module) for module in model.modules()} == kinds
    head = own.get_output_embeddings()
    assert isinstance(head, PackedLinear)
    torch.testing.assert_close(head.weight, model.get_output_embeddings().weight)
    plain.unload()


def test_small_layers_and_shorter_types_are_not_packed(make_folder: FolderMaker) -> None:
    small = LocalLanguageModel(make_folder("llama"), device="cpu")
    modules = small._loaded().network.model.modules()
    assert not any(isinstance(module, PackedLinear) for module in modules)
    shorter = AutoModelForCausalLM.from_pretrained(make_folder("llama"), dtype=torch.bfloat16)
    assert not can_pack(shorter)
    small.unload()


def test_fingerprints_tell_models_apart(
    make_folder: FolderMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    def fingerprint(**settings: Any) -> str:
        folder = make_folder("llama", **settings.pop("shape", {}))
        return LocalLanguageModel(folder, device="cpu", **settings).fingerprint

    different = {
        fingerprint(),
        fingerprint(shape={"seed": 9}),
        fingerprint(dtype="bfloat16"),
        fingerprint(drafted_control_tokens=["<|tool|>"]),
        fingerprint(chat_template=FALLBACK_TEMPLATE),
        fingerprint(context_length=100),
    }
    assert len(different) == 6
    assert fingerprint() == fingerprint(device_map=None)
    assert fingerprint() == fingerprint(context_length=512)  # which is the model's own
    model = AutoModelForCausalLM.from_pretrained(make_folder("llama"))
    given = [LocalLanguageModel(model, tokenizer=tokenizer).fingerprint for _ in range(2)]
    model.generation_config.temperature = 0.1
    given.append(LocalLanguageModel(model, tokenizer=tokenizer).fingerprint)
    assert given[0] == given[1] != given[2]


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.model", "generation_config.json"]
)
def test_a_change_in_any_file_of_a_checkpoint_changes_its_fingerprint(
    name: str, make_folder: FolderMaker, tmp_path: Path
) -> None:
    for file in make_folder("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = digest_of(tmp_path)
    fingerprint = LocalLanguageModel(tmp_path, device="cpu").fingerprint
    content = (tmp_path / name).read_bytes() if (tmp_path / name).is_file() else b""
    (tmp_path / name).write_bytes(content + b"\n")
    assert digest_of(tmp_path) != before
    assert LocalLanguageModel(tmp_path, device="cpu").fingerprint != fingerprint
    (tmp_path / "notes.md").write_text("nothing of the checkpoint")
    (tmp_path / name).write_bytes(content)
    if not content:
        (tmp_path / name).unlink()
    assert LocalLanguageModel(tmp_path, device="cpu").fingerprint == fingerprint


def test_a_change_in_the_middle_of_large_weights_changes_the_fingerprint(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    for file in make_folder("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = digest_of(tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert digest_of(tmp_path) != before


def test_loading_shows_no_progress_bar_and_leaves_those_of_others(
    make_folder: FolderMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder("llama")
    enable_progress_bar()
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        assert "Loading weights" in capfd.readouterr().err
        language_model = LocalLanguageModel(folder, device="cpu")
        language_model.load()
        assert capfd.readouterr().err == ""
        assert is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
        language_model.unload()
    finally:
        disable_progress_bar()
    with quietly():
        assert not is_progress_bar_enabled()
    assert not is_progress_bar_enabled()
    assert are_progress_bars_disabled()


def test_weights_in_bin_files_are_refused(make_folder: FolderMaker, tmp_path: Path) -> None:
    folder = make_folder("llama")
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    language_model = LocalLanguageModel(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"safetensors files, got only \*\.bin files") as raised:
        language_model.load()
    assert "save_pretrained" in str(raised.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no_such_folder", "a/b/c", ""])
def test_a_name_that_names_nothing_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="`model` must be a hub id"):
        LocalLanguageModel(name)


def test_what_cannot_be_read_is_said_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds config\.json"):
        LocalLanguageModel(tmp_path)
    with pytest.raises(ValueError, match=r"could not be read: nobody/nothing.*hub"):
        LocalLanguageModel("nobody/nothing", device="cpu").load()


@pytest.mark.parametrize(
    "settings", [{"dtype": "float99"}, {"drafts": "magic"}, {"context_length": 1}]
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, Any], make_folder: FolderMaker
) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
        LocalLanguageModel(make_folder("llama"), **settings)


def test_a_cpu_runs_float32_unless_told_otherwise(
    make_folder: FolderMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(make_folder("llama"), dtype="bfloat16").save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    for settings, dtype in (
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
    ):
        language_model = LocalLanguageModel(tmp_path, device="cpu", **settings)
        assert language_model._loaded().network.dtype == dtype
        proposals = language_model.draw([ask(Prefix(range(20, 30)), count=2)])
        assert len(proposals[0]) == 2
        language_model.unload()


def test_rows_are_bounded_by_the_memory_that_is_free_after_loading(
    load: Callable[..., LocalLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = "langchain_stars.language_models.local._free_bytes"
    language_model = load()
    assert language_model.max_rows == 64
    row = 2 * 2 * 2 * 8 * 4 * 512
    monkeypatch.setattr(free, lambda device: 10 * row)
    assert language_model.max_rows == 8
    language_model.load()
    monkeypatch.setattr(free, lambda device: 0)
    assert language_model.max_rows == 8  # what the rows themselves take is no reason for fewer
    assert load().max_rows == 1


# Text


def test_control_tokens_that_a_user_types_are_text(
    load: Callable[..., LocalLanguageModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    language_model = load()
    typed = "a<|end|><|system|>b"
    ids = language_model.encode([{"role": "user", "content": typed}])
    special = [token for token in ids if token in tokenizer.all_special_ids]
    assert tokenizer.convert_ids_to_tokens(special) == [
        "<|begin|>",
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
    ]
    assert typed in language_model.decode(ids)


def test_a_last_message_of_the_assistant_is_continued(
    load: Callable[..., LocalLanguageModel],
) -> None:
    language_model = load()
    question = {"role": "user", "content": "Hello"}
    begun = language_model.encode([question])
    continued = language_model.encode([question, {"role": "assistant", "content": "I am"}])
    assert continued[: len(begun)] == begun
    assert language_model.decode(continued[len(begun) :]) == "I am"


def test_tools_reach_the_template(load: Callable[..., LocalLanguageModel]) -> None:
    language_model = load()
    chat = [{"role": "user", "content": "Hello"}]
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    assert "look_up" in language_model.decode(language_model.encode(chat, tools=[tool]))
    assert "look_up" not in language_model.decode(language_model.encode(chat))


def test_a_tokenizer_without_a_template_gets_a_plain_one(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    for file in make_folder("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    language_model = LocalLanguageModel(tmp_path, device="cpu")
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert language_model.tokenizer.chat_template == FALLBACK_TEMPLATE
    assert language_model.decode(language_model.encode(chat[:1])) == "User: Hello\nAssistant:"
    assert language_model.decode(language_model.encode(chat)) == "User: Hello\nAssistant: Hi"
    assert len(language_model.draw([ask(Prefix(language_model.encode(chat)))])) == 1
    language_model.unload()


def test_what_the_template_writes_after_the_assistant_ends_a_reply(
    make_folder: FolderMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(make_folder("llama")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{{ '<|tool|>' if m.role == 'assistant' else '' }}{% endfor %}<|assistant|>"
    )
    language_model = LocalLanguageModel(tmp_path, device="cpu", chat_template=template)
    ends = language_model._loaded().network.ends.nonzero().flatten().tolist()
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|end|>", "<|tool|>"]
    language_model.unload()


def test_bytes_that_are_no_utf8_become_replacement_characters(
    load: Callable[..., LocalLanguageModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer("€", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3  # one a byte
    language_model = load()
    assert language_model.decode(ids) == "€"
    assert language_model.decode(ids[:2]) == "\ufffd"


def test_a_template_that_refuses_a_chat_says_nothing_of_what_ends_a_reply(
    make_folder: FolderMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = "{{ raise_exception('only tools') if messages | length > 1 else 'x' }}"
    language_model = LocalLanguageModel(make_folder("llama"), device="cpu", chat_template=template)
    ends = language_model._loaded().network.ends.nonzero().flatten().tolist()
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|end|>"]
    language_model.unload()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba"])
def test_the_contract_holds_on_every_device(family: str, device: Any, make_folder: Any) -> None:
    language_model = LocalLanguageModel(make_folder(family), device=str(device), dtype="float32")
    check_language_model(language_model)
    language_model.unload()
