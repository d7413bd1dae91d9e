"""How the next token is drawn: the warpers of transformers for many branches at once, then one number.

Knows logits, sampling settings and uniform numbers; nothing of models or caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from langchain_stars.language_models.base import Sampling
from langchain_stars.packing import to_device

_NUCLEUS_GUESS = 256


@dataclass(frozen=True, slots=True)
class Warpers:
    """Which warpers some settings need; what was recorded for these fits all that need the same.

    Attributes:
        greedy: Whether some rows take the likeliest token.
        all_greedy: Whether all do.
        penalty: Whether some rows penalise what they hold.
        temperature: Whether some rows divide their logits.
        most_k: At least the largest of the rows' top-k; 0 where there is none.
        top_p: Whether some rows cut by cumulative probability.
        few: Whether all those keep no more than `most_k` tokens anyway.
        min_p: Whether some rows cut by relative probability.
    """

    greedy: bool
    all_greedy: bool
    penalty: bool
    temperature: bool
    most_k: int
    top_p: bool
    few: bool
    min_p: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Warpers":
        """Return what the settings of some rows need."""
        most_k = max((s.top_k or 0 for s in samplings), default=0)
        return cls(
            greedy=any(s.temperature == 0 for s in samplings),
            all_greedy=all(s.temperature == 0 for s in samplings),
            penalty=any(s.repetition_penalty != 1 for s in samplings),
            temperature=any(s.temperature not in (0, 1) for s in samplings),
            most_k=1 << (most_k - 1).bit_length() if most_k else 0,
            top_p=any(s.top_p < 1 for s in samplings),
            few=all(s.top_k or s.top_p == 1 for s in samplings),
            min_p=any(s.min_p > 0 for s in samplings),
        )


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
        asks: Whether the host may look at what was computed, to spare the device work.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        *,
        hidden: Tensor | None,
        device: torch.device,
        asks: bool = True,
    ) -> None:
        self.warpers = warpers = Warpers.of(samplings)
        self._hidden = hidden
        self._asks = asks
        self._settings = to_device(_table(samplings), device)
        penalty, temperature, top_p, min_p = self._settings[:4, :, None, None]
        self._penalty = penalty if warpers.penalty else None
        self._temperature = temperature if warpers.temperature else None
        self._top_k = self._settings[4] if warpers.most_k else None
        self._top_p = top_p if warpers.top_p else None
        self._min_p = min_p if warpers.min_p else None
        self._greedy = self._settings[5] if warpers.greedy else None

    def load(self, samplings: Sequence[Sampling]) -> None:
        """Take other settings for the rows, in place; they need the same warpers."""
        assert Warpers.of(samplings) == self.warpers
        self._settings.copy_(to_device(_table(samplings), self._settings.device))

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
        if self.warpers.all_greedy:
            return scores
        if self._temperature is not None:
            scores = scores / self._temperature[rows]
        if self._top_k is not None:
            scores = _keep_top_k(scores, self._top_k[rows].long(), self.warpers.most_k)
        if self._top_p is not None:
            few = self.warpers.most_k if self.warpers.few else None
            scores = _keep_top_p(scores, self._top_p[rows], few, asks=self._asks)
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
            if self.warpers.all_greedy:
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
            picked = torch.where(self._greedy[rows, None] > 0, likeliest, picked)
        return picked


def _table(samplings: Sequence[Sampling]) -> Tensor:
    """Return the settings of each row, one below the other, [6, rows]."""
    return torch.tensor(
        [
            [s.repetition_penalty for s in samplings],
            [s.temperature or 1.0 for s in samplings],
            [s.top_p for s in samplings],
            [s.min_p for s in samplings],
            [s.top_k or 0 for s in samplings],
            [s.temperature == 0 for s in samplings],
        ],
        dtype=torch.float32,
    )


def _keep_top_k(scores: Tensor, top_k: Tensor, most: int) -> Tensor:
    """Cut every token below the k-th; k is 0 in rows that keep all."""
    vocab = scores.shape[-1]
    best = scores.topk(min(most, vocab), dim=-1).values
    at = (top_k.clamp(1, best.shape[-1]) - 1)[:, None, None].expand(*scores.shape[:2], 1)
    least = best.gather(-1, at).masked_fill((top_k == 0)[:, None, None], -torch.inf)
    return scores.masked_fill(scores < least, -torch.inf)


def _keep_top_p(scores: Tensor, top_p: Tensor, few: int | None, *, asks: bool) -> Tensor:
    """Cut every token whose likelier tokens hold `top_p` of the probability together.

    The likeliest few nearly always hold it, so they are sorted first, and all only if not; without
    asking whether they do, all are sorted.

    Args:
        scores: Of each token.
        top_p: Of each row; 1 cuts nothing.
        few: At least the number of tokens that were left where `top_p` is not 1, if that is known.
        asks: Whether it may be asked whether the likeliest few hold it.
    """
    vocab = scores.shape[-1]
    partial = top_p < 1
    guess = min(max(_NUCLEUS_GUESS, 2 * (few or 0)), vocab)  # twice: the last ones may be tied
    if asks or few:
        likeliest, ids = scores.topk(guess, dim=-1)
        probabilities = (likeliest - scores.logsumexp(-1, keepdim=True)).exp()
        reached = probabilities.cumsum(-1)
        enough = (reached[..., -1:] >= top_p) | (likeliest[..., -1:] == -torch.inf) | ~partial
        if few or guess == vocab or bool(enough.all()):
            cut = reached - probabilities >= top_p
            cut[..., 0].fill_(False)
            kept = torch.full_like(scores, -torch.inf)
            kept.scatter_(-1, ids, likeliest.masked_fill(cut, -torch.inf))
            return torch.where(partial, kept, scores)
    ascending, ids = scores.sort(dim=-1)
    cut = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & partial
    cut[..., -1].fill_(False)
    return scores.masked_fill(torch.zeros_like(cut).scatter_(-1, ids, cut), -torch.inf)
