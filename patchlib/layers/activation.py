"""Activations by name."""

from torch import nn

from ..errors import ConfigError, nearest

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


def activation(name: str) -> nn.Module:
    """The module behind ``"gelu"`` (exact), ``"relu"`` or ``"silu"``.

    Raises:
        ConfigError: the name is another.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"act: found {name!r}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()
