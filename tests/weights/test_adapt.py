"""Weights of one geometry in a model of another."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patchlib
from patchlib.weights.adapt import adapt_channels

VIT = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "img_size": 16, "num_classes": 5}


def redrawn(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 if name.endswith("var") else torch.randn_like(tensor) * 0.3)
    return model.eval()


def saved(tmp_path, **options):
    model = redrawn(patchlib.ViT(**{**VIT, **options}))
    return model, patchlib.save_pretrained(model, tmp_path)


def load(folder, **options):
    return patchlib.create_model(f"local-dir:{folder}", **options)


def close(found, wanted, tolerance=1e-4):
    return ((found - wanted).abs().max() / wanted.abs().max()).item() < tolerance


# channels


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 4), (3, 6), (1, 3), (4, 3), (6, 2), (2, 5)])
def test_kernels_are_repeated_and_keep_their_response(old, new):
    kernel = torch.randn(5, old, 2, 2)
    found = adapt_channels(kernel, new)
    if new == 1:
        wanted = torch.stack([kernel[:, c] for c in range(old)]).sum(0)[:, None]
    else:
        wanted = torch.stack([kernel[:, c % old] * old / new for c in range(new)], dim=1)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert found.dtype == kernel.dtype
    assert adapt_channels(kernel, old) is kernel


def test_kernels_of_half_precision_stay_so():
    assert adapt_channels(torch.randn(5, 3, 2, 2).half(), 4).dtype == torch.float16


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_grey_image_looks_as_its_three_equal_channels_did(kind, tmp_path):
    model, folder = saved(tmp_path, patch_embed=kind)
    grey = torch.randn(2, 1, 16, 16)
    assert close(load(folder, in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1)))
    again = patchlib.save_pretrained(load(folder, in_chans=1), tmp_path / "grey")
    assert close(load(again, in_chans=3)(grey.expand(-1, 3, -1, -1)), model(grey.expand(-1, 3, -1, -1)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_six_channels_answer_to_an_image_twice_as_three_to_it_once(kind, tmp_path):
    model, folder = saved(tmp_path, patch_embed=kind)
    images = torch.randn(2, 3, 16, 16)
    assert close(load(folder, in_chans=6)(torch.cat([images, images], dim=1)), model(images))
    assert load(folder, in_chans=4)(torch.randn(2, 4, 16, 16)).shape == (2, 5)


def test_convmixers_are_adapted_too(tmp_path):
    model = redrawn(patchlib.ConvMixer(dim=8, depth=1, kernel_size=3, patch_size=4, img_size=16))
    folder = patchlib.save_pretrained(model, tmp_path)
    grey = torch.randn(2, 1, 16, 16)
    assert close(load(folder, in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1)))
    assert load(folder, patch_size=8, img_size=32)(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_an_early_conv_stem_cannot_be_adapted(tmp_path):
    _, folder = saved(tmp_path, patch_embed="early_conv")
    with pytest.raises(patchlib.WeightsError, match=r"of another shape.*patch_embed\.proj\.0\.weight"):
        load(folder, in_chans=1)


# linear and conv


@torch.no_grad()
@pytest.mark.parametrize(("old", "new"), [("linear", "conv"), ("conv", "linear")])
def test_linear_and_conv_patches_are_one_function(old, new, tmp_path):
    model, folder = saved(tmp_path, patch_embed=old, patch_size=(2, 4))
    images = torch.randn(2, 3, 16, 16)
    again = load(folder, patch_embed=new)
    assert again.patch_embed.kind == new
    flat = again.patch_embed.proj.weight.flatten(1)
    assert torch.equal(flat, model.patch_embed.proj.weight.flatten(1))
    assert close(again(images), model(images), 1e-5)


@torch.no_grad()
def test_all_at_once(tmp_path):
    """Other patches, other channels, the other form: as one after the other."""
    _, folder = saved(tmp_path, patch_embed="linear")
    at_once = load(folder, patch_embed="conv", in_chans=1, patch_size=2)
    step = patchlib.save_pretrained(load(folder, patch_embed="conv"), tmp_path / "a")
    step = patchlib.save_pretrained(load(step, in_chans=1), tmp_path / "b")
    step = load(step, patch_size=2)
    images = torch.randn(2, 1, 16, 16)
    assert close(at_once(images), step(images), 1e-5)


# patch size


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("size", [8, (8, 6), 5])
def test_larger_patches_answer_to_enlarged_patches_as_the_old_to_the_old(kind, size, tmp_path):
    """Enlarging loses nothing, so the new kernel can make it good exactly (FlexiViT, section 3.4)."""
    model, folder = saved(tmp_path, patch_embed=kind)
    new = (size, size) if isinstance(size, int) else size
    again = load(folder, patch_size=size, img_size=(4 * new[0], 4 * new[1]))
    images = torch.randn(2, 3, 16, 16)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    patches = F.interpolate(patches, new, mode="bicubic", antialias=True)
    larger = patches.unflatten(0, (2, 4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 4 * new[0], 4 * new[1])
    assert close(again.patch_embed(larger), model.patch_embed(images))
    assert close(again(larger), model(images))


@torch.no_grad()
def test_smaller_patches_are_the_nearest_answer(tmp_path):
    """What a smaller patch cannot hold is lost; the kernel is the least-squares solution over random patches."""
    model, folder = saved(tmp_path, patch_size=8, img_size=32)
    again = load(folder, patch_size=4, img_size=16)
    patches = torch.eye(64).reshape(64, 1, 8, 8)
    smaller = F.interpolate(patches, (4, 4), mode="bicubic", antialias=True).flatten(1)
    wanted = torch.linalg.lstsq(smaller, model.patch_embed.proj.weight.flatten(2).flatten(0, 1).T).solution
    assert close(again.patch_embed.proj.weight.flatten(2).flatten(0, 1).T, wanted)


def test_patches_that_overlap_or_are_no_matrix_cannot_be_resized(tmp_path):
    _, folder = saved(tmp_path, patch_embed="early_conv")
    with pytest.raises(patchlib.PatchlibError):
        load(folder, patch_size=8)


# positions


@torch.no_grad()
@pytest.mark.parametrize("size", [24, 8, (16, 32), (12, 20)])
@pytest.mark.parametrize("covers", [True, False])
def test_a_model_for_another_size_is_the_old_one_at_that_size(size, covers, tmp_path):
    model, folder = saved(tmp_path, pos_embed={"covers_prefix": covers}, tokens={"register": 2})
    height, width = (size, size) if isinstance(size, int) else size
    again = load(folder, img_size=size)
    assert again.config.img_size == size
    assert again.pos_embed.size == (height // 4, width // 4)
    images = torch.randn(2, 3, height, width)
    assert close(again(images), model(images), 1e-5)
    if covers:
        assert torch.equal(again.pos_embed.table[:, :3], model.pos_embed.table[:, :3])


@pytest.mark.parametrize("size", [24, 8, (12, 28)])
def test_positions_are_resampled_as_pillow_resamples_pictures(size, tmp_path):
    """Bicubic and antialiased, each channel a picture of 5 by 7 pixels."""
    image, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    model, folder = saved(tmp_path, img_size=(20, 28))
    again = load(folder, img_size=size)
    rows, columns = again.pos_embed.size
    old = model.pos_embed.table[0, 1:].detach().unflatten(0, (5, 7))
    new = again.pos_embed.table[0, 1:].detach().unflatten(0, (rows, columns))
    for channel in range(4):
        picture = image.fromarray(old[..., channel].contiguous().numpy())
        wanted = torch.from_numpy(numpy.array(picture.resize((columns, rows), image.Resampling.BICUBIC)))
        assert torch.allclose(new[..., channel], wanted, atol=1e-5)


@torch.no_grad()
def test_a_grid_of_another_shape_and_as_many_patches_is_another_grid(tmp_path):
    model, folder = saved(tmp_path, img_size=(16, 36))  # 4 x 9 patches
    again = load(folder, img_size=24)  # 6 x 6
    images = torch.randn(2, 3, 24, 24)
    assert not torch.equal(again.pos_embed.table, model.pos_embed.table)
    assert close(again(images), model(images), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "patch_embed",
    [{"kind": "conv", "stride": 2}, {"kind": "linear", "stride": (2, 4)}, {"kind": "conv", "remainder": "pad"}],
)
def test_overlapping_and_padded_patches_have_their_own_grid(patch_embed, tmp_path):
    model, folder = saved(tmp_path, patch_embed=patch_embed, img_size=(18, 12) if "stride" in patch_embed else (17, 9))
    images = torch.randn(2, 3, 24, 20)
    assert close(load(folder, img_size=(24, 20))(images), model(images), 1e-5)


@torch.no_grad()
def test_positions_of_patchnet_are_resampled(tmp_path):
    net = {"stages": ({"kind": "convmixer", "dim": 8},), "patch_size": 4, "img_size": 16, "pos_embed": "learned"}
    model = redrawn(patchlib.PatchNet(**net))
    folder = patchlib.save_pretrained(model, tmp_path)
    images = torch.randn(2, 3, 24, 12)
    assert close(load(folder, img_size=(24, 12))(images), model(images), 1e-5)


def test_a_bare_file_is_adapted_as_far_as_its_shapes_tell(tmp_path):
    model, folder = saved(tmp_path)
    options = {**VIT, "img_size": (24, 32), "patch_embed": "linear"}
    again = patchlib.load_pretrained(patchlib.ViT(**options), folder / "model.safetensors").eval()
    images = torch.randn(2, 3, 24, 32)
    assert close(again(images), model(images), 1e-5)
    _, folder = saved(tmp_path, img_size=(16, 20))  # 4 x 5 patches: no square, and nobody says which
    with pytest.raises(patchlib.WeightsError, match=r"pos_embed\.table \(1, 21, 16\) for \(1, 49, 16\)"):
        patchlib.load_pretrained(patchlib.ViT(**options), folder / "model.safetensors")


def test_positions_of_another_width_are_misshapen(tmp_path):
    _, folder = saved(tmp_path)
    with pytest.raises(patchlib.WeightsError, match=r"pos_embed\.table"):
        load(folder, dim=8, img_size=32)


def test_half_precision_is_adapted_in_float32(tmp_path):
    model = redrawn(patchlib.ViT(**VIT))
    folder = patchlib.save_pretrained(model, tmp_path, dtype=torch.float16)
    again = load(folder, img_size=24, dtype="file")
    assert again.pos_embed.table.dtype == torch.float16
    wanted = patchlib.save_pretrained(model, tmp_path / "exact")
    assert close(again.pos_embed.table.float(), load(wanted, img_size=24).pos_embed.table, 2e-3)


def test_another_architecture_by_override_is_named_by_the_caller(tmp_path):
    """Overrides that fit in shape are done; those that do not are refused."""
    _, folder = saved(tmp_path)
    assert isinstance(load(folder, drop=0.5).blocks[0].mlp.drop, nn.Dropout)
    with pytest.raises(patchlib.WeightsError, match=r"not used: .*blocks\.1\."):
        load(folder, depth=1)
    with pytest.raises(patchlib.WeightsError, match=r"missing: blocks\.2\."):
        load(folder, depth=3)
