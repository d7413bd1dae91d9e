"""Steps whose shapes stay draw what eager steps draw: as they are, replayed, compiled."""

import contextlib
import inspect
import itertools
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLINGS
from torch.utils._python_dispatch import TorchDispatchMode

from langchain_stars.language_models import (
    Candidate,
    LocalLanguageModel,
    Prefix,
    Request,
    Sampling,
)
from langchain_stars.language_models import drafters as drafters_module
from langchain_stars.language_models.drafters import RaggedDrafter
from langchain_stars.language_models.sampling import Sampler
from langchain_stars.language_models.steps import CudaRecorder, Listener, Recording, Runner
from langchain_stars.packing import free_cached
from langchain_stars.ragged_cache import packed_sdpa

FolderMaker = Callable[..., Path]
Loader = Callable[..., LocalLanguageModel]
# What makes the host wait for the device, or brings it something that only the host knows.
ASKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "lift_fresh"}


class Tape(TorchDispatchMode):
    """Writes down every operation on tensors, so that it can be done again on the same ones.

    As with a CUDA graph, nothing of what was recorded has been done when recording ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func.overloadpacket.__name__ not in ASKS, f"{func} waits or tells"
        for value, argument in zip(args, func._schema.arguments, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and id(value) not in self._before:
                self._before[id(value)] = value, value.clone()
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Give every tensor that was there before what it held then."""
        for tensor, held in reversed(self._before.values()):
            tensor.copy_(held)

    def replay(self) -> None:
        """Do all operations again, on the same tensors and with the same numbers of the host."""
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


class TapeRecorder:
    """Records on tapes what a GPU would record as graphs."""

    def __init__(self) -> None:
        self.warmed = self.recorded = self.replayed = 0
        self.failing: Exception | None = None

    def warm(self, work: Callable[[], None]) -> None:
        self.warmed += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.failing is not None:
            raise self.failing
        tape = Tape()
        try:
            with tape:
                work()
        finally:
            tape.undo()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay


@pytest.fixture
def load(make_folder: FolderMaker) -> Iterator[Loader]:
    """Loads a language model of its own, and frees it after the test."""
    made: list[LocalLanguageModel] = []

    def load(family: str = "llama", steps: Any = "static", **settings: Any) -> LocalLanguageModel:
        folder = make_folder(family, **settings.pop("shape", {}))
        recorder = settings.pop("recorder", None)
        made.append(LocalLanguageModel(folder, device="cpu", steps=steps, **settings))
        if recorder is not None:
            drafter_of(made[-1])._runner = Runner("recorded", recorder=recorder)
        return made[-1]

    yield load
    for language_model in made:
        language_model.unload()


def drafter_of(language_model: LocalLanguageModel) -> RaggedDrafter:
    drafter = language_model._loaded()
    assert isinstance(drafter, RaggedDrafter)
    return drafter


