"""How the next token is drawn: the warpers of transformers for many branches at once, then one number.

Knows logits, sampling settings and uniform numbers; nothing of models or caches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from langchain_stars.language_models.base import Sampling

_NUCLEUS_GUESS = 256


class Sampler:
    """Draws the next token of every branch of a round.

    Settings belong to rows, and a row's branches share them. The order is that of transformers:
    repetition penalty, temperature, top-k, top-p, min-p; then the token is the first whose
    cumulative probability reaches the uniform number of its key. So a token follows from the
    logits and the number, and a token of probability 0 is never drawn.

    Args:
        samplings: Settings of each row.
        hidden: Which tokens are never drafted; None hides none.
        device: Where logits lie.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        *,
        hidden: Tensor | None,
        device: torch.device,
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]

        self._hidden = hidden
        self._all_greedy = all(s.temperature == 0 for s in samplings)
        self._greedy: Tensor | None = None
        if any(s.temperature == 0 for s in samplings):
            self._greedy = torch.tensor([s.temperature == 0 for s in samplings], device=device)
        self._penalty: Tensor | None = None
        if any(s.repetition_penalty != 1 for s in samplings):
            self._penalty = column([s.repetition_penalty for s in samplings])
        self._temperature: Tensor | None = None
        if any(s.temperature not in (0, 1) for s in samplings):
            self._temperature = column([s.temperature or 1.0 for s in samplings])
        self._top_k: Tensor | None = None
        self._most_k = max((s.top_k or 0 for s in samplings), default=0)
        if self._most_k:
            self._top_k = torch.tensor([s.top_k or 0 for s in samplings], device=device)
        self._top_p: Tensor | None = None
        if any(s.top_p < 1 for s in samplings):
            self._top_p = column([s.top_p for s in samplings])
        self._min_p: Tensor | None = None
        if any(s.min_p > 0 for s in samplings):
            self._min_p = column([s.min_p for s in samplings])

    @property
    def remembers(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self._penalty is not None

    def warp(
        self,
        logits: Tensor,
        seen: Tensor | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """Return the logits that tokens are drawn by; -inf where a token is cut off.

        Args:
            logits: What the model gave.
            seen: Tokens that prompt, reply and branch hold; needed if `remembers`.
            rows: Which of the rows these are.
        """
        scores = logits.float()
        if self._hidden is not None:
            scores = scores.masked_fill(self._hidden, -torch.inf)
        if self._penalty is not None:
            assert seen is not None
            penalty = self._penalty[rows]
            penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(seen, penalised, scores)
        if self._all_greedy:
            return scores
        if self._temperature is not None:
            scores = scores / self._temperature[rows]
        if self._top_k is not None:
            scores = _keep_top_k(scores, self._top_k[rows], self._most_k)
        if self._top_p is not None:
            most_kept = self._most_k if self._top_k is not None else 0
            scores = _keep_top_p(scores, self._top_p[rows], most_kept)
        if self._min_p is not None:
            probabilities = scores.softmax(-1)
            least = self._min_p[rows] * probabilities.amax(-1, keepdim=True)
            scores = scores.masked_fill(probabilities < least, -torch.inf)
        return scores

    def pick(
        self,
        scores: Tensor,
        numbers: Tensor,
        rows: slice = slice(None),
    ) -> Tensor:
        """Return the token that each number, in (0, 1], picks; -1 where scores are not finite.

        That is where one is NaN or infinite, or all are cut off. Other branches have their tokens.

        Args:
            scores: Warped logits; with one branch, all numbers of a row pick from it.
            numbers: One for each branch.
            rows: Which of the rows these are.
        """
        shared = scores.shape[1] == 1
        likeliest: Tensor | None = None
        if self._greedy is not None:
            likeliest = scores.argmax(-1)
            highest = scores.gather(-1, likeliest[..., None])[..., 0]
            likeliest = likeliest.masked_fill(~highest.isfinite(), -1).expand(numbers.shape)
            if self._all_greedy:
                return likeliest
        wide = scores if scores.device.type == "mps" else scores.double()
        cumulative = wide.softmax(-1).cumsum(-1)
        # The total is 1 but for rounding; the share of it keeps every number within reach.
        total = cumulative[..., -1]
        wanted = numbers.to(cumulative.dtype) * total
        wanted = wanted[:, None] if shared else wanted[..., None]
        picked = torch.searchsorted(cumulative, wanted.contiguous()).view(numbers.shape)
        picked = picked.masked_fill(~total.isfinite(), -1)
        if likeliest is not None:
            assert self._greedy is not None
            picked = torch.where(self._greedy[rows, None], likeliest, picked)
        return picked


def _keep_top_k(scores: Tensor, top_k: Tensor, most: int) -> Tensor:
    """Cut every token below the k-th; k is 0 in rows that keep all."""
    vocab = scores.shape[-1]
    best = scores.topk(min(most, vocab), dim=-1).values
    at = (top_k.clamp(1, best.shape[-1]) - 1)[:, None, None].expand(*scores.shape[:2], 1)
    least = best.gather(-1, at).masked_fill((top_k == 0)[:, None, None], -torch.inf)
    return scores.masked_fill(scores < least, -torch.inf)


def _keep_top_p(scores: Tensor, top_p: Tensor, most_kept: int) -> Tensor:
    """Cut every token whose likelier tokens hold `top_p` of the probability together.

    The likeliest few nearly always hold it, so they are sorted first, and all only if not.
    """
    vocab = scores.shape[-1]
    partial = top_p < 1
    guess = min(max(_NUCLEUS_GUESS, most_kept), vocab)
    if scores.device.type != "cuda":  # on CUDA the question would cost a synchronisation
        likeliest, ids = scores.topk(guess, dim=-1)
        probabilities = (likeliest - scores.logsumexp(-1, keepdim=True)).exp()
        reached = probabilities.cumsum(-1)
        enough = (reached[..., -1:] >= top_p) | (likeliest[..., -1:] == -torch.inf) | ~partial
        if guess == vocab or bool(enough.all()):
            cut = reached - probabilities >= top_p
            cut[..., 0] = False
            kept = torch.full_like(scores, -torch.inf)
            kept.scatter_(-1, ids, likeliest.masked_fill(cut, -torch.inf))
            return torch.where(partial, kept, scores)
    ascending, ids = scores.sort(dim=-1)
    cut = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & partial
    cut[..., -1] = False
    return scores.masked_fill(torch.zeros_like(cut).scatter_(-1, ids, cut), -torch.inf)
