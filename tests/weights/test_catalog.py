"""The catalogue: every entry leads somewhere, and what has no weights says so."""

import json
import re

import pytest

import patchlib
from patchlib.labels import class_names
from patchlib.registry import find_model
from patchlib.weights import catalog
from patchlib.weights.catalog import BUNDLED, find_weights, names_with_weights, weights_of
from patchlib.weights.hub import HubRepo
from patchlib.weights.load import FORMATS, Checkpoint, fill

ENTRIES = [entry for name in names_with_weights() for entry in weights_of(name)]


def test_the_catalogue_holds_timms_tags():
    assert len(ENTRIES) >= 60
    names = {entry.full_name for entry in ENTRIES}
    assert {
        "vit_base_patch16_224.augreg2_in21k_ft_in1k", "convmixer_768_32.in1k", "deit3_base_patch16_224.fb_in1k",
        "deit_base_distilled_patch16_224.fb_in1k",
    } <= names  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.full_name)
def test_every_entry_resolves(entry):
    """Its name is registered, its overrides and preprocessing are allowed, its source and format are real."""
    model_class, config = find_model(entry.name)
    config = config.replace(**entry.overrides)
    assert re.fullmatch(r"[\w-]+", entry.tag)
    assert entry.format in FORMATS
    assert entry.license
    assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    if entry.source == "bundled":
        folder = BUNDLED / entry.full_name
        assert entry.bundled_folder == folder
        assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
    else:
        assert entry.bundled_folder is None
        repo = HubRepo.parse(entry.source.removeprefix("hf-hub:"))
        assert entry.source == f"hf-hub:{repo.repo_id}"
    if spec := entry.info.get("preprocessing"):
        prepare = patchlib.preprocess(spec)
        height, width = (config.img_size,) * 2 if isinstance(config.img_size, int) else config.img_size
        assert prepare.input_size == (config.in_chans, height, width)
        assert model_class.__name__ != "GPT"
    labels = entry.info.get("labels")
    if isinstance(labels, str):
        assert len(class_names(labels)) == config.num_classes


def test_timms_repositories_bear_timms_names():
    for entry in ENTRIES:
        if entry.source.startswith("hf-hub:timm/"):
            assert entry.source == f"hf-hub:timm/{entry.full_name}"
            assert entry.format == "timm"


def test_the_first_entry_is_the_default():
    for name in names_with_weights():
        assert find_weights(name, None) == weights_of(name)[0]
        for entry in weights_of(name):
            assert find_weights(name, entry.tag) == entry
    assert find_weights("vit_base_patch16_224", None).tag == "augreg2_in21k_ft_in1k"  # timm's default


def test_an_unknown_tag_names_the_nearest():
    with pytest.raises(patchlib.UnknownNameError, match=r"tag 'augreg2_in21k'; did you mean .*'augreg_in21k'"):
        find_weights("vit_base_patch16_224", "augreg2_in21k")


@pytest.mark.parametrize("name", ["convmixer_16_8", "vit_16_linear", "patchnet_tiny", "my_own_net"])
def test_what_has_no_weights_names_the_nearest_that_does(name):
    assert not weights_of(name)
    with pytest.raises(patchlib.UnknownNameError, match=f"no weights of '{name}'") as caught:
        find_weights(name, None)
    named = re.search(r"nearest names that have some: (.*) \(", str(caught.value)).group(1)
    near = [one.strip("'") for one in named.split(", ")]
    assert len(near) == 3
    assert all(weights_of(one) for one in near)
    if name.startswith(("convmixer", "vit")):
        assert near[0].startswith(name.partition("_")[0])


def test_the_file_has_each_key_once():
    def unique(pairs):
        assert len({key for key, _ in pairs}) == len(pairs), pairs
        return dict(pairs)

    path = catalog.Path(catalog.__file__).parent / "catalog.json"
    assert json.loads(path.read_text(), object_pairs_hook=unique)


def test_a_model_does_not_share_its_info_with_the_catalogue():
    """Whoever changes a model's preprocessing changes that model's, and not the next one's."""
    entry = find_weights("vit_base_patch16_224", None)
    model = patchlib.ViT(dim=8, depth=1, heads=2, patch_size=4, img_size=8, num_classes=2)
    fill(model, Checkpoint(entry.full_name, model.state_dict(), "patchlib", patchlib.ViT, model.config, entry.info))
    assert model.info == entry.info
    model.info["preprocessing"]["mean"][0] = 9
    assert find_weights("vit_base_patch16_224", None).info["preprocessing"]["mean"][0] == 0.5
