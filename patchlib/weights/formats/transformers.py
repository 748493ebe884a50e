"""Checkpoints of Hugging Face transformers: `config.json` with "model_type", and its key names."""

from collections.abc import Mapping
from typing import Any

from ...errors import WeightsError, nearest
from ...registry import find_model_class
from .table import CONCAT_3, TRANSPOSE, VECTOR, Rule, Table


def _vit(prefix: str, head: str = "classifier") -> Table:
    """The names on disk."""
    layer = f"{prefix}encoder.layer.{{i}}."
    attention = f"{layer}attention.attention."
    return _vit_names(
        prefix,
        head,
        layer,
        qkv=(f"{attention}query.{{p}}", f"{attention}key.{{p}}", f"{attention}value.{{p}}"),
        names=("attention.output.dense", "intermediate.dense", "output.dense"),
    )


def _vit_in_memory(prefix: str, head: str = "classifier") -> Table:
    """The names that `state_dict` gives since version 5."""
    layer = f"{prefix}layers.{{i}}."
    return _vit_names(
        prefix,
        head,
        layer,
        qkv=tuple(f"{layer}attention.{name}_proj.{{p}}" for name in "qkv"),
        names=("attention.o_proj", "mlp.fc1", "mlp.fc2"),
    )


def _vit_names(prefix: str, head: str, layer: str, qkv: tuple[str, ...], names: tuple[str, ...]) -> Table:
    proj, fc1, fc2 = names
    return Table(
        (
            Rule("cls_token", f"{prefix}embeddings.cls_token"),
            Rule("dist_token", f"{prefix}embeddings.distillation_token"),
            Rule("pos_embed.table", f"{prefix}embeddings.position_embeddings"),
            Rule("patch_embed.proj.{p}", f"{prefix}embeddings.patch_embeddings.projection.{{p}}"),
            Rule("blocks.{i}.norm1.{p}", f"{layer}layernorm_before.{{p}}"),
            Rule("blocks.{i}.attn.qkv.{p}", qkv, CONCAT_3),
            Rule("blocks.{i}.attn.proj.{p}", f"{layer}{proj}.{{p}}"),
            Rule("blocks.{i}.norm2.{p}", f"{layer}layernorm_after.{{p}}"),
            Rule("blocks.{i}.mlp.fc1.{p}", f"{layer}{fc1}.{{p}}"),
            Rule("blocks.{i}.mlp.fc2.{p}", f"{layer}{fc2}.{{p}}"),
            Rule("norm.{p}", f"{prefix}layernorm.{{p}}"),
            Rule("head.fc.{p}", f"{head}.{{p}}"),
            Rule("head.fc_dist.{p}", "distillation_classifier.{p}"),
        ),
        ignored=rf"{prefix}(pooler\..*|embeddings\.mask_token)",
    )


def _convnext(prefix: str) -> Table:
    block, layer = "stages.{i}.blocks.{j}.", f"{prefix}encoder.stages.{{i}}.layers.{{j}}."
    downsampling = f"{prefix}encoder.stages.{{i}}.downsampling_layer."
    return Table(
        (
            Rule("patch_embed.proj.{p}", f"{prefix}embeddings.patch_embeddings.{{p}}"),
            Rule("stem_norm.{p}", f"{prefix}embeddings.layernorm.{{p}}"),
            Rule("stages.{i}.downsample.norm.{p}", f"{downsampling}0.{{p}}"),
            Rule("stages.{i}.downsample.conv.{p}", f"{downsampling}1.{{p}}"),
            Rule(block + "depthwise.{p}", f"{layer}dwconv.{{p}}"),
            Rule(block + "norm.{p}", f"{layer}layernorm.{{p}}"),
            Rule(block + "fc{n}.{p}", f"{layer}pwconv{{n}}.{{p}}"),
            Rule(block + "grn.{p}", f"{layer}grn.{{p}}", VECTOR),
            Rule(block + "scale.gamma", f"{layer}layer_scale_parameter"),
            Rule("head.norm.{p}", f"{prefix}layernorm.{{p}}"),
            Rule("head.fc.{p}", "classifier.{p}"),
        )
    )


