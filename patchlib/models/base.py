"""What models share: timm's methods, derived once from `embed`, `steps`, `norm` and `head`."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..config import BaseConfig
from ..errors import ConfigError, InputError, UnknownNameError, nearest
from ..layers.grid import Patches, grid_to_nchw, pair
from ..layers.head import Head
from ..layers.patch_embed import PatchEmbed
from ..layers.pos_embed import LearnedPE
from ..layers.recompute import recompute
from .features import FeatureInfo, take_indices


class Model(nn.Module):
    """A module that knows the config which rebuilds it.

    Attributes:
        config: the frozen dataclass.
        info: plain facts that travel with the weights: labels, preprocessing, licence, source.
    """

    Config: type[BaseConfig]
    config: Any
    info: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.info = {}

    @torch.no_grad()
    def init_weights(self, part: nn.Module | str | None = None) -> None:
        """Draws fresh weights, for the whole model or for one part of it (a submodule or its name).

        Each module that holds parameters is initialised by its own `reset_parameters`, and then as the model's
        paper says, where that differs.
        """
        named = dict(self.named_modules())
        if isinstance(part, str) and part not in named:
            raise UnknownNameError(f"no submodule is named {part!r}{nearest(part, named)}")
        root = named[part or ""] if part is None or isinstance(part, str) else part
        for module in root.modules():
            if module is not self and (reset := getattr(module, "reset_parameters", None)):
                reset()
            self._init_module(module)

    def _init_module(self, module: nn.Module) -> None:
        """The paper's initialisation of one module, itself included, without its children."""

    def tie_weights(self) -> None:
        """Makes parameters that are one by design one again. Most models have none."""


