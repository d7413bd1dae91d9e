"""What the queries of a round see: masks that are added to attention scores.

Knows slots and positions; nothing of tokens, of sampling or of who asks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class TreeMask:
    """Additive masks of a round, one for each kind of layer, brought forward step by step.

    A query of branch i at step j sees its row's prefix and the tokens 0 ... j of branch i; under
    a sliding window only those of them that are nearer than the window. The masks, and the number
    of the step, stay where they are on the device and are written in place.

    Args:
        windows: Kind of layer and its sliding window; None sees everything.
        lengths: Length of each row's prefix, [rows]; read anew whenever a round begins.
        branches: Branches of a row.
        limit: Number of slots that are read. Where it is a multiple of 8, kernels on CUDA take the
            mask as it lies; else they copy it at every layer.
        groups: Query heads that share a key head, where the attention takes a mask with the groups
            folded into the queries; it is then the same at every layer, and copied at none.
        dtype: Of the masks; kernels on CUDA want that of the queries.
    """

    def __init__(
        self,
        windows: Mapping[str, int | None],
        lengths: Tensor,
        branches: int,
        limit: int,
        *,
        groups: int = 1,
        dtype: torch.dtype,
    ) -> None:
        device = lengths.device
        groups = groups if branches > 1 else 1  # one query alone is spread over all heads
        self._windows = windows
        self._branches = branches
        self._lengths = lengths[:, None, None]
        self._own = torch.arange(branches, device=device).repeat(groups)[None, :, None]
        self._slots = torch.arange(limit, device=device)
        self._step = torch.zeros((), dtype=torch.long, device=device)
        shape = (len(lengths), groups * branches, limit)
        self._masks = {kind: torch.empty(shape, dtype=dtype, device=device) for kind in windows}
        self.begin()

    def begin(self) -> None:
        """Let every branch see its row's prefix alone, as before the first step of a round."""
        self.rewind()
        for kind, window in self._windows.items():
            visible = self._slots < self._lengths
            if window is not None:
                # The first step's query stands at the prefix's length and sees `window` with itself.
                visible = visible & (self._slots > self._lengths - window)
            self._masks[kind].zero_().masked_fill_(~visible, -torch.inf)

    def rewind(self) -> None:
        """Count steps from the first one again; what is seen stays."""
        self._step.zero_()

    def advance(self) -> None:
        """Let every branch see its token of the next step, and no more what its window has left."""
        step = self._step
        own = self._lengths + step * self._branches + self._own
        for kind, window in self._windows.items():
            mask = self._masks[kind]
            if window is not None:
                left = step - window  # the position that the window leaves, from the prefix's end
                gone = torch.where(left >= 0, own - window * self._branches, self._lengths + left)
                # A row shorter than the window leaves nothing: its own slot is seen next.
                mask.scatter_(2, torch.where(gone >= 0, gone, own), -torch.inf)
            mask.scatter_(2, own, 0.0)
        step.add_(1)

    def read(self, first: int, last: int, limit: int) -> Tensor | dict[str, Tensor]:
        """Return the masks [rows, 1, queries, limit] of some rows; a dictionary if there are kinds."""
        masks = {kind: mask[first:last, None, :, :limit] for kind, mask in self._masks.items()}
        return next(iter(masks.values())) if len(masks) == 1 else masks


def causal_masks(
    windows: Mapping[str, int | None],
    starts: Tensor,
    queries: int,
    limit: int,
    *,
    dtype: torch.dtype,
) -> Tensor | dict[str, Tensor]:
    """Return masks [rows, 1, queries, limit] for rows fed with `queries` tokens behind `starts`."""
    device = starts.device
    slots = torch.arange(limit, device=device)
    at = (starts[:, None] + torch.arange(queries, device=device))[:, None, :, None]
    masks = {}
    for kind, window in windows.items():
        visible = slots <= at
        if window is not None:
            visible = visible & (slots > at - window)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        masks[kind] = mask.masked_fill_(~visible, -torch.inf)
    return next(iter(masks.values())) if len(masks) == 1 else masks
