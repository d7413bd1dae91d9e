"""Reads candidates with a causal model that keeps what it has read of every reply.

Knows token ids and per-token outputs of a model; nothing of text, labels or rewards. A row holds
the prompt and the accepted tokens of one reply; all candidates of a request are queries of that
one row, each of which sees the row up to where its candidate leaves it, and its own candidate.
"""

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from langchain_stars.packing import free_cached
from langchain_stars.prompts import PromptStore
from langchain_stars.ragged_cache import RaggedCache, tree_mask

_log = logging.getLogger(__name__)

_LEAST_TOKENS = 16
_MOST_SEEN = 1 << 24  # entries of a mask
_ROW_STEPS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


@dataclass(slots=True)
class Counters:
    """What was computed.

    Attributes:
        prompt_tokens: Tokens of prompts.
        reused_tokens: Tokens of prompts that were found read for another reply.
        candidate_tokens: Tokens of candidates, with those that close a finished one.
        refed_tokens: Accepted tokens that had to be read again, as candidates they were not.
        forwards: Forward passes.
        backoffs: How often memory ended, and less was read at once or stored.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    candidate_tokens: int = 0
    refed_tokens: int = 0
    forwards: int = 0
    backoffs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is to be read of one reply; ids are those of the reply, without its prompt.

    Attributes:
        subject: The reply, compared by identity.
        lane: Replies of one lane are read together.
        prompt_ids: The prompt; always the same for a reply.
        accepted_ids: What has been kept of the reply.
        candidates: The ids of each candidate, from the reply's first token on.
        partition: Name under which what is read may be shared with other replies; none shares.
    """

    subject: object
    lane: str
    prompt_ids: Sequence[int]
    accepted_ids: Sequence[int]
    candidates: Sequence[Sequence[int]]
    partition: str = ""


@dataclass(slots=True)
class _Branch:
    """A candidate whose tokens still lie in the slots behind its row.

    Attributes:
        depth: Tokens of the reply that it shares with the row.
        ids: Its own tokens.
        slot: Slot of the first of them.
        outputs: The model's output at each of them, [tokens, outputs].
    """

    depth: int
    ids: tuple[int, ...]
    slot: int
    outputs: Tensor


@dataclass(slots=True)
class _Row:
    """What was read of one reply.

    Attributes:
        index: Row of the buffers.
        prompt_ids: Tokens of the prompt.
        partition: Name under which they and those of the reply may be shared.
        prompt_output: Output at the last token of the prompt that is no padding, [outputs]; None
            where there is no prompt.
        ids: Tokens of the reply that fill the slots behind the prompt.
        outputs: Output at each of them.
        branches: Candidates whose slots have not been used again.
    """

    index: int
    subject: "weakref.ref[object]"
    prompt_ids: tuple[int, ...] = ()
    partition: str = ""
    prompt_output: Tensor | None = None
    ids: tuple[int, ...] = ()
    outputs: Tensor | None = None
    branches: list[_Branch] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def end(self) -> int:
        """The slot behind everything that may still be used."""
        ends = [branch.slot + len(branch.ids) for branch in self.branches]
        return max([self.num_prompt + len(self.ids), *ends])


@dataclass(slots=True)
class _Run:
    """Tokens that follow one another, each of which sees `depth` slots and those before it."""

    ids: tuple[int, ...]
    depth: int
    slot: int


@dataclass(slots=True)
class _Plan:
    """What is fed to a row for a reading.

    Attributes:
        row: The row.
        prompt_ids: What must be read of its prompt.
        stored: Keys and values of what stands before that, where it is known from another reply.
        kept: Tokens that the row holds when the plan has been carried out.
        num_known: How many of those it holds before.
        branches: Depth, own tokens and first slot of each candidate, in order.
        runs: Everything that is fed, in an order in which each token comes after what it sees.
    """

    row: _Row
    prompt_ids: tuple[int, ...]
    kept: tuple[int, ...]
    num_known: int
    stored: list[Tensor] = field(default_factory=list)
    branches: list[tuple[int, tuple[int, ...], int]] = field(default_factory=list)
    runs: list[_Run] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    num_done: int = 0

    @property
    def finite(self) -> bool:
        """Whether the model's output at everything fed is a number."""
        return all(bool(outputs.isfinite().all()) for outputs in self.outputs)

    @property
    def num_tokens(self) -> int:
        """Number of tokens fed."""
        return sum(len(run.ids) for run in self.runs)

    @property
    def end(self) -> int:
        """The slot behind the last one written."""
        return max((run.slot + len(run.ids) for run in self.runs), default=0)


