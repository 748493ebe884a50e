"""Images to a grid of patches."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..registry import build_block
from .grid import checked_pair, nchw_to_grid, pair
from .linear import Linear


class PatchEmbed(nn.Module):
    """Cuts images into patches and maps each patch to a vector.

    Kinds: ``linear`` flattens each patch and multiplies by a matrix, as ViT's paper writes it; ``conv`` is the same
    function as a strided convolution; ``early_conv`` is the stack of small convolutions of Xiao et al. 2021,
    https://arxiv.org/abs/2106.14881; others are registered with `patchlib.register_block`.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        in_chans: channels of the images.
        dim: length of a patch's vector.
        kind: name of the kind.
        stride: pixels from one patch to the next, ``patch_size`` if left out.
        remainder: what to do with an image that the patches do not cover exactly: ``"error"``; ``"pad"`` adds zeros
            at the right and bottom; ``"drop"`` leaves the last rows and columns out.
        options: of the kind, for instance ``widths=`` and ``norm=`` of ``early_conv``.

    Shape: ``(batch, in_chans, height, width)`` to ``(batch, height / stride, width / stride, dim)``.

    Raises:
        InputError: from `forward`, if rank, channels or size of the images do not fit.
        ConfigError: a kind or an option is unknown or impossible.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        dim: int = 768,
        kind: str = "conv",
        *,
        stride: int | tuple[int, int] | None = None,
        remainder: str = "error",
        **options: object,
    ) -> None:
        super().__init__()
        if remainder not in ("error", "pad", "drop"):
            raise ConfigError(f"remainder: found {remainder!r}; allowed: 'error', 'pad', 'drop'")
        self.patch_size = checked_pair("patch_size", patch_size)
        self.stride = self.patch_size if stride is None else checked_pair("stride", stride)
        self.in_chans, self.dim, self.kind, self.remainder = in_chans, dim, kind, remainder
        if self.stride != self.patch_size:
            options["stride"] = self.stride
        spec = {"kind": kind, **options}
        self.proj = build_block("patch_embed", spec, patch_size=self.patch_size, in_chans=in_chans, dim=dim)

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        return self.proj(self._fit(images))

    def grid_size(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """Height and width, in patches, of the grid that an image of this size (in pixels) gives."""
        height, width = pair(img_size)
        return self._cells(height, 0), self._cells(width, 1)

    def _cells(self, length: int, axis: int) -> int:
        patch, stride = self.patch_size[axis], self.stride[axis]
        if self.remainder == "pad":
            return max(0, -(-(length - patch) // stride)) + 1
        if length < patch:
            raise InputError(f"image {('height', 'width')[axis]} {length}: smaller than one patch of {patch} pixels")
        return (length - patch) // stride + 1

    def _fit(self, images: Tensor) -> Tensor:
        """Pads or crops to the pixels that patches cover; raises if there are others and that is an error."""
        size = (images.shape[-2], images.shape[-1])
        covered = [
            (cells - 1) * stride + patch
            for cells, stride, patch in zip(self.grid_size(size), self.stride, self.patch_size, strict=True)
        ]
        if self.remainder == "error":
            for name, length, fits, patch in zip(("height", "width"), size, covered, self.patch_size, strict=True):
                if length != fits:
                    raise InputError(
                        f"image {name} {length}: not covered exactly by patches of {patch} pixels "
                        f"(the nearest smaller size that is: {fits}); resize the image, "
                        "or choose remainder='pad' or 'drop'"
                    )
            return images
        if self.remainder == "pad":
            return F.pad(images, (0, covered[1] - size[1], 0, covered[0] - size[0]))
        return images[..., : covered[0], : covered[1]]

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4:
            raise InputError(
                f"images: found {images.dim()} dimensions {tuple(images.shape)}; "
                f"allowed: 4, (batch, channels, height, width); a single image needs [None]"
            )
        if images.shape[1] != self.in_chans:
            hint = " (it looks channels-last: permute it)" if images.shape[3] == self.in_chans else ""
            raise InputError(f"images: found {images.shape[1]} channels; this model takes {self.in_chans}{hint}")
        if not images.is_floating_point():
            raise InputError(f"images: found {images.dtype}; allowed: floats (patchlib.preprocess scales bytes)")

    def as_kind(self, kind: str) -> "PatchEmbed":
        """The same function in the other form, ``linear`` or ``conv``, with weights of its own.

        Raises:
            ConfigError: this or the wanted kind is neither.
        """
        if not {kind, self.kind} <= {"linear", "conv"}:
            raise ConfigError(f"as_kind: {self.kind!r} to {kind!r}; only 'linear' and 'conv' hold the same function")
        return self._rebuilt(kind, self.patch_size, self.stride, self.proj.weight)

    def resize(self, patch_size: int | tuple[int, int]) -> None:
        """Resizes the kernels of ``linear`` or ``conv`` patches to another patch size, see `resize_kernel`.

        Raises:
            ConfigError: the kind is another, or patches overlap.
        """
        if self.kind not in ("linear", "conv") or self.stride != self.patch_size:
            raise ConfigError(f"patch_size: only whole 'linear' and 'conv' patches can be resized, not {self.kind!r}")
        patch = checked_pair("patch_size", patch_size)
        if patch == self.patch_size:
            return
        kernel = self.proj.weight.detach().reshape(self.dim, self.in_chans, *self.patch_size)
        other = self._rebuilt(self.kind, patch, patch, resize_kernel(kernel, patch))
        self.proj, self.patch_size, self.stride = other.proj, other.patch_size, other.stride

    @torch.no_grad()
    def _rebuilt(self, kind: str, patch: tuple[int, int], stride: tuple[int, int], weight: Tensor) -> "PatchEmbed":
        bias = self.proj.bias
        options = {"stride": stride, "remainder": self.remainder, "bias": bias is not None}
        other = PatchEmbed(patch, self.in_chans, self.dim, kind, **options).to(weight)  # type: ignore[arg-type]
        other.proj.weight.copy_(weight.reshape(other.proj.weight.shape))
        if bias is not None:
            other.proj.bias.copy_(bias)
        return other.requires_grad_(self.proj.weight.requires_grad).train(self.training)


def resize_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch kernels ``(dim, channels, height, width)`` for patches of another size.

    The new kernel answers to a resized patch as the old one to the patch itself, as nearly as it can: with ``B`` the
    matrix of the (bicubic, antialiased) resize, it is the pseudo-inverse of ``B`` transposed times the old kernel
    (FlexiViT, Beyer et al. 2022, https://arxiv.org/abs/2212.08013, section 3.4).
    """
    old = (kernel.shape[2], kernel.shape[3])
    if old == tuple(size):
        return kernel
    pixels = old[0] * old[1]
    basis = torch.eye(pixels, device=kernel.device).reshape(pixels, 1, *old)
    resized = F.interpolate(basis, size=tuple(size), mode="bicubic", antialias=True).flatten(1)
    solved = torch.linalg.pinv(resized.double()) @ kernel.double().flatten(2).flatten(0, 1).T
    return solved.T.reshape(*kernel.shape[:2], *size).to(kernel.dtype)


class LinearPatches(Linear):
    """Patches flattened in the order (channel, row, column) and multiplied by a matrix.

    Shape: ``(batch, in_chans, height, width)`` to ``(batch, rows, columns, dim)``.
    """

    def __init__(
        self,
        patch_size: tuple[int, int],
        in_chans: int,
        dim: int,
        *,
        stride: tuple[int, int] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(in_chans * patch_size[0] * patch_size[1], dim, bias=bias)
        self.patch_size, self.stride = pair(patch_size), pair(stride or patch_size)

    def forward(self, images: Tensor) -> Tensor:
        if self.stride == self.patch_size:
            height, width = self.patch_size
            patches = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=height, q=width)
        else:
            windows = images.unfold(2, self.patch_size[0], self.stride[0]).unfold(3, self.patch_size[1], self.stride[1])
            patches = rearrange(windows, "b c h w p q -> b h w (c p q)")
        return super().forward(patches)


class ConvPatches(nn.Conv2d):
    """One convolution as large as its patch. Its weight is kept channels_last, so that the grid is contiguous.

    Shape: ``(batch, in_chans, height, width)`` to ``(batch, rows, columns, dim)``.
    """

    def __init__(
        self,
        patch_size: tuple[int, int],
        in_chans: int,
        dim: int,
        *,
        stride: tuple[int, int] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(in_chans, dim, pair(patch_size), stride=pair(stride or patch_size), bias=bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        return nchw_to_grid(super().forward(images))


class EarlyConv(nn.Sequential):
    """The convolutional stem of "Early Convolutions Help Transformers See Better": 3x3 convolutions of stride 2,
    each followed by batch norm and ReLU, then a 1x1 convolution (Xiao et al. 2021, https://arxiv.org/abs/2106.14881).

    Args:
        patch_size: a power of two; its exponent is the number of strided convolutions.
        widths: channels after each of them; left out, they double up to ``dim / 2``.
        norm: batch norm, and then no bias in the strided convolutions.
        act: ReLU. ``norm=False, act=False`` is the bare form.

    Shape: ``(batch, in_chans, height, width)`` to ``(batch, height / patch, width / patch, dim)``.
    """

    def __init__(
        self,
        patch_size: tuple[int, int],
        in_chans: int,
        dim: int,
        *,
        widths: tuple[int, ...] | None = None,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        patch, other = pair(patch_size)
        steps = patch.bit_length() - 1
        if patch != other or patch != 2**steps or not steps:
            raise ConfigError(f"early_conv: found patch_size {patch_size}; allowed: one power of two (2, 4, 8, …)")
        widths = tuple(widths) if widths else tuple(max(1, dim >> (steps - i)) for i in range(steps))
        if len(widths) != steps:
            raise ConfigError(
                f"early_conv: found {len(widths)} widths; patch size {patch} takes {steps}, one a halving"
            )
        if not all(isinstance(width, int) and width > 0 for width in widths):
            raise ConfigError(f"early_conv: found widths {widths}; allowed: integers from 1")
        layers: list[nn.Module] = []
        for before, after in zip((in_chans, *widths), widths, strict=False):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(after)] if norm else []
            layers += [nn.ReLU()] if act else []
        layers.append(nn.Conv2d(widths[-1], dim, 1))
        super().__init__(*layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        return nchw_to_grid(super().forward(images))
