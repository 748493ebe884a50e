"""The feed-forward blocks against their equations."""

import math

import pytest
import torch
from torch import nn

from patchlib import MLP, ConfigError, SwiGLU


def gelu(x):
    """x times the normal distribution's function, by the error function."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("approximate", "act"), [("none", gelu), ("tanh", tanh_gelu)])
def test_mlp_is_linear_gelu_linear(approximate, act):
    mlp, x = MLP(6, ratio=1.5, approximate=approximate).double(), 4 * torch.randn(2, 3, 4, 6, dtype=torch.float64)
    hidden = act(x @ mlp.fc1.weight.T + mlp.fc1.bias)
    assert hidden.shape[-1] == 9
    assert torch.allclose(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias, atol=1e-12)


def test_swiglu_gates_its_values():
    mlp, x = SwiGLU(6, ratio=2).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    gate, value = (x @ mlp.fc1.weight.T + mlp.fc1.bias).split(12, dim=-1)
    wanted = (gate * torch.sigmoid(gate) * value) @ mlp.fc2.weight.T + mlp.fc2.bias
    assert torch.allclose(mlp(x), wanted, atol=1e-12)


def test_swiglu_has_about_as_many_parameters():
    count = {cls: sum(p.numel() for p in cls(96).parameters()) for cls in (MLP, SwiGLU)}
    assert count[SwiGLU] == pytest.approx(count[MLP], rel=0.01)


@pytest.mark.parametrize("cls", [MLP, SwiGLU])
def test_a_rounded_quotient_gives_the_width_that_was_meant(cls):
    """48 / 11 of 1408 are 6144; in floating point a little less."""
    with torch.device("meta"):
        assert cls(1408, ratio=48 / 11).fc2.in_features == 6144


@pytest.mark.parametrize("cls", [MLP, SwiGLU])
@pytest.mark.parametrize("ratio", [0, -1.0, 0.01, float("nan"), float("inf"), "4"])
def test_impossible_ratios_are_refused(cls, ratio):
    with pytest.raises(ConfigError, match="ratio: found"):
        cls(8, ratio=ratio)


@pytest.mark.parametrize("cls", [MLP, SwiGLU])
def test_dropout_is_in_training_only(cls):
    mlp, x = cls(8, drop=0.5), torch.randn(4, 50, 8)
    assert (mlp(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))
    plain = cls(8)
    plain.load_state_dict(mlp.state_dict())
    assert torch.equal(mlp(x), plain(x))
    assert [type(m) for m in mlp.modules()].count(nn.Dropout) == 1
