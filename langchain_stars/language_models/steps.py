"""Steps of a round whose shapes stay: run as they are, compiled, or recorded and replayed.

Knows a network, slots and the tokens of one round; nothing of prefixes, of requests or of who asks.
Whatever changes from step to step and from round to round stands in buffers that are written in
place, and no step waits for the host or tells it anything. So what was compiled or recorded once
fits every later step of the same shape.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from langchain_stars.language_models.base import Sampling
from langchain_stars.language_models.masks import TreeMask, causal_masks
from langchain_stars.language_models.network import Network
from langchain_stars.language_models.sampling import Sampler
from langchain_stars.packing import ALLOCATING, to_device
from langchain_stars.ragged_cache import RaggedCache

_log = logging.getLogger(__name__)

Steps: TypeAlias = Literal["auto", "eager", "static", "compiled", "graphs"]
"""How the steps of a round are run."""


class Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices where the host waits for the device or brings it something, which no graph can hold.

    To find out by recording would be late: where that fails, memory stays behind, and up to torch
    2.12 the allocator takes the graph for one that is still recorded.

    Attributes:
        heard: Whether it has noticed any such thing.
    """

    heard: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation."""
        result = func(*args, **(kwargs or {}))
        self.heard = self.heard or _asks(func, args, result)
        return result


def _asks(func: Any, args: Sequence[Any], result: Any) -> bool:
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):  # by a mask: as many as it is true for
        return any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        return True
    kinds = {each.device.type for each in (*args, result) if isinstance(each, Tensor)}
    if name == "lift_fresh":  # what the host has made from numbers, and put on a device at once
        return kinds != {"cpu"}
    return name in ("_to_copy", "copy_") and "cpu" in kinds and len(kinds) > 1


class Recorder(Protocol):
    """Records device work once, to repeat it without the host's part in it."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do the work where it will be recorded, so that what is made once is made beforehand."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats the work on the same tensors; recording does not do it."""


class CudaRecorder:
    """Records CUDA graphs, all in one pool of memory.

    They may share it, since none is replayed beside another and what they give lies outside.

    Args:
        device: Of everything that is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def warm(self, work: Callable[[], None]) -> None:
        """Do the work on the stream that records, between what the current one does."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return the replay of a new graph."""
        if not self._graphs:  # torch takes no pool whose graphs have all gone, but not its memory
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            # One graph at a time in a process, and nobody gives memory back meanwhile.
            ALLOCATING,
            # Where recording fails, `torch.cuda.graph` leaves its stream current; this does not.
            torch.cuda.stream(self._stream),
            # What other threads do on the device meanwhile is no fault of this one.
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            work()
        self._graphs.add(graph)
        return graph.replay


@dataclass(slots=True)
class Recording:
    """What a runner keeps of one piece of work.

    Attributes:
        compiles: Whether compiling it is worth while.
        compiled: The work, compiled.
        warm: Whether it has been done where it is recorded.
        replay: What repeats it.
    """

    compiles: bool = False
    compiled: Callable[[], None] | None = None
    warm: bool = False
    replay: Callable[[], None] | None = None

    def drop(self) -> None:
        """Forget everything, so that its memory is free at once."""
        self.compiled = self.replay = None
        self.warm = False


class Runner:
    """Runs pieces of work whose shapes stay.

    The first time, a piece is run as it is, or compiled, where it is to be recorded; the second
    time it is recorded, and from then on replayed. Where compiling or recording fails it is run
    as it is, and the runner says that it is of no more use.

    Args:
        name: Of the model, for the log.
        compiles: Whether pieces for which it is worth while are compiled.
        recorder: What records them; None runs them every time.
    """

    def __init__(
        self, name: str, *, compiles: bool = False, recorder: Recorder | None = None
    ) -> None:
        self._name = name
        self.compiles = compiles
        self._recorder = recorder
        self.usable = True

    @property
    def records(self) -> bool:
        """Whether pieces are recorded, which takes memory."""
        return self._recorder is not None

    def run(self, recording: Recording, work: Callable[[], None]) -> None:
        """Do a piece of work.

        Args:
            recording: What this runner has kept of it.
            work: Reads and writes the same tensors each time, and asks nothing of the device.
        """
        if recording.replay is not None:
            recording.replay()
            return
        if self._recorder is None:
            self._call(recording, work)
            return
        if not recording.warm:
            self._recorder.warm(lambda: self._call(recording, work))
            recording.warm = True
            return
        try:
            replay = self._recorder.record(lambda: self._call(recording, work))
        except Exception as error:  # models do other things where they see that they are recorded
            self.give_up(type(error).__name__)
            work()  # nothing of what was recorded has been done; what fails anyway fails here
            return
        recording.replay = replay
        replay()

    def give_up(self, reason: str) -> None:
        """Compile and record nothing any more.

        Args:
            reason: Name of an error, or what else tells nothing of any text.
        """
        if self.usable:
            _log.warning("%s: steps are run eagerly from now on (%s)", self._name, reason)
        self.usable = self.compiles = False
        self._recorder = None

    def _call(self, recording: Recording, work: Callable[[], None]) -> None:
        if not (self.compiles and recording.compiles):
            work()
            return
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if recording.compiled is None:
            settings: dict[str, Any] = {"fullgraph": True, "dynamic": False}
            if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
                settings["isolate_recompiles"] = True  # each shape is a piece of work of its own
            recording.compiled = torch.compile(work, **settings)
        try:
            recording.compiled()
        except (FailOnRecompileLimitHit, TorchDynamoException) as error:
            self.give_up(type(error).__name__)
            work()


