"""ConvNeXtV2LM: the published sizes, any trunk, both readouts."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

import patchlib
from patchlib.errors import ConfigError, InputError
from patchlib.models.convmixer import ConvMixer
from patchlib.models.convnext_lm import VARIANTS, ConvNeXtV2LM, ConvNeXtV2LMConfig
from patchlib.models.convnextv2 import ConvNeXtV2
from patchlib.models.gpt import GPT
from patchlib.models.gpt import VARIANTS as GPT_VARIANTS
from patchlib.models.vit import ViT

torch.set_num_threads(1)
TRUNKS = {
    "convnextv2": {"kind": "convnextv2", "depths": (1, 1), "dims": (8, 12)},
    "convnext": {"kind": "convnext", "depths": (1, 1), "dims": (8, 12)},
    "convmixer": {"kind": "convmixer", "dim": 12, "depth": 1, "kernel_size": 3, "patch_size": 8},
    "vit": {"kind": "vit", "dim": 12, "depth": 1, "heads": 2, "patch_size": 8},
    "patchnet": {"kind": "patchnet", "patch_size": 8, "stages": [{"kind": "transformer", "dim": 12, "heads": 2}]},
}
# 14 tokens of 48 on a 4 x 4 grid: a 3 x 16 x 16 image
SMALL = {"vocab_size": 19, "num_tokens": 14, "patch_size": 4, "trunk": TRUNKS["convnextv2"]}


def model_of(**options):
    torch.manual_seed(0)
    model = ConvNeXtV2LM(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_ids(*shape, seed=1):
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(seed))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "image", "stride"),
    [
        ("convnextv2_lm_base", 115_308_288, (512, 512), 3),
        ("convnextv2_lm_base_256", 124_745_472, (256, 256), 12),
    ],
)
def test_sizes_of_the_source_experiment(name, parameters, image, stride):
    with torch.device("meta"):
        model = ConvNeXtV2LM(**VARIANTS[name])
    assert count(model) == parameters
    assert model.encoder.image_size == image
    assert model.encoder.positions.shape == (1024, 768)
    assert (model.readout.kernel_size, model.readout.stride) == ((stride,), (stride,))
    assert model(torch.zeros(2, 100, dtype=torch.long, device="meta")).shape == (2, 1, 50257)
    assert not any("head" in key or ".norm." in key for key in model.trunk.state_dict() if key.count(".") < 3)


def test_tiny_is_as_large_as_gpt_tiny():
    with torch.device("meta"):
        ours, theirs = ConvNeXtV2LM(**VARIANTS["convnextv2_lm_tiny"]), GPT(**GPT_VARIANTS["gpt_tiny"])
    assert count(ours) == pytest.approx(count(theirs), rel=0.1)
    assert (ours.context, ours.config.vocab_size) == (theirs.context, theirs.config.vocab_size)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("readout", ["upsample", "pool"])
def test_any_trunk(trunk, readout):
    model, ids = model_of(trunk=TRUNKS[trunk], readout=readout), random_ids(3, 14)
    assert model(ids).shape == (3, 1, 19)
    assert torch.equal(model.next_logits(ids), model(ids)[:, -1])
    F.cross_entropy(model.train()(ids)[:, 0], ids[:, 0]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_forward_is_encoder_trunk_and_transposed_convolution():
    """Against torch's own transposed convolution, all of whose channels are computed, in channels-first images."""
    model, ids = model_of(order="newest_first"), random_ids(2, 11)
    trunk = ConvNeXtV2(depths=(1, 1), dims=(8, 12), num_classes=0, img_size=16).eval()
    missing, unexpected = trunk.load_state_dict(model.trunk.state_dict(), strict=False)
    assert (set(missing), unexpected) == ({"head.norm.weight", "head.norm.bias"}, [])
    features = trunk.forward_features(model.encoder(ids))
    assert features.shape == (2, 12, 2, 2)
    upsampled = F.conv_transpose1d(features.flatten(2), model.readout.weight, model.readout.bias, stride=12)
    assert upsampled.shape == (2, 12, 48)
    expected = upsampled[:, -1] @ model.encoder.tokens.T
    torch.testing.assert_close(model(ids)[:, 0], expected)


