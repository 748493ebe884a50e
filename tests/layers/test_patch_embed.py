"""Patches against torch's own unfolding, padding and resizing, and the papers' stems written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patchlib
from patchlib import ConfigError, InputError, PatchEmbed, UnknownNameError, ViT, register_block
from patchlib.layers.patch_embed import resize_kernel

SHAPES = [
    # patch, stride, image
    (4, None, (8, 12)),
    ((2, 3), None, (6, 9)),
    ((4, 2), (2, 1), (8, 5)),
    (3, 5, (8, 13)),
]


def unfolded(images, patch, stride):
    """Patches flattened as (channel, row, column), ``(batch, patches, pixels)``, by torch."""
    return F.unfold(images, patch, stride=stride or patch).transpose(1, 2)


@pytest.mark.parametrize(("patch", "stride", "image"), SHAPES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_patches_are_unfolded_in_order_channel_row_column(kind, patch, stride, image):
    embed = PatchEmbed(patch, 2, 5, kind, stride=stride)
    images = torch.randn(3, 2, *image)
    grid = embed(images)
    assert grid.shape == (3, *embed.grid_size(image), 5)
    wanted = F.linear(unfolded(images, patch, stride), embed.proj.weight.reshape(5, -1), embed.proj.bias)
    assert torch.allclose(grid.flatten(1, 2), wanted, atol=1e-5)


def test_one_patch_by_hand():
    embed = PatchEmbed((1, 2), 2, 1, "linear")
    with torch.no_grad():
        embed.proj.weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
        embed.proj.bias.fill_(0.5)
    images = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]], [[5.0, 6.0, 7.0, 8.0]]]])
    assert embed(images).tolist() == [[[[1 + 20 + 500 + 6000.5], [3 + 40 + 700 + 8000.5]]]]


@pytest.mark.parametrize(("patch", "stride", "image"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_conv_are_one_function_both_ways(patch, stride, image, bias):
    images = torch.randn(2, 3, *image)
    for kind, other in (("linear", "conv"), ("conv", "linear")):
        embed = PatchEmbed(patch, 3, 7, kind, stride=stride, bias=bias).eval()
        turned = embed.as_kind(other)
        assert type(turned.proj) is not type(embed.proj)
        assert torch.allclose(turned(images), embed(images), atol=1e-5)
        assert not turned.training
        again = turned.as_kind(kind)
        assert torch.equal(again.proj.weight, embed.proj.weight), "nothing is lost on the way"
        with torch.no_grad():
            turned.proj.weight.zero_()
        assert embed.proj.weight.any(), "the weights are its own"


def test_as_kind_keeps_what_to_do_with_a_remainder_and_refuses_other_kinds():
    assert PatchEmbed(4, 3, 8, "linear", remainder="drop").as_kind("conv")(torch.rand(1, 3, 9, 9)).shape == (1, 2, 2, 8)
    with pytest.raises(ConfigError, match="early_conv"):
        PatchEmbed(4, 3, 8, "early_conv").as_kind("conv")
    with pytest.raises(ConfigError, match="early_conv"):
        PatchEmbed(4, 3, 8, "conv").as_kind("early_conv")


# --- the stem of small convolutions


def paper_stem(in_chans, widths, dim):
    layers = []
    for before, after in itertools.pairwise((in_chans, *widths)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))


@pytest.mark.parametrize(
    ("patch", "dim", "given", "widths"),
    [(16, 64, None, (4, 8, 16, 32)), (4, 10, None, (2, 5)), (8, 6, (3, 9, 5), (3, 9, 5)), (2, 8, None, (4,))],
)
@pytest.mark.parametrize("training", [True, False])
def test_early_conv_is_the_papers_stem(patch, dim, given, widths, training):
    options = {} if given is None else {"widths": given}
    embed = PatchEmbed(patch, 3, dim, "early_conv", **options)
    stem = paper_stem(3, widths, dim)
    for ours, theirs in zip(embed.parameters(), stem.parameters(), strict=True):
        with torch.no_grad():
            ours.copy_(torch.randn_like(ours))
            theirs.copy_(ours)
    images = torch.randn(2, 3, 3 * patch, 2 * patch)
    embed.train(training), stem.train(training)
    wanted = stem(images).permute(0, 2, 3, 1)
    assert torch.allclose(embed(images), wanted, atol=1e-4 * wanted.abs().max().item())
    for ours, theirs in zip(embed.buffers(), stem.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_bare_early_conv_has_neither_norm_nor_activation_and_biases_instead():
    embed = PatchEmbed(8, 3, 16, "early_conv", norm=False, act=False)
    assert [type(layer) for layer in embed.proj] == [nn.Conv2d] * 4
    assert all(layer.bias is not None for layer in embed.proj)
    first, second = torch.randn(2, 1, 3, 16, 16)
    middle = (embed(first) + embed(second)) / 2
    assert torch.allclose(embed((first + second) / 2), middle, atol=1e-5), "without them it is affine"


def test_the_source_experiments_bare_stem_has_its_number_of_parameters():
    with torch.device("meta"):
        model_class, config = patchlib.registry.find_model("vit_early_conv_128_6")
        bare = model_class(config, patch_embed={"norm": False, "act": False})
    assert sum(p.numel() for p in bare.parameters()) == 7_256_418


@pytest.mark.parametrize(
    ("patch", "options", "message"),
    [
        (12, {}, "power of two"),
        (1, {}, "power of two"),
        ((4, 8), {}, "power of two"),
        (8, {"widths": (4, 8)}, "2 widths; patch size 8 takes 3"),
        (4, {"widths": (0, 4)}, r"\(0, 4\)"),
        (4, {"width": (4, 8)}, "did you mean 'widths'"),
        (4, {"stride": 2}, "no option 'stride'"),
    ],
)
def test_impossible_stems_are_refused(patch, options, message):
    with pytest.raises(ConfigError, match=message):
        PatchEmbed(patch, 3, 16, "early_conv", **options)


# --- images that patches do not cover


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("patch", "stride"), [(4, 4), ((4, 3), (4, 3)), (4, 3), (3, 4)])
@pytest.mark.parametrize("image", [(8, 12), (9, 13), (10, 11), (7, 15)])
def test_a_remainder_is_padded_with_zeros_or_cropped(kind, patch, stride, image):
    exact = PatchEmbed(patch, 2, 5, kind, stride=stride)
    images = torch.randn(1, 2, *image)
    patches, strides = [(p, p) if isinstance(p, int) else p for p in (patch, stride)]

    def covered(round_up):
        cells = [(n - p) / s for n, p, s in zip(image, patches, strides, strict=True)]
        cells = [-int(-c // 1) if round_up else int(c // 1) for c in cells]
        return [c * s + p for c, p, s in zip(cells, patches, strides, strict=True)]

    height, width = covered(round_up=True)
    padded = F.pad(images, (0, width - image[1], 0, height - image[0]))
    exact.remainder = "pad"
    assert torch.allclose(
        exact(images), F.conv2d(padded, *kernel_of(exact, patches), stride).permute(0, 2, 3, 1), atol=1e-5
    )
    assert exact.grid_size(image) == tuple(exact(images).shape[1:3])

    height, width = covered(round_up=False)
    cropped = images[:, :, :height, :width]
    exact.remainder = "drop"
    assert torch.allclose(
        exact(images), F.conv2d(cropped, *kernel_of(exact, patches), stride).permute(0, 2, 3, 1), atol=1e-5
    )
    assert exact.grid_size(image) == tuple(exact(images).shape[1:3])

    exact.remainder = "error"
    if (height, width) == image:
        exact(images)
    else:
        with pytest.raises(InputError, match="not covered exactly"):
            exact(images)


def kernel_of(embed, patch):
    return embed.proj.weight.reshape(embed.dim, embed.in_chans, *patch), embed.proj.bias


def test_padding_makes_a_patch_of_an_image_smaller_than_one():
    images = torch.rand(1, 3, 2, 3)
    assert PatchEmbed(4, 3, 8, remainder="pad")(images).shape == (1, 1, 1, 8)
    for remainder in ("error", "drop"):
        with pytest.raises(InputError, match="height 2: smaller than one patch of 4"):
            PatchEmbed(4, 3, 8, remainder=remainder)(images)


def test_early_conv_pads_and_drops_too():
    images = torch.rand(1, 3, 10, 8)
    assert PatchEmbed(4, 3, 8, "early_conv", remainder="pad")(images).shape == (1, 3, 2, 8)
    assert PatchEmbed(4, 3, 8, "early_conv", remainder="drop")(images).shape == (1, 2, 2, 8)
    with pytest.raises(InputError, match="height 10"):
        PatchEmbed(4, 3, 8, "early_conv")(images)


# --- resized kernels


def resized(patches, size):
    return F.interpolate(patches, size=size, mode="bicubic", antialias=True)


def test_a_kernel_keeps_its_size():
    kernel = torch.randn(2, 3, 4, 4)
    assert resize_kernel(kernel, (4, 4)) is kernel


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (4, 9)])
def test_a_larger_kernel_answers_to_a_resized_patch_as_before(size):
    """Enlarging loses nothing of a patch, so FlexiViT's objective is met exactly."""
    kernel, patches = torch.randn(6, 3, 4, 4), torch.randn(5, 3, 4, 4)
    before = torch.einsum("nchw,dchw->nd", patches, kernel)
    after = torch.einsum("nchw,dchw->nd", resized(patches, size), resize_kernel(kernel, size))
    assert torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("size", [(4, 4), (3, 8)])