class Replies:
    """Some replies, told to several language models at once; each must draw the same."""

    def __init__(self, seed: int, lengths: Sequence[int], models: Sequence[Any]) -> None:
        self.chance = random.Random(seed)
        self.models = list(models)
        self.prefixes = [
            [Prefix(ids) for _ in models]
            for ids in ([self.chance.randrange(10, 300) for _ in range(n)] for n in lengths)
        ]
        self.segments = [0] * len(lengths)
        self.attempts = [1] * len(lengths)

    def requests(self, rows: Sequence[int], counts: Sequence[int], size: int) -> list[Any]:
        return [
            [
                Request(
                    prefix=self.prefixes[row][at],
                    seed=100 + row,
                    segment=self.segments[row],
                    first_attempt=self.attempts[row],
                    count=count,
                    size=size,
                    sampling=SAMPLINGS[row % len(SAMPLINGS)],
                )
                for row, count in zip(rows, counts, strict=True)
            ]
            for at in range(len(self.models))
        ]

    def draw(self, rows: Sequence[int], counts: Sequence[int], size: int) -> list[list[Candidate]]:
        """Draw, and keep one of every row's candidates, or none, or take some tokens back."""
        requests = self.requests(rows, counts, size)
        drawn = [
            model.draw(of_model) for model, of_model in zip(self.models, requests, strict=True)
        ]
        for other in drawn[1:]:
            assert other == drawn[0]
        for row, candidates in zip(rows, drawn[0], strict=True):
            deed = self.chance.choice(["keep", "keep", "reject", "part", "back"])
            if deed == "reject":
                self.attempts[row] += len(candidates)
                continue
            ids = self.prefixes[row][0].token_ids
            if deed == "back":
                ids = ids[: self.chance.randrange(len(ids) + 1)]
            else:
                added = self.chance.choice(candidates).token_ids
                ids += added[: self.chance.randrange(len(added) + 1)] if deed == "part" else added
            for prefix in self.prefixes[row]:
                prefix.token_ids = ids
            self.segments[row] += 1
            self.attempts[row] = 1
        return drawn[0]

    def play(self, rounds: int, *, size: int = 5) -> None:
        for _ in range(rounds):
            rows = [row for row in range(len(self.prefixes)) if self.chance.random() < 0.7] or [0]
            self.chance.shuffle(rows)
            self.draw(rows, [self.chance.choice([1, 1, 2, 3, 5]) for _ in rows], size)


# The same as eager steps


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3", "gpt2", "opt"])
def test_static_steps_draw_what_eager_ones_draw(family: str, load: Loader) -> None:
    models = load(family, "eager"), load(family)
    replies = Replies(1, [20, 1, 33, 14, 7, 20], models)
    replies.play(20)
    assert [model.steps for model in models] == ["eager", "static"]
    assert models[0].counts.drafted == models[1].counts.drafted
    assert models[0].counts.prompt == models[1].counts.prompt == sum([20, 1, 33, 14, 7, 20])


def test_rows_may_grow_beyond_what_was_made_for_them(load: Loader) -> None:
    """Over a bucket of slots, and over a number of rows; what is staged goes, and is made anew."""
    models = load(steps="eager"), load()
    network = models[1]._loaded().network
    network.ends.zero_()
    models[0]._loaded().network.ends.zero_()
    replies = Replies(2, [225, 40, 250, 3, 90, 254], models)
    held = set()
    for _ in range(4):
        replies.draw([0, 1], [2, 1], 16)
        [pool] = drafter_of(models[1])._pools.values()
        assert pool.cache is not None
        held.add((pool.cache.num_rows, pool.cache.num_slots))
    for rows in ([2, 0, 3], [5, 4, 3, 2, 1, 0], [1, 5]):
        replies.draw(rows, [1] * len(rows), 16)
        held.add((pool.cache.num_rows, pool.cache.num_slots))
    assert len({rows for rows, _ in held}) >= 3
    assert len({slots for _, slots in held}) >= 2


def test_rounds_closed_between_two_steps_leave_static_steps_right(load: Loader) -> None:
    models = load(steps="eager"), load(recorder=TapeRecorder())
    replies = Replies(3, [20, 9, 40], models)
    for steps in range(10):
        requests = replies.requests([0, 1, 2], [2, 1, 3], 6)
        for model, of_model in zip(models, requests, strict=True):
            drafting = model.drafting(of_model)
            for _ in range(steps):
                if next(drafting, None) is None:
                    break
            drafting.close()
        if steps % 3 == 2:
            replies.draw([2, 0, 1], [1, 2, 2], 6)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("steps", ["eager", "static"])
