"""Tokens as images, against loops that place one token at a time."""

import copy
import math

import pytest
import torch

from patchlib.errors import ConfigError, InputError
from patchlib.layers.token_image import TokenImageEncoder, check_ids


def encoder(**options):
    torch.manual_seed(0)
    return TokenImageEncoder(**{"vocab_size": 11, "num_tokens": 7, "patch_size": 2, "channels": 3, **options})


def placed_by_hand(model, ids, columns, rows):
    """The definition, cell by cell and pixel by pixel."""
    size, channels, count = model.patch_size, model.channels, ids.shape[1]
    image = torch.zeros(len(ids), channels, rows * size, columns * size)
    for b in range(len(ids)):
        for cell in range(rows * columns):
            if cell < count:
                token = ids[b, cell] if model.order == "oldest_first" else ids[b, count - 1 - cell]
                vector = model.tokens[token] + positions_by_hand(model, cell)
            elif model.pad_token_id is not None:
                vector = model.tokens[model.pad_token_id]
            else:
                continue
            for i in range(channels * size * size):
                c, y, x = i // size**2, i // size % size, i % size
                image[b, c, cell // columns * size + y, cell % columns * size + x] = vector[i]
    return image


def positions_by_hand(model, place):
    if model.positions is not None:
        return model.positions[place]
    values = []
    for i in range(model.dim // 2):
        angle = place / 10000 ** (2 * i / model.dim)
        values += [math.sin(angle), math.cos(angle)]
    return torch.tensor(values)


@pytest.mark.parametrize("order", ["oldest_first", "newest_first"])
@pytest.mark.parametrize("pos_embed", ["learned", "sinusoidal"])
@pytest.mark.parametrize("pad", [None, 4])
@pytest.mark.parametrize("count", [1, 5, 7])
def test_places_tokens_as_defined(order, pos_embed, pad, count):
    model = encoder(order=order, pos_embed=pos_embed, pad_token_id=pad)
    assert model.grid_size == (3, 3)
    assert model.image_size == (6, 6)
    ids = torch.randint(11, (2, count))
    torch.testing.assert_close(model(ids), placed_by_hand(model, ids, 3, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "patch", "grid", "image"),
    [
        (1024, 16, (32, 32), (512, 512)),
        (256, 16, (16, 16), (256, 256)),
        (10, 2, (3, 4), (6, 8)),
        (12, 2, (3, 4), (6, 8)),
        (13, 1, (4, 4), (4, 4)),
        (2, 3, (1, 2), (3, 6)),
        (1, 3, (1, 1), (3, 3)),
    ],
)
def test_smallest_grid(tokens, patch, grid, image):
    model = TokenImageEncoder(3, tokens, patch)
    assert (model.grid_size, model.image_size) == (grid, image)
    assert model(torch.zeros(2, tokens, dtype=torch.long)).shape == (2, 3, *image)


@pytest.mark.parametrize("order", ["oldest_first", "newest_first"])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_inverse_is_exact_both_ways(order, count):
    model = encoder(order=order, pad_token_id=2)
    embeddings = torch.randn(2, count, model.dim)
    image = model.to_image(embeddings)
    assert torch.equal(model.to_embeddings(image, count), embeddings)
    assert torch.equal(model.to_image(model.to_embeddings(image, count)), image)
    whole = torch.randn(2, 3, 4, 4)  # every cell holds a token here
    other = TokenImageEncoder(11, 4, 2, order=order)
    assert torch.equal(other.to_image(other.to_embeddings(whole)), whole)


def test_inverse_of_ids_is_embedding_and_position():
    model = encoder(order="newest_first")
    ids = torch.randint(11, (2, 5))
    got = model.to_embeddings(model(ids), 5)
    expected = torch.stack([model.tokens[ids[:, t]] + model.positions[4 - t] for t in range(5)], dim=1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("order", ["oldest_first", "newest_first"])
def test_padding_leaves_real_patches_alone(order):
    ids = torch.randint(11, (3, 4))
    plain, padded = encoder(order=order), encoder(order=order, pad_token_id=9)
    assert torch.equal(plain.to_embeddings(plain(ids), 4), padded.to_embeddings(padded(ids), 4))
    # a longer text leaves what stands first in the chosen order alone
    longer = torch.cat([ids, ids], dim=1)[:, :7]
    kept = longer[:, :4] if order == "oldest_first" else longer[:, 3:]
    size = plain.patch_size
    assert torch.equal(plain(longer)[..., :size, :], plain(kept)[..., :size, :])


def test_learned_table_may_be_longer():
    model = encoder(max_positions=20)
    assert model.positions.shape == (20, 12)
    model(torch.zeros(1, 7, dtype=torch.long)).sum().backward()
    used = model.positions.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * 7 + [False] * 13


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(1, 8, dtype=torch.long), ["8 tokens", "7"]),
        (torch.zeros(1, 0, dtype=torch.long), ["0 tokens"]),
        (torch.zeros(3, dtype=torch.long), ["(3,)"]),
        (torch.zeros(1, 3), ["float32"]),
        (torch.tensor([[1, 2, 3], [4, 11, -1]]), ["ids[1, 1]", "11", "0 to 10"]),
        (torch.tensor([[0, -3, 12]]), ["ids[0, 1]", "-3"]),
    ],
)
def test_bad_ids(ids, words):
    with pytest.raises(InputError) as error:
        encoder()(ids)
    assert all(word in str(error.value) for word in words), error.value


def test_value_check_stands_aside_elsewhere():
    outside = torch.full((1, 3), 99)
    check_ids(outside.to("meta"), 11)  # values cannot be seen there
    check_ids(outside, 11, check=False)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(ids):
        check_ids(ids, 11)
        return ids + 1

    assert compiled(outside)[0, 0] == 100
    with pytest.raises(InputError):
        check_ids(outside, 11, check=True)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "random"},
        {"pos_embed": "rotary"},
        {"max_positions": 6},
        {"max_positions": 9, "pos_embed": "sinusoidal"},
        {"pad_token_id": 11},
        {"pad_token_id": -1},
        {"pos_embed": "sinusoidal", "channels": 1, "patch_size": 3},
        *({name: value} for name in ("vocab_size", "num_tokens", "patch_size", "channels") for value in
          (0, -1, (8, 8), 1.5, "8", None, True)),
        *({name: value} for name in ("max_positions", "pad_token_id") for value in ((8, 8), 8.5, "8", True)),
    ],
)  # fmt: skip
def test_impossible_options(options):
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}: "):
        encoder(**options)


@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (2, 1, 6, 6), (3, 6, 6)])
def test_foreign_images(shape):
    with pytest.raises(InputError, match="image"):
        encoder().to_embeddings(torch.zeros(shape))


def test_foreign_embeddings_and_counts():
    with pytest.raises(InputError, match="up to 7"):
        encoder().to_image(torch.zeros(1, 8, 12))
    with pytest.raises(InputError, match="0 to 7"):
        encoder().to_embeddings(torch.zeros(1, 3, 6, 6), 8)


def test_dtype_meta_and_copies():
    ids = torch.randint(11, (2, 5))
    model = encoder(pos_embed="sinusoidal")
    half = copy.deepcopy(model).bfloat16()
    assert half(ids).dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).float(), model(ids), atol=1e-2, rtol=1e-2)
    with torch.device("meta"):
        assert encoder()(ids.to("meta")).shape == (2, 3, 6, 6)
    first, second = encoder(), TokenImageEncoder(11, 7, 2)
    assert not torch.equal(first.tokens, second.tokens)