def test_a_smaller_kernel_is_the_least_squares_one(size):
    """FlexiViT's objective over white patches: ``|w - B w'|`` with B the resize."""
    kernel = torch.randn(2, 1, 8, 8)
    columns = [resized(torch.eye(64)[i].reshape(1, 1, 8, 8), size).flatten() for i in range(64)]
    wanted = torch.linalg.lstsq(torch.stack(columns).double(), kernel.reshape(2, 64).T.double()).solution.T
    assert torch.allclose(resize_kernel(kernel, size).flatten(1).double(), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_patches_are_resized_in_place(kind):
    embed = PatchEmbed(4, 3, 8, kind).requires_grad_(False)
    images = torch.randn(2, 3, 8, 12)
    before, weight = embed(images), embed.proj.weight
    embed.resize(4)
    assert embed.proj.weight is weight
    embed.resize((8, 6))
    assert embed.patch_size == embed.stride == (8, 6)
    assert not any(p.requires_grad for p in embed.parameters()), "what was frozen stays frozen"
    tiles = images.reshape(2, 3, 2, 4, 3, 4).transpose(3, 4).flatten(2, 3).transpose(1, 2).flatten(0, 1)
    larger = resized(tiles, (8, 6)).reshape(2, 2, 3, 3, 8, 6).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 18)
    assert torch.allclose(embed(larger), before, atol=1e-4)


