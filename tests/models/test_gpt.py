import copy
import pickle

import pytest
import torch
from gpt_golden import read_golden, tiny_gpt

from patchlib.errors import ConfigError, InputError
from patchlib.models.gpt import GPT, VARIANTS, CausalAttention

# a tenth of what is asked for: the two forms of GELU differ by too little to be told apart tenfold at 1e-4
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    return read_golden()


def difference(model, golden):
    with torch.no_grad():
        return ((model(golden["ids"]) - golden["logits"]).abs().max() / golden["logits"].abs().max()).item()


def test_logits_are_those_of_transformers(golden):
    assert difference(tiny_gpt(golden), golden) < TOLERANCE


def test_sabotage_is_seen(golden):
    assert difference(tiny_gpt(golden, norm={"eps": 1e-6}), golden) > 10 * TOLERANCE
    assert difference(tiny_gpt(golden, mlp={"approximate": "none"}), golden) > 10 * TOLERANCE
    for branch in ("attn", "mlp"):
        model = tiny_gpt(golden)
        last = model.blocks[-1].attn.proj if branch == "attn" else model.blocks[-1].mlp.fc2
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        assert difference(model, golden) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts_of_the_released_sizes(name, count):
    with torch.device("meta"):
        model = GPT(**VARIANTS[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_cache_gives_what_a_full_pass_gives(golden):
    model, ids = tiny_gpt(golden), golden["ids"]
    with torch.no_grad():
        logits, cache = model.start(ids[:, :5])
        for i in range(5, ids.shape[1] + 1):
            torch.testing.assert_close(logits, golden["logits"][:, i - 1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(logits, model.next_logits(ids[:, :i]), atol=1e-5, rtol=1e-4)
            if i < ids.shape[1]:
                logits, cache = model.step(ids[:, i : i + 1], cache)


def test_cache_grows_past_its_first_buffer():
    model = GPT(vocab_size=11, context=200, dim=8, depth=2, heads=2).eval()
    ids = torch.randint(11, (2, 200))
    with torch.no_grad():
        full = model(ids)
        logits, cache = model.start(ids[:, :1])
        for i in range(1, 200):
            torch.testing.assert_close(logits, full[:, i - 1], atol=1e-5, rtol=1e-4)
            logits, cache = model.step(ids[:, i : i + 1], cache)
        with pytest.raises(InputError, match="holds 200 tokens"):
            model.step(ids[:, :1], cache)
    with pytest.raises(InputError, match=r"found \(1, 1\); allowed: \(2, 1\)"):
        model.step(ids[:1, :1], model.start(ids[:, :1])[1])


def test_later_tokens_change_nothing_before_them(golden):
    model, ids = tiny_gpt(golden), golden["ids"].clone()
    with torch.no_grad():
        before = model(ids)
        ids[:, 10] = (ids[:, 10] + 1) % 97
        after = model(ids)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(dim=-1).all()


def test_attention_maps_are_what_the_fused_kernel_mixes_with():
    attention = CausalAttention(12, 3)
    x = torch.randn(2, 7, 12)
    maps = attention.maps(x)
    values = attention.qkv(x)[..., 24:].unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(attention.proj((maps @ values).transpose(1, 2).flatten(2)), attention(x))
    assert (maps.triu(1) == 0).all()


def test_dropout_only_in_training():
    model = GPT(vocab_size=11, context=8, dim=8, depth=2, heads=2, drop=0.5)
    ids = torch.randint(11, (2, 8))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_fresh_weights_and_gradients():
    model = GPT(vocab_size=101, context=16, dim=64, depth=8, heads=4)
    assert abs(model.token_embed.weight.std().item() - 0.02) < 0.001
    assert abs(model.blocks[3].mlp.fc1.weight.std().item() - 0.02) < 0.001
    assert abs(model.blocks[3].mlp.fc2.weight.std().item() - 0.02 / 4) < 0.0005
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    ids = torch.randint(101, (4, 16))
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_head_is_the_embedding_whatever_happens_to_it(golden):
    model = tiny_gpt(golden)
    moved = GPT(model.config).to("meta").to_empty(device="cpu").eval()
    moved.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), moved, copy.deepcopy(model).double()):
        logits = other(golden["ids"]).float()
        torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            other.token_embed.weight[5] = 0
        assert (other(golden["ids"])[..., 5] == 0).all()
        assert sum(p.shape == (97, 24) for p in other.parameters()) == 1


def test_matrices_lie_in_memory_as_in_the_published_files(golden):
    published = golden["model.transformer.h.0.attn.c_attn.weight"].T
    for model in (tiny_gpt(golden), copy.deepcopy(tiny_gpt(golden)), tiny_gpt(golden).bfloat16()):
        assert model.blocks[0].attn.qkv.weight.stride() == published.stride() == (1, 72)


def test_compiles_whole_exports_and_halves():
    model = GPT(vocab_size=31, context=32, dim=24, depth=1, heads=2).eval()
    ids = torch.randint(31, (3, 20))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=32)},)
    exported = torch.export.export(model, (ids,), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(ids[:2, :7]), model(ids[:2, :7]))
    half = copy.deepcopy(model).bfloat16()(ids)
    assert half.dtype == torch.bfloat16
    assert (half.float() - model(ids)).abs().mean() < 0.02 * model(ids).abs().mean()


def test_bad_input_is_named():
    model = GPT(vocab_size=11, context=8, dim=8, depth=1, heads=2)
    with pytest.raises(InputError, match="found 11; allowed: 0 to 10"):
        model(torch.tensor([[1, 2], [11, 12]]))
    with pytest.raises(InputError, match="found 9 tokens; allowed: 1 to 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(InputError, match=r"found torch\.float32"):
        model(torch.zeros(1, 4))
    with pytest.raises(ConfigError, match="heads: found 5; allowed: a divisor of dim=8"):
        GPT(dim=8, heads=5)
    with pytest.raises(ConfigError, match="no field 'head'; did you mean 'heads'"):
        GPT(head=3)
