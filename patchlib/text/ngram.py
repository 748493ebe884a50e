"""N-gram models: what a language model has to beat."""

import math

import torch
from torch import Tensor

from ..errors import InputError


class NGram:
    """Predicts a token from the ``order - 1`` before it: interpolated Kneser-Ney smoothing with one discount (Kneser
    and Ney 1995; as in Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128, section 2.7).

    Args:
        tokens: ``(n,)``, the text it counts.
        order: 2 for a bigram, 3 for a trigram.
        vocab_size: how many tokens there are.
        discount: taken off every count, from 0 to 1, and given to the order below.

    Raises:
        InputError: the text is shorter than `order`, or there are too many possible n-grams to number.
    """

    def __init__(self, tokens: Tensor, order: int, vocab_size: int, discount: float = 0.75) -> None:
        if len(tokens) < order or order < 1:
            raise InputError(f"order: found {order}; allowed: 1 to {len(tokens)}, the tokens of the text")
        if vocab_size**order >= 2**63:
            most = int(63 / math.log2(vocab_size))
            raise InputError(f"order: found {order}; allowed: 1 to {most} with a vocabulary of {vocab_size}")
        self.order, self.vocab_size, self.discount = order, vocab_size, discount
        self.levels: list[tuple[Tensor, ...]] = []
        grams, counts = self._number(tokens.long().unfold(0, order, 1)).unique(return_counts=True)
        for n in range(order, 0, -1):
            contexts, where, kinds = (grams // vocab_size).unique(return_inverse=True, return_counts=True)
            totals = torch.zeros_like(contexts).scatter_add_(0, where, counts)
            self.levels.insert(0, (grams, counts, contexts, totals, kinds))
            # below the top it counts in how many contexts an n-gram stands, not how often
            grams, counts = (grams % vocab_size ** (n - 1)).unique(return_counts=True)

    def probabilities(self, windows: Tensor) -> Tensor:
        """Of the last token of each window ``(n, at least order)``, given those before it: ``(n,)``, float64."""
        p = torch.full((len(windows),), 1 / self.vocab_size, dtype=torch.float64)
        for n, (grams, counts, contexts, totals, kinds) in enumerate(self.levels, 1):
            gram = self._number(windows[:, -n:].long())
            count, total = _look_up(grams, counts, gram), _look_up(contexts, totals, gram // self.vocab_size)
            left = self.discount * _look_up(contexts, kinds, gram // self.vocab_size)
            p = torch.where(total > 0, ((count - self.discount).clamp(min=0) + left * p) / total.clamp(min=1), p)
        return p

    def loss(self, windows: Tensor) -> float:
        """Mean negative log-probability of the windows' last tokens, in nats."""
        return -self.probabilities(windows).log().mean().item()

    def _number(self, grams: Tensor) -> Tensor:
        """``(n, order)`` tokens to one number each, ``(n,)``."""
        powers = self.vocab_size ** torch.arange(grams.shape[1] - 1, -1, -1)
        return (grams * powers).sum(dim=1)


def fit_ngram(tokens: Tensor, order: int, vocab_size: int) -> NGram:
    """An `NGram` of the whole text, with the discount that fits best where the first nine tenths predict the rest."""
    cut = len(tokens) * 9 // 10
    trial, held = NGram(tokens[:cut], order, vocab_size), tokens[cut:].unfold(0, order, 1)
    losses = {}
    for trial.discount in (twentieths / 20 for twentieths in range(2, 20)):
        losses[trial.discount] = trial.loss(held)
    return NGram(tokens, order, vocab_size, min(losses, key=losses.__getitem__))


def _look_up(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """The values that stand beside the sorted `keys`, 0 where a key is missing; float64."""
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, values[places], 0).double()