class ImageModel(Model):
    """A model of images: `embed` cuts patches, `steps` mix them, `norm` ends the encoder, `head` classifies.

    A subclass provides `patch_embed`, `blocks`, `norm` and `head`; where its steps are something else than `blocks`,
    or change the grid, it says so in `steps`, `widths` and `reductions`.
    """

    patch_embed: Any
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    grad_checkpointing = False
    frozen = 0  # how many of (*steps, norm, head), counted from the end, still train; 0 while nothing is frozen

    @property
    def steps(self) -> list[nn.Module]:
        """The modules that `encode` runs in turn."""
        return list(self.blocks)

    def embed(self, images: Tensor) -> Patches:
        """Images ``(batch, channels, height, width)`` to patches with positions."""
        grid = self.patch_embed(images)
        return Patches(grid, (grid.shape[1], grid.shape[2]))

    def encode(self, patches: Patches) -> Patches:
        """All steps and the final norm."""
        patches, _ = self._run(patches)
        return patches._replace(x=self.norm(patches.x))

    def to_grid(self, patches: Patches) -> Tensor:
        """``(batch, height, width, dim)``, without prefix tokens.

        Raises:
            InputError: masked training has taken patches out.
        """
        if patches.keep is not None:
            raise InputError("to_grid: patches are missing (Patches.keep is set); put them back in place first")
        if patches.x.dim() == 4:
            return patches.x
        return patches.x[:, patches.prefix :].unflatten(1, patches.size)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        if not isinstance(images, Tensor):
            raise InputError(
                f"images: found {type(images).__name__}; allowed: a tensor (batch, channels, height, width), as "
                "patchlib.preprocess(model) makes of pictures and arrays"
            )
        patches = self.encode(self.embed(images))
        return self.head(patches.x, patches.prefix)

    # What follows has timm's names and shapes, so that code written for timm runs.

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Length of the pooled vector."""
        return self.widths[-1]

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    @property
    def widths(self) -> list[int]:
        """Channels after each step."""
        return [self.config.dim] * len(self.steps)

    @property
    def reductions(self) -> list[int]:
        """Pixels that a cell covers along an axis, after each step."""
        return [self.patch_embed.stride[0]] * len(self.steps)

    @property
    def feature_info(self) -> FeatureInfo:
        """What `forward_intermediates` returns: channels, pixels a cell, module."""
        names = {module: name for name, module in self.named_modules()}
        return FeatureInfo(
            {"num_chs": width, "reduction": reduction, "module": names[step]}
            for width, reduction, step in zip(self.widths, self.reductions, self.steps, strict=True)
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """The encoder's output: ``(batch, channels, height, width)`` of a convolutional model, a view;
        ``(batch, tokens, dim)`` of a ViT."""
        x = self.encode(self.embed(images)).x
        return grid_to_nchw(x) if x.dim() == 4 else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From `forward_features`' output to logits, or to the pooled vector with ``pre_logits=True``."""
        return self.head(x.permute(0, 2, 3, 1), pre_logits=pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Iterable[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """The outputs of single steps beside the encoder's.

        Args:
            images: ``(batch, channels, height, width)``.
            indices: which steps: a list (negative ones count from the end), the last ``n``, or None for all.
            norm: pass each through the final norm.
            stop_early: do not run the steps after the last that is asked for.
            output_fmt: ``"NCHW"``, ``"NHWC"`` (the grid) or ``"NLC"`` (a sequence).
            intermediates_only: return only the list.
            return_prefix_tokens: make each entry ``(patches, prefix tokens)``.

        Returns:
            ``(features, [tensor, …])``, features as `forward_features` gives them, or the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise InputError(f"output_fmt: found {output_fmt!r}; allowed: 'NCHW', 'NHWC', 'NLC'")
        wanted = take_indices(len(self.steps), indices)
        patches, kept = self._run(self.embed(images), wanted, max(wanted) + 1 if stop_early else None)
        outputs = []
        for state in kept:
            if norm:
                if state.x.shape[-1] != self.num_features:
                    raise InputError("norm=True: the final norm fits only steps as wide as the last; leave it out")
                state = state._replace(x=self.norm(state.x))
            grid = self.to_grid(state)
            shaped = {"NCHW": grid_to_nchw(grid), "NHWC": grid, "NLC": grid.flatten(1, 2)}[output_fmt]
            outputs.append((shaped, state.x[:, : state.prefix]) if return_prefix_tokens else shaped)
        if intermediates_only:
            return outputs
        x = self.norm(patches.x)
        return (grid_to_nchw(x) if x.dim() == 4 else x), outputs

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for other classes, freshly initialised; 0 for none."""
        shared = {key: value for key, value in self.config.pool.items() if key == "norm"}
        pool = {"kind": global_pool, **shared} if global_pool else self.config.pool
        self.config = self.config.replace(num_classes=num_classes, pool=pool)
        weight = next(self.parameters())
        self.head = self._make_head().to(device=weight.device, dtype=weight.dtype).train(self.training)
        self.init_weights(self.head)
        self.info = with_new_head(self.info)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc  # type: ignore[return-value]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: the steps' inner activations are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm, beside biases and norms: positions and tokens."""
        ends = ("pos_embed.table", "cls_token", "dist_token", "reg_token", "pool.query")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise learning rates."""
        return {
            "stem": r"^(?:cls_token|dist_token|reg_token|pos_embed|patch_embed|stem_norm)",
            "blocks": r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Adapts to another image size (learned positions are resampled) or patch size (kernels are resized), or
        raises `ConfigError` or `InputError` and changes nothing."""
        config, patch_embed = self.config, self.patch_embed
        if img_size is not None:
            config = config.replace(img_size=img_size)
        if patch_size is not None:
            options = {key: value for key, value in config.patch_embed.items() if key != "stride"}
            config = config.replace(patch_size=patch_size, patch_embed=options)
            patch_embed = deepcopy(patch_embed)
            patch_embed.resize(patch_size)
        self._check_size(config.img_size, patch_embed, self.reductions[-1] // self.patch_embed.stride[0])
        self.config, self.patch_embed = config, patch_embed
        if isinstance(positions := getattr(self, "pos_embed", None), LearnedPE):
            positions.resize(patch_embed.grid_size(config.img_size))
        if img_size is not None:
            self.info = with_input_size(self.info, img_size)

    def freeze(self, upto: int | None = None) -> None:
        """Stops training of the patch embedding and of the first `upto` steps; left out, of all but the head.
        Frozen batch norms keep their statistics, in training mode too. `unfreeze` undoes it."""
        if upto is not None and not 0 <= upto <= len(self.steps):
            raise ConfigError(f"freeze: found upto={upto}; allowed: 0 to {len(self.steps)}")
        trained = [self.head] if upto is None else [*self.steps[upto:], self.norm, self.head]
        self.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        self.frozen = len(trained)
        self.train(self.training)

    def unfreeze(self) -> None:
        """Every parameter trains again."""
        self.requires_grad_(True)
        self.frozen = 0
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode and not self.frozen)
        self.training = mode
        if self.frozen:
            for module in [*self.steps, self.norm, self.head][-self.frozen :]:
                module.train(mode)
        return self

    def _check_size(self, img_size: int | tuple[int, int], patch_embed: PatchEmbed, merged: int = 1) -> None:
        """Raises `InputError` where images of the config's own size could not be run: patches do not cover them, or
        `merged` patches along an axis, which the stages make one, are more than there are."""
        try:
            patch_embed._fit(torch.empty(0, 1, *pair(img_size), device="cpu"))  # no images, which take no memory
            rows, columns = patch_embed.grid_size(img_size)
        except InputError as error:
            raise InputError(f"{type(self.config).__name__}.img_size: {error}") from error
        if min(rows, columns) < merged:
            raise InputError(
                f"{type(self.config).__name__}.img_size: found {img_size}, which gives {rows} x {columns} patches; "
                f"allowed: at least {merged} along each axis, which the stages merge into one"
            )

    def _make_head(self) -> Head:
        return Head(self.num_features, self.config.num_classes, pool=self.config.pool, drop=self.config.drop)

    def _step_arguments(self, patches: Patches) -> tuple[Any, ...]:
        """What each step takes beside the patches, for instance rotary angles."""
        return ()

    def _run(
        self, patches: Patches, wanted: Sequence[int] = (), stop: int | None = None
    ) -> tuple[Patches, list[Patches]]:
        """The steps in turn (the first `stop` of them), with the states after those that are `wanted`."""
        arguments = self._step_arguments(patches)
        kept: dict[int, Patches] = {}
        for i, step in enumerate(self.steps[:stop]):
            saving = self.grad_checkpointing and torch.is_grad_enabled()
            x = recompute(step, patches.x, *arguments) if saving else step(patches.x, *arguments)
            size = (x.shape[1], x.shape[2]) if x.dim() == 4 else patches.size
            patches = patches._replace(x=x, size=size)
            if i in wanted:
                kept[i] = patches
        return patches, [kept[i] for i in wanted]


def with_input_size(info: Mapping[str, Any], img_size: int | tuple[int, int]) -> dict[str, Any]:
    """`Model.info` whose preprocessing, if it has one, makes images of this size (pixels)."""
    numbers = info.get("preprocessing")
    if not isinstance(numbers, Mapping) or not isinstance(numbers.get("input_size"), (list, tuple)):
        return dict(info)
    size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    return {**info, "preprocessing": {**numbers, "input_size": [*numbers["input_size"][:1], *size]}}


def with_new_head(info: Mapping[str, Any]) -> dict[str, Any]:
    """`Model.info` of weights that go on with another classifier: how images are prepared, where the weights come from
    and what their licence asks for. Labels, scores, data and date were of the training that is over."""
    return {key: info[key] for key in ("preprocessing", "license", "terms", "source") if key in info}


class LanguageModel(Model):
    """A model of token sequences. A subclass provides `forward` and, in its config, ``vocab_size``.

    One that need not read everything again for each new token has ``start(ids)`` and ``step(ids, cache)`` too, which
    give the next token's logits ``(batch, vocab_size)`` and a cache; `generate` uses them where they are. A cache is
    used up by the `step` that it is given to, which may change it in place: go on with the one that it returns.
    """

    context: int  # how many tokens it can read at once

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``(batch, T)`` to logits ``(batch, T, vocab_size)``; windowed models answer with ``T = 1``."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def next_logits(self, ids: Tensor) -> Tensor:
        """Logits of the token that follows ``(batch, T)`` ids: ``(batch, vocab_size)``."""
        return self(ids)[:, -1]