def test_pool_readout():
    model, ids = model_of(readout="pool"), random_ids(2, 11)
    features = model.trunk.forward_features(model.encoder(ids)).mean((2, 3))
    normed = F.layer_norm(features, (12,), model.readout.norm.weight, model.readout.norm.bias, 1e-6)
    expected = (normed @ model.readout.proj.weight.T + model.readout.proj.bias) @ model.encoder.tokens.T
    torch.testing.assert_close(model(ids)[:, 0], expected)


def test_trunk_by_registered_name():
    patchlib.register_model("a_small_mixer", ConvMixer, ConvMixer.Config(dim=12, depth=1, kernel_size=3, patch_size=8))
    model = model_of(trunk="a_small_mixer")
    assert isinstance(model.trunk, ConvMixer)
    assert (model.trunk.config.img_size, model.trunk.config.num_classes) == ((16, 16), 0)
    assert ConvNeXtV2LM(**{**SMALL, "trunk": {"kind": "a_small_mixer", "depth": 2}}).trunk.config.depth == 2
    assert isinstance(model_of(trunk={"kind": "vit_128_6_cifar", "depth": 1}).trunk, ViT)


def test_trunk_is_data():
    changed = ConvNeXtV2LMConfig().replace(trunk={"depths": [1, 1, 1, 1]})
    assert changed.trunk == {"kind": "convnextv2", "depths": (1, 1, 1, 1), "dims": (128, 256, 512, 1024)}
    assert ConvNeXtV2LMConfig.from_dict(changed.to_dict()) == changed
    assert changed.replace(trunk="vit").trunk == {"kind": "vit"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_chans": 3}, ["in_chans"]),
        ({"img_size": 32}, ["img_size"]),
        ({"trunk": "convnexxt"}, ["trunk", "convnexxt"]),
        ({"trunk": {"kind": "gpt"}}, ["trunk", "gpt"]),
        ({"trunk": 3}, ["trunk", "kind"]),
        ({"trunk": {"kind": "convmixer", "dims": 3}}, ["trunk", "'dims'", "'dim'"]),
        ({"trunk": {"kind": "convmixer", "dim": -3}}, ["trunk", "dim", "-3"]),
        ({"trunk": {"kind": "convmixer", "img_size": 32}}, ["trunk.img_size", "leave it out"]),
        (
            {"trunk": {"kind": "vit", "dim": 12, "depth": 1, "heads": 2, "patch_size": 7}},
            ["trunk.patch_size", "7", "16"],
        ),
        ({"trunk": {"kind": "vit", "dim": 12, "depth": 1, "heads": 2, "patch_size": 32}}, ["trunk.patch_size", "32"]),
        ({"trunk": {"kind": "convnext", "depths": (1,) * 5, "dims": (4,) * 5}}, ["trunk", "16"]),
        (
            {"channels": 1, "trunk": {"kind": "convmixer", "dim": 4, "patch_size": 3}},
            ["readout", "16", "5 x 5", "pool"],
        ),
        ({"channels": 4096, "patch_size": 256}, ["channels", "32768"]),
        ({"max_positions": 9}, ["max_positions", "14"]),
        ({"pad_token_id": 19}, ["pad_token_id", "18"]),
        ({"readout": "mean"}, ["readout", "pool"]),
    ],
)
def test_bad_configs(options, words):
    with pytest.raises(ConfigError) as error:
        ConvNeXtV2LM(**{**SMALL, **options})
    assert all(word in str(error.value) for word in words), error.value


def test_bad_input():
    with pytest.raises(InputError, match="15 tokens"):
        model_of()(random_ids(1, 15))
    with pytest.raises(InputError, match=r"\[1, 0\]: found -1"):
        model_of()(torch.tensor([[0, 1], [-1, 3]]))


