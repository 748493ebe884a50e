"""Checkpoints as the authors of a paper published them: bare files, without a config."""

from collections.abc import Mapping
from typing import Any

from .table import CONV_1X1, FRESH_NORM, VECTOR, Rule, Table


def recognises(content: Mapping[str, Any]) -> bool:
    """Never: these come without a config.json."""
    return False


def tables(model: Any) -> tuple[Table, ...]:
    """Key tables of a model, none if its authors published no file of another form."""
    if type(model).__name__ in ("ConvNeXt", "ConvNeXtV2"):
        return (_CONVNEXT,)
    return (_convmixer(model.config.depth),) if type(model).__name__ == "ConvMixer" else ()


_BLOCK = "stages.{i}.blocks.{j}."
_CONVNEXT = Table(
    (
        Rule("patch_embed.proj.{p}", "downsample_layers.0.0.{p}"),
        Rule("stem_norm.{p}", "downsample_layers.0.1.{p}"),
        Rule("stages.{i}.downsample.norm.{p}", "downsample_layers.{i}.0.{p}"),
        Rule("stages.{i}.downsample.conv.{p}", "downsample_layers.{i}.1.{p}"),
        Rule(_BLOCK + "depthwise.{p}", "stages.{i}.{j}.dwconv.{p}"),
        Rule(_BLOCK + "norm.{p}", "stages.{i}.{j}.norm.{p}"),
        Rule(_BLOCK + "fc{n}.{p}", "stages.{i}.{j}.pwconv{n}.{p}"),
        Rule(_BLOCK + "grn.weight", "stages.{i}.{j}.grn.gamma", VECTOR),
        Rule(_BLOCK + "grn.bias", "stages.{i}.{j}.grn.beta", VECTOR),
        Rule(_BLOCK + "scale.gamma", "stages.{i}.{j}.gamma"),
        Rule("head.norm.{p}", "norm.{p}"),
        Rule("head.fc.{p}", "head.{p}"),
    ),
    initial=FRESH_NORM,
)


def _convmixer(depth: int) -> Table:
    """The authors' model is one `nn.Sequential`: convolution, activation, norm, then the blocks, pooling and head."""
    rules = [Rule("patch_embed.proj.{p}", "0.{p}"), Rule("stem_norm.{p}", "2.{p}")]
    for i in range(depth):
        rules += [
            Rule(f"blocks.{i}.depthwise.{{p}}", f"{i + 3}.0.fn.0.{{p}}"),
            Rule(f"blocks.{i}.norm1.{{p}}", f"{i + 3}.0.fn.2.{{p}}"),
            Rule(f"blocks.{i}.pointwise.weight", f"{i + 3}.1.weight", CONV_1X1),
            Rule(f"blocks.{i}.pointwise.bias", f"{i + 3}.1.bias"),
            Rule(f"blocks.{i}.norm2.{{p}}", f"{i + 3}.3.{{p}}"),
        ]
    return Table((*rules, Rule("head.fc.{p}", f"{depth + 5}.{{p}}")))
