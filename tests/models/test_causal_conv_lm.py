"""CausalConvLM: nothing reads ahead, everything before can be read, and token by token gives the same."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from patchlib.errors import ConfigError, InputError
from patchlib.layers.masked_conv import CausalConvNeXtBlock, CausalDepthwiseConv, CausalGRN
from patchlib.models.causal_conv_lm import VARIANTS, CausalConvLM
from patchlib.models.gpt import GPT
from patchlib.models.gpt import VARIANTS as GPT_VARIANTS

torch.set_num_threads(1)
SMALL = {"vocab_size": 19, "context": 30, "dim": 8, "depth": 3, "kernel_size": 5}  # a grid 6 wide


def model_of(**options):
    """Every parameter at random: fresh ones leave the response normalisation out."""
    torch.manual_seed(0)
    model = CausalConvLM(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_ids(*shape, seed=1):
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(seed))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "peer"), [("causal_conv_lm_tiny", "gpt_tiny"), ("causal_conv_lm_base", "gpt2")])
def test_as_many_parameters_as_gpt(name, peer):
    with torch.device("meta"):
        ours, theirs = CausalConvLM(**VARIANTS[name]), GPT(**GPT_VARIANTS[peer])
    assert count(ours) == {"causal_conv_lm_tiny": 2_922_048, "causal_conv_lm_base": 124_100_352}[name]
    assert count(ours) == pytest.approx(count(theirs), rel=0.1)
    assert (ours.context, ours.config.vocab_size) == (theirs.context, theirs.config.vocab_size)


@pytest.mark.parametrize("kernel_size", [3, 5, (3, 7), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logit_reads_ahead(kernel_size, dtype):
    """Another token at t: every earlier logit is equal to the bit, and that at t is not."""
    model, ids = model_of(kernel_size=kernel_size).to(dtype), random_ids(1, 29)
    others = ids.repeat(29, 1)
    others[range(29), range(29)] = (others.diagonal() + 1) % 19
    with torch.no_grad():
        changed, plain = model(others), model(ids.repeat(29, 1))
    for t in range(29):
        assert torch.equal(changed[t, :t], plain[t, :t]), t
        assert not torch.equal(changed[t, t], plain[t, t]), t


def test_no_length_reads_ahead():
    model, ids = model_of(), random_ids(2, 30)
    with torch.no_grad():
        whole = model(ids)
        for length in (1, 5, 6, 7, 29):
            torch.testing.assert_close(model(ids[:, :length]), whole[:, :length], atol=1e-5, rtol=1e-5)


def influence(model, length):
    """Whether token s can change the last features of token t, by the convolutions alone: ``(t, s)``."""
    with torch.no_grad():
        for block in model.blocks:
            block.grn.weight.zero_()
    x = torch.randn(1, length, model.config.dim).requires_grad_()
    width = model.config.grid_width
    grid = F.pad(x, (0, 0, 0, -length % width)).unflatten(1, (-1, width))
    for block in model.blocks:
        grid = block(grid)
    rows = []
    for t in range(length):
        (gradient,) = torch.autograd.grad(grid.flatten(1, 2)[0, t].square().sum(), x, retain_graph=True)
        rows.append(gradient[0].abs().sum(-1) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_every_earlier_token_is_read(kernel_size):
    """Also those that PixelCNN's blind spot would hide: the end of the row above, from a row's beginning."""
    reach = kernel_size // 2 * 6 + kernel_size // 2
    model = model_of(kernel_size=kernel_size, depth=2 * (-(-29 // reach)))
    assert torch.equal(influence(model, 30), torch.ones(30, 30).tril().bool())


@pytest.mark.parametrize("name", VARIANTS)
def test_named_sizes_read_their_whole_context(name):
    config = {**VARIANTS[name], "dim": 4, "vocab_size": 19}
    model = model_of(**config)
    with torch.no_grad():
        for block in model.blocks:
            block.grn.weight.zero_()
    x = torch.randn(1, model.config.grid_width, model.config.grid_width, 4).requires_grad_()
    grid = x
    for block in model.blocks:
        grid = block(grid)
    grid[0, -1, -1].square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("kernel_size", [(3, 3), (7, 5), (1, 3), (5, 1)])
def test_convolution_cell_by_cell(kernel_size):
    torch.manual_seed(0)
    conv, grid = CausalDepthwiseConv(3, kernel_size), torch.randn(2, 4, 6, 3)
    rows, reach = kernel_size[0] // 2, kernel_size[1] // 2
    line, expected = grid.flatten(1, 2), torch.zeros(2, 24, 3)
    for t in range(24):
        expected[:, t] = conv.bias
        tap = 0
        for up in range(rows, -1, -1):
            for side in range(-reach, reach + 1 if up else 1):
                source = t - up * 6 + side
                if source >= 0:
                    expected[:, t] += conv.weight[:, tap] * line[:, source]
                tap += 1
        assert tap == conv.weight.shape[1]
    torch.testing.assert_close(conv(grid), expected.view(2, 4, 6, 3))


def test_convolution_is_pixelcnns_away_from_the_ends():
    torch.manual_seed(0)
    conv, grid = CausalDepthwiseConv(4, 5), torch.randn(1, 7, 9, 4)
    kernel = torch.zeros(4, 25)
    kernel[:, :13] = conv.weight
    masked = F.conv2d(grid.permute(0, 3, 1, 2), kernel.view(4, 1, 5, 5), conv.bias, padding=2, groups=4)
    torch.testing.assert_close(conv(grid)[:, :, 2:-2], masked.permute(0, 2, 3, 1)[:, :, 2:-2])


def test_response_row_by_row():
    torch.manual_seed(0)
    grn, x = CausalGRN(5), torch.randn(2, 4, 3, 5)
    torch.nn.init.normal_(grn.weight)
    torch.nn.init.normal_(grn.bias)
    for b in range(2):
        for row in range(4):
            strength = (x[b, :row].square().sum((0, 1)) + 1e-6).sqrt()
            response = strength / (strength.mean() + 1e-6)
            expected = x[b, row] * (1 + grn.weight * response) + grn.bias
            torch.testing.assert_close(grn(x)[b, row], expected)
    zero = torch.zeros(1, 2, 2, 5, requires_grad=True)
    grn(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("kernel_size", [5, (3, 7)])
@pytest.mark.parametrize("start", [1, 5, 6, 7, 13, 29])
def test_token_by_token_is_the_full_pass(start, kernel_size):
    model, ids = model_of(kernel_size=kernel_size), random_ids(3, 30)
    with torch.no_grad():
        full = model(ids)
        logits, cache = model.start(ids[:, :start])
        torch.testing.assert_close(logits, full[:, start - 1], atol=2e-5, rtol=1e-4)
        for t in range(start, 30):
            logits, cache = model.step(ids[:, t : t + 1], cache)
            torch.testing.assert_close(logits, full[:, t], atol=2e-5, rtol=1e-4)
        assert torch.equal(model.next_logits(ids[:, :start]), model.start(ids[:, :start])[0])


def test_cache_stays_small_and_is_not_written_to():
    model, ids = model_of(context=26), random_ids(2, 36)
    longer = CausalConvLM(**{**SMALL, "context": 36}).eval()  # as wide a grid
    longer.load_state_dict(model.state_dict())
    with torch.no_grad():
        full = longer(ids)
        _, cache = model.start(ids[:, :20])
        size = [t.shape for block in cache.blocks for t in block]
        before = copy.deepcopy(cache)
        once, _ = model.step(ids[:, 20:21], cache)
        again, after = model.step(ids[:, 20:21], cache)
        assert torch.equal(once, again)
        assert all(
            torch.equal(a, b)
            for x, y in zip(cache.blocks, before.blocks, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        for t in range(21, 36):  # past the context
            again, after = model.step(ids[:, t : t + 1], after)
    assert [t.shape for block in after.blocks for t in block] == size
    torch.testing.assert_close(again, full[:, -1], atol=2e-5, rtol=1e-4)


def test_every_parameter_learns_and_half_precision_works():
    model, ids = model_of(), random_ids(2, 30)
    F.cross_entropy(model.train()(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    model.eval()
    half = copy.deepcopy(model).bfloat16()
    assert half(ids).dtype == torch.bfloat16
    assert ((half(ids).float() - model(ids)).abs().max() / model(ids).abs().max()).item() < 0.1
    logits, cache = half.start(ids[:, :9])
    assert half.step(ids[:, 9:10], cache)[0].dtype == logits.dtype == torch.bfloat16


def test_learns_to_look_back():
    """Each token repeats the one seven before it, which stands in another row."""
    torch.manual_seed(0)
    model = CausalConvLM(**{**SMALL, "dim": 32, "depth": 2, "drop": 0.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(19, (16, 7)).repeat(1, 5)[:, :30]
        loss = F.cross_entropy(model(ids)[:, 6:-1].flatten(0, 1), ids[:, 7:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.5  # guessing is 2.9


def test_tied_weight_is_one():
    model = model_of()
    assert [name for name in model.state_dict() if "tokens" in name or "head" in name] == ["tokens"]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    rebuilt = CausalConvLM(type(model.config).from_dict(model.config.to_dict())).eval()
    rebuilt.load_state_dict(model.state_dict())
    ids = random_ids(1, 9)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), rebuilt):
        assert torch.equal(other(ids), model(ids))
        assert count(other) == count(model)
        before = other(ids)
        with torch.no_grad():
            other.tokens[ids[0, 0]] *= 2  # what reads it and what is scored against it change together
        assert (other(ids) != before).any(-1).all()


def test_dropout_and_fresh_weights():
    torch.manual_seed(0)
    model = CausalConvLM(**{**SMALL, "dim": 64, "drop": 0.5, "drop_path": 0.2})
    assert [round(block.drop_path.p, 3) for block in model.blocks] == [0, 0.1, 0.2]
    ids = random_ids(1, 9)
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))
    assert model.blocks[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(model.blocks[0].fc1.weight, model.blocks[1].fc1.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel_size": 4}, ["kernel_size", "odd"]),
        ({"kernel_size": (3, 6)}, ["kernel_size", "odd"]),
        ({"kernel_size": 13}, ["kernel_size", "6", "width"]),
        ({"img_size": 32}, ["img_size"]),
        ({"in_chans": 3}, ["in_chans"]),
        ({"contexts": 3}, ["'context'"]),
        ({"vocab_size": 0}, ["vocab_size", "from 1"]),
        ({"ratio": 1e9}, ["ratio"]),
    ],
)
def test_bad_configs(options, words):
    with pytest.raises(ConfigError) as error:
        CausalConvLM(**{**SMALL, **options})
    assert all(word in str(error.value) for word in words), error.value


def test_bad_input():
    model = model_of()
    with pytest.raises(InputError, match="31 tokens"):
        model(random_ids(1, 31))
    with pytest.raises(InputError, match=r"\[0, 2\]: found 19"):
        model(torch.tensor([[0, 1, 19]]))
    _, cache = model.start(random_ids(2, 3))
    with pytest.raises(InputError, match="batch of 3"):
        model.step(random_ids(3, 1), cache)
    with pytest.raises(InputError, match="2 tokens"):
        model.step(random_ids(2, 2), cache)
    with pytest.raises(ConfigError, match="odd"):
        CausalConvNeXtBlock(4, 2)


def test_compile_export_and_meta():
    model, ids = model_of(depth=1), random_ids(2, 20)
    expected = model(ids)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(ids), expected)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (ids,), dynamic_shapes={"ids": {0: batch}}).module()
    torch.testing.assert_close(exported(random_ids(5, 20)), model(random_ids(5, 20)))
    with torch.device("meta"):
        assert CausalConvLM(**SMALL)(ids.to("meta")).shape == (2, 20, 19)


@pytest.mark.parametrize("context", [26, 30])  # 30 tokens fill their rows, 26 do not
@pytest.mark.parametrize("example", [2, 20, 26])
def test_one_export_for_every_length(context, example):
    model = model_of(depth=2, context=context)
    sizes = {"ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=context)}}
    exported = torch.export.export(model, (random_ids(2, example),), dynamic_shapes=sizes).module()
    for length in range(1, context + 1):
        ids = random_ids(3, length)
        torch.testing.assert_close(exported(ids), model(ids))
