"""Checkpoints of timm (pytorch-image-models): `config.json` with "architecture", and its key names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import UnknownNameError, WeightsError, nearest
from ...layers.grid import pair
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
    "fc_norm": lambda v: {} if v is None else {"pool": {"norm": v}},
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
_INSTEAD = "use format='patchlib'"
_EPS = 1e-5  # torch's, of a layer norm that names none
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return isinstance(content.get("architecture"), str)


def tables(model: Any) -> tuple[Table, ...]:
    """Key tables of a model, none if timm has no such model."""
    name = type(model).__name__
    if name in ("ConvNeXt", "ConvNeXtV2"):
        return (_CONVNEXT_SMALL,) if _has_conv_mlp(model.config) else (_CONVNEXT,)
    return {"ViT": (_VIT,), "ConvMixer": (_CONVMIXER,)}.get(name, ())


def _has_conv_mlp(config: Any) -> bool:
    """Whether timm's ConvNeXt of these sizes holds its matrices as 1x1 convolutions."""
    return config.dims[0] < 96 or not config.pool.get("norm", True)


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
    cut = zip(pair(config.img_size), pair(config.patch_size), strict=True)
    if model_class.__name__ == "ViT" and any(side % patch for side, patch in cut):
        config = config.replace(patch_embed={"remainder": "drop"})  # timm leaves out what fills no patch
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
    if pool := overrides.get("pool"):
        same = pool.get("kind", config.pool["kind"]) == config.pool["kind"]
        # for another pooling timm, if it is not told of fc_norm, puts the norm after averages alone
        overrides["pool"] = {**(config.pool if same else {"norm": pool["kind"] == "avg"}), **pool}
    return config.replace(**overrides)


def from_model(model: Any) -> dict[str, Any]:
    """A config.json that timm reads: a base architecture, and every argument in which this model differs.

    Raises:
        WeightsError: the model has something that timm's has not.
    """
    config = model.config
    if type(model).__name__ not in _EXPORTS:
        raise WeightsError(f"format 'timm': timm has no {type(model).__name__}; {_INSTEAD}")
    architecture, arguments = _EXPORTS[type(model).__name__](config)
    _, rebuilt = find_model(architecture)
    rebuilt = rebuilt.replace(in_chans=config.in_chans, img_size=config.img_size, num_classes=config.num_classes)
    rebuilt = _with_arguments(rebuilt, arguments)
    ours, theirs = _weights_of(config), _weights_of(rebuilt)
    if differing := [key for key in ours if ours[key] != theirs[key]]:
        raise WeightsError(
            f"format 'timm': timm's {architecture} differs in {', '.join(differing)} and takes no argument for it; "
            f"{_INSTEAD}"
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
    if len(config.depths) != 4:
        raise WeightsError(f"format 'timm': timm's ConvNeXt has 4 stages, this one {len(config.depths)}; {_INSTEAD}")
    if config.kernel_size % 2 == 0:
        raise WeightsError(f"format 'timm': timm's ConvNeXt has odd kernels, not {config.kernel_size}; {_INSTEAD}")
    family = "convnextv2" if config.grn else "convnext"
    same = ("depths", "dims", "pool")
    fits = (
        name
        for name in model_names(family)
        if all(getattr(find_model(name)[1], key) == getattr(config, key) for key in same)
    )
    return next(fits, f"{family}_tiny"), {
        "depths": config.depths,
        "dims": config.dims,
        "kernel_sizes": config.kernel_size,
        "ls_init_value": config.layer_scale,
        "use_grn": config.grn,
        "norm_eps": config.norm.get("eps", _EPS),
        "head_norm_first": not config.pool.get("norm", True),
        "conv_mlp": _has_conv_mlp(config),
    }


_EXPORTS: dict[str, Any] = {
    "ViT": _vit_arguments,
    "ConvMixer": _convmixer_arguments,
    "ConvNeXt": _convnext_arguments,
    "ConvNeXtV2": _convnext_arguments,
}


def _weights_of(config: Any) -> dict[str, Any]:
    """What of a config shapes weights or outputs in evaluation, with one spelling for equal things."""
    training = ("drop", "drop_path", "memory_efficient")
    fields = {key: value for key, value in config.to_dict().items() if key not in training}
    patches = {"stride": None, "remainder": "error", "bias": True, **config.patch_embed}
    if patches["kind"] in ("linear", "conv"):  # one function
        patches["kind"] = "conv"
    if patches["remainder"] == "error":  # timm's convolution drops pixels where this would raise
        patches["remainder"] = "drop"
    if patches["stride"] in (config.patch_size, (config.patch_size,) * 2):
        patches["stride"] = None
    fields["patch_embed"] = patches
    fields["pool"] = {"norm": False, **config.pool}
    if "norm" in fields:
        fields["norm"] = {"eps": _EPS, **config.norm}
    if "mlp" in fields:
        fields["mlp"] = {"approximate": "none", "ratio": 4.0, **config.mlp}
    if "heads" in fields and config.attention["head_dim"] == config.dim // config.heads:
        fields["attention"] = {**config.attention, "head_dim": None}
    if fields.get("pos_embed") and not config.prefix:
        fields["pos_embed"] = {**fields["pos_embed"], "covers_prefix": True}
    return fields
