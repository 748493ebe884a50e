"""When a gradient of this library may stand in for torch's own."""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def transformed() -> bool:
    """Whether what runs is traced, exported, or transformed by `torch.func`: none of them follows a backward that is
    written in Python."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


def plain(*tensors: Tensor) -> bool:
    """Whether nothing but plain backpropagation, eager or compiled, can ask for gradients: no transform, no forward
    mode, no tensor subclass."""
    if transformed():
        return False
    if torch.compiler.is_compiling():
        return True
    return all(type(t) in (Tensor, torch.nn.Parameter) and unpack_dual(t).tangent is None for t in tensors)


def needs_graph(grad: Tensor, *tensors: Tensor) -> bool:
    """Whether a backward has to be made of torch's own operations: its result will itself be differentiated (some
    tensor requires a gradient while gradients are on), or `grad` is a batch of gradients in one (`is_grads_batched`,
    vectorised Jacobians)."""
    if torch.compiler.is_compiling():
        return False
    again = torch.is_grad_enabled() and any(t.requires_grad for t in (grad, *tensors))
    return again or is_batch(grad)


def is_batch(grad: Tensor) -> bool:
    """Whether a tensor in a backward is a batch of gradients that looks like one."""
    kinds = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and any(kind(grad) for kind in kinds)