def _gpt(prefix: str) -> Table:
    layer = f"{prefix}h.{{i}}."
    matrices = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    return Table(
        (
            Rule("token_embed.weight", f"{prefix}wte.weight"),
            Rule("pos_embed.weight", f"{prefix}wpe.weight"),
            Rule("blocks.{i}.norm{n}.{p}", f"{layer}ln_{{n}}.{{p}}"),
            *(Rule(f"blocks.{{i}}.{a}.weight", f"{layer}{b}.weight", TRANSPOSE) for a, b in matrices.items()),
            *(Rule(f"blocks.{{i}}.{a}.bias", f"{layer}{b}.bias") for a, b in matrices.items()),
            Rule("norm.{p}", f"{prefix}ln_f.{{p}}"),
        ),
        ignored=rf"lm_head\.weight|{prefix}h\.\d+\.attn\.(masked_)?bias",  # the head is the embedding; masks
    )


TABLES: dict[str, tuple[Table, ...]] = {
    "GPT": (_gpt("transformer."), _gpt("")),
    "ConvNeXt": (_convnext("convnext."), _convnext("")),
    "ConvNeXtV2": (_convnext("convnextv2."), _convnext("")),
    "ViT": tuple(
        form(*names) for form in (_vit, _vit_in_memory) for names in (("vit.",), ("",), ("deit.", "cls_classifier"))
    ),
}


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return isinstance(content.get("model_type"), str)


def tables(model: Any) -> tuple[Table, ...]:
    """Key tables of a model: one for each way its files are named."""
    return TABLES.get(type(model).__name__, ())


