"""What the queries of a round see: masks that are added to attention scores.

Knows slots and positions; nothing of tokens, of sampling or of who asks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


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
        windows: Mapping[str, int | None],
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
    windows: Mapping[str, int | None],
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