def test_streamed_tokens_are_those_of_the_first_candidate(
    steps: str, asynchronous: bool, load: Loader
) -> None:
    """Where the device works on meanwhile, each is passed on while the next is computed."""
    language_model = load(steps=steps)
    network = language_model._loaded().network
    network.asynchronous = asynchronous
    network.ends[::9] = True  # replies end soon
    lengths = set()
    for seed in range(6):
        requests = [
            Request(
                prefix=Prefix(range(20 + row, 30)),
                seed=seed,
                segment=row,
                first_attempt=1,
                count=1 + row % 2,
                size=size,
                sampling=Sampling(),
                streamed=row != 1,
            )
            for row, size in enumerate((19, 6, 12))
        ]
        drafting = language_model.drafting(requests)
        shown: list[list[int]] = [[], [], []]
        while True:
            try:
                tokens = next(drafting)
            except StopIteration as stop:
                proposals = stop.value
                break
            for of_row, token in zip(shown, tokens, strict=False):
                of_row += [token] if token is not None else []
        wanted = [list(candidates[0].token_ids) for candidates in proposals]
        assert shown == [wanted[0], [], wanted[2]]
        lengths |= {len(wanted[0]), len(wanted[2])}
        network.asynchronous = False
        assert language_model.draw(requests) == proposals
        network.asynchronous = asynchronous
    assert len(lengths) > 3


