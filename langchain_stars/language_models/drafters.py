"""How candidates are drafted: on a ragged cache, on snapshots of a cache, or by recomputing.

All three draw the same tokens from the same request; they differ in what they keep and compute.
Knows networks, prefixes and rounds; nothing of text, of folders or of rewards.
"""

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from langchain_stars.language_models.base import (
    Candidate,
    Drafting,
    Prefix,
    Request,
    Sampling,
)
from langchain_stars.language_models.masks import TreeMask, causal_masks
from langchain_stars.language_models.network import Network
from langchain_stars.language_models.sampling import Sampler, Warpers
from langchain_stars.language_models.steps import Feeding, Listener, Runner, Shape, Stage
from langchain_stars.packing import read_later, to_device
from langchain_stars.prompts import PromptStore, num_common
from langchain_stars.ragged_cache import RaggedCache
from langchain_stars.randomness import drafting_uniforms

_BUCKET = 256
_STEPS_BETWEEN_LOOKS = 16
_TIMED_SLOTS = 64
_MOST_STAGES = 32

_Staged = TypeVar("_Staged", Stage, Feeding)


@dataclass(slots=True)
class Counts:
    """What a language model has computed, in tokens unless said otherwise.

    Attributes:
        prompt: Tokens of prompts, forwarded.
        accepted: Last tokens of accepted segments, forwarded for the logits that follow them.
        drafted: Tokens of candidates, forwarded.
        refed: Tokens forwarded once more, because their keys and values were gone.
        idle: Places of a forward pass that nobody needed: ended candidates, rows that waited.
        reused: Tokens of prompts that were found computed by another request.
        forwards: Forward passes.
        rounds: Rounds.
        out_of_memory: Times that memory ran out: a round was done in parts, or a prompt not stored.
    """

    prompt: int = 0
    accepted: int = 0
    drafted: int = 0
    refed: int = 0
    idle: int = 0
    reused: int = 0
    forwards: int = 0
    rounds: int = 0
    out_of_memory: int = 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the device, or of the machine, has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("out of memory", "can't allocate memory", "alloc_failed")
    )


class _Draws:
    """The tokens of a round in the making, and what the host knows of them.

    Args:
        network: The model.
        requests: What is asked for, a row each.
        rooms: Tokens that each reply has room for.
        lags: Whether tokens are streamed one step late, so that the device has the next step to do
            while the host waits for them and passes them on.

    Attributes:
        requests: What is asked for, a row each.
        counts: Candidates of each row.
        sizes: Most tokens of a candidate of each row.
        steps: Most steps of the round.
        step: How many there have been.
        drawn: What was drawn, [rows, branches or more, steps or more]; -1 where logits were not
            finite.
        ended: Which branches want no more, [rows, branches or more].
    """

    drawn: Tensor
    ended: Tensor

    def __init__(
        self,
        network: Network,
        requests: Sequence[Request],
        rooms: Sequence[int],
        *,
        lags: bool = False,
    ) -> None:
        self._network = network
        self._lag = int(lags)
        self._readings: list[tuple[set[int], Callable[[], Any]]] = []
        self.requests = requests
        self.counts = [request.count for request in requests]
        self.sizes = [
            min(request.size, room) for request, room in zip(requests, rooms, strict=True)
        ]
        self.steps = max(self.sizes)
        self.step = 0
        self._open = [[True] * count for count in self.counts]
        self._streamed = any(request.streamed for request in requests)

    @property
    def active(self) -> list[int]:
        """Rows that want another token."""
        return [
            row
            for row, (size, candidates) in enumerate(zip(self.sizes, self._open, strict=True))
            if self.step < size and any(candidates)
        ]

    def num_open(self, row: int) -> int:
        """Number of a row's candidates that want another token."""
        return sum(self._open[row])

    def numbers(self, branches: int, steps: int) -> Tensor:
        """Return what picks the tokens, [rows, branches, steps], still on the host."""
        return torch.tensor(
            [
                [
                    drafting_uniforms(
                        self.steps,
                        seed=request.seed,
                        segment=request.segment,
                        attempt=request.first_attempt + branch,
                    )
                    + [1.0] * (steps - self.steps)
                    if branch < request.count
                    else [1.0] * steps
                    for branch in range(branches)
                ]
                for request in self.requests
            ],
            dtype=torch.float32 if self._network.device.type == "mps" else torch.float64,
        )

    def look(self) -> Sequence[int | None]:
        """Count a step; see, if it is worth waiting for, what has ended. Return what is streamed."""
        active = set(self.active)
        self.step += 1
        if not (
            self._streamed
            or not self._network.asynchronous
            or (self.step % _STEPS_BETWEEN_LOOKS == 0 and self.step < self.steps)
        ):
            return ()
        seen = torch.cat([self.drawn[:, :1, self.step - 1], self.ended.long()], dim=1)
        self._readings.append((active, read_later(seen)))
        if self._streamed and len(self._readings) <= self._lag:
            return ()
        return self._read()

    def rest(self) -> Iterator[Sequence[int | None]]:
        """Return what is still to be streamed when there are no more steps."""
        while self._readings:
            yield self._read()

    def _read(self) -> Sequence[int | None]:
        """Look at what has been computed; return what is streamed."""
        active, read = self._readings.pop(0)
        seen = read()
        self._open = [
            [not ended for ended in of_row[1 : count + 1]]
            for of_row, count in zip(seen, self.counts, strict=True)
        ]
        if not self._streamed:
            return ()
        return [
            of_row[0] if request.streamed and row in active and self._open[row][0] else None
            for row, (request, of_row) in enumerate(zip(self.requests, seen, strict=True))
        ]

    def lost_rows(self) -> list[int]:
        """Return the rows in which some branch had no finite logits."""
        lost = self.drawn[:, :, : self.step] < 0
        return lost.flatten(1).any(1).nonzero().flatten().tolist()

    def results(self) -> tuple[list[list[Candidate]], list[list[list[int]]]]:
        """Return the candidates of every row, and all token ids that were drawn; -1 for none."""
        drawn = self.drawn[:, :, : self.step]
        ends = self._network.ends[drawn.clamp(min=0)] & (drawn >= 0)
        ids, flags = torch.stack([drawn, ends.long()]).tolist()
        proposals = []
        for request, size, of_row, ends_of_row in zip(
            self.requests, self.sizes, ids, flags, strict=True
        ):
            candidates = []
            for branch in range(request.count):
                ended = ends_of_row[branch][:size]
                finished = 1 in ended
                length = ended.index(1) if finished else len(ended)
                if -1 in of_row[branch][:length]:
                    finished, length = False, 0
                candidates.append(
                    Candidate(
                        attempt=request.first_attempt + branch,
                        token_ids=tuple(of_row[branch][:length]),
                        finished=finished,
                    )
                )
            proposals.append(candidates)
        return proposals, ids


