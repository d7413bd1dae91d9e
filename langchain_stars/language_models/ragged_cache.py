"""A KV cache whose rows have lengths of their own, and the attention and masks that read it.

One row is one reply: its prompt is stored once, and M candidate branches are M query positions
behind it, each of which sees the prefix and its own branch alone. Rejecting a candidate costs
nothing, for the next round overwrites its slots; keeping one copies its slots behind the prefix.

Knows slots, positions and masks; nothing of tokens, of sampling or of who asks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with each group of query heads folded into the query length.

    Stock attention copies keys and values once for every query head whenever there is a mask
    and more than one query; this reads each of them once.
    """
    rows, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and queries > 1 and causal:
        # A causal mask belongs to the queries themselves: slots behind them hold nothing yet.
        key, value = key[:, :, :queries], value[:, :, :queries]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
            enable_gqa=groups > 1,
        )
        return out.transpose(1, 2).contiguous(), None
    if groups > 1:
        query = query.reshape(rows, key.shape[1], groups * queries, query.shape[-1])
        if attention_mask is not None and attention_mask.shape[1] > 1:
            attention_mask = attention_mask.expand(rows, heads, queries, key.shape[2])
            attention_mask = attention_mask.reshape(rows, -1, groups * queries, key.shape[2])
        elif attention_mask is not None and queries > 1:
            attention_mask = attention_mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make `attn_implementation="packed_sdpa"` known to transformers."""
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


class _Target:
    """Where the next forward pass writes and how far it reads; one for all layers of a cache."""

    __slots__ = ("first", "index", "last", "limit", "rows", "slot", "slots")

    def __init__(self) -> None:
        self.rows = 0
        self.slots = 0
        self.first = 0
        self.last = 0
        self.limit = 0
        self.slot: int | None = 0
        self.index: Tensor | None = None


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, slots, heads, size], written where the cache says."""

    is_sliding = False
    is_compileable = False  # a mask is given, or none is needed: transformers shall make none
    is_croppable = False

    def __init__(self, target: _Target) -> None:
        super().__init__()
        self.target = target

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.target.rows, self.target.slots)
        # Zeros, because attention multiplies what it does not see by zero, and 0 * nan is nan.
        self.keys = key_states.new_zeros(*shape, key_states.shape[1], key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        to = self.target
        rows = slice(to.first, to.last)
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            states = states.transpose(1, 2)
            if to.slot is not None:
                stored[rows, to.slot : to.slot + states.shape[1]] = states
            else:
                assert to.index is not None
                stored.flatten(0, 1).index_copy_(
                    0, to.index.to(stored.device), states.flatten(0, 1)
                )
        return (
            self.keys[rows, : to.limit].transpose(1, 2),
            self.values[rows, : to.limit].transpose(1, 2),
        )

    def get_seq_length(self) -> int:
        return 0  # positions and masks are given; what transformers would derive is not wanted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.target.limit, 0

    def get_max_length(self) -> int:
        return self.target.slots

    def resize(self, rows: int, slots: int) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            if old.shape[:2] == (rows, slots):
                continue
            new = old.new_zeros(rows, slots, *old.shape[2:])
            kept = (slice(min(rows, old.shape[0])), slice(min(slots, old.shape[1])))
            new[kept] = old[kept]
            setattr(self, name, new)


class RaggedCache(Cache):
    """Keys and values of all layers, for rows that advance apart.

    Args:
        num_layers: Layers of the model.
        rows: Rows that there is room for.
        slots: Slots of a row.
    """

    def __init__(self, num_layers: int, rows: int, slots: int) -> None:
        self.target = _Target()
        self.target.rows, self.target.slots = rows, slots
        super().__init__(layers=[RaggedLayer(self.target) for _ in range(num_layers)])

    @property
    def num_rows(self) -> int:
        """Number of rows that there is room for."""
        return self.target.rows

    @property
    def num_slots(self) -> int:
        """Number of slots of a row."""
        return self.target.slots

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take, in bytes."""
        return sum(
            stored.numel() * stored.element_size()
            for layer in self.layers
            if layer.is_initialized
            for stored in (layer.keys, layer.values)
        )

    def aim(
        self,
        first: int,
        last: int,
        limit: int,
        slot: int | None = None,
        index: Tensor | None = None,
    ) -> None:
        """Say where the next forward pass writes and reads.

        Args:
            first: First row of its batch.
            last: Row after the last.
            limit: Slots that attention reads, from 0.
            slot: Slot that the first query of every row writes; the others follow it.
            index: Instead of `slot`, `row * num_slots + slot` of every query of every row.
        """
        to = self.target
        to.first, to.last, to.limit, to.slot, to.index = first, last, limit, slot, index

    def resize(self, rows: int, slots: int) -> None:
        """Make room for `rows` rows of `slots` slots, layer by layer, keeping what fits.

        Raises:
            MemoryError: There is no memory for it (or torch's own error that says so); the layers
                have then different sizes, and the cache must be thrown away.
        """
        for layer in self.layers:
            layer.resize(rows, slots)
        self.target.rows, self.target.slots = rows, slots

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy keys and values between slots, each given as `row * num_slots + slot`."""
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            for stored in (layer.keys, layer.values):
                flat = stored.flatten(0, 1)
                taken = flat.index_select(0, source.to(flat.device))
                flat.index_copy_(0, target.to(flat.device), taken)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of a row to another row."""
        for layer in self.layers:
            if layer.is_initialized:
                for stored in (layer.keys, layer.values):
                    stored[target, :length] = stored[source, :length]

    def swap_rows(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` slots of two rows."""
        for layer in self.layers:
            if layer.is_initialized:
                for stored in (layer.keys, layer.values):
                    held = stored[one, :length].clone()
                    stored[one, :length] = stored[other, :length]
                    stored[other, :length] = held


class TreeMask:
    """Additive masks of a round, one for each kind of layer, brought forward step by step.

    A query of branch i at step j sees its row's prefix and the tokens 0 ... j of branch i; under
    a sliding window only those of them that are nearer than the window.

    Args:
        windows: Kind of layer and its sliding window; None sees everything.
        lengths: Length of each row's prefix.
        branches: Branches of a row.
        steps: Most steps of the round.
        dtype: Of the masks.
        device: Of the masks.
    """

    def __init__(
        self,
        windows: dict[str, int | None],
        lengths: Sequence[int],
        branches: int,
        steps: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._windows = windows
        self._branches = branches
        self._lengths = torch.tensor(lengths, device=device)[:, None, None]
        self._own = torch.arange(branches, device=device)[None, :, None]
        capacity = max(lengths) + branches * steps
        slots = torch.arange(capacity, device=device)
        hidden = torch.full((), -torch.inf, dtype=dtype, device=device)
        seen = torch.zeros((), dtype=dtype, device=device)
        self._masks: dict[str, Tensor] = {}
        for kind, window in windows.items():
            visible = slots < self._lengths
            if window is not None:
                # The first step's query stands at the prefix's length and sees `window` with itself.
                visible = visible & (slots > self._lengths - window)
            mask = torch.where(visible, seen, hidden).expand(-1, branches, -1)
            self._masks[kind] = mask.contiguous()

    def advance(self, step: int) -> None:
        """Let every branch see its token of `step`, and no more what its window has left."""
        own = self._lengths + step * self._branches + self._own
        for kind, window in self._windows.items():
            mask = self._masks[kind]
            own_of_all = own.expand(mask.shape[0], -1, -1)
            if window is not None:
                left = step - window  # the position that the window leaves, from the prefix's end
                if left >= 0:
                    gone = self._lengths + left * self._branches + self._own
                else:
                    gone = (self._lengths + left).expand(-1, self._branches, -1)
                    # A row shorter than the window leaves nothing: its own slot is seen next.
                    gone = torch.where(gone >= 0, gone, own)
                mask.scatter_(2, gone, -torch.inf)
            mask.scatter_(2, own_of_all, 0.0)

    def read(self, first: int, last: int, limit: int) -> Tensor | dict[str, Tensor]:
        """Return the masks [rows, 1, branches, limit] of some rows; a dictionary if there are kinds."""
        masks = {kind: mask[first:last, None, :, :limit] for kind, mask in self._masks.items()}
        return next(iter(masks.values())) if len(masks) == 1 else masks


def causal_masks(
    windows: dict[str, int | None],
    starts: Sequence[int],
    queries: int,
    limit: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | dict[str, Tensor]:
    """Return masks [rows, 1, queries, limit] for rows fed with `queries` tokens behind `starts`."""
    slots = torch.arange(limit, device=device)
    at = torch.tensor(starts, device=device)[:, None] + torch.arange(queries, device=device)
    at = at[:, None, :, None]
    masks = {}
    for kind, window in windows.items():
        visible = slots <= at
        if window is not None:
            visible = visible & (slots > at - window)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        masks[kind] = mask.masked_fill_(~visible, -torch.inf)
    return next(iter(masks.values())) if len(masks) == 1 else masks
