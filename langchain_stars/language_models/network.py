"""A loaded model and what drafting must know of it.

Knows models of transformers and their forward pass; nothing of prefixes, rounds or sampling.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Network:
    """A loaded model and what drafting must know of it.

    Attributes:
        model: The model of transformers.
        device: Where token ids go and logits come from.
        dtype: Of attention masks.
        num_layers: Layers with keys and values.
        windows: Kinds of attention layers, and their sliding windows.
        groups: Query heads that share a key head, where attention takes masks with the groups folded
            into the queries; else 1.
        maskless: Whether one query without a mask sees all slots that it is given.
        keeps: Whether the model can be told for which positions logits are wanted.
        context_length: Most tokens of a sequence.
        ends: Which token ids end a reply, [vocab].
        hidden: Which token ids are never drafted, [vocab].
        cache_name: What the model calls its own cache.
        chunk: Most tokens of a prompt in one forward pass.
        asynchronous: Whether the device works on while the host does, so that the host waits where
            it looks at what has been computed.
    """

    model: Any
    device: torch.device
    dtype: torch.dtype
    num_layers: int
    windows: dict[str, int | None]
    maskless: bool
    keeps: bool
    context_length: int
    ends: Tensor
    hidden: Tensor
    cache_name: str = "past_key_values"
    chunk: int = 512
    groups: int = 1
    asynchronous: bool = False

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
        cache: Any = None,
        keep: Tensor | int = 0,
    ) -> Tensor:
        """Return logits [rows, kept, vocab] of some token ids behind what `cache` holds.

        Args:
            ids: Token ids, [rows, queries].
            positions: Their positions; None leaves them to the model.
            mask: Additive, for each kind of layer if there are several; None leaves it to the model.
            cache: Of transformers, or a ragged one; None computes without.
            keep: Queries whose logits are wanted: an index vector, a number from the end, 0 for all.
        """
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if positions is not None:
            arguments["position_ids"] = positions
        if mask is not None:
            arguments["attention_mask"] = mask
        if cache is not None:
            arguments["past_key_values"] = cache
        logits: Tensor
        if self.keeps and not (isinstance(keep, int) and keep == 0):
            logits = self.model(**arguments, logits_to_keep=keep).logits
            return logits.to(self.device)
        logits = self.model(**arguments).logits.to(self.device)
        if isinstance(keep, Tensor):
            return logits[:, keep]
        return logits[:, -keep:] if keep else logits

    def advance(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return the logits [rows, vocab] behind some token ids, and the model's own cache then.

        Args:
            ids: Token ids, [rows, queries].
            cache: What the last call returned; None begins.
        """
        arguments: dict[str, Any] = {self.cache_name: cache} if cache is not None else {}
        output = self.model(input_ids=ids, use_cache=True, **arguments)
        return output.logits[:, -1].to(self.device), getattr(output, self.cache_name)
