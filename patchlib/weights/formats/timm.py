"""Checkpoints of timm (pytorch-image-models): `config.json` with "architecture", and its key names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import UnknownNameError, WeightsError, nearest
from ...registry import find_model, model_names
from .table import CONV_1X1, FRESH_NORM, MATRIX, Op, Rule, Table

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


def _convnext(matrix: Op) -> Table:
    block = "stages.{i}.blocks.{j}."
    return Table(
        (
            Rule("patch_embed.proj.{p}", "stem.0.{p}"),
            Rule("stem_norm.{p}", "stem.1.{p}"),
            Rule("stages.{i}.downsample.norm.{p}", "stages.{i}.downsample.0.{p}"),
            Rule("stages.{i}.downsample.conv.{p}", "stages.{i}.downsample.1.{p}"),
            Rule(block + "depthwise.{p}", block + "conv_dw.{p}"),
            Rule(block + "fc{n}.weight", block + "mlp.fc{n}.weight", matrix),
            Rule(block + "fc{n}.bias", block + "mlp.fc{n}.bias"),
            Rule(block + "grn.{p}", block + "mlp.grn.{p}"),
            Rule(block + "scale.gamma", block + "gamma"),
            Rule("norm.{p}", "norm_pre.{p}"),
            Rule("head.fc.{p}", "head.fc.{p}"),
        ),
        initial=FRESH_NORM,
    )


# timm's smaller ConvNeXts hold their matrices as 1x1 convolutions
_CONVNEXT, _CONVNEXT_SMALL = _convnext(MATRIX), _convnext(Op(MATRIX.to_ours, CONV_1X1.to_theirs))

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
    "global_pool": lambda v: {"pool": {"kind": {"token": "class", "avg": "avg"}[v]}},
    "fc_norm": lambda v: {"pool": {"norm": v}},
    "depths": lambda v: {"depths": v},
    "dims": lambda v: {"dims": v},
    "kernel_sizes": lambda v: {"kernel_size": v},
    "ls_init_value": lambda v: {"layer_scale": v},
    "use_grn": lambda v: {"grn": v},
    "norm_eps": lambda v: {"norm": {"eps": v}},
    "head_norm_first": lambda v: {"pool": {"norm": not v}},
    "conv_mlp": lambda v: {},
    "drop_rate": lambda v: {"drop": v},
    "drop_path_rate": lambda v: {"drop_path": v},
}
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return isinstance(content.get("architecture"), str)


def tables(model: Any) -> tuple[Table, ...]:
    """Key tables of a model, none if timm has no such model."""
    name, config = type(model).__name__, model.config
    if name in ("ConvNeXt", "ConvNeXtV2"):
        small = config.dims[0] < 96 or not config.pool.get("norm", True)
        return (_CONVNEXT_SMALL,) if small else (_CONVNEXT,)
    return {"ViT": (_VIT,), "ConvMixer": (_CONVMIXER,)}.get(name, ())


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
    details, arguments = content.get("pretrained_cfg") or {}, content.get("model_args") or {}
    for field, value in (("pretrained_cfg", details), ("model_args", arguments)):
        if not isinstance(value, Mapping):
            raise WeightsError(f"field {field!r}: found {value!r:.80}; allowed: an object")
    input_size = details.get("input_size")
    if isinstance(input_size, (list, tuple)) and len(input_size) == 3:
        channels, height, width = input_size
        config = config.replace(in_chans=channels, img_size=height if height == width else (height, width))
    classes = content.get("num_classes", details.get("num_classes"))
    if classes is not None:
        config = config.replace(num_classes=classes)
    config = _with_arguments(config, arguments)
    info: dict[str, Any] = {"preprocessing": {key: details[key] for key in _PREPROCESSING if key in details}}
    if "license" in details:
        info["license"] = details["license"]
    labels = content.get("label_names") or details.get("label_names")
    if isinstance(labels, list):
        info["labels"] = labels
    return model_class, config, info


def _with_arguments(config: Any, arguments: Mapping[str, Any]) -> Any:
    """Our config, changed as arguments of timm's constructor say."""
    overrides: dict[str, Any] = {}
    for key, value in arguments.items():
        if key not in _ARGUMENTS:
            raise WeightsError(f"field 'model_args.{key}': patchlib cannot carry it over{nearest(key, _ARGUMENTS)}")
        try:
            changes = _ARGUMENTS[key](value)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"field 'model_args.{key}': found {value!r:.80}, which patchlib does not know"
            ) from error
        for field, change in changes.items():
            overrides[field] = {**overrides.get(field, {}), **change} if isinstance(change, dict) else change
    pool = overrides.get("pool", {})
    if pool.get("kind") == "avg" != config.pool["kind"]:
        overrides["pool"] = {"norm": True, **pool}  # where timm is not told of fc_norm, averages are normed after
    return config.replace(**overrides)


