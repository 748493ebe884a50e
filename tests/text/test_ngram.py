import math
from collections import Counter

import pytest
import torch

from patchlib.errors import InputError
from patchlib.text.ngram import NGram, fit_ngram


def by_the_book(text, order, vocab_size, discount, gram):
    """Interpolated Kneser-Ney of one n-gram, written as its recursion is."""

    def counts(n):
        top = Counter(zip(*(text[i:] for i in range(order)), strict=False))
        kinds = set(top)
        for size in range(order - 1, n - 1, -1):
            top = Counter(g[1:] for g in kinds)
            assert all(len(g) == size for g in top)
            kinds = set(top)
        return top

    def probability(gram):
        if not gram:
            return 1 / vocab_size
        table = counts(len(gram))
        total = sum(c for g, c in table.items() if g[:-1] == gram[:-1])
        lower = probability(gram[1:])
        if not total:
            return lower
        kinds = sum(g[:-1] == gram[:-1] for g in table)
        return (max(table[gram] - discount, 0) + discount * kinds * lower) / total

    return probability(tuple(gram))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_the_recursions(order):
    tokens = torch.randint(6, (80,)) % 5  # 5 never stands there
    model = NGram(tokens, order, 6, 0.6)
    windows = torch.randint(6, (40, 5))
    wanted = [by_the_book(tokens.tolist(), order, 6, 0.6, w[-order:]) for w in windows.tolist()]
    torch.testing.assert_close(model.probabilities(windows), torch.tensor(wanted, dtype=torch.float64))
    assert math.isclose(model.loss(windows), -sum(map(math.log, wanted)) / 40)


def test_probabilities_add_up_to_one():
    model = NGram(torch.randint(30, (500,)), 3, 30)
    for context in ([3, 4], [0, 0], [29, 28]):
        windows = torch.tensor([[*context, token] for token in range(30)])
        assert math.isclose(model.probabilities(windows).sum().item(), 1, rel_tol=1e-9)


def test_fitting_takes_the_best_discount_for_text_it_has_not_counted():
    tokens = torch.randint(8, (3000,)).cumsum(0) % 16 // 2
    model = fit_ngram(tokens, 2, 8)
    held = tokens[2700:].unfold(0, 2, 1)
    losses = {d: NGram(tokens[:2700], 2, 8, d).loss(held) for d in (0.1, 0.3, 0.5, 0.7, 0.9, model.discount)}
    assert min(losses, key=losses.get) == model.discount


def test_trigram_of_shakespeare_beats_bigram_beats_unigram(shared):
    text = (shared / "shakespeare" / "tiny.txt").read_bytes()
    tokens = torch.frombuffer(bytearray(text[:300_000]), dtype=torch.uint8)
    held = tokens[270_000:].unfold(0, 3, 1)
    losses = [fit_ngram(tokens[:270_000], order, 256).loss(held) for order in (1, 2, 3)]
    assert losses[0] > losses[1] + 0.5 > losses[2] + 0.9


def test_impossible_orders_are_named():
    with pytest.raises(InputError, match="order: found 5; allowed: 1 to 4, the tokens"):
        NGram(torch.zeros(4), 5, 3)
    with pytest.raises(InputError, match="order: found 5; allowed: 1 to 4 with"):
        NGram(torch.zeros(9), 5, 50_257)