@dataclass(frozen=True, slots=True)
class Shape:
    """What is the same in all rounds of a stage.

    Attributes:
        rows: Rows, with those that are there to fill up.
        branches: Branches of a row, likewise.
        steps: Most steps.
        limit: Number of slots that are read, fewer than a row has.
    """

    rows: int
    branches: int
    steps: int
    limit: int


class Stage:
    """The buffers of rounds of one shape, and their steps.

    Args:
        network: The model.
        cache: Where the rows lie, the first ones of it. Rows that fill up may be somebody's: they
            write the last slot, which is never read.
        logits: Behind each row's prefix, [rows or more, vocab].
        shape: Of the rounds.
        samplings: As of the rounds: they need the same warpers.
        runner: Runs the steps.
    """

    def __init__(
        self,
        network: Network,
        cache: RaggedCache,
        logits: Tensor,
        shape: Shape,
        samplings: Sequence[Sampling],
        runner: Runner,
    ) -> None:
        device = network.device
        rows, branches = shape.rows, shape.branches
        self.shape = shape
        self._network = network
        self._cache = cache
        self._logits = logits
        self._runner = runner
        self._recordings = Recording(), Recording(compiles=True)
        self._spare_slot = cache.num_slots - 1
        assert shape.limit <= self._spare_slot
        self._lengths = torch.ones(rows, dtype=torch.long, device=device)
        self._waiting = torch.ones((rows, 1), dtype=torch.bool, device=device)
        self._own = torch.arange(branches, device=device)
        self._slots = torch.zeros((rows, branches), dtype=torch.long, device=device)
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._numbers = torch.ones(
            (rows, branches, shape.steps),
            dtype=torch.float32 if device.type == "mps" else torch.float64,
            device=device,
        )
        self._last = torch.zeros((rows, branches), dtype=torch.long, device=device)
        self.drawn = torch.zeros(self._numbers.shape, dtype=torch.long, device=device)
        self.ended = torch.zeros((rows, branches), dtype=torch.bool, device=device)
        self._mask = TreeMask(
            network.windows,
            self._lengths,
            branches,
            shape.limit,
            groups=network.groups,
            dtype=network.dtype,
        )
        self._sampler = Sampler(
            _filled(samplings, rows), hidden=network.hidden, device=device, asks=False
        )
        self._seen: Tensor | None = None
        if self._sampler.remembers:
            vocab = len(network.hidden)
            self._seen = torch.zeros((rows, branches, vocab), dtype=torch.bool, device=device)

    def begin(
        self,
        lengths: Sequence[int],
        numbers: Tensor,
        samplings: Sequence[Sampling],
        held: Sequence[Sequence[int]],
    ) -> None:
        """Begin a round.

        Args:
            lengths: Length of each row's prefix; rows beyond them fill up.
            numbers: What picks the tokens, [rows, branches, steps].
            samplings: Settings of each row.
            held: Token ids that prompt and reply of each row hold.
        """
        device = self._network.device
        rows = self.shape.rows
        waiting = torch.arange(rows) >= len(lengths)
        self._lengths.copy_(to_device(torch.tensor(_filled(lengths, rows, 1)), device))
        self._waiting.copy_(to_device(waiting[:, None], device))
        self._numbers[: len(lengths)].copy_(to_device(numbers, device))
        self._sampler.load(_filled(samplings, rows))
        self._at.zero_()
        self.drawn.zero_()
        self.ended.zero_()
        self._mask.begin()
        if self._seen is not None:
            longest = max(map(len, held))
            ids = to_device(torch.tensor([_filled(of_row, longest) for of_row in held]), device)
            ids = ids[:, None].expand(-1, self.shape.branches, -1)
            self._seen.zero_()[: len(held)].scatter_(2, ids, True)

    def first(self) -> None:
        """Draw the first token of every branch from what is known behind the prefix."""
        self._runner.run(self._recordings[0], self._draw_first)

    def step(self) -> None:
        """Feed the last token of every branch and draw the next."""
        shape = self.shape
        with self._cache.at(rows=range(shape.rows), slots=self._slots, limit=shape.limit):
            self._runner.run(self._recordings[1], self._draw_next)

    def repeat(self) -> Tensor:
        """Do the second step once more; return its tokens, [rows, branches]."""
        self._at.fill_(1)
        self._mask.rewind()
        self.step()
        return self._last

    def drop(self) -> None:
        """Forget what was recorded."""
        for recording in self._recordings:
            recording.drop()

    def _draw_first(self) -> None:
        seen = self._seen[:, :1] if self._seen is not None else None
        self._draw(self._logits[: self.shape.rows, None], seen)

    def _draw_next(self) -> None:
        network, shape = self._network, self.shape
        at = self._at - 1
        ends = self._lengths[:, None]
        slots = ends + at * shape.branches + self._own
        self._slots.copy_(slots.masked_fill(self._waiting, self._spare_slot))
        places = (ends + at).clamp(max=network.context_length - 1)
        self._mask.advance()
        logits = network.forward(
            self._last,
            positions=places.expand(-1, shape.branches),
            mask=self._mask.read(0, shape.rows, shape.limit),
            cache=self._cache,
        )
        if self._seen is not None:
            self._seen.scatter_(2, self._last[..., None], True)
        self._draw(logits, self._seen)

    def _draw(self, logits: Tensor, seen: Tensor | None) -> None:
        scores = self._sampler.warp(logits, seen)
        numbers = self._numbers.index_select(2, self._at)[..., 0]
        picked = self._sampler.pick(scores, numbers)
        last = picked.clamp(min=0)
        self.drawn.index_copy_(2, self._at, picked[..., None])
        self.ended.logical_or_(self._network.ends[last] | (picked < 0))
        self._last.copy_(last)
        self._at.add_(1)


