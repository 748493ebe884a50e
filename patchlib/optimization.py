"""Models made faster for inference: norms folded into what stands beside them, weights cast once, compiled."""

from copy import deepcopy
from importlib import import_module
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .errors import InputError, PatchlibError, require
from .layers.convmixer import ConvMixerBlock
from .layers.grid import nchw, pair
from .layers.linear import Linear
from .layers.patch_embed import EarlyConv
from .layers.scale import LayerScale
from .models.base import ImageModel, LanguageModel, Model
from .models.convmixer import ConvMixer

AnyModel = TypeVar("AnyModel", bound=Model)

# How far the logits may move: the root mean square of their difference, in units of the root mean square by which the
# plain model's logits differ from their mean over the classes. Measured, mostly with random weights: 1e-6 in float32
# (where only the order of additions changes), 0.002 to 0.012 in bfloat16, 0.04 with int8.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.15}
_HALF = (torch.bfloat16, torch.float16)

# torch counts recompilations for all models of a process together, and gives up at the eighth; newer ones need not
_ALONE = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}


class OptimizationError(PatchlibError, RuntimeError):
    """An optimised model cannot be compiled here, or its answers are not the plain model's."""


def optimize(
    model: AnyModel,
    *,
    dtype: str | None = "bf16",
    compile: bool = True,
    fuse: bool = True,
    quantize: str | None = None,
    sample: Tensor | None = None,
) -> AnyModel:
    """A faster copy of a model, for inference; the given one stays as it is.

    The copy is of the same class, in evaluation mode, channels_last, and its parameters take no gradients. Its
    `forward` takes what the model's does (images in float32) and returns float32; with ``dtype=None`` its dtypes are
    the model's. It runs once, on `sample`: there it is compiled, and its answer is compared with the plain model's.
    Save the model itself, not this copy: folded norms fit no checkpoint. Hooks on what is folded are not copied.

    Args:
        model: a model of images or of language.
        dtype: ``"bf16"`` casts the weights once, except those of batch norms and of an image model's head, which keep
            theirs; inputs are cast inside. None leaves everything as it is. bfloat16 is fast where the processor
            has instructions for it (on the CPU AVX-512 BF16 or AMX), and slow elsewhere.
        compile: with torch's Inductor, as one graph. On the CPU it needs a C++ compiler. Only `forward` is compiled.
            The first batch of another size than the sample's is compiled for once more, then any size goes.
        fuse: fold batch norms: ConvMixer's into affines computed in place and the next layer's bias, those of an
            ``early_conv`` stem into its convolutions.
        quantize: ``"int8"`` multiplies linear layers, the head left out, in 8 bits: weights per output channel,
            inputs per position by the range found in them (torchao, the extra ``quantize``). Where the processor has
            bfloat16 instructions, bfloat16 alone is faster: there it pays only for memory.
        sample: what is compared on: images ``(batch, in_chans, height, width)`` or token ids ``(batch, T)``. Left out,
            two of noise, always the same. Photographs, as `preprocess` makes them, are the better check.

    Raises:
        OptimizationError: the answers differ by more than `TOLERANCES` allow, or torch cannot compile the model here.
        InputError: an argument is not one of those above, there is nothing to quantise, or the model is one that
            `optimize` has returned.
        MissingExtraError: torchao is not installed.
    """
    if not isinstance(model, (ImageModel, LanguageModel)):
        raise InputError(f"model: found {type(model).__name__}; allowed: an image or language model of patchlib")
    if dtype not in ("bf16", None):
        raise InputError(f"dtype: found {dtype!r}; allowed: 'bf16', None")
    if quantize not in ("int8", None):
        raise InputError(f"quantize: found {quantize!r}; allowed: 'int8', None")
    if any(isinstance(module, (Affine, FusedConvMixerBlock)) for module in model.modules()):
        raise InputError("model: found one whose norms are folded already; give the model that it was made from")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise InputError("model: found one on the meta device; allowed: one with weights, to compare answers with")
    if sample is not None and not (isinstance(sample, Tensor) and sample.numel()):
        raise InputError(f"sample: found {type(sample).__name__}; allowed: a tensor of at least one image or text")
    optimized: Any = deepcopy(model).eval().requires_grad_(False)
    sample = _sample(model) if sample is None else sample
    with torch.no_grad():
        expected = optimized(sample).float()
        if fuse:
            _fold(optimized)
        if dtype == "bf16":
            _cast(optimized)
        optimized.to(memory_format=torch.channels_last)
        if quantize:
            _quantize(optimized)
        if compile:
            optimized.compile(fullgraph=True, **_ALONE)
        found = _run(optimized, sample, compile)
    _compare(found, expected, quantize or dtype or ("bf16" if next(model.parameters()).dtype in _HALF else "fp32"))
    return optimized