@pytest.mark.parametrize("options", [{"kind": "early_conv"}, {"kind": "conv", "stride": 2}])
def test_only_whole_patches_are_resized(options):
    embed = PatchEmbed(4, 3, 8, **options)
    with pytest.raises(ConfigError, match="patch_size"):
        embed.resize(8)


# --- errors, layout, kinds of the user's own


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 8, 8), r"3 dimensions \(3, 8, 8\).*\[None\]"),
        (torch.rand(1, 1, 8, 8), "1 channels; this model takes 3$"),
        (torch.rand(1, 8, 8, 3), "channels-last: permute"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8; allowed: floats"),
        (torch.rand(1, 3, 8, 9), "width 9: .*patches of 4.*size that is: 8.*remainder='pad'"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, message):
    with pytest.raises(InputError, match=message):
        PatchEmbed(4, 3, 8)(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size: found 0"),
        ({"patch_size": (4, -1)}, "patch_size: found"),
        ({"patch_size": "16"}, "patch_size: found '16'"),
        ({"stride": 0}, "stride: found 0"),
        ({"stride": (1, 2, 3)}, "stride: found"),
        ({"remainder": "crop"}, "remainder: found 'crop'"),
        ({"kind": "conv", "padding": 1}, "no option 'padding'"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PatchEmbed(**{"patch_size": 4, "dim": 8, **options})


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        PatchEmbed(4, 3, 8, "liner")


@pytest.mark.parametrize("options", [{"kind": "linear"}, {"kind": "conv"}, {"kind": "early_conv"}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_first_grid_is_contiguous(options, layout):
    images = torch.rand(2, 3, 12, 8).to(memory_format=layout)
    embed = PatchEmbed(4, 3, 8, **options)
    assert embed(images).is_contiguous()
    assert embed.bfloat16()(images.bfloat16()).is_contiguous()


class MeanPatches(nn.Module):
    """A user's kind: the mean colour of each patch, scaled."""

    def __init__(self, patch_size, in_chans, dim, *, gain=1.0):
        super().__init__()
        self.pool, self.mix, self.gain = nn.AvgPool2d(patch_size), nn.Linear(in_chans, dim), gain

    def forward(self, images):
        return self.mix(self.gain * self.pool(images).permute(0, 2, 3, 1))


def test_users_register_kinds_of_their_own():
    register_block("mean_of_patch", MeanPatches, role="patch_embed")
    embed = PatchEmbed((4, 2), 3, 8, "mean_of_patch", gain=2.0)
    images = torch.rand(2, 3, 8, 8)
    means = images.reshape(2, 3, 2, 4, 4, 2).mean(dim=(3, 5)).permute(0, 2, 3, 1)
    assert torch.allclose(embed(images), embed.proj.mix(2 * means), atol=1e-6)
    with pytest.raises(InputError, match="height 9"):
        embed(torch.rand(1, 3, 9, 8))
    with pytest.raises(ConfigError, match="did you mean 'gain'"):
        PatchEmbed(4, 3, 8, "mean_of_patch", gian=2.0)
    with pytest.raises(ConfigError, match="only whole"):
        embed.resize(8)
    model = ViT(dim=8, depth=1, heads=2, patch_size=4, img_size=8, patch_embed={"kind": "mean_of_patch", "gain": 3.0})
    assert model.patch_embed.proj.gain == 3.0
    assert model(images).shape == (2, 1000)