class Feeding:
    """The buffers to feed one token to each of some rows, and that step.

    Args:
        network: The model.
        cache: Where the rows lie, the first ones of it; the last slot is never read.
        logits: Behind each row's prefix, [rows or more, vocab].
        rows: Rows, with those that are there to fill up.
        limit: Number of slots that are read.
        runner: Runs the step.
    """

    def __init__(
        self,
        network: Network,
        cache: RaggedCache,
        logits: Tensor,
        rows: int,
        limit: int,
        runner: Runner,
    ) -> None:
        device = network.device
        self._network = network
        self._cache = cache
        self._logits = logits[:rows]
        self._limit = limit
        self._spare_slot = cache.num_slots - 1
        assert limit <= self._spare_slot
        self._runner = runner
        self._recording = Recording()
        self._ids = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._starts = torch.zeros(rows, dtype=torch.long, device=device)
        self._slots = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._fed = torch.zeros((rows, 1), dtype=torch.bool, device=device)

    def feed(self, starts: Sequence[int], ids: Sequence[int | None]) -> None:
        """Feed a token behind the slots of each row, and keep the logits behind it.

        Args:
            starts: Slot of each token; rows beyond them fill up.
            ids: The tokens; None where a row waits.
        """
        device, rows = self._network.device, len(self._starts)
        given = [(start, token) for start, token in zip(starts, ids, strict=True)]
        table = torch.tensor(
            [
                [start, token, start, 1] if token is not None else [0, 0, self._spare_slot, 0]
                for start, token in _filled(given, rows, (0, None))
            ]
        )
        on_device = to_device(table, device)
        self._starts.copy_(on_device[:, 0])
        self._ids.copy_(on_device[:, 1:2])
        self._slots.copy_(on_device[:, 2:3])
        self._fed.copy_(on_device[:, 3:4])
        with self._cache.at(rows=range(rows), slots=self._slots, limit=self._limit):
            self._runner.run(self._recording, self._feed)

    def drop(self) -> None:
        """Forget what was recorded."""
        self._recording.drop()

    def _feed(self) -> None:
        network = self._network
        logits = network.forward(
            self._ids,
            positions=self._starts[:, None],
            mask=causal_masks(network.windows, self._starts, 1, self._limit, dtype=network.dtype),
            cache=self._cache,
        )
        kept = self._logits
        kept.copy_(torch.where(self._fed, logits[:, 0].to(kept.dtype), kept))


def _filled(values: Sequence[Any], length: int, filling: Any = None) -> list[Any]:
    """Return some values filled up to a length, with the first of them unless said otherwise."""
    filling = values[0] if filling is None else filling
    return [*values, *[filling] * (length - len(values))]