class _EagerDraws(_Draws):
    """Draws of a round of any shape: rows of `branches` candidates, drawn step by step."""

    def __init__(
        self,
        network: Network,
        requests: Sequence[Request],
        rooms: Sequence[int],
        *,
        lags: bool = False,
    ) -> None:
        super().__init__(network, requests, rooms, lags=lags)
        device = network.device
        self.branches = max(self.counts)
        shape = (len(requests), self.branches, self.steps)
        self.drawn = torch.zeros(shape, dtype=torch.long, device=device)
        self.ended = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        self.tokens = torch.zeros(shape[:2], dtype=torch.long, device=device)  # the last ones
        self._numbers = to_device(self.numbers(self.branches, self.steps), device)
        self._sampler = Sampler(
            [request.sampling for request in requests],
            hidden=network.hidden,
            device=device,
            asks=not network.asynchronous,
        )
        self._seen: Tensor | None = None
        if self._sampler.remembers:
            seen = torch.zeros((shape[0], len(network.hidden)), dtype=torch.bool, device=device)
            for row, request in zip(seen, requests, strict=True):
                held = request.prefix.prompt_ids + request.prefix.token_ids
                row.scatter_(0, to_device(torch.tensor(held), device), True)
            self._seen = seen[:, None]

    def draw(self, logits: Tensor, first: int, last: int) -> Sequence[int | None]:
        """Draw the next token of some rows; return what is streamed of it.

        Args:
            logits: [rows, branches, vocab]; one branch where all of a row are still the same.
            first: First of the rows.
            last: Row after the last.
        """
        rows = slice(first, last)
        seen = self._seen
        if seen is not None:
            if seen.shape[1] < self.branches and logits.shape[1] == self.branches:
                self._seen = seen = seen.repeat(1, self.branches, 1)
            if self.step:
                seen.scatter_(2, self.tokens[:, : seen.shape[1], None], True)
            seen = seen[rows]
        scores = self._sampler.warp(logits, seen, rows)
        picked = self._sampler.pick(scores, self._numbers[rows, :, self.step], rows)
        self.drawn[rows, :, self.step] = picked
        self.tokens[rows] = picked.clamp(min=0)
        self.ended[rows] |= self._network.ends[self.tokens[rows]] | (picked < 0)
        return self.look()


class Drafter(ABC):
    """Drafts the candidates of a round, and keeps what it computed under each prefix."""

    def __init__(self, network: Network, counts: Counts) -> None:
        self.network = network
        self.counts = counts

    @abstractmethod
    def round(self, requests: Sequence[Request]) -> Drafting:
        """Draft for requests of one lane; may be closed between any two steps."""

    @abstractmethod
    def release(self, prefix: Prefix) -> None:
        """Forget a prefix."""

    @abstractmethod
    def forget(self, lane: str) -> None:
        """Forget everything computed for a lane, but none of its prefixes' ids."""

    @property
    def num_bytes(self) -> int:
        """Memory held for keys and values, in bytes."""
        return 0

    def spare(self) -> bool:
        """Free what is only held for requests to come; return whether there was anything."""
        return False

    def padded(self, num_rows: int, count: int) -> tuple[int, int]:
        """Return how many rows and branches a round of so many is computed with."""
        return num_rows, count

    @abstractmethod
    def stepping(self, queries: int) -> Callable[[], Tensor]:
        """Return a function that makes one forward pass of so many queries, to be timed."""


def _rooms(network: Network, requests: Sequence[Request]) -> list[int]:
    """Return how many tokens each reply has room for.

    Raises:
        ValueError: A prefix is empty, or leaves no room.
    """
    rooms = []
    for request in requests:
        length = len(request.prefix)
        if not request.prefix.prompt_ids:
            raise ValueError("`prompt_ids` must hold at least one token, got none")
        if length >= network.context_length:
            raise ValueError(
                f"a prefix of {length} tokens leaves no room in a context of "
                f"{network.context_length} tokens"
            )
        rooms.append(network.context_length - length)
    return rooms