def to_config(content: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Class, config and info from a config.json.

    Raises:
        WeightsError: the model type, or a value, is one that patchlib does not have.
    """
    kind = content["model_type"]
    if kind not in _CONFIGS:
        raise WeightsError(f"field 'model_type': found {kind!r:.80}{nearest(kind, _CONFIGS)}")
    class_name, fields = _CONFIGS[kind](content)
    labels = content.get("id2label")
    info: dict[str, Any] = {}
    if isinstance(labels, Mapping) and labels and not str(next(iter(labels.values()))).startswith("LABEL_"):
        info["labels"] = [labels[key] for key in sorted(labels, key=int)]
    model_class = find_model_class(class_name)
    return model_class, model_class.Config().replace(**fields), info


def _vit_fields(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    dim = content.get("hidden_size", 768)
    if not isinstance(dim, int) or dim < 1:
        raise WeightsError(f"field 'hidden_size': found {dim!r:.80}; allowed: a positive integer")
    distilled = any("WithTeacher" in str(name) for name in content.get("architectures") or ())
    if content["model_type"] == "deit" and not distilled:
        raise WeightsError(
            "field 'architectures': patchlib reads DeiT with both of its classifiers "
            "('DeiTForImageClassificationWithTeacher'); other DeiT heads it does not have"
        )
    headless = all(str(name).endswith("Model") for name in content.get("architectures") or ("Model",))
    return "ViT", {
        "dim": dim,
        "depth": content.get("num_hidden_layers", 12),
        "heads": content.get("num_attention_heads", 12),
        "patch_size": content.get("patch_size", 16),
        "img_size": content.get("image_size", 224),
        "in_chans": content.get("num_channels", 3),
        "num_classes": 0 if headless else num_labels(content),
        "tokens": {"class": 1, "distill": int(distilled)},
        "attention": {"qkv_bias": content.get("qkv_bias", True)},
        "mlp": {**activation(content), "ratio": content.get("intermediate_size", 3072) / dim},
        "norm": {"kind": "layer", "eps": content.get("layer_norm_eps", 1e-12)},
    }


def _convnext_fields(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    second = content["model_type"] == "convnextv2"
    if content.get("hidden_act", "gelu") != "gelu":
        raise WeightsError(f"field 'hidden_act': found {content['hidden_act']!r}; allowed: 'gelu'")
    eps = content.get("layer_norm_eps", 1e-12)  # of the last norm alone; the others have 1e-6
    headless = all(str(name).endswith("Model") for name in content.get("architectures") or ("Model",))
    fields: dict[str, Any] = {
        "depths": content.get("depths", (3, 3, 9, 3)),
        "dims": content.get("hidden_sizes", (96, 192, 384, 768)),
        "patch_size": content.get("patch_size", 4),
        "img_size": content.get("image_size", 224),
        "in_chans": content.get("num_channels", 3),
        "num_classes": 0 if headless else num_labels(content),
        "drop_path": content.get("drop_path_rate", 0.0),
        "pool": {"kind": "avg", "norm": {"kind": "layer", "eps": eps}},
    }
    if second:
        return "ConvNeXtV2", fields
    return "ConvNeXt", fields | {"layer_scale": content.get("layer_scale_init_value", 1e-6) or None}


def _gpt_fields(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    for key, only in (
        ("tie_word_embeddings", True),
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if content.get(key, only) is not only:
            raise WeightsError(f"field {key!r}: found {content[key]!r}; patchlib's GPT has only {only}")
    dim = content.get("n_embd", 768)
    inner = content.get("n_inner") or 4 * dim
    return "GPT", {
        "vocab_size": content.get("vocab_size", 50257),
        "context": content.get("n_positions", 1024),
        "dim": dim,
        "depth": content.get("n_layer", 12),
        "heads": content.get("n_head", 12),
        "mlp": {**activation(content, "activation_function", "gelu_new"), "ratio": inner / dim},
        "norm": {"kind": "layer", "eps": content.get("layer_norm_epsilon", 1e-5)},
    }


def activation(content: Mapping[str, Any], field: str = "hidden_act", default: str = "gelu") -> dict[str, Any]:
    """The MLP that a config.json's activation means."""
    forms = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
    name = content.get(field, default)
    if name not in forms:
        raise WeightsError(f"field {field!r}: found {name!r:.80}{nearest(str(name), forms)}")
    return {"kind": "gelu", "approximate": forms[name]}


def num_labels(content: Mapping[str, Any]) -> int:
    """How many classes a config.json has: the length of its table of labels, 2 if it has none."""
    labels = content.get("id2label")
    return len(labels) if isinstance(labels, Mapping) else int(content.get("num_labels", 2))


_CONFIGS = {
    "gpt2": _gpt_fields,
    "convnext": _convnext_fields,
    "convnextv2": _convnext_fields,
    "vit": _vit_fields,
    "deit": _vit_fields,
}


def preprocessing(content: Mapping[str, Any]) -> dict[str, Any]:
    """Our preprocessing from a preprocessor_config.json: what stands there, in timm's terms."""
    resample = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    spec: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if isinstance(content.get(theirs), list):
            spec[ours] = content[theirs]
    size = content.get("crop_size") if content.get("do_center_crop") else content.get("size")
    if isinstance(size, Mapping):
        size = [size["height"], size["width"]] if {"height", "width"} <= size.keys() else size.get("shortest_edge")
    if isinstance(size, int):
        size = [size, size]
    if size is not None:
        if not isinstance(size, list) or [isinstance(side, int) and side > 0 for side in size] != [True, True]:
            raise WeightsError(f"field 'size' or 'crop_size': found {size!r:.80}; allowed: numbers of pixels")
        spec["input_size"] = [len(spec.get("mean", (0, 0, 0))), *size]
        edge = content.get("size")
        edge = edge.get("shortest_edge", edge.get("height")) if isinstance(edge, Mapping) else edge
        if content.get("do_center_crop") and isinstance(edge, int):
            spec |= {"crop_pct": size[0] / edge, "crop_mode": "center"}
        else:
            spec |= {"crop_pct": 1.0, "crop_mode": "squash"}
    if content.get("resample") in resample:
        spec["interpolation"] = resample[content["resample"]]
    return spec
