"""Stochastic depth: statistics and expectation."""

import pytest
import torch

from patchlib import ConfigError, DropPath
from patchlib.layers.drop import drop_path_schedule


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_samples_are_dropped_whole_and_the_expectation_stays(p):
    x = torch.rand(20_000, 2, 3) + 1
    y = DropPath(p)(x)
    ratio = y / x
    assert torch.equal(ratio.amax((1, 2)) > 0, ratio.amin((1, 2)) > 0), "a sample is dropped whole or not at all"
    dropped = (y == 0).all(dim=2).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(p, abs=0.02)
    assert torch.allclose(ratio[~dropped], torch.tensor(1 / (1 - p)), rtol=1e-5)
    assert y.mean().item() == pytest.approx(x.mean().item(), rel=0.05)


def test_nothing_happens_in_evaluation_or_at_zero():
    x = torch.rand(4, 2)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_dropped_samples_get_no_gradient():
    x = torch.ones(100, 2, requires_grad=True)
    y = DropPath(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_the_dtype_stays():
    assert DropPath(0.5)(torch.rand(4, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan")])
def test_impossible_probabilities_are_refused(p):
    with pytest.raises(ConfigError, match="drop_path: found"):
        DropPath(p)


@pytest.mark.parametrize("depth", [2, 5, 12])
def test_the_schedule_grows_linearly(depth):
    assert drop_path_schedule(0.3, depth) == pytest.approx(torch.linspace(0, 0.3, depth).tolist())
    assert drop_path_schedule(0.3, 1) == [0.0]