def _bucket(length: int) -> int:
    """Return `length` rounded up to what buffers are sized by."""
    step = _BUCKET if length <= 8 * _BUCKET else 4 * _BUCKET
    return -(-length // step) * step


def _power(number: int) -> int:
    """Return a number rounded up to a power of two."""
    return 1 << (number - 1).bit_length()


def _eights(number: int) -> int:
    """Return a number rounded up to a power of two up to 8, and to a multiple of 8 beyond."""
    return _power(number) if number <= 8 else -(-number // 8) * 8


@dataclass(slots=True, eq=False)
class _Row:
    """A row of a pool.

    Attributes:
        prefix: Whose it is.
        index: Where it lies in the pool.
        ids: Token ids whose keys and values stand in its first slots.
        scored: Whether the pool holds the logits behind `ids`.
        branches: Branches of the last round, behind `ids`; token t of branch i in slot
            `len(ids) + t * branches + i`.
        drafted: Token ids of each of its candidates that have keys and values.
    """

    prefix: "ReferenceType[Prefix]"
    index: int
    ids: list[int] = field(default_factory=list)
    scored: bool = False
    branches: int = 1
    drafted: list[list[int]] = field(default_factory=list)

    @property
    def extent(self) -> int:
        """Number of slots that hold something."""
        return len(self.ids) + self.branches * max(map(len, self.drafted), default=0)


class _Pool:
    """The rows of one lane and their buffers. One round at a time."""

    def __init__(self, network: Network, counts: Counts, prompts: PromptStore) -> None:
        self._network = network
        self._counts = counts
        self._prompts = prompts
        self.busy = False
        self.cache: RaggedCache | None = None
        self.logits: Tensor | None = None
        self.stages: OrderedDict[Any, Stage | Feeding] = OrderedDict()
        self._rows: list[_Row | None] = []
        self._of: WeakKeyDictionary[Prefix, _Row] = WeakKeyDictionary()
        self._released: list[Prefix] = []

    def release(self, prefix: Prefix) -> None:
        """Free a prefix's row, now or when the round has ended; its prompt may be stored."""
        if self.busy:
            self._released.append(prefix)
            return
        row = self._of.pop(prefix, None)
        if row is not None:
            self._rows[row.index] = None
            self.store(prefix, row)

    @torch.inference_mode()
    def store(self, prefix: Prefix, row: _Row) -> None:
        """Store what a row holds of a prefix, if that is allowed and new, and there is memory."""
        if self.cache is not None and self._prompts.wants(prefix.partition, row.ids):
            try:
                states = self.cache.take(row.index, num_slots=len(row.ids))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._counts.out_of_memory += 1  # what is not stored is only computed again
                return
            self._prompts.put(prefix.partition, row.ids, states)

    def recall(self, prefix: Prefix, row: _Row) -> int:
        """Let a new row begin with what is stored; return the number of tokens."""
        if row.ids or not prefix.partition or self.cache is None:
            return 0
        wanted = prefix.prompt_ids[:-1]  # the last one is fed, for the logits behind it
        length, states = self._prompts.find(prefix.partition, wanted)
        if length:
            self.cache.put(row.index, states, num_slots=length)
            row.ids = list(wanted[:length])
        return length

    def settle(self) -> None:
        """End a round."""
        self.busy = False
        while self._released:
            self.release(self._released.pop())

    @torch.inference_mode()
    def clear(self, row: _Row) -> None:
        """Forget what a row holds; it is computed anew when it is next drawn."""
        row.ids, row.drafted, row.scored = [], [], False
        if self.cache is not None:
            self.cache.clear_row(row.index)

    def stage(self, runner: Runner, shape: Shape, requests: Sequence[Request]) -> Stage:
        """Return the buffers for rounds of a shape and of what the requests need."""
        samplings = [request.sampling for request in requests]

        def make() -> Stage:
            assert self.cache is not None
            assert self.logits is not None
            return Stage(self._network, self.cache, self.logits, shape, samplings, runner)

        return self._kept((shape, Warpers.of(samplings)), make)

    def feeding(self, runner: Runner, rows: int, limit: int) -> Feeding:
        """Return the buffers to feed a token to each of some rows."""

        def make() -> Feeding:
            assert self.cache is not None
            assert self.logits is not None
            return Feeding(self._network, self.cache, self.logits, rows, limit, runner)

        return self._kept((rows, limit), make)

    def _kept(self, key: Any, make: Callable[[], _Staged]) -> _Staged:
        """Return what is kept under a key, made where it is not; what was not used longest goes."""
        if key not in self.stages:
            while len(self.stages) >= _MOST_STAGES:
                self.stages.popitem(last=False)[1].drop()
            self.stages[key] = make()
        self.stages.move_to_end(key)
        kept: Any = self.stages[key]
        return kept  # type: ignore[no-any-return]

    def unstage(self) -> None:
        """Drop all stages, and what was recorded of them: it fits these buffers only."""
        for stage in self.stages.values():
            stage.drop()
        self.stages.clear()

    def drop(self) -> None:
        """Free the buffers; every row is computed anew when it is next drawn."""
        self.unstage()
        self.cache = self.logits = None
        self._rows.clear()
        self._of.clear()

    @torch.inference_mode()
    def place(self, prefixes: Sequence[Prefix], slots: int, tail: int) -> list[_Row]:
        """Return the rows of some prefixes, made the first ones of the pool.

        Args:
            prefixes: Whose rows are wanted.
            slots: Slots that the longest prefix takes.
            tail: Slots that the round's candidates take behind it.
        """
        rows = self._rows
        for index, row in enumerate(rows):
            if row is not None and row.prefix() is None:
                rows[index] = None
        num_live = sum(row is not None for row in rows)
        num_new = sum(prefix not in self._of for prefix in prefixes)
        self._fit(num_live + num_new, slots, tail, empty=num_live == 0)
        assert self.cache is not None
        wanted = [self._of.get(prefix) for prefix in prefixes]
        count = len(prefixes)
        rows.extend([None] * (self.cache.num_rows - len(rows)))
        asked = set(map(id, filter(None, wanted)))
        free = [
            index for index in range(count) if rows[index] is None or id(rows[index]) not in asked
        ]
        for row in wanted:
            if row is not None and row.index >= count:
                self._exchange(row.index, free.pop(0))
        for prefix, row in zip(prefixes, wanted, strict=True):
            if row is None:
                index = free.pop(0)
                if rows[index] is not None:
                    self._exchange(index, rows.index(None, count))
                rows[index] = self._of[prefix] = _Row(prefix=ref(prefix), index=index)
        return [self._of[prefix] for prefix in prefixes]

    def _fit(self, num_rows: int, slots: int, tail: int, *, empty: bool) -> None:
        """Make room; an empty pool that is far too large is made anew."""
        num_rows = _eights(num_rows)
        fitting = num_rows * (_bucket(slots) + tail)
        cache = self.cache
        if cache is not None and empty and cache.num_rows * cache.num_slots > 4 * fitting:
            self.drop()
            cache = None
        if cache is None:
            self.cache = RaggedCache(self._network.num_layers)
            self.cache.resize(num_rows, _bucket(slots) + tail)
        elif num_rows > cache.num_rows or slots + tail > cache.num_slots:
            wider = cache.num_slots
            if slots + tail > wider:
                wider = max(wider, _bucket(slots) + tail)
            self.unstage()
            try:
                cache.resize(max(num_rows, cache.num_rows), wider)
            except Exception:
                self.drop()  # half grown, it is of no use; the rows are computed anew
                raise
        assert self.cache is not None
        if self.logits is None or self.logits.shape[0] < self.cache.num_rows:
            self.unstage()
            old = self.logits
            vocab = len(self._network.hidden)
            self.logits = torch.zeros((self.cache.num_rows, vocab), device=self._network.device)
            if old is not None:
                self.logits[: old.shape[0]] = old

    def _exchange(self, one: int, other: int) -> None:
        """Exchange two rows, of which one may be empty."""
        assert self.cache is not None
        assert self.logits is not None
        rows = self._rows
        first, second = rows[one], rows[other]
        if first is not None and second is not None:
            self.cache.swap_rows(one, other, num_slots=max(first.extent, second.extent))
        elif first is not None:
            self.cache.copy_row(one, other, num_slots=first.extent)
        elif second is not None:
            self.cache.copy_row(other, one, num_slots=second.extent)
        held = self.logits[one].clone()
        self.logits[one] = self.logits[other]
        self.logits[other] = held
        rows[one], rows[other] = second, first
        if first is not None:
            first.index = other
        if second is not None:
            second.index = one


class _Round(ABC):
    """The steps of a round on a ragged cache.

    Attributes:
        draws: What is drawn.
        branches: Branches of a row, with those that fill up.
    """

    draws: _Draws
    branches: int

    @abstractmethod
    def first(self) -> Sequence[int | None]:
        """Draw the first tokens; return what is streamed."""

    @abstractmethod
    def step(self, active: Sequence[int]) -> Sequence[int | None]:
        """Feed the last token of every branch of some rows and draw the next."""

    @abstractmethod
    def computed(self, active: Sequence[int]) -> int:
        """Return how many rows are computed for the active ones."""


class _EagerRound(_Round):
    """Steps of any shape: no row is computed that no active one needs, nor a slot read.

    Nothing of where the branches lie is copied to the device step by step.
    """

    def __init__(
        self,
        network: Network,
        cache: RaggedCache,
        logits: Tensor,
        lengths: list[int],
        draws: _EagerDraws,
    ) -> None:
        device = network.device
        self.draws: _EagerDraws = draws
        self.branches = draws.branches
        self._network = network
        self._cache = cache
        self._logits = logits
        self._lengths = lengths
        ends = to_device(torch.tensor(lengths), device)
        self._ends = ends[:, None]
        self._own = torch.arange(draws.branches, device=device)
        self._mask: TreeMask | None = None
        tail = draws.branches * draws.steps
        if draws.branches > 1 or not _uniform(network, lengths, lengths[0] + draws.steps):
            self._mask = TreeMask(
                network.windows,
                ends,
                draws.branches,
                max(lengths) + tail,
                groups=network.groups,
                dtype=network.dtype,
            )

    def first(self) -> Sequence[int | None]:
        """Draw the first tokens; return what is streamed."""
        count = len(self._lengths)
        return self.draws.draw(self._logits[:count, None], 0, count)

    def step(self, active: Sequence[int]) -> Sequence[int | None]:
        """Feed the last token of every branch of some rows and draw the next."""
        network, branches = self._network, self.branches
        first, last = active[0], active[-1] + 1
        step = self.draws.step - 1
        lengths, ends = self._lengths[first:last], self._ends[first:last]
        limit = max(lengths) + (step + 1) * branches
        mask = None
        if self._mask is not None:
            self._mask.advance()
            mask = self._mask.read(first, last, limit)
        slots: Tensor | int = lengths[0] + step * branches
        if min(lengths) != max(lengths):
            slots = ends + (step * branches + self._own)
        places = (ends + step).clamp(max=network.context_length - 1).expand(-1, branches)
        with self._cache.at(rows=range(first, last), slots=slots, limit=limit):
            logits = network.forward(
                self.draws.tokens[first:last], positions=places, mask=mask, cache=self._cache
            )
        return self.draws.draw(logits, first, last)

    def computed(self, active: Sequence[int]) -> int:
        """Return how many rows are computed for the active ones."""
        return active[-1] + 1 - active[0]


class _StaticRound(_Round):
    """Steps whose shapes stay, those of a stage: all its rows, and all slots that it reads."""

    def __init__(self, stage: Stage, lengths: Sequence[int], draws: _Draws) -> None:
        shape, count = stage.shape, len(lengths)
        self.draws = draws
        self.branches = shape.branches
        self._stage = stage
        stage.begin(
            lengths,
            draws.numbers(shape.branches, shape.steps),
            [request.sampling for request in draws.requests],
            [[*r.prefix.prompt_ids, *r.prefix.token_ids] for r in draws.requests],
        )
        draws.drawn, draws.ended = stage.drawn[:count], stage.ended[:count]

    def first(self) -> Sequence[int | None]:
        """Draw the first tokens; return what is streamed."""
        self._stage.first()
        return self.draws.look()

    def step(self, active: Sequence[int]) -> Sequence[int | None]:
        """Feed the last token of every branch and draw the next."""
        self._stage.step()
        return self.draws.look()

    def computed(self, active: Sequence[int]) -> int:
        """Return how many rows there are, whichever are active."""
        return self._stage.shape.rows


def _uniform(network: Network, lengths: Sequence[int], limit: int) -> bool:
    """Whether rows end at the same slot and see all before it, so that no mask is needed."""
    return (
        network.maskless
        and min(lengths) == max(lengths)
        and all(window is None or limit < window for window in network.windows.values())
    )


class RaggedDrafter(Drafter):
    """Drafts all branches of all rows at once, on a cache whose rows have lengths of their own."""

    def __init__(
        self,
        network: Network,
        counts: Counts,
        prompts: PromptStore,
        runner: Runner | None = None,
    ) -> None:
        super().__init__(network, counts)
        self.prompts = prompts
        self._pools: dict[str, _Pool] = {}
        self._runner = runner

    @property
    def runner(self) -> Runner | None:
        """What runs steps whose shapes stay; None where they are run eagerly."""
        return self._runner if self._runner is not None and self._runner.usable else None

    @property
    def num_bytes(self) -> int:
        """Memory held for keys and values, in bytes."""
        return sum(pool.cache.num_bytes for pool in self._pools.values() if pool.cache is not None)

    def spare(self) -> bool:
        """Drop the prompts that are stored, and record no more steps."""
        held = self.prompts.num_bytes > 0
        self.prompts.clear()
        if self.runner is not None and self.runner.records:
            held = True
            self.runner.give_up("memory has run out")
            for pool in self._pools.values():
                pool.unstage()
        return held

    def padded(self, num_rows: int, count: int) -> tuple[int, int]:
        """Return how many rows and branches a round of so many is computed with."""
        if self.runner is None:
            return num_rows, count
        return _eights(num_rows), _power(count)

    def release(self, prefix: Prefix) -> None:
        """Free the prefix's row."""
        pool = self._pools.get(prefix.lane)
        if pool is not None:
            pool.release(prefix)

    def forget(self, lane: str) -> None:
        """Free the lane's buffers."""
        pool = self._pools.get(lane)
        if pool is not None:
            pool.drop()

    def stepping(
        self, queries: int, *, rows: int = 1, length: int = _TIMED_SLOTS
    ) -> Callable[[], Tensor]:
        """Return a step, to be timed.

        Args:
            queries: Branches of each row.
            rows: Rows, all of the same length.
            length: Tokens of each row before the branches.
        """
        network, device = self.network, self.network.device
        length = min(length, network.context_length - 1)
        cache = RaggedCache(network.num_layers)
        runner = self.runner
        branches = queries if runner is None else _power(queries)
        steps = 1 if runner is None else 8
        shape = Shape(rows, branches, steps, length + branches * steps)
        if runner is not None:
            shape = replace(shape, limit=_bucket(length) + branches * steps)
        cache.resize(rows, shape.limit + 1)
        mask = TreeMask(
            network.windows,
            torch.full((rows,), length, device=device),
            branches,
            length + branches,
            groups=network.groups,
            dtype=network.dtype,
        )
        mask.advance()
        lengths, limit = [length] * rows, length + branches
        ids = torch.ones((rows, branches), dtype=torch.long, device=device)
        places = torch.full((rows, branches), length, device=device)

        @torch.inference_mode()
        def step() -> Tensor:
            free = queries == 1 and _uniform(network, lengths, limit)
            seen = None if free else mask.read(0, rows, limit)
            with cache.at(rows=range(rows), slots=length, limit=limit):
                logits = network.forward(ids, positions=places, mask=seen, cache=cache)
            return logits.argmax(-1)

        if runner is None:
            return step
        return self._staged(runner, cache, shape, length, step)

    @torch.inference_mode()
    def _staged(
        self,
        runner: Runner,
        cache: RaggedCache,
        shape: Shape,
        length: int,
        step: Callable[[], Tensor],
    ) -> Callable[[], Tensor]:
        """Return a step of a stage, made as often as it takes to be what it is from then on."""
        step()  # the first one allocates
        logits = torch.zeros((shape.rows, len(self.network.hidden)), device=self.network.device)
        greedy = [Sampling(temperature=0)] * shape.rows
        stage = Stage(self.network, cache, logits, shape, greedy, runner)
        numbers = torch.ones((shape.rows, shape.branches, shape.steps))
        stage.begin([length] * shape.rows, numbers, greedy, [[0]] * shape.rows)
        repeat = torch.inference_mode()(stage.repeat)
        for _ in range(2):
            repeat()
        return repeat

    def round(self, requests: Sequence[Request]) -> Drafting:
        """Draft for all rows at once."""
        rooms = _rooms(self.network, requests)
        pool = self._pools.setdefault(
            requests[0].prefix.lane, _Pool(self.network, self.counts, self.prompts)
        )
        if pool.busy:
            raise RuntimeError("a round of this lane is under way; a lane has one at a time")
        pool.busy = True
        try:
            return (yield from self._round(pool, requests, rooms))
        finally:
            pool.settle()

    def _round(self, pool: _Pool, requests: Sequence[Request], rooms: Sequence[int]) -> Drafting:
        self.counts.rounds += 1
        runner = self.runner
        steps = max(min(r.size, room) for r, room in zip(requests, rooms, strict=True))
        longest = max(len(request.prefix) for request in requests)
        branches = max(request.count for request in requests)
        shape = Shape(len(requests), branches, steps, longest + steps * branches)
        if runner is not None:
            steps, branches = -(-steps // 8) * 8, _power(branches)
            limit = _bucket(longest) + steps * branches
            shape = Shape(_eights(len(requests)), branches, steps, limit)
            longest, tail = _bucket(longest), steps * branches + 1  # a slot that nobody reads
        else:
            tail = steps * branches
            pool.unstage()
        placed = pool.place([request.prefix for request in requests], longest, tail)
        order = sorted(range(len(requests)), key=lambda at: placed[at].index)
        rows = [placed[at] for at in order]
        requests = [requests[at] for at in order]
        missing = self._keep(pool, rows, requests)
        try:
            for _ in self._feed(pool, rows, missing, shape, runner):
                yield ()
        except BaseException:
            self._clean(pool, [row for row, ids in zip(rows, missing, strict=True) if ids])
            raise
        drafting = self._begin(pool, rows, requests, [rooms[at] for at in order], shape, runner)
        draws = drafting.draws
        lost: list[int] = []
        try:
            streamed = self._first(drafting)
            fed = [0] * len(rows)
            while active := draws.active:
                yield self._in_order(streamed, order)
                num_open = sum(map(draws.num_open, active))
                streamed = self._step(drafting, active)
                for at in active:
                    fed[at] += 1
                self.counts.forwards += 1
                self.counts.drafted += num_open
                computed = drafting.computed(active) * drafting.branches
                self.counts.idle += computed - num_open
            if streamed:
                yield self._in_order(streamed, order)
            for streamed in draws.rest():
                yield self._in_order(streamed, order)

            proposals, ids = draws.results()
            lost = [at for at, of_row in enumerate(ids) if any(-1 in b for b in of_row)]
            for row, count, length, of_row in zip(rows, draws.counts, fed, ids, strict=True):
                row.branches = drafting.branches
                row.drafted = [token_ids[:length] for token_ids in of_row[:count]]
        except BaseException:
            lost = draws.lost_rows()
            raise
        finally:
            for at in lost:
                pool.clear(rows[at])
        for row, request, lacked in zip(rows, requests, missing, strict=True):
            if len(lacked) > 1:
                pool.store(request.prefix, row)
        returned: list[list[Candidate]] = [[] for _ in requests]
        for at, candidates in zip(order, proposals, strict=True):
            returned[at] = candidates
        return returned

    @torch.inference_mode()
    def _clean(self, pool: _Pool, rows: Sequence[_Row]) -> None:
        """Clear those of some rows that hold what is not finite."""
        for row in rows:
            if pool.cache is not None and not pool.cache.is_finite(row.index):
                pool.clear(row)

    @torch.inference_mode()
    def _begin(
        self,
        pool: _Pool,
        rows: Sequence[_Row],
        requests: Sequence[Request],
        rooms: Sequence[int],
        shape: Shape,
        runner: Runner | None,
    ) -> _Round:
        """Return the steps of a round whose rows have been fed."""
        assert pool.cache is not None
        assert pool.logits is not None
        lengths = [len(row.ids) for row in rows]
        lags = self.network.asynchronous
        if runner is None:
            eager = _EagerDraws(self.network, requests, rooms, lags=lags)
            return _EagerRound(self.network, pool.cache, pool.logits, lengths, eager)
        stage = pool.stage(runner, shape, requests)
        return _StaticRound(stage, lengths, _Draws(self.network, requests, rooms, lags=lags))

    @torch.inference_mode()
    def _first(self, drafting: _Round) -> Sequence[int | None]:
        return drafting.first()

    @torch.inference_mode()
    def _step(self, drafting: _Round, active: Sequence[int]) -> Sequence[int | None]:
        return drafting.step(active)

    @staticmethod
    def _in_order(streamed: Sequence[int | None], order: Sequence[int]) -> Sequence[int | None]:
        if not streamed:
            return ()
        returned: list[int | None] = [None] * len(order)
        for at, token in zip(order, streamed, strict=True):
            returned[at] = token
        return returned

    @torch.inference_mode()
    def _keep(
        self, pool: _Pool, rows: Sequence[_Row], requests: Sequence[Request]
    ) -> list[list[int]]:
        """Make the cache agree with the prefixes; return the ids of each that must still be fed."""
        assert pool.cache is not None
        kept: list[int] = []
        moves: list[tuple[int, int, int]] = []
        wanted = [[*r.prefix.prompt_ids, *r.prefix.token_ids] for r in requests]
        for row, request, ids in zip(rows, requests, wanted, strict=True):
            self.counts.reused += pool.recall(request.prefix, row)
            length = num_common(row.ids, ids)
            if length == len(row.ids) and row.drafted:
                added = ids[length:]
                matching, branch = max(
                    (num_common(drafted, added), -at) for at, drafted in enumerate(row.drafted)
                )
                if row.branches > 1:
                    moves += [
                        (row.index, length + at * row.branches - branch, length + at)
                        for at in range(matching)
                    ]
                length += matching
            kept.append(length)
        if moves:
            index, source, target = to_device(torch.tensor(moves), self.network.device).T
            pool.cache.move(index, source, target)
        missing = []
        for row, request, ids, length in zip(rows, requests, wanted, kept, strict=True):
            row.scored = row.scored and length == len(row.ids)
            row.drafted = []
            if length < len(ids):
                prompt = max(0, len(request.prefix.prompt_ids) - length)
                accepted = int(length + prompt < len(ids))
                self.counts.prompt += prompt
                self.counts.accepted += accepted
                self.counts.refed += len(ids) - length - prompt - accepted
            elif not row.scored:
                length -= 1
                self.counts.refed += 1
            row.ids = ids[:length]
            missing.append(ids[length:])
        return missing

    def _feed(
        self,
        pool: _Pool,
        rows: Sequence[_Row],
        missing: Sequence[list[int]],
        shape: Shape,
        runner: Runner | None,
    ) -> Iterator[None]:
        """Feed what rows miss, so that the logits behind every prefix are known."""
        assert pool.cache is not None
        single = [at for at, ids in enumerate(missing) if len(ids) == 1]
        if single and runner is not None and pool.cache.is_initialized:
            self._feed_all(pool, rows, missing, shape, runner)
            yield
        elif single:
            self._feed_one(pool, rows, missing, single[0], single[-1] + 1)
            yield
        many = [at for at, ids in enumerate(missing) if len(ids) > 1]
        while many:
            group = self._group(rows, missing, many)
            del many[: len(group)]
            longest = max(len(missing[at]) for at in group)
            for start in range(0, longest, self.network.chunk):
                self._feed_chunk(pool, rows, missing, group, start)
                yield

    def _group(
        self, rows: Sequence[_Row], missing: Sequence[list[int]], many: Sequence[int]
    ) -> list[int]:
        """Return the first of the rows to feed that are worth one forward pass together."""
        group = [many[0]]
        total = longest = len(missing[many[0]])
        for at in many[1:]:
            length = len(missing[at])
            total, longest = total + length, max(longest, length)
            padded = longest * (len(group) + 1)
            if at != group[-1] + 1 or padded > 1.2 * total or padded > 4 * self.network.chunk:
                break
            group.append(at)
        return group

    @torch.inference_mode()
    def _feed_all(
        self,
        pool: _Pool,
        rows: Sequence[_Row],
        missing: Sequence[list[int]],
        shape: Shape,
        runner: Runner,
    ) -> None:
        """Feed one token to those that miss just one, in a step whose shape stays."""
        fed = [ids[0] if len(ids) == 1 else None for ids in missing]
        longest = max(
            len(row.ids) + 1 for row, ids in zip(rows, fed, strict=True) if ids is not None
        )
        feeding = pool.feeding(runner, shape.rows, _bucket(longest))
        feeding.feed([len(row.ids) for row in rows], fed)
        self.counts.forwards += 1
        for row, token in zip(rows, fed, strict=True):
            if token is None:
                self.counts.idle += 1
            else:
                row.ids.append(token)
                row.scored = True
        self.counts.idle += shape.rows - len(rows)

    @torch.inference_mode()
    def _feed_one(
        self,
        pool: _Pool,
        rows: Sequence[_Row],
        missing: Sequence[list[int]],
        first: int,
        last: int,
    ) -> None:
        """Feed one token to those of some rows that miss just one; the others wait."""
        assert pool.cache is not None
        assert pool.logits is not None
        network, device = self.network, self.network.device
        fed = [at for at in range(first, last) if len(missing[at]) == 1]
        lengths = [len(row.ids) for row in rows[first:last]]
        ids = [missing[at][0] if len(missing[at]) == 1 else 0 for at in range(first, last)]
        limit = max(lengths) + 1
        starts = to_device(torch.tensor(lengths), device)
        places = starts[:, None]
        slots: Tensor | int = places
        mask = None
        if _uniform(self.network, lengths, limit):
            slots = lengths[0]
        else:
            mask = causal_masks(network.windows, starts, 1, limit, dtype=network.dtype)
        with pool.cache.at(rows=range(first, last), slots=slots, limit=limit):
            logits = network.forward(
                to_device(torch.tensor(ids), device)[:, None],
                positions=places,
                mask=mask,
                cache=pool.cache,
            )
        self.counts.forwards += 1
        self.counts.idle += last - first - len(fed)
        for at in fed:
            pool.logits[at] = logits[at - first, 0]
            rows[at].ids.append(missing[at][0])
            rows[at].scored = True

    @torch.inference_mode()
    def _feed_chunk(
        self,
        pool: _Pool,
        rows: Sequence[_Row],
        missing: Sequence[list[int]],
        group: Sequence[int],
        start: int,
    ) -> None:
        """Feed one chunk of what a group of rows misses, from its token `start`."""
        assert pool.cache is not None
        assert pool.logits is not None
        network, device = self.network, self.network.device
        chunks = [missing[at][start : start + network.chunk] for at in group]
        queries = max(map(len, chunks))
        first, last = group[0], group[-1] + 1
        # A row that ended in an earlier chunk waits where its tokens would go on.
        starts = [len(rows[at].ids) for at in group]
        behind = to_device(torch.tensor(starts), device)
        places = behind[:, None] + torch.arange(queries, device=device)
        # Padding goes to the last slot, which is not read: a prompt leaves room for candidates.
        limit = min(max(starts) + queries, pool.cache.num_slots - 1)
        slots: Tensor | int = places.clamp(max=pool.cache.num_slots - 1)
        mask = None
        if max(starts) == 0 and _uniform(self.network, starts, limit):
            slots = 0
        else:
            mask = causal_masks(network.windows, behind, queries, limit, dtype=network.dtype)
        ids = torch.zeros((len(group), queries), dtype=torch.long)
        for row, chunk in zip(ids, chunks, strict=True):
            row[: len(chunk)] = torch.tensor(chunk, dtype=torch.long)
        ends = sorted({len(c) - 1 for at, c in zip(group, chunks, strict=True) if c})
        with pool.cache.at(rows=range(first, last), slots=slots, limit=limit):
            logits = network.forward(
                to_device(ids, device),
                positions=places.clamp(max=network.context_length - 1),
                mask=mask,
                cache=pool.cache,
                keep=to_device(torch.tensor(ends), device),
            )
        self.counts.forwards += 1
        self.counts.idle += len(group) * queries - sum(map(len, chunks))
        for at, of_row, chunk in zip(group, logits, chunks, strict=True):
            rows[at].ids.extend(chunk)
            if chunk and start + len(chunk) == len(missing[at]):
                pool.logits[at] = of_row[ends.index(len(chunk) - 1)]
                rows[at].scored = True


class _OneByOne(Drafter):
    """Drafts for one row after the other, its branches as rows of a batch."""

    def round(self, requests: Sequence[Request]) -> Drafting:
        """Draft for row after row."""
        rooms = _rooms(self.network, requests)
        self.counts.rounds += 1
        returned: list[list[Candidate]] = []
        for at, (request, room) in enumerate(zip(requests, rooms, strict=True)):
            draws = _EagerDraws(self.network, [request], [room])
            for streamed in self._one(request.prefix, draws):
                tokens: list[int | None] = [None] * len(requests)
                if streamed:
                    tokens[at] = streamed[0]
                yield tokens if streamed else ()
            returned += draws.results()[0]
        return returned

    def stepping(self, queries: int) -> Callable[[], Tensor]:
        """Return a pass of a batch of short rows."""
        ids = torch.ones((queries, 2), dtype=torch.long, device=self.network.device)

        @torch.inference_mode()
        def step() -> Tensor:
            return self.network.forward(ids, keep=1).argmax(-1)

        return step

    @abstractmethod
    def _one(self, prefix: Prefix, draws: _EagerDraws) -> Iterator[Sequence[int | None]]:
        """Draw all tokens of a row's candidates."""

    def _count(self, draws: _EagerDraws, tokens_each: int = 1) -> None:
        self.counts.forwards += 1
        self.counts.drafted += draws.num_open(0) * tokens_each
        self.counts.idle += (draws.branches - draws.num_open(0)) * tokens_each


@dataclass(slots=True, eq=False)
class _Snapshot:
    """What is kept of a prefix.

    Attributes:
        ids: Token ids that `cache` holds.
        cache: As transformers made it, one row.
        logits: Behind `ids`, [vocab].
        branches: Cache behind the candidates of the last round, one row each.
        drafted: Token ids that `branches` holds behind `ids`.
    """

    ids: list[int]
    cache: Any
    logits: Tensor
    branches: Any = None
    drafted: list[list[int]] = field(default_factory=list)


class SnapshotDrafter(_OneByOne):
    """Drafts on copies of a prefix's cache: for models whose state cannot be taken back.

    The cache of the prefix itself is left as it is; candidates advance a copy with one row for
    each, and the kept one's row becomes the prefix's cache.
    """

    def __init__(self, network: Network, counts: Counts) -> None:
        super().__init__(network, counts)
        self._snapshots: dict[str, WeakKeyDictionary[Prefix, _Snapshot]] = {}

    def release(self, prefix: Prefix) -> None:
        """Drop the prefix's cache."""
        self._snapshots.get(prefix.lane, WeakKeyDictionary()).pop(prefix, None)

    def forget(self, lane: str) -> None:
        """Drop the lane's caches."""
        self._snapshots.pop(lane, None)

    def _one(self, prefix: Prefix, draws: _EagerDraws) -> Iterator[Sequence[int | None]]:
        snapshot = yield from self._advance(prefix)
        snapshot.branches, snapshot.drafted = None, []
        streamed = self._draw(draws, snapshot.logits[None, None])
        branches = None
        fed = 0
        while draws.active:
            yield streamed
            if branches is None:
                branches = self._copies(snapshot.cache, draws.branches)
            logits, branches = self._forward(draws.tokens[0, :, None], branches)
            self._count(draws)
            fed += 1
            streamed = self._draw(draws, logits[None])
        if streamed:
            yield streamed
        snapshot.branches = branches
        snapshot.drafted = [ids[:fed] for ids in draws.results()[1][0][: draws.counts[0]]]
        if draws.lost_rows():
            self.release(prefix)

    def _advance(self, prefix: Prefix) -> Generator[Sequence[int | None], None, _Snapshot]:
        """Bring what is kept of a prefix to its end."""
        kept = self._snapshots.setdefault(prefix.lane, WeakKeyDictionary())
        ids = [*prefix.prompt_ids, *prefix.token_ids]
        snapshot = kept.pop(prefix, None)
        if snapshot is not None and ids[: len(snapshot.ids)] != snapshot.ids:
            snapshot = None
        if snapshot is None:
            prompt_ids = list(prefix.prompt_ids)
            logits, cache = self._forward(torch.tensor([prompt_ids]), None)
            self.counts.forwards += 1
            self.counts.prompt += len(prompt_ids)
            snapshot = _Snapshot(ids=prompt_ids, cache=cache, logits=logits[0])
            yield ()
        added = ids[len(snapshot.ids) :]
        self.counts.accepted += bool(added)
        for branch, drafted in enumerate(snapshot.drafted):
            if drafted and added[: len(drafted)] == drafted and len(added) > len(drafted):
                snapshot.cache = self._row(snapshot.branches, branch)
                snapshot.branches = None
                added = added[len(drafted) :]
                break
        self.counts.refed += max(0, len(added) - 1)
        # One at a time: recurrent layers continue exactly only so.
        for token_id in added:
            logits, snapshot.cache = self._forward(torch.tensor([[token_id]]), snapshot.cache)
            self.counts.forwards += 1
            snapshot.logits = logits[0]
            yield ()
        snapshot.ids = ids
        kept[prefix] = snapshot
        return snapshot

    @torch.inference_mode()
    def _forward(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self.network.advance(ids.to(self.network.device), cache)

    @torch.inference_mode()
    def _copies(self, cache: Any, count: int) -> Any:
        copies = copy.deepcopy(cache)
        if count > 1:
            copies.reorder_cache(torch.zeros(count, dtype=torch.long, device=self.network.device))
        return copies

    @torch.inference_mode()
    def _row(self, cache: Any, row: int) -> Any:
        cache.reorder_cache(torch.tensor([row], device=self.network.device))
        return cache

    @torch.inference_mode()
    def _draw(self, draws: _EagerDraws, logits: Tensor) -> Sequence[int | None]:
        return draws.draw(logits, 0, 1)


class RecomputeDrafter(_OneByOne):
    """Drafts without a cache: right for every model, and slow."""

    def release(self, prefix: Prefix) -> None:
        """Do nothing; nothing is kept."""

    def forget(self, lane: str) -> None:
        """Do nothing; nothing is kept."""

    def _one(self, prefix: Prefix, draws: _EagerDraws) -> Iterator[Sequence[int | None]]:
        ids = torch.tensor([prefix.prompt_ids + prefix.token_ids], device=self.network.device)
        streamed = self._next(draws, ids)
        self.counts.forwards += 1
        self.counts.prompt += len(prefix.prompt_ids)
        self.counts.refed += len(prefix.token_ids)
        while draws.active:
            yield streamed
            drawn = draws.drawn[0, :, : draws.step].clamp(min=0)
            whole = torch.cat([ids.expand(draws.branches, -1), drawn], dim=1)
            self._count(draws, whole.shape[1])
            streamed = self._next(draws, whole)
        if streamed:
            yield streamed

    @torch.inference_mode()
    def _next(self, draws: _EagerDraws, ids: Tensor) -> Sequence[int | None]:
        return draws.draw(self.network.forward(ids, keep=1).transpose(0, 1), 0, 1)


def _probe(network: Network) -> tuple[list[list[int]], Tensor]:
    """Return two short prompts and, for each, two branches of two tokens, [2, 2, 2]."""
    ordinary = torch.nonzero(~(network.hidden | network.ends)).flatten().tolist()
    ids = [ordinary[(7 * at * at + 3 * at) % len(ordinary)] for at in range(19)]
    return [ids[:7], ids[7:11]], torch.tensor(ids[11:]).view(2, 2, 2).to(network.device)


def _deviation(network: Network, logits: Sequence[tuple[list[int], Tensor]]) -> float:
    """Return the largest difference from plain recomputation, in units of the logits' range."""
    worst = 0.0
    for ids, got in logits:
        whole = torch.tensor([ids], device=network.device)
        wanted = network.model(input_ids=whole).logits[0, -1].to(network.device).float()
        scale = (wanted.max() - wanted.min()).clamp(min=1e-6)
        worst = max(worst, float((got.float() - wanted).abs().max() / scale))
    return worst if worst == worst else float("inf")


def _fed(network: Network, cache: RaggedCache, prompts: Sequence[list[int]]) -> Tensor:
    """Feed a prompt to each row of a cache; return the logits behind them, [rows, vocab]."""
    device, count, longest = network.device, len(prompts), max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    starts = torch.zeros(count, dtype=torch.long, device=device)
    with cache.at(rows=range(count), slots=0, limit=longest):
        logits = network.forward(
            ids.to(device),
            positions=torch.arange(longest, device=device).expand(count, -1),
            mask=causal_masks(network.windows, starts, longest, longest, dtype=network.dtype),
            cache=cache,
        )
    return torch.stack(
        [of_row[len(prompt) - 1] for of_row, prompt in zip(logits, prompts, strict=True)]
    )


@torch.inference_mode()
def ragged_error(network: Network) -> float:
    """Return how far a ragged cache is from plain recomputation on a few tokens.

    Two rows of different length hold two branches each. A model that does not do what position
    ids and masks say, as with ALiBi, sees its tokens at the wrong distance and differs.
    """
    prompts, branches = _probe(network)
    device, longest = network.device, max(map(len, prompts))
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = RaggedCache(network.num_layers)
    cache.resize(2, longest + 4)
    _fed(network, cache, prompts)
    tree = TreeMask(
        network.windows, ends, 2, longest + 4, groups=network.groups, dtype=network.dtype
    )
    logits = []
    for step in range(2):
        tree.advance()
        slots = ends[:, None] + 2 * step + torch.arange(2, device=device)
        with cache.at(rows=range(2), slots=slots, limit=longest + 4):
            got = network.forward(
                branches[:, :, step],
                positions=(ends + step)[:, None].expand(-1, 2),
                mask=tree.read(0, 2, longest + 4),
                cache=cache,
            )
        logits += [
            (prompts[row] + branches[row, branch, : step + 1].tolist(), got[row, branch])
            for row in range(2)
            for branch in range(2)
        ]
    return _deviation(network, logits)


@torch.inference_mode()
def snapshot_error(network: Network) -> float:
    """Return how far copies of the model's own cache are from plain recomputation."""
    prompts, branches = _probe(network)
    device = network.device
    prompt, drafted = prompts[0], branches[0]
    _, cache = network.advance(torch.tensor([prompt], device=device), None)
    copies = copy.deepcopy(cache)
    copies.reorder_cache(torch.zeros(2, dtype=torch.long, device=device))
    logits = []
    for step in range(2):
        got, copies = network.advance(drafted[:, step, None], copies)
        logits += [(prompt + drafted[at, : step + 1].tolist(), got[at]) for at in range(2)]
    copies.reorder_cache(torch.tensor([1], device=device))
    last = branches[1, 0, :1]
    got, _ = network.advance(last[None], copies)
    logits.append((prompt + drafted[1].tolist() + last.tolist(), got[0]))
    got, _ = network.advance(last[None], cache)
    logits.append((prompt + last.tolist(), got[0]))
    return _deviation(network, logits)


def _probed(
    network: Network, prompts: Sequence[list[int]], runner: Runner
) -> tuple[Stage, Callable[[], None]]:
    """Return a stage for rounds behind two prompts, and what begins one, with likeliest tokens."""
    limit = _bucket(max(map(len, prompts))) + 16
    cache = RaggedCache(network.num_layers)
    cache.resize(2, limit + 1)
    logits = _fed(network, cache, prompts).float()
    greedy, lengths = [Sampling(temperature=0)] * 2, list(map(len, prompts))
    stage = Stage(network, cache, logits, Shape(2, 2, 8, limit), greedy, runner)
    return stage, lambda: stage.begin(lengths, torch.ones((2, 2, 8)), greedy, prompts)


@torch.inference_mode()
def asks(network: Network) -> bool:
    """Whether the host waits for the device in a step, or brings it something."""
    stage, begin = _probed(network, _probe(network)[0], Runner(""))
    begin()
    stage.first()
    listener = Listener()  # type: ignore[no-untyped-call]
    with listener:
        stage.step()
    return listener.heard


@torch.inference_mode()
def replay_error(network: Network, runner: Runner) -> float:
    """Return how far steps that a runner has recorded are from plain recomputation.

    Two rows of different length draw the likeliest tokens in three rounds, the last of which is
    replayed. As far as a token that was drawn is below the likeliest, in units of the logits'
    range, so far are they.
    """
    prompts, _ = _probe(network)
    stage, begin = _probed(network, prompts, runner)
    for _ in range(3):
        begin()
        stage.first()
        for _ in range(3):
            stage.step()
    worst = 0.0
    for prompt, branches in zip(prompts, stage.drawn[:, :, :4].tolist(), strict=True):
        for drawn in branches:
            whole = torch.tensor([prompt + [max(0, token) for token in drawn[:-1]]])
            plain = network.model(input_ids=whole.to(network.device)).logits[0, -4:]
            plain = plain.to(network.device).float().masked_fill(network.hidden, -torch.inf)
            picked = plain[range(4), drawn]
            scale = plain.amax(-1) - plain.masked_fill(network.hidden, torch.inf).amin(-1)
            below = float(((plain.amax(-1) - picked) / scale.clamp(min=1e-6)).max())
            worst = max(worst, below) if below == below else float("inf")
    stage.drop()
    return worst