def from_model(model: Any) -> dict[str, Any]:
    """A config.json that timm reads: a base architecture, and every argument in which this model differs.

    Raises:
        WeightsError: the model has something that timm's has not.
    """
    config = model.config
    if type(model).__name__ not in _EXPORTS:
        raise WeightsError(f"format 'timm': timm has no {type(model).__name__}; use format='patchlib'")
    architecture, arguments = _EXPORTS[type(model).__name__](config)
    _, rebuilt = find_model(architecture)
    rebuilt = rebuilt.replace(in_chans=config.in_chans, img_size=config.img_size, num_classes=config.num_classes)
    rebuilt = _with_arguments(rebuilt, arguments)
    ours, theirs = _weights_of(config), _weights_of(rebuilt)
    if differing := [key for key in ours if ours[key] != theirs[key]]:
        raise WeightsError(
            f"format 'timm': timm's {architecture} differs in {', '.join(differing)} and takes no argument for it; "
            "use format='patchlib'"
        )
    height, width = (config.img_size,) * 2 if isinstance(config.img_size, int) else config.img_size
    details = {"input_size": [config.in_chans, height, width], "num_classes": config.num_classes}
    details |= {k: v for k, v in model.info.get("preprocessing", {}).items() if k in _PREPROCESSING[1:]}
    if "license" in model.info:
        details["license"] = model.info["license"]
    content = {"architecture": architecture, "num_classes": config.num_classes, "pretrained_cfg": details}
    if isinstance(model.info.get("labels"), (list, tuple)):
        content["label_names"] = list(model.info["labels"])
    return content | {"model_args": arguments}


def conv_patches(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear patches as the convolution that timm has."""
    name = "patch_embed.proj.weight"
    weight, patches = tensors[name], model.patch_embed
    return {**tensors, name: weight.reshape(len(weight), patches.in_chans, *patches.patch_size)}


def _vit_arguments(config: Any) -> tuple[str, dict[str, Any]]:
    arguments = {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp.get("ratio", 4.0),
        "qkv_bias": config.attention["qkv_bias"],
        "init_values": config.layer_scale,
        "no_embed_class": not (config.pos_embed or {}).get("covers_prefix", True),
    }
    if config.tokens["distill"]:
        return "deit_base_distilled_patch16_224", arguments
    return "vit_base_patch16_224", arguments | {
        "class_token": bool(config.tokens["class"]),
        "reg_tokens": config.tokens["register"],
        "global_pool": {"class": "token"}.get(config.pool["kind"], "avg"),
        "fc_norm": bool(config.pool.get("norm")),
    }


def _convmixer_arguments(config: Any) -> tuple[str, dict[str, Any]]:
    sizes = {"convmixer_768_32": 768, "convmixer_1024_20_ks9_p14": 1024, "convmixer_1536_20": 1536}
    return next((name for name, dim in sizes.items() if dim == config.dim), "convmixer_768_32"), {}


def _convnext_arguments(config: Any) -> tuple[str, dict[str, Any]]:
    names = model_names("convnextv2" if config.grn else "convnext")
    same = ("depths", "dims", "pool")
    fits = (n for n in names if all(getattr(find_model(n)[1], key) == getattr(config, key) for key in same))
    return next(fits, names[-1]), {}


_EXPORTS: dict[str, Any] = {
    "ViT": _vit_arguments,
    "ConvMixer": _convmixer_arguments,
    "ConvNeXt": _convnext_arguments,
    "ConvNeXtV2": _convnext_arguments,
}


def _weights_of(config: Any) -> dict[str, Any]:
    """What of a config shapes weights or outputs in evaluation, with one spelling for equal things."""
    fields = config.replace(drop=0.0, drop_path=0.0).to_dict()
    if config.patch_embed["kind"] in ("linear", "conv"):  # one function
        fields["patch_embed"] = {"stride": config.patch_embed.get("stride")}
    fields["pool"] = {"norm": False, **config.pool}
    if fields.get("mlp"):
        fields["mlp"] = {"approximate": "none", "ratio": 4.0, **config.mlp}
    if fields.get("pos_embed") and not config.prefix:
        fields["pos_embed"] = {**fields["pos_embed"], "covers_prefix": True}
    return fields
