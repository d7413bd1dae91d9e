"""KV of rows that advance apart: every row writes, reads and moves where it is told to.

Knows tensors only; nothing of tokens, rewards or sampling. A row is one reply: its prompt and its
accepted tokens fill the slots from 0 on, slot after slot, and candidates lie behind them. What a
query sees is written down as three numbers, `depth`, `start` and `slot`: the first `depth` slots
(what it continues) and its own run from `start` to `slot`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import sdpa_mask

ATTENTION = "ragged_sdpa"
"""Name of the attention, for `attn_implementation`, that never widens keys to all query heads."""


@dataclass(slots=True)
class _Place:
    """Where the forward pass that runs now writes and reads.

    Attributes:
        rows: Rows of the buffers, one for each row of the batch; a slice where they are adjacent.
        slots: Slot that each query writes, [batch, queries]; or the one that the first query of
            every row writes, where the rows are adjacent and the other queries follow it.
        limit: Number of slots that are read.
    """

    rows: slice | Tensor
    slots: Tensor | int
    limit: int


class RaggedLayer(StaticLayer):
    """One layer's keys and values, [rows, heads, slots, size]."""

    is_croppable = False
    # A mask is given or none is needed: where this were true, transformers would make its own.
    is_compileable = False

    def __init__(self, cache: "RaggedCache") -> None:
        super().__init__(max_cache_len=0)
        self._cache = cache

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values, or nothing before the first forward pass."""
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for the heads, size, type and device of what is written first."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, slots = self._cache.num_rows, self._cache.num_slots
        self.keys = key_states.new_zeros((rows, key_states.shape[1], slots, key_states.shape[-1]))
        self.values = value_states.new_zeros(
            (rows, value_states.shape[1], slots, value_states.shape[-1])
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of the queries to their slots; return what is read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self._cache.place
        assert place is not None
        assert self.keys is not None
        assert self.values is not None
        if isinstance(place.rows, slice):
            read = []
            for buffer, states in ((self.keys, key_states), (self.values, value_states)):
                window = buffer[place.rows]
                if isinstance(place.slots, int):
                    window[:, :, place.slots : place.slots + states.shape[2]] = states
                else:
                    slots = place.slots.to(states.device)
                    index = slots[:, None, :, None].expand(states.shape)
                    window.scatter_(2, index, states.to(buffer.dtype))
                read.append(window[:, :, : place.limit])
            return read[0], read[1]
        assert isinstance(place.slots, Tensor)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            # Two index tensors around a slice put their axes first: [batch, queries, heads, size].
            buffer[place.rows[:, None], :, place.slots] = states.to(buffer.dtype).transpose(1, 2)
        return (
            self.keys[:, :, : place.limit].index_select(0, place.rows),
            self.values[:, :, : place.limit].index_select(0, place.rows),
        )

    def get_seq_length(self) -> int:
        """Return 0: positions are always given, and differ from row to row."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of slots of a row."""
        return self._cache.num_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of slots that are read, and no offset."""
        place = self._cache.place
        return (place.limit if place is not None else self._cache.num_slots), 0


class RaggedCache(Cache):
    """Keys and values of rows that advance apart.

    Attributes:
        num_rows: Rows that there is room for.
        num_slots: Slots of each row.
        place: Where the forward pass that runs now writes and reads.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_rows = 0
        self.num_slots = 0
        self.place: _Place | None = None
        self._layers = [RaggedLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._layers))

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(
            buffer.numel() * buffer.element_size()
            for layer in self._layers
            for buffer in layer.buffers
        )

    def resize(self, num_rows: int, num_slots: int) -> None:
        """Give the rows other room, layer by layer, keeping what fits.

        Where memory ends on the way, the layers differ and the cache must be thrown away.
        """
        if (num_rows, num_slots) == (self.num_rows, self.num_slots):
            return
        for layer in self._layers:
            _resize(layer, num_rows, num_slots)
        self.num_rows, self.num_slots = num_rows, num_slots

    @contextmanager
    def at(self, *, rows: Sequence[int], slots: Tensor | int, limit: int) -> Iterator[None]:
        """Say where the forward pass inside writes and reads.

        Args:
            rows: Row of each row of the batch, each once; adjacent ones are not copied to be read.
            slots: Slot that each query writes, [batch, queries]; two of a row are the same only
                where the queries are. Of adjacent rows also a number: the slot of every row's
                first query, which the others follow.
            limit: Number of slots that are read, above every slot written.
        """
        chosen: slice | Tensor = slice(rows[0], rows[-1] + 1)
        if list(rows) != list(range(rows[0], rows[-1] + 1)):
            assert isinstance(slots, Tensor)
            chosen = torch.tensor(list(rows), device=slots.device)
        self.place = _Place(chosen, slots, limit)
        try:
            yield
        finally:
            self.place = None

    def move(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy slots of rows: entry after entry, `source` of a row to `target`, [entries].

        A kept branch becomes the row's continuation. The copy is whole before any slot is
        written, so that the two may overlap.
        """
        for layer in self._layers:
            for buffer in layer.buffers:
                buffer[rows, :, target] = buffer[rows, :, source]

    def copy_row(self, source: int, target: int, *, num_slots: int) -> None:
        """Copy the first slots of a row to another."""
        for layer in self._layers:
            for buffer in layer.buffers:
                buffer[target, :, :num_slots] = buffer[source, :, :num_slots]

    def take(self, row: int, *, num_slots: int) -> list[Tensor]:
        """Return a copy of the first slots of a row: keys and values of each layer in turn."""
        return [
            buffer[row, :, :num_slots].clone() for layer in self._layers for buffer in layer.buffers
        ]

    def put(self, row: int, states: Sequence[Tensor], *, num_slots: int) -> None:
        """Write what was taken of a row, or its first slots, to the first slots of a row."""
        pairs = zip(states[::2], states[1::2], strict=True)
        for layer, (keys, values) in zip(self._layers, pairs, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            for buffer, state in zip(layer.buffers, (keys, values), strict=True):
                buffer[row, :, :num_slots] = state[:, :num_slots]

    def clear_row(self, row: int) -> None:
        """Fill a row with zeros: what is not finite reaches other queries through any mask."""
        for layer in self._layers:
            for buffer in layer.buffers:
                buffer[row] = 0

    def is_finite(self, row: int) -> bool:
        """Whether a row holds nothing but finite numbers."""
        sums = (
            buffer[row].sum(dtype=torch.float32)
            for layer in self._layers
            for buffer in layer.buffers
        )
        return all(bool(total.isfinite()) for total in sums)

    def swap_rows(self, one: int, other: int, *, num_slots: int) -> None:
        """Exchange the first slots of two rows."""
        for layer in self._layers:
            for buffer in layer.buffers:
                held = buffer[one, :, :num_slots].clone()
                buffer[one, :, :num_slots] = buffer[other, :, :num_slots]
                buffer[other, :, :num_slots] = held


def _resize(layer: RaggedLayer, num_rows: int, num_slots: int) -> None:
    if not layer.is_initialized:
        return
    for name in ("keys", "values"):
        old: Tensor = getattr(layer, name)
        rows, heads, slots, size = old.shape
        if (rows, slots) == (num_rows, num_slots):
            continue
        new = old.new_zeros((num_rows, heads, num_slots, size))
        rows, slots = min(rows, num_rows), min(slots, num_slots)
        new[:rows, :, :slots] = old[:rows, :, :slots]
        setattr(layer, name, new)


def tree_mask(
    depth: Tensor, start: Tensor, slot: Tensor, *, limit: int, window: int | None = None
) -> Tensor:
    """Return what each query sees, [batch, 1, queries, limit].

    A query sees the first `depth` slots, and its own run from `start` to `slot`, itself included.

    Args:
        depth: Number of slots that it continues, [batch, queries].
        start: Slot of the first token of its run, at least `depth`.
        slot: Its own slot, at least `start`.
        limit: Number of slots that are read.
        window: How many positions back, its own counted, a layer with a sliding window sees.
    """
    every = torch.arange(limit, device=slot.device)
    depth, start, slot = depth[..., None], start[..., None], slot[..., None]
    if window is None:
        seen = (every < depth) | ((every >= start) & (every <= slot))
    else:
        position = depth + slot - start
        seen = ((every < depth) & (every > position - window)) | (
            (every >= start) & (every <= slot) & (every > slot - window)
        )
    return seen[:, None]


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, with the query heads that share a key head folded into the length of the query.

    Masked attention over grouped heads would else copy keys and values for every query head. The
    mask may be folded already, group after group; where a layer has other groups, it is folded anew.
    """
    batch, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and queries > 1 and causal:
        # Causal among the queries themselves, which begin at the first slot: behind them is nothing.
        out = F.scaled_dot_product_attention(
            query,
            key[:, :, :queries],
            value[:, :, :queries],
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
            enable_gqa=groups > 1,
        )
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None and queries > 1 and attention_mask.shape[2] != groups * queries:
        attention_mask = attention_mask[:, :, :queries, : key.shape[2]]
        if groups > 1:
            attention_mask = attention_mask.expand(-1, 1, queries, -1).repeat(1, 1, groups, 1)
    if groups > 1:
        query = query.reshape(batch, key.shape[1], groups * queries, size)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


# Where nobody has said otherwise, of the kernels of a GPU those that take every length as it comes:
# torch prefers cuDNN's on Hopper, which are compiled anew for each number of queries and slots.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
os.environ.setdefault("TORCH_CUDNN_SDPA_PREFERRED", "0")  # what torch 2.9 and 2.10 look at

AttentionInterface.register(ATTENTION, packed_sdpa)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
