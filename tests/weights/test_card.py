"""The card of a model on the Hub."""

import json

from huggingface_hub import ModelCard

import patchlib
from patchlib.weights.card import model_card

MODEL = {"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 4, "img_size": 8}
INFO = {
    "license": "mit",
    "source": "hf-hub:user/other",
    "data": "cats and dogs\n(Kaggle | 2013)",
    "command": "python examples/finetune.py --data x",
    "score": "86.4 % of 1,000 test photographs",
    "date": "2026-11-21",
}


def card(info=None, **options):
    model = patchlib.ConvMixer(**MODEL, **options)
    model.info = info or {}
    text = model_card(model, "user/my-net")
    _, front, body = text.split("---\n", 2)
    return front.splitlines(), body


def test_front_matter_is_what_the_hub_reads():
    front, _ = card(INFO)
    assert "library_name: patchlib" in front
    assert "pipeline_tag: image-classification" in front
    assert "license: mit" in front
    assert front[front.index("tags:") + 1 :][:2] == ["- patchlib", "- image-classification"]


def test_the_hubs_own_client_reads_it():
    model = patchlib.ConvMixer(**MODEL)
    model.info = INFO
    data = ModelCard(model_card(model, "user/my-net")).data
    assert (data.library_name, data.license, data.tags) == ("patchlib", "mit", ["patchlib", "image-classification"])


def test_facts_stand_in_the_table():
    _, body = card(INFO)
    rows = dict(line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.count(" | ") and line != "| | |")
    assert rows == {
        "Model": "ConvMixer", "Parameters": f"{sum(p.numel() for p in patchlib.ConvMixer(**MODEL).parameters()):,}",
        "Data": "cats and dogs (Kaggle \\| 2013)", "Command": INFO["command"], "Score": INFO["score"],
        "Date": "2026-11-21", "Source": "hf-hub:user/other", "License": "mit",
    }  # fmt: skip


def test_what_is_not_known_is_left_out():
    front, body = card()
    assert not any(line.startswith("license") for line in front)
    assert "| Model | ConvMixer |" in body
    assert not any(word in body for word in ("Data", "Score", "None"))


def test_a_new_head_is_not_credited_with_the_old_ones_training():
    model = patchlib.create_model("convmixer_16", pretrained=True, num_classes=10)
    text = model_card(model, "me/flowers")
    assert not any(word in text for word in ("accuracy", "5,977", "finetune.py", "letterboxed", "2026"))
    assert "| Source | convmixer_16.cats_dogs |" in text
    assert "| Terms | research use" in text
    assert model.info["preprocessing"]["crop_mode"] == "border"
    same = patchlib.create_model("convmixer_16", pretrained=True)
    assert same.info["test_accuracy"] == 0.85
    same.reset_classifier(2)
    assert same.info == model.info


def test_a_licence_of_several_lines_adds_no_field():
    front, _ = card({"license": "mit\nlibrary_name: evil"})
    assert [line for line in front if line.startswith("library_name")] == ["library_name: patchlib"]


def test_it_says_how_to_load_the_model():
    _, body = card()
    assert "# my-net" in body
    assert 'model = patchlib.create_model("hf-hub:user/my-net")' in body


def test_language_models_are_tagged_as_such():
    name = next(name for name in ("gpt_tiny", "gpt2", "vit_16_linear") if name in patchlib.list_models())
    model = patchlib.create_model(name, device="meta")
    tag = "image-classification" if name == "vit_16_linear" else "text-generation"
    assert f"pipeline_tag: {tag}" in model_card(model, "user/x")
    assert json.dumps(model.info) == "{}"