def test_tied_weight_is_one():
    model, ids = model_of(), random_ids(2, 14)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    rebuilt = ConvNeXtV2LM(type(model.config).from_dict(model.config.to_dict())).eval()
    rebuilt.load_state_dict(model.state_dict())
    cast = copy.deepcopy(model).double().float()
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), rebuilt, cast):
        assert torch.equal(other(ids), model(ids))
        assert count(other) == count(model)
        assert [key for key, value in other.state_dict().items() if 19 in value.shape] == ["encoder.tokens"]
        token = (set(range(19)) - set(ids.flatten().tolist())).pop()
        before = other(ids)
        with torch.no_grad():
            other.encoder.tokens[token] *= 2  # a token that the text has not, so that its score alone changes
        changed = (other(ids) != before)[:, 0]
        assert changed[:, token].all()
        assert changed.sum() == 2


def test_fresh_weights_are_the_trunks():
    torch.manual_seed(0)
    model = ConvNeXtV2LM(**{**SMALL, "trunk": {"kind": "convnextv2", "depths": (1, 1), "dims": (64, 64)}})
    torch.nn.init.ones_(model.trunk.stages[0].blocks[0].fc1.weight)
    model.init_weights()
    weight = model.trunk.stages[0].blocks[0].fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.trunk.stages[0].blocks[0].fc1.bias == 0).all()
    assert model.encoder.tokens.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("readout", ["upsample", "pool"])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_fresh_weights_are_drawn_alike_by_constructor_and_init_weights(trunk, readout):
    width = 64
    trunk = {key: (width, width) if key == "dims" else width if key == "dim" else v for key, v in TRUNKS[trunk].items()}
    if "stages" in trunk:
        trunk["stages"] = [{**trunk["stages"][0], "dim": width}]
    model = ConvNeXtV2LM(**{**SMALL, "trunk": trunk, "readout": readout})
    built = {name: p.clone() for name, p in model.named_parameters()}
    model.init_weights()
    for name, parameter in model.named_parameters():
        if built[name].std() == 0:
            assert torch.equal(parameter, built[name]), name
        else:
            assert not torch.equal(parameter, built[name]), name
            chance = max(0.05, 4 * parameter.numel() ** -0.5)
            assert parameter.std().item() == pytest.approx(built[name].std().item(), rel=chance), name
    # torch's own, as in the models trained so far
    if readout == "pool":
        assert model.readout.proj.weight.std().item() == pytest.approx(width**-0.5 / 3**0.5, rel=0.05)
        assert model.readout.proj.bias.std() > 0.01


def test_dropout_of_the_trunk_falls_on_what_is_read_out():
    for readout in ("pool", "upsample"):
        model = model_of(trunk={**TRUNKS["convmixer"], "drop": 0.5}, readout=readout)
        plain = model_of(trunk=TRUNKS["convmixer"], readout=readout)
        assert model.state_dict().keys() == plain.state_dict().keys()
        ids, read = random_ids(4, 14), []
        assert torch.equal(model(ids), plain(ids))
        model.readout.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0]))
        model.train()
        model(ids)
        assert 0.3 < (read[0] == 0).float().mean() < 0.7


def test_learns_the_newest_token():
    torch.manual_seed(0)
    model = ConvNeXtV2LM(**{**SMALL, "order": "newest_first", "readout": "pool"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(90):
        ids = torch.randint(19, (64, 5))
        loss = F.cross_entropy(model(ids)[:, 0], (ids[:, -1] + 1) % 19)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.5  # guessing is 2.9


def test_compile_export_dtypes_and_meta():
    model, ids = model_of(), random_ids(2, 14)
    expected = model(ids)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(ids), expected)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (ids,), dynamic_shapes={"ids": {0: batch}}).module()
    torch.testing.assert_close(exported(random_ids(5, 14)), model(random_ids(5, 14)))
    half = copy.deepcopy(model).bfloat16()
    assert half(ids).dtype == torch.bfloat16
    assert ((half(ids).float() - expected).abs().max() / expected.abs().max()).item() < 0.1
    with torch.device("meta"):
        assert ConvNeXtV2LM(**SMALL)(ids.to("meta")).shape == (2, 1, 19)
