"""Activations by name."""

from torch import nn

from ..errors import ConfigError, nearest

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


def activation(name: str, *, inplace: bool = False) -> nn.Module:
    """The module behind ``"gelu"`` (exact), ``"relu"`` or ``"silu"``.

    Args:
        name: one of these.
        inplace: overwrite the input where that spares memory, which is for relu: right after a convolution, which does
            not need its output again.

    Raises:
        ConfigError: the name is another.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"act: found {name!r}{nearest(name, ACTIVATIONS)}")
    return nn.ReLU(inplace) if name == "relu" else ACTIVATIONS[name]()
