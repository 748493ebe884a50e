"""Checkpoints of timm (pytorch-image-models): `config.json` with "architecture", and its key names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import UnknownNameError, WeightsError, nearest
from ...registry import find_model
from .table import CONV_1X1, Rule, Table

_VIT = Table(
    (
        Rule("pos_embed.table", "pos_embed"),
        Rule("head.norm.{p}", "fc_norm.{p}"),
        Rule("head.fc.{p}", "head.{p}"),
        Rule("head.fc_dist.{p}", "head_dist.{p}"),
    )
)
_CONVMIXER = Table(
    (
        Rule("patch_embed.proj.{p}", "stem.0.{p}"),
        Rule("stem_norm.{p}", "stem.2.{p}"),
        Rule("blocks.{i}.depthwise.{p}", "blocks.{i}.0.fn.0.{p}"),
        Rule("blocks.{i}.norm1.{p}", "blocks.{i}.0.fn.2.{p}"),
        Rule("blocks.{i}.pointwise.weight", "blocks.{i}.1.weight", CONV_1X1),
        Rule("blocks.{i}.pointwise.bias", "blocks.{i}.1.bias"),
        Rule("blocks.{i}.norm2.{p}", "blocks.{i}.3.{p}"),
        Rule("head.fc.{p}", "head.{p}"),
    )
)
TABLES: dict[str, tuple[Table, ...]] = {"ViT": (_VIT,), "ConvMixer": (_CONVMIXER,)}

# Arguments of timm's constructors that a config.json may carry, as overrides of our config.
_ARGUMENTS: dict[str, Any] = {
    "img_size": lambda v: {"img_size": v},
    "patch_size": lambda v: {"patch_size": v},
    "in_chans": lambda v: {"in_chans": v},
    "num_classes": lambda v: {"num_classes": v},
    "embed_dim": lambda v: {"dim": v},
    "dim": lambda v: {"dim": v},
    "depth": lambda v: {"depth": v},
    "num_heads": lambda v: {"heads": v},
    "kernel_size": lambda v: {"kernel_size": v},
    "mlp_ratio": lambda v: {"mlp": {"ratio": v}},
    "qkv_bias": lambda v: {"attention": {"qkv_bias": v}},
    "init_values": lambda v: {"layer_scale": v},
    "class_token": lambda v: {"tokens": {"class": int(v)}},
    "reg_tokens": lambda v: {"tokens": {"register": v}},
    "no_embed_class": lambda v: {"pos_embed": {"covers_prefix": not v}},
    "global_pool": lambda v: {"pool": {"kind": {"token": "class", "avg": "avg"}[v], "norm": v == "avg"}},
    "fc_norm": lambda v: {"pool": {"norm": v}},
    "drop_rate": lambda v: {"drop": v},
    "drop_path_rate": lambda v: {"drop_path": v},
}
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return isinstance(content.get("architecture"), str)


def tables(model: Any) -> tuple[Table, ...]:
    """Key tables of a model, none if timm has no such model."""
    return TABLES.get(type(model).__name__, ())


def to_config(content: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Class, config and info from a config.json.

    Raises:
        WeightsError: the architecture or an argument is one that patchlib does not have.
    """
    architecture = content["architecture"].split(".")[0]
    try:
        model_class, config = find_model(architecture)
    except UnknownNameError as error:
        raise WeightsError(f"field 'architecture': {error}") from error
    details = content.get("pretrained_cfg") or {}
    if not isinstance(details, Mapping):
        raise WeightsError("field 'pretrained_cfg' must be an object")
    input_size = details.get("input_size")
    if isinstance(input_size, (list, tuple)) and len(input_size) == 3:
        channels, height, width = input_size
        config = config.replace(in_chans=channels, img_size=height if height == width else (height, width))
    classes = content.get("num_classes", details.get("num_classes"))
    if classes is not None:
        config = config.replace(num_classes=classes)
    for key, value in (content.get("model_args") or {}).items():
        if key not in _ARGUMENTS:
            raise WeightsError(f"field 'model_args.{key}': patchlib cannot carry it over{nearest(key, _ARGUMENTS)}")
        config = config.replace(**_ARGUMENTS[key](value))
    info: dict[str, Any] = {"preprocessing": {key: details[key] for key in _PREPROCESSING if key in details}}
    if "license" in details:
        info["license"] = details["license"]
    labels = content.get("label_names") or details.get("label_names")
    if isinstance(labels, list):
        info["labels"] = labels
    return model_class, config, info