class Affine(nn.Module):
    """A batch norm in evaluation, computed in place: fresh memory costs the CPU more than the arithmetic.

    Shape: ``(batch, dim, height, width)`` to the same tensor, overwritten.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = _scale_and_shift(norm)
        self.scale, self.shift = nn.Parameter(scale[:, None, None], False), nn.Parameter(shift[:, None, None], False)

    def forward(self, x: Tensor) -> Tensor:
        return _multiply_add(self.shift, self.scale, x)


class FusedConvMixerBlock(nn.Module):
    """A `ConvMixerBlock` in evaluation. The first norm's scale goes into the addition of the residual, its shift
    through the pointwise matrix into that one's bias. The second has to stay: what follows pads with zeros.

    Shape: ``(batch, height, width, dim)`` to the same.
    """

    def __init__(self, block: ConvMixerBlock) -> None:
        super().__init__()
        scale, shift = _scale_and_shift(block.norm1)
        if isinstance(block.scale, LayerScale):
            scale, shift = scale * block.scale.gamma, shift * block.scale.gamma
        self.depthwise, self.act, self.pointwise = block.depthwise, block.act, block.pointwise
        self.scale = nn.Parameter(scale, False)
        self.pointwise.bias.add_(self.pointwise.weight @ shift)
        self.norm2 = Affine(block.norm2)

    def forward(self, grid: Tensor) -> Tensor:
        grid = _multiply_add(grid, self.scale, self.act(self.depthwise(grid)))
        return nchw(self.norm2, self.act(self.pointwise(grid)))


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _multiply_add(shift: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """``shift + scale * x`` into `x`. A compiler decides for itself what it overwrites."""
    return torch.addcmul(shift, scale, x, out=None if torch.compiler.is_compiling() else x)


def _fold(model: Model) -> None:
    """Folds the batch norms whose neighbours are known, in place."""
    blocks = {module: FusedConvMixerBlock(module) for module in model.modules() if isinstance(module, ConvMixerBlock)}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ConvMixerBlock):
                setattr(module, name, blocks[child])
        if isinstance(module, ConvMixer):
            module.stem_norm = Affine(module.stem_norm)  # type: ignore[assignment]
        if isinstance(module, EarlyConv):
            for i, layer in enumerate(module):
                if isinstance(layer, nn.BatchNorm2d):
                    convolution: Any = module[i - 1]
                    module[i - 1], module[i] = fuse_conv_bn_eval(convolution, layer), nn.Identity()


def _cast(model: Model) -> None:
    """Weights to bfloat16, but for batch norms (their kernels take float32 beside it) and an image model's head, where
    rounding would decide between near classes."""
    exact: list[nn.Module] = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if isinstance(model, ImageModel):
        exact.append(model.head.float())
        model.patch_embed.register_forward_pre_hook(_to_bfloat16)
        model.head.register_forward_pre_hook(_to_float32)
    else:
        for module in model.modules():  # the image that a language model makes of text is in bfloat16 already
            if isinstance(module, ImageModel):
                module.patch_embed.register_forward_pre_hook(_to_bfloat16)
        model.register_forward_hook(_answer_in_float32)
    kept = {id(tensor) for module in exact for tensor in (*module.parameters(), *module.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.bfloat16()  # in place, so that tied weights stay tied


def _to_bfloat16(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].bfloat16() if args[0].is_floating_point() else args[0], *args[1:])


def _to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])


def _answer_in_float32(module: nn.Module, args: tuple[Any, ...], answer: Tensor) -> Tensor:
    return answer.float()


def _quantize(model: Model) -> None:
    """Linear layers to int8, but for the head, which decides between classes, and what is a subclass of its own."""
    require("torchao", "quantize")
    torchao = import_module("torchao.quantization")

    def wanted(module: nn.Module, name: str) -> bool:
        return type(module) is Linear and not name.startswith("head.")

    if not any(wanted(module, name) for name, module in model.named_modules()):
        raise InputError(f"quantize: {type(model).__name__} has no linear layers before its head; allowed: None")
    # without set_inductor_config=False it would change Inductor's global settings
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), wanted)


def _sample(model: Model) -> Tensor:
    """Two images or texts of noise, always the same."""
    weight, generator = next(model.parameters()), torch.Generator().manual_seed(0)
    if isinstance(model, LanguageModel):
        ids = torch.randint(model.config.vocab_size, (2, min(model.context, 64)), generator=generator)
        return ids.to(weight.device)
    size = model.config.in_chans, *pair(model.config.img_size)
    return torch.randn(2, *size, generator=generator).to(weight)


def _run(model: Model, sample: Tensor, compiled: bool) -> Tensor:
    try:
        return model(sample)
    except RuntimeError as error:
        if not compiled:
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OptimizationError(
            f"torch cannot compile this {type(model).__name__} here ({reason}); on the CPU it needs a C++ compiler: "
            "install one (such as g++), or use compile=False"
        ) from error


def _compare(found: Tensor, expected: Tensor, kind: str) -> None:
    scale = expected - expected.mean(-1, keepdim=True) if expected.shape[-1] > 1 else expected
    difference = ((found - expected).square().mean() / scale.square().mean().clamp_min(1e-30)).sqrt().item()
    if not difference <= TOLERANCES[kind]:  # so that NaN raises too
        remedy = {
            "fp32": "this model's folded norms are ill-conditioned: use fuse=False, compile=False",
            "bf16": "use dtype=None, or a sample that is nearer to what the model reads",
            "int8": "use quantize=None, or a sample that is nearer to what the model reads",
        }[kind]
        raise OptimizationError(
            f"optimised in {kind}, the answers differ from the plain model's by {difference:.2g} of their spread; "
            f"allowed: {TOLERANCES[kind]}; {remedy}"
        )
