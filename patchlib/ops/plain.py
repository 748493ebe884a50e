"""When a gradient of this library may stand in for torch's own."""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def plain(*tensors: Tensor) -> bool:
    """Whether nothing but plain backpropagation, eager or compiled, can ask for gradients: no `torch.func`, no forward
    mode, no tensor subclass."""
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    return all(type(t) in (Tensor, torch.nn.Parameter) and unpack_dual(t).tangent is None for t in tensors)


def differentiates(*tensors: Tensor) -> bool:
    """Whether a gradient, being computed, will itself be differentiated."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(t.requires_grad for t in tensors)