def from_model(model: Any) -> dict[str, Any]:
    """A config.json that timm reads: a base architecture, and every argument in which this model differs.

    Raises:
        WeightsError: the model has something that timm's has not.
    """
    config = model.config
    if type(model).__name__ == "ViT":
        architecture, arguments = _vit_arguments(config)
    elif type(model).__name__ == "ConvMixer":
        architecture = "convmixer_768_32" if config.act == "relu" else "convmixer_1536_20"
        arguments = {key: getattr(config, key) for key in ("dim", "depth", "kernel_size", "patch_size")}
    else:
        raise WeightsError(f"format 'timm': timm has no {type(model).__name__}; use format='patchlib'")
    _, base = find_model(architecture)
    carried: dict[str, Any] = {
        "in_chans": config.in_chans,
        "img_size": config.img_size,
        "num_classes": config.num_classes,
    }
    rebuilt = base.replace(**carried)
    for key, value in arguments.items():
        rebuilt = rebuilt.replace(**_ARGUMENTS[key](value))
    free = {"drop": config.drop, "drop_path": config.drop_path}  # they hold no weights and act in training only
    wanted, rebuilt = config.replace(**_without_form(config)), rebuilt.replace(**_without_form(rebuilt), **free)
    if rebuilt != wanted:
        differing = [key for key, value in wanted.to_dict().items() if value != getattr(rebuilt, key)]
        raise WeightsError(f"format 'timm': timm's {architecture} has no such {', '.join(differing)}; use 'patchlib'")
    height, width = (config.img_size,) * 2 if isinstance(config.img_size, int) else config.img_size
    details = {"input_size": [config.in_chans, height, width], "num_classes": config.num_classes}
    details |= {k: v for k, v in model.info.get("preprocessing", {}).items() if k in _PREPROCESSING[1:]}
    if "license" in model.info:
        details["license"] = model.info["license"]
    content = {"architecture": architecture, "num_classes": config.num_classes, "pretrained_cfg": details}
    content["model_args"] = (
        arguments if type(model).__name__ == "ConvMixer" else {**arguments, "img_size": config.img_size}
    )
    if isinstance(model.info.get("labels"), (list, tuple)):
        content["label_names"] = list(model.info["labels"])
    return content


def conv_patches(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear patches as the convolution that timm has."""
    name = "patch_embed.proj.weight"
    weight, patches = tensors[name], model.patch_embed
    return {**tensors, name: weight.reshape(len(weight), patches.in_chans, *patches.patch_size)}


def _vit_arguments(config: Any) -> tuple[str, dict[str, Any]]:
    distilled = config.tokens["distill"]
    positions = config.pos_embed or {}
    return "deit_base_distilled_patch16_224" if distilled else "vit_base_patch16_224", {
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp.get("ratio", 4.0),
        "qkv_bias": config.attention["qkv_bias"],
        "init_values": config.layer_scale,
        **({} if distilled else {"class_token": bool(config.tokens["class"]), "reg_tokens": config.tokens["register"]}),
        "no_embed_class": not positions.get("covers_prefix", True),
        "global_pool": {"class": "token"}.get(config.pool["kind"], "avg"),
        "fc_norm": bool(config.pool.get("norm")),
    }


def _without_form(config: Any) -> dict[str, Any]:
    """Linear and conv patches are one function; without prefix tokens it says nothing whether positions cover them."""
    same: dict[str, Any] = {}
    if config.patch_embed["kind"] in ("linear", "conv"):
        same["patch_embed"] = {**config.patch_embed, "kind": "conv"}
        if same["patch_embed"].get("remainder") in ("error", "drop"):
            del same["patch_embed"]["remainder"]
    if "pos_embed" in config.to_dict() and not config.prefix and config.pos_embed:
        same["pos_embed"] = {**config.pos_embed, "covers_prefix": True}
    if "mlp" in config.to_dict() and config.mlp["kind"] == "gelu":
        same["mlp"] = {"kind": "gelu", "ratio": config.mlp.get("ratio", 4.0)} | {
            key: value for key, value in config.mlp.items() if key == "approximate" and value != "none"
        }
    return same