def test_what_fills_up_writes_nothing_that_a_reply_reads(load: Loader) -> None:
    """Rows that wait lie among those that fill up a round of the others, with all they hold."""
    language_model = load()
    prefixes = [Prefix(range(20, 30 + at)) for at in range(4)]
    ask = [
        Request(
            prefix=prefix,
            seed=1,
            segment=0,
            first_attempt=1,
            count=2,
            size=4,
            sampling=Sampling(),
        )
        for prefix in prefixes
    ]
    language_model.draw(ask)
    [pool] = drafter_of(language_model)._pools.values()
    assert pool.cache is not None
    rows = {id(row.prefix()): row.index for row in pool._rows if row is not None}
    last = rows[id(prefixes[3])]
    spare = pool.cache.num_slots - 1
    before = [buffer[last, :, :spare].clone() for buffer in pool.cache._layers[0].buffers]
    scored = pool.logits is not None and pool.logits[last].clone()
    language_model.draw(ask[:3])
    after = [buffer[last, :, :spare] for buffer in pool.cache._layers[0].buffers]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(scored, pool.logits[last])
    assert pool.cache._layers[0].buffers[0][last, :, spare].abs().sum() > 0


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("folded", [1, 2, 4])
def test_attention_takes_a_mask_that_is_folded_for_other_groups(kept: int, folded: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn((2, 4, 3, 8), generator=generator)
    key, value = (torch.randn((2, kept, 9, 8), generator=generator) for _ in range(2))
    mask = torch.randn((2, 1, 3, 9), generator=generator)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    got, _ = packed_sdpa(torch.nn.Module(), query, key, value, mask.repeat(1, 1, folded, 1))
    torch.testing.assert_close(got.transpose(1, 2), wanted)


def test_kernels_that_are_compiled_for_every_length_are_not_preferred() -> None:
    """Torch reads it when attention is first computed on a GPU, which must be later."""
    names = ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "TORCH_CUDNN_SDPA_PREFERRED")
    code = (
        "import os, langchain_stars.rewards, langchain_stars.ragged_cache\n"
        f"print(*map(os.environ.get, {names}))"
    )
    without = {name: value for name, value in os.environ.items() if name not in names}
    for given, wanted in (({}, "1 0"), (dict(zip(names, "01", strict=True)), "0 1")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=without | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == wanted


# Recorded


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_replayed_steps_draw_what_eager_ones_draw(family: str, load: Loader) -> None:
    recorder = TapeRecorder()
    models = load(family, "eager"), load(family, recorder=recorder)
    replies = Replies(4, [20, 1, 33, 14, 7, 20], models)
    replies.play(25)
    assert recorder.replayed > recorder.warmed > 0
    assert recorder.recorded <= recorder.warmed


def test_a_step_is_recorded_once_and_then_replayed_in_every_round(load: Loader) -> None:
    recorder = TapeRecorder()
    language_model = load(recorder=recorder)
    language_model._loaded().network.ends.zero_()
    prefix = Prefix(range(20, 40))
    for segment in range(6):
        [[candidate]] = language_model.draw(
            [
                Request(
                    prefix=prefix,
                    seed=1,
                    segment=segment,
                    first_attempt=1,
                    count=1,
                    size=8,
                    sampling=Sampling(),
                )
            ]
        )
        prefix.token_ids += candidate.token_ids
    # The first draw of a round, its other steps, and the feeding of a kept token: one of each.
    assert (recorder.warmed, recorder.recorded) == (3, 3)
    assert recorder.replayed == 6 * 8 + 5 - 3


def test_what_was_recorded_goes_with_the_buffers_it_was_recorded_for(load: Loader) -> None:
    recorder = TapeRecorder()
    models = load(steps="eager"), load(recorder=recorder)
    for model in models:
        model._loaded().network.ends.zero_()
    replies = Replies(5, [240, 30, 12], models)
    for _ in range(3):
        replies.draw([0], [2], 8)
    [pool] = drafter_of(models[1])._pools.values()
    assert len(pool.stages) >= 2
    recordings = [
        recording
        for stage in pool.stages.values()
        for recording in getattr(stage, "_recordings", ())
    ]
    assert any(recording.replay is not None for recording in recordings)
    recorded = recorder.recorded
    for prefix in replies.prefixes[0]:  # over the bucket, by tokens of nobody's
        prefix.token_ids += (77,) * 20
    replies.draw([0], [2], 8)
    assert all(recording.replay is None for recording in recordings)
    replies.draw([0, 1, 2], [2, 1, 1], 8)
    replies.play(6, size=8)
    assert recorder.recorded > recorded
    drafter_of(models[1]).forget("interactive")
    assert not pool.stages
    replies.play(3, size=8)


def test_stages_are_bounded_and_what_was_not_used_longest_goes(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafters_module, "_MOST_STAGES", 3)
    models = load(steps="eager"), load(recorder=TapeRecorder())
    replies = Replies(6, [20, 5, 9, 30, 11], models)
    for _ in range(25):
        replies.play(1)
        [pool] = drafter_of(models[1])._pools.values()
        assert len(pool.stages) <= 3


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("not while capturing"),
        torch.OutOfMemoryError("none left"),
        AttributeError("no such thing where it is traced"),
    ],
)
def test_where_recording_fails_steps_become_eager_and_one_line_says_so(
    error: Exception, load: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = TapeRecorder()
    models = load(steps="eager"), load(recorder=recorder)
    replies = Replies(7, [20, 5, 9], models)
    recorder.failing = error
    with caplog.at_level(logging.WARNING):
        replies.play(8)
    assert models[1].steps == "eager"
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"recorded: steps are run eagerly from now on ({type(error).__name__})"
    [pool] = drafter_of(models[1])._pools.values()
    assert not pool.stages
    assert models[1].counts.out_of_memory == 0


def test_where_memory_ends_what_was_recorded_is_given_up_before_anything_is_split(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = load(recorder=TapeRecorder()), load(steps="eager")
    replies = Replies(8, [20, 5, 9], models)
    replies.play(6)
    model = models[0]._loaded().network.model  # whose weights are the other's too
    forward, calls = model.forward, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("made by the test")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    long = Prefix(range(20, 60)), Prefix(range(20, 60))
    replies.prefixes.append(list(long))
    replies.segments.append(0)
    replies.attempts.append(1)
    replies.draw([3, 0], [2, 2], 5)
    assert [model.counts.out_of_memory for model in models] == [1, 0]
    assert models[0].max_candidates > 1
    assert models[0].steps == "eager"
    replies.play(4)


def test_work_that_fails_while_it_is_recorded_is_done_all_the_same() -> None:
    done: list[str] = []
    recorder = TapeRecorder()
    runner, recording = Runner("a model", recorder=recorder), Recording()
    runner.run(recording, lambda: done.append("first"))
    recorder.failing = RuntimeError("no")
    runner.run(recording, lambda: done.append("second"))
    assert done == ["first", "second"]
    assert not runner.usable
    assert not runner.records
    runner.run(recording, lambda: done.append("third"))
    assert done[-1] == "third"


@pytest.mark.parametrize("fails", [False, True])
def test_a_cuda_graph_is_recorded_beside_the_current_stream(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warmed and recorded on one stream of its own and in one pool; the current one is restored."""
    log: list[str] = []
    current = ["main"]
    signature = inspect.signature(torch.cuda.graph.__init__)

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = str(name)

        def wait_stream(self, other: Any) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        before = current[0]
        current[0] = chosen.name
        try:
            yield
        finally:
            current[0] = before

    class Graph:
        def replay(self) -> None:
            raise AssertionError("recording is not doing")

    class Recording:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = signature.bind(self, *args, **kwargs).arguments
            self.mode, self.pool = given["capture_error_mode"], given["pool"]
            self.stream = given["stream"]

        def __enter__(self) -> None:
            log.append(f"record in {self.pool} on {self.stream.name}, {self.mode}")

        def __exit__(self, *args: Any) -> None:
            log.append("recorded")
            current[0] = self.stream.name  # as torch leaves it where recording fails

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("memory is given back"))
    others: list[threading.Thread] = []

    def work() -> None:
        log.append(f"work on {current[0]}")
        others.append(threading.Thread(target=free_cached, args=("cuda:1",)))
        others[-1].start()
        others[-1].join(0.05)
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    recorder = CudaRecorder(torch.device("cuda:0"))
    with contextlib.suppress(RuntimeError):
        recorder.warm(work)
    wanted = ["side waits for main", "work on side", "memory is given back", "main waits for side"]
    assert log == wanted
    assert current == ["main"]
    log.clear()
    if fails:
        with pytest.raises(RuntimeError, match="not permitted"):
            recorder.record(work)
    else:
        recorder.record(work)
    for other in others:
        other.join()
    # Nobody may while a graph is recorded: torch would fail there, or here.
    wanted = ["record in the pool on side, thread_local", "work on side", "recorded"]
    assert log == [*wanted, "memory is given back"]
    assert current == ["main"]


def test_graphs_share_a_pool_as_long_as_one_of_them_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses a pool whose graphs have all gone while any of its memory is held."""
    pools: list[int] = []

    class Graph:
        def replay(self) -> None: ...

    @contextlib.contextmanager
    def recording(graph: Graph, *, pool: int, **settings: Any) -> Iterator[None]:
        pools.append(pool)
        yield

    handles = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    recorder = CudaRecorder(torch.device("cuda:0"))
    replays = [recorder.record(lambda: None) for _ in range(2)]
    replays.append(recorder.record(lambda: None))
    del replays[:2]
    replays.append(recorder.record(lambda: None))
    assert len(set(pools)) == 1
    replays.clear()
    replays.append(recorder.record(lambda: None))
    assert len(set(pools)) == 2


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_recorded_steps_are_checked_when_a_model_is_loaded(
    family: str, load: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Deaf(TapeRecorder):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            super().record(work)
            return lambda: None

    recorders = TapeRecorder(), Deaf()
    for recorder in recorders:
        runner = Runner("a model", recorder=recorder)
        monkeypatch.setattr(LocalLanguageModel, "_runner", lambda *_, runner=runner: runner)
        language_model = load(family)
        right = recorder is recorders[0]
        assert language_model.steps == ("graphs" if right else "eager")
        assert (recorder.warmed, recorder.recorded) == (2, 2)
        assert drafter_of(language_model).counts.forwards == 0
    assert recorders[0].replayed == 2 + 8  # first steps of three rounds, and nine others
    assert caplog.text.count("eagerly from now on (recorded ones compute otherwise)") == 1


def test_a_model_that_asks_the_device_is_not_recorded(
    load: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Recording it would fail, and leave what torch cannot clean up."""

    def item(states: torch.Tensor) -> object:
        return states.sum().item()

    def by_mask(states: torch.Tensor) -> object:
        return states[states > 0]

    def write_by_mask(states: torch.Tensor) -> object:
        states[states != states] = 0.0
        return None

    def nothing(states: torch.Tensor) -> object:
        return states[:, torch.arange(states.shape[1])] + 1.0

    for asking in (item, by_mask, write_by_mask, nothing):
        recorder = TapeRecorder()
        runner = Runner(f"{asking.__name__} a model", recorder=recorder)
        models = load(steps="eager"), load()
        head = models[0]._loaded().network.model.lm_head  # the weights are the other's too

        def ask(module: Any, inputs: Any, asking: Any = asking) -> None:
            asking(inputs[0].clone())

        with monkeypatch.context() as patch:
            patch.setattr(LocalLanguageModel, "_runner", lambda *_, runner=runner: runner)
            handle = head.register_forward_pre_hook(ask)
            try:
                Replies(12, [20, 7, 12], models).play(3)
            finally:
                handle.remove()
        assert (models[1].steps == "eager") == (asking is not nothing)
        assert (recorder.recorded == 0) == (asking is not nothing)
        for model in models:
            model.unload()
    assert caplog.text.count("eagerly from now on (the model asks the device") == 3


def test_what_is_brought_to_a_gpu_is_noticed_there_only() -> None:
    with Listener() as listener:
        torch.tensor([1.0]).to(torch.float64).copy_(torch.ones(1))
        torch.tensor(2) + torch.zeros(1)
        assert not listener.heard
        torch.ones(2).to("meta")
        assert listener.heard
    with Listener() as listener:
        torch.empty(2, device="meta").copy_(torch.ones(2))
    assert listener.heard


# What the host waits for


@pytest.mark.parametrize("steps", ["eager", "static", "recorded"])
def test_the_host_looks_at_the_device_once_a_round(
    steps: str, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = TapeRecorder() if steps == "recorded" else None
    language_model = load(steps="eager" if steps == "eager" else "static", recorder=recorder)
    network = language_model._loaded().network
    network.asynchronous = True
    network.ends.zero_()
    looks = 0

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def look(self: torch.Tensor, *args: Any) -> Any:
            nonlocal looks
            looks += 1
            return original(self, *args)

        return look

    prefixes = [Prefix(range(20, 30 + at)) for at in range(3)]
    for name in ("tolist", "item", "__bool__", "nonzero", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    for segment in range(5):
        looks = 0
        drawn = language_model.draw(
            [
                Request(
                    prefix=prefix,
                    seed=at,
                    segment=segment,
                    first_attempt=1,
                    count=1 + at,
                    size=16,
                    sampling=SAMPLINGS[at],
                )
                for at, prefix in enumerate(prefixes)
            ]
        )
        assert looks == 1
        for prefix, candidates in zip(prefixes, drawn, strict=True):
            prefix.token_ids += candidates[-1].token_ids
    monkeypatch.undo()


def test_a_sampler_that_asks_nothing_picks_what_one_that_asks_picks() -> None:
    generator = torch.Generator().manual_seed(3)
    samplings = [*SAMPLINGS, Sampling(top_p=0.3, top_k=700), Sampling(top_p=0.99)]
    settings: dict[str, Any] = {"hidden": None, "device": torch.device("cpu")}
    asking = Sampler(samplings, **settings)
    silent = Sampler([Sampling(top_p=0.5, top_k=513)] * len(samplings), asks=False, **settings)
    with pytest.raises(AssertionError):
        silent.load(samplings)  # they need other warpers
    silent = Sampler(samplings[::-1], asks=False, **settings)
    silent.load(samplings)
    for _ in range(20):
        logits = 3 * torch.randn((len(samplings), 3, 900), generator=generator)
        seen = torch.rand((len(samplings), 3, 900), generator=generator) < 0.1
        numbers = torch.rand((len(samplings), 3), generator=generator, dtype=torch.float64)
        picked = [sampler.pick(sampler.warp(logits, seen), numbers) for sampler in (asking, silent)]
        assert torch.equal(*picked)


# Choosing


def test_steps_are_eager_unless_one_gpu_does_them(load: Loader) -> None:
    assert load(steps="auto").steps == "eager"
    assert load(steps="static").steps == "static"
    assert load("mamba", steps="static").steps == "eager"  # it is not drafted the ragged way
    with pytest.raises(ValueError, match="graphs on a CUDA device only, got cpu"):
        load(steps="graphs")
    with pytest.raises(ValueError, match="`steps` must be one of auto, eager"):
        load(steps="fast")


def test_the_time_of_a_static_round_is_that_of_what_is_computed(load: Loader) -> None:
    language_model = load(recorder=TapeRecorder())
    assert 0 < language_model.round_seconds(3, 3, 4) < 2
    [(way, table)] = language_model._weights().seconds.items()
    assert way == ("ragged", "graphs")
    table.clear()
    table.update({4: 2.0, 16: 5.0})
    assert language_model.round_seconds(3, 3, 3) == 2.0 + 2 * 5.0
    tree = drafter_of(language_model).stepping(4, rows=2, length=40)
    copies = drafter_of(language_model).stepping(1, rows=8, length=40)
    eager = drafter_of(load(steps="eager")).stepping(4, rows=2, length=40)
    assert tree().shape == eager().shape == (2, 4)
    assert copies().shape == (8, 1)


def test_where_tokens_are_cheap_wide_steps_are_timed_as_far_as_memory_goes(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = load(steps="eager")
    drafter = drafter_of(language_model)
    drafter.network.asynchronous = True
    stepping = drafter.stepping

    def small(queries: int, *, rows: int = 1, **settings: Any) -> Any:
        if rows >= 16:
            raise torch.OutOfMemoryError("made by the test")
        return stepping(queries, rows=rows, **settings)

    monkeypatch.setattr(drafter, "stepping", small)
    assert language_model.round_seconds(64, 16, 2) > 0
    [table] = language_model._weights().seconds.values()
    assert sorted(table) == [1, 2, 4, 8, 16, 32, 64, 128]


# Compiled


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with a compiler of C++")
def test_compiled_steps_draw_what_eager_ones_draw(
    load: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"shape": {"num_hidden_layers": 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it compiles
        models = load("llama", "eager", **shape), load("llama", "compiled", **shape)
        replies = Replies(9, [20, 7], models)
        replies.segments = [0, 0]
        for _ in range(4):
            replies.draw([0, 1], [2, 2], 6)
    assert models[1].steps == "compiled"
    assert "eagerly" not in caplog.text
    torch._dynamo.reset()


def test_where_nothing_can_be_compiled_steps_become_eager(
    load: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import Unsupported

    def compile_nothing(work: Callable[[], None], **settings: Any) -> Callable[[], None]:
        assert settings["fullgraph"]

        def fail() -> None:
            raise Unsupported("made by the test")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    models = load(steps="eager"), load(steps="compiled")
    Replies(10, [20, 7, 12], models).play(5)
    assert models[1].steps == "eager"
    assert caplog.text.count("steps are run eagerly from now on (Unsupported)") == 1


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_graphs_draw_what_eager_steps_draw(family: str, make_folder: FolderMaker) -> None:
    folder = make_folder(family)
    models = [LocalLanguageModel(folder, device="cuda", steps=s) for s in ("eager", "graphs")]
    Replies(11, [20, 1, 33, 14, 7, 240], models).play(30, size=16)
    assert [model.steps for model in models] == ["eager", "graphs"]
    [pool] = drafter_of(models[1])._pools.values()
    stages = [stage for stage in pool.stages.values() if hasattr(stage, "_recordings")]
    assert any(stage._recordings[1].replay is not None for stage in stages)  # type: ignore[union-attr]
    for model in models:
        model.unload()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_host_waits_once_a_round(make_folder: FolderMaker) -> None:
    language_model = LocalLanguageModel(make_folder("llama"), device="cuda", steps="graphs")
    language_model._loaded().network.ends.zero_()
    prefix = Prefix(range(20, 40))
    for segment in range(4):
        request = Request(
            prefix=prefix,
            seed=1,
            segment=segment,
            first_attempt=1,
            count=2,
            size=16,
            sampling=Sampling(temperature=0.8, top_p=0.9),
        )
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                [candidates] = language_model.draw([request])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if segment == 3:  # what there is to record has been recorded
            assert len([w for w in waits if "synchronizing" in str(w.message)]) == 1
        prefix.token_ids += candidates[1].token_ids
    language_model.unload()
