"""ConvMixer against its authors' code, and what its config allows."""

import pytest
import torch
from torch import nn

import patchlib
from patchlib import ConfigError, ConvMixer, ConvMixerConfig, InputError

TINY = {"dim": 12, "depth": 3, "kernel_size": 5, "patch_size": 4, "img_size": 16, "num_classes": 5}


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


def authors(dim, depth, kernel_size, patch_size, num_classes, act=nn.GELU, **_):
    """The whole model as figure 3 of the paper prints it."""
    return nn.Sequential(
        nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size),
        act(),
        nn.BatchNorm2d(dim),
        *[
            nn.Sequential(
                Residual(
                    nn.Sequential(
                        nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same"), act(), nn.BatchNorm2d(dim)
                    )
                ),
                nn.Conv2d(dim, dim, kernel_size=1),
                act(),
                nn.BatchNorm2d(dim),
            )
            for _ in range(depth)
        ],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, num_classes),
    )


def both(**overrides):
    """Ours and the authors', whose tensors come in the same order; all redrawn."""
    options = {**TINY, **overrides}
    theirs = authors(**{**options, "act": {"gelu": nn.GELU, "relu": nn.ReLU}[options.get("act", "gelu")]})
    for tensor in [*theirs.parameters(), *theirs.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else torch.randn_like(tensor) / 4
    ours = ConvMixer(**options)
    values = theirs.state_dict().values()
    state = {key: v.reshape(old.shape) for (key, old), v in zip(ours.state_dict().items(), values, strict=True)}
    ours.load_state_dict(state)
    return ours, theirs


def close(found, wanted):
    return (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("options", [{}, {"act": "relu"}, {"kernel_size": 4, "patch_size": 3}])
@torch.no_grad()
def test_evaluation_is_the_authors(options):
    ours, theirs = both(**options)
    images = torch.randn(2, 3, 19, 26)  # the last rows and columns fill no patch
    assert close(ours.eval()(images), theirs.eval()(images))


def test_a_training_step_is_the_authors():
    ours, theirs = both()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    for model in (ours, theirs):
        nn.functional.cross_entropy(model(images), labels).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine.grad.flatten(), other.grad.flatten(), atol=1e-5, rtol=1e-3)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_1536_20", "convmixer_256_8"]
)
def test_the_papers_own_models_have_its_number_of_parameters(name):
    """Section 2: h (d (k² + h + 6) + c p² + n + 3) + n."""
    model = patchlib.create_model(name, device="meta")
    c = model.config
    h, d, k, p, n = c.dim, c.depth, c.kernel_size, c.patch_size, c.num_classes
    wanted = h * (d * (k**2 + h + 6) + 3 * p**2 + n + 3) + n
    assert sum(w.numel() for w in model.parameters()) == wanted


def test_a_rezero_model_starts_without_its_depthwise_branches():
    model = ConvMixer(**TINY, rezero=True).eval()
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    with torch.no_grad():
        for block in model.blocks:
            block.depthwise.weight.mul_(5)
    assert torch.equal(model(images), before)
    with torch.no_grad():
        model.blocks[0].scale.gamma.fill_(1)
    assert not torch.allclose(model(images), before, atol=1e-3)


def test_remainders_are_dropped_unless_said_otherwise():
    images = torch.randn(1, 3, 18, 23)
    model = ConvMixer(**TINY).eval()
    assert torch.equal(model(images), model(images[..., :16, :20]))
    strict = ConvMixer(**TINY, patch_embed={"remainder": "error"})
    with pytest.raises(InputError, match="height 18"):
        strict(images)


def test_patches_may_overlap():
    model = ConvMixer(**{**TINY, "patch_size": 2}, patch_embed={"kind": "conv", "stride": 1})
    assert model.forward_features(torch.randn(2, 3, 8, 8)).shape == (2, 12, 7, 7)
    assert model.feature_info.reduction() == [1, 1, 1]


def test_dropout_is_before_the_classifier():
    model = ConvMixer(**TINY, drop=0.5).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    model.head.train()
    assert not torch.equal(model(images), model(images))


def test_drop_path_grows_to_the_last_block():
    model = ConvMixer(**TINY, drop_path=0.4)
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"act": "tanh"}, r"ConvMixerConfig.act: found 'tanh'; allowed: 'gelu', 'relu', 'silu'"),
        ({"kernel_size": 0}, "ConvMixerConfig.kernel_size: found 0; allowed: an integer from 1 to 255"),
        ({"pool": "class"}, "ConvMixerConfig.pool: found 'class'"),
        ({"depht": 3}, "did you mean 'depth'"),
    ],
)
def test_impossible_configs_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        ConvMixerConfig().replace(**overrides)