class _Lane:
    """The rows of one lane and their buffers."""

    def __init__(self, num_layers: int) -> None:
        self.cache = RaggedCache(num_layers)
        self.rows: list[_Row] = []
        self.of_subject: weakref.WeakKeyDictionary[Any, _Row] = weakref.WeakKeyDictionary()

    def add(self, subject: object) -> _Row:
        row = _Row(index=len(self.rows), subject=weakref.ref(subject))
        self.rows.append(row)
        self.of_subject[subject] = row
        return row

    def drop(self, row: _Row) -> None:
        """Free a row; the last one takes its place, so that rows stay adjacent."""
        subject = row.subject()
        if subject is not None and self.of_subject.get(subject) is row:
            del self.of_subject[subject]
        last = self.rows.pop()
        if last is not row:
            # A row that has never been fed may lie beyond the buffers.
            if last.index < self.cache.num_rows and row.index < self.cache.num_rows:
                self.cache.copy_row(last.index, row.index, num_slots=last.end)
            last.index = row.index
            self.rows[row.index] = last

    def sweep(self) -> None:
        """Free the rows of replies that are gone without having been released."""
        for row in [row for row in self.rows if row.subject() is None]:
            self.drop(row)

    def make_room(self, num_slots: int) -> None:
        num_rows = len(self.rows)
        rows = next((step for step in _ROW_STEPS if step >= num_rows), -(-num_rows // 32) * 32)
        step = 64 if num_slots <= 1024 else 256
        slots = -(-num_slots // step) * step
        self.cache.resize(max(rows, self.cache.num_rows), max(slots, self.cache.num_slots))


class PackedModel:
    """A causal model that reads the candidates of many replies in one forward pass.

    Args:
        body: Called with input ids, a mask, position ids and a cache; returns hidden states as
            `last_hidden_state`.
        head: Called with hidden states, [batch, queries, size]; returns what is wanted of each
            token, [batch, queries, outputs].
        num_layers: Layers of the model.
        windows: Sliding window of each kind of layer, None where a layer sees everything.
        pad_token_id: The token that the plain model takes for padding and passes over when it
            looks for the last token of a text.
        device: Device of the model.
        max_tokens: Most tokens of a forward pass, padding included.
        prompt_bytes: Most memory for prompts that later replies may begin with; 0 keeps none.

    Attributes:
        counters: What was computed.
        prompts: What is kept for later replies.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        head: Callable[[Tensor], Tensor],
        *,
        num_layers: int,
        windows: Mapping[str, int | None],
        pad_token_id: int | None,
        device: torch.device,
        max_tokens: int = 4096,
        prompt_bytes: int = 0,
    ) -> None:
        self._body = body
        self._head = head
        self._num_layers = num_layers
        self._windows = dict(windows)
        self._pad = pad_token_id
        self._device = device
        self._max_tokens = max(max_tokens, _LEAST_TOKENS)
        self._lanes: dict[str, _Lane] = {}
        self.counters = Counters()
        self.prompts = PromptStore(prompt_bytes)

    @property
    def num_rows(self) -> int:
        """Replies that something is kept of."""
        return sum(len(lane.rows) for lane in self._lanes.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values of replies; those of stored prompts are `prompts.num_bytes`."""
        return sum(lane.cache.num_bytes for lane in self._lanes.values())

    def read(self, readings: Sequence[Reading]) -> list[list[Tensor]]:
        """Return, for each reading and candidate, the output at its last token, [outputs] in fp32.

        That is the last one of prompt and candidate that is no padding, as in the plain model;
        a single NaN where there is no token at all.
        What fails leaves nothing behind of the replies of the call.
        """
        results: dict[int, list[Tensor]] = {}
        pending = list(range(len(readings)))
        while pending:
            # One lane at a time, and of a reply that occurs twice one reading at a time.
            name = readings[pending[0]].lane
            chosen: dict[int, int] = {}
            for index in pending:
                if readings[index].lane == name:
                    chosen.setdefault(id(readings[index].subject), index)
            indices = list(chosen.values())
            pending = [index for index in pending if index not in set(indices)]
            asked = [readings[index] for index in indices]
            results.update(zip(indices, self._read_within_memory(asked), strict=True))
        return [results[index] for index in range(len(readings))]

    def _read_within_memory(self, readings: Sequence[Reading]) -> list[list[Tensor]]:
        """Read; where memory ends, do with less of it.

        Stored prompts are given up first, then all other replies, and then half of these are read
        at a time.
        """
        others = self.num_rows - sum(self._has(reading) for reading in readings)
        try:
            return self._read(readings)
        except BaseException as error:
            for reading in readings:
                self._forget(reading.subject, clean=True)
            may_spare = bool(self.prompts.num_bytes or others or len(readings) > 1)
            if not out_of_memory(error) or not may_spare:
                raise
        # Out here the failed pass and all that it held are gone.
        if self._spares():
            return self._read_within_memory(readings)
        self._backs_off()
        self.clear()
        half = (len(readings) + 1) // 2
        if half == len(readings):
            return self._read_within_memory(readings)
        return [
            *self._read_within_memory(readings[:half]),
            *self._read_within_memory(readings[half:]),
        ]

    def _has(self, reading: Reading) -> bool:
        lane = self._lanes.get(reading.lane)
        return lane is not None and reading.subject in lane.of_subject

    def _spares(self) -> bool:
        """Drop the stored prompts; return whether there were any."""
        held = self.prompts.num_bytes > 0
        if held:
            self.prompts.clear()
            self._backs_off()
        return held

    def _backs_off(self) -> None:
        self.counters.backoffs += 1
        free_cached(str(self._device))

    def _read(self, readings: Sequence[Reading]) -> list[list[Tensor]]:
        lane = self._lanes.setdefault(readings[0].lane, _Lane(self._num_layers))
        lane.sweep()
        moves: list[tuple[int, int, int]] = []
        plans = [self._plan(lane, reading, moves) for reading in readings]
        if moves:
            lane.cache.move(*torch.tensor(moves, device=self._device).T)
        self._feed(lane, plans)
        results = [self._finish(plan) for plan in plans]
        for index, plan in enumerate(plans):
            if not plan.finite:
                self._forget(readings[index].subject, clean=True)
            elif len(plan.prompt_ids) > 1:
                self._store(lane, plan.row, plan.row.prompt_ids)
        for index, (plan, reading) in enumerate(zip(plans, readings, strict=True)):
            if not plan.finite and len(reading.candidates) > 1:
                results[index] = self._read_one_by_one(reading, plan.kept, results[index])
        return results

    def _read_one_by_one(
        self, reading: Reading, kept: tuple[int, ...], results: list[Tensor]
    ) -> list[Tensor]:
        """Read each candidate by itself, where what they continue does not break the model yet."""
        if reading.prompt_ids or kept:
            [[before]] = self._read([replace(reading, candidates=[kept])])
            if not before.isfinite().all():
                return results
        alone = [replace(reading, candidates=[ids]) for ids in reading.candidates]
        return [self._read([each])[0][0] for each in alone]

    def release(self, subject: object) -> None:
        """Drop what was read of a reply; another one of its partition may begin with it."""
        for lane in self._lanes.values():
            row = lane.of_subject.get(subject)
            if row is not None and row.prompt_output is not None:
                self._store(lane, row, row.prompt_ids + row.ids)
        self._forget(subject)

    def _forget(self, subject: object, *, clean: bool = False) -> None:
        """Drop what was read of a reply, and store nothing of it; `clean` what may not be finite."""
        for name, lane in list(self._lanes.items()):
            row = lane.of_subject.get(subject)
            if row is not None:
                if clean and row.index < lane.cache.num_rows:
                    # Through a mask, too, what is not finite reaches every later token of its row.
                    lane.cache.clear_row(row.index)
                lane.drop(row)
            if not lane.rows:
                del self._lanes[name]

    def clear(self) -> None:
        """Drop everything that was read, but for what is stored."""
        self._lanes.clear()

    # What is shared

    def _store(self, lane: _Lane, row: _Row, ids: tuple[int, ...]) -> None:
        """Store what the first slots of a row hold, if that is allowed, new, finite and fits."""
        cache = lane.cache
        size = cache.num_bytes // max(cache.num_rows * cache.num_slots, 1)
        if size * len(ids) > self.prompts.max_bytes or not self.prompts.wants(row.partition, ids):
            return
        try:
            states = cache.take(row.index, num_slots=len(ids))
            finite = all(bool(state.isfinite().all()) for state in states)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self.counters.backoffs += 1  # what is not stored is only read again
            return
        if finite:
            self.prompts.put(row.partition, ids, states)

    def _recall(self, partition: str, ids: tuple[int, ...]) -> tuple[int, list[Tensor]]:
        """Return how many of a prompt's tokens need not be read, and their keys and values."""
        # The last one that is no padding is read, for the output there.
        wanted = ids[: max(self._last(ids), 0)]
        if not partition or not wanted:
            return 0, []
        return self.prompts.find(partition, wanted)

    # What is fed

    def _plan(self, lane: _Lane, reading: Reading, moves: list[tuple[int, int, int]]) -> _Plan:
        row = lane.of_subject.get(reading.subject)
        prompt_ids: tuple[int, ...] = ()
        stored: list[Tensor] = []
        if row is None:
            row = lane.add(reading.subject)
            row.prompt_ids = tuple(reading.prompt_ids)
            row.partition = reading.partition
            num_stored, stored = self._recall(reading.partition, row.prompt_ids)
            prompt_ids = row.prompt_ids[num_stored:]
        num_prompt = row.num_prompt
        candidates = [tuple(ids) for ids in reading.candidates]
        accepted = tuple(reading.accepted_ids)
        # With another tokenizer no candidate may begin with all the tokens of what was accepted:
        # its last token grows. Nothing is read that no candidate needs.
        longest = max((_common(accepted, ids) for ids in candidates), default=0)
        kept = accepted[:longest]
        num_known = self._keep(row, kept, moves)
        plan = _Plan(row=row, prompt_ids=prompt_ids, kept=kept, num_known=num_known, stored=stored)
        if prompt_ids:
            begin = num_prompt - len(prompt_ids)
            plan.runs.append(_Run(prompt_ids, begin, begin))
        if len(kept) > num_known:
            row.branches.clear()
            begin = num_prompt + num_known
            plan.runs.append(_Run(kept[num_known:], begin, begin))
        depths = [_common(kept, ids) for ids in candidates]
        total = sum(len(ids) - depth for ids, depth in zip(candidates, depths, strict=True))
        slot = max(row.end, num_prompt + len(kept))
        if slot + total > lane.cache.num_slots:
            row.branches.clear()
            slot = num_prompt + len(kept)
        for ids, depth in zip(candidates, depths, strict=True):
            own = ids[depth:]
            plan.branches.append((depth, own, slot))
            if own:
                plan.runs.append(_Run(own, num_prompt + depth, slot))
            slot += len(own)
        return plan

    def _keep(self, row: _Row, kept: tuple[int, ...], moves: list[tuple[int, int, int]]) -> int:
        """Let a row hold as many of the tokens `kept` as are known; return how many.

        Args:
            row: The row.
            kept: What it is to hold.
            moves: Takes the row, source and target of each slot that must be copied for it.
        """
        num_known = _common(row.ids, kept)
        best: _Branch | None = None
        for branch in row.branches:
            if branch.depth > _common(row.ids, kept):
                continue
            num_of_branch = branch.depth + _common(branch.ids, kept[branch.depth :])
            if num_of_branch > num_known:
                num_known, best = num_of_branch, branch
        if best is not None:
            count = num_known - best.depth
            target = row.num_prompt + best.depth
            moves += ((row.index, best.slot + index, target + index) for index in range(count))
            before = row.outputs[: best.depth] if row.outputs is not None else best.outputs[:0]
            row.outputs = torch.cat([before, best.outputs[:count]])
            row.branches.clear()
        elif num_known < len(row.ids):  # something was taken back
            assert row.outputs is not None
            row.outputs = row.outputs[:num_known]
            row.branches.clear()
        row.ids = kept[:num_known]
        return num_known

    # Feeding it

    def _feed(self, lane: _Lane, plans: Sequence[_Plan]) -> None:
        lane.make_room(max(plan.end for plan in plans))
        for plan in plans:
            if plan.stored:
                count = plan.row.num_prompt - len(plan.prompt_ids)
                lane.cache.put(plan.row.index, plan.stored, num_slots=count)
                plan.stored = []
                self.counters.reused_tokens += count
        pending = sorted((plan for plan in plans if plan.runs), key=lambda plan: plan.row.index)
        queries = {id(plan): self._queries(plan) for plan in pending}
        while pending:
            group = self._group(pending)
            seen = len(group) * max(plan.end for plan in group)
            width = min(
                max(plan.num_tokens - plan.num_done for plan in group),
                max(self._max_tokens // len(group), 1),
                max(_MOST_SEEN // seen, _LEAST_TOKENS),
            )
            try:
                self._forward(lane, group, [queries[id(plan)] for plan in group], width)
            except (MemoryError, RuntimeError) as error:
                may_spare = self.prompts.num_bytes > 0 or self._max_tokens > _LEAST_TOKENS
                if not out_of_memory(error) or not may_spare:
                    raise
            else:
                pending = [plan for plan in pending if plan.num_done < plan.num_tokens]
                continue
            if self._spares():
                continue
            self._max_tokens = max(self._max_tokens // 2, _LEAST_TOKENS)
            self._backs_off()
            _log.warning("out of memory: at most %d tokens at once from now on", self._max_tokens)

    def _group(self, pending: Sequence[_Plan]) -> list[_Plan]:
        """Return the plans of the next forward pass: adjacent rows of about the same width."""
        group: list[_Plan] = []
        widest = total = 0
        for plan in pending:
            count = plan.num_tokens - plan.num_done
            wider = max(widest, count)
            padded = wider * (len(group) + 1)
            if group and (padded > self._max_tokens or padded > 2 * (total + count) + 64):
                break
            group.append(plan)
            widest, total = wider, total + count
        return group

    def _queries(self, plan: _Plan) -> Tensor:
        """Return token, position, depth, first slot and slot of everything fed, [5, queries]."""
        columns: list[list[int]] = [[], [], [], [], []]
        for run in plan.runs:
            count = len(run.ids)
            columns[0] += run.ids
            columns[1] += range(run.depth, run.depth + count)
            columns[2] += [run.depth] * count
            columns[3] += [run.slot] * count
            columns[4] += range(run.slot, run.slot + count)
        return torch.tensor(columns)

    def _forward(
        self, lane: _Lane, group: Sequence[_Plan], queries: Sequence[Tensor], width: int
    ) -> None:
        """Feed the next tokens of some plans, at most `width` of each."""
        counts = [min(width, plan.num_tokens - plan.num_done) for plan in group]
        # A row with fewer tokens repeats its last one, which writes again what it has written.
        batch = torch.stack(
            [
                of_plan[:, plan.num_done + torch.arange(width).clamp(max=count - 1)]
                for plan, of_plan, count in zip(group, queries, counts, strict=True)
            ],
            dim=1,
        )
        limit = int(batch[4].max()) + 1
        ids, positions, depth, start, slot = batch.to(self._device)
        masks = {
            kind: tree_mask(depth, start, slot, limit=limit, window=window)
            for kind, window in self._windows.items()
        }
        mask = next(iter(masks.values())) if len(masks) == 1 else masks
        rows = [plan.row.index for plan in group]
        with lane.cache.at(rows=rows, slots=slot, limit=limit):
            hidden = self._body(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=lane.cache,
                use_cache=True,
            ).last_hidden_state
        outputs = self._head(hidden).float().cpu()
        self.counters.forwards += 1
        for plan, count, of_plan in zip(group, counts, outputs, strict=True):
            plan.outputs.append(of_plan[:count])
            plan.num_done += count

    # Reading it

    def _finish(self, plan: _Plan) -> list[Tensor]:
        """Bring the row up to date and return the output of each candidate."""
        row = plan.row
        outputs = torch.cat(plan.outputs) if plan.outputs else None
        cursor = 0

        def take(count: int) -> Tensor:
            nonlocal cursor
            assert outputs is not None
            cursor += count
            return outputs[cursor - count : cursor]

        if plan.prompt_ids:
            of_prompt = take(len(plan.prompt_ids))
            row.prompt_output = of_prompt[max(self._last(plan.prompt_ids), 0)].clone()
            self.counters.prompt_tokens += len(plan.prompt_ids)
        if len(plan.kept) > plan.num_known:
            more = take(len(plan.kept) - plan.num_known)
            row.outputs = more if row.outputs is None else torch.cat([row.outputs, more])
            self.counters.refed_tokens += len(more)
        row.ids = plan.kept
        results = []
        for depth, own, slot in plan.branches:
            if own:
                of_branch = take(len(own))
                row.branches.append(_Branch(depth, own, slot, of_branch))
                self.counters.candidate_tokens += len(own)
            at, before = self._last(own), self._last(row.ids[:depth])
            if at >= 0:
                results.append(of_branch[at])
            elif before >= 0:
                assert row.outputs is not None
                results.append(row.outputs[before])
            elif row.prompt_output is not None:
                results.append(row.prompt_output)
            else:
                results.append(of_branch[0] if own else torch.tensor([math.nan]))
        return results

    def _last(self, ids: Sequence[int]) -> int:
        """Return the index of the last token that is no padding, or -1."""
        at = len(ids) - 1
        while at >= 0 and ids[at] == self._pad:
            at -= 1
        return at


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common from the first on."""
    count = min(len(one), len(other))
    if one[:count] == other[:count]:
        return count
    return next(index for index in range(count) if one[index] != other[index])


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ended."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error) or "out of memory" in str(error)
    )
