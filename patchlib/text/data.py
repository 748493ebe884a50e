"""Tokens on disk, and windows of them to train on."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError, WeightsError, nearest
from ..weights.files import read_tensors, write_tensors
from .tokenizer import Tokenizer


def write_tokens(path: str | PathLike[str], ids: Iterable[int] | Tensor, tokenizer: Tokenizer) -> None:
    """Writes ids, and whose they are, to a safetensors file: two bytes a token up to 65,536 tokens, else four.

    It is written beside the old file and renamed, so that no reader sees half of it.

    Raises:
        InputError: the name does not end with ``.safetensors``, or the ids are no integers, none, or outside the
            vocabulary.
    """
    path, tokens = Path(path), _integers("ids", ids)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: token files are safetensors files; call it {path.with_suffix('.safetensors').name}")
    if not len(tokens):
        raise InputError("ids: found none; allowed: at least one")
    tokens = tokens.long()  # in their own dtype, the vocabulary's size may not fit, and torch compares few of them
    wrong = (tokens < 0) | (tokens >= tokenizer.vocab_size)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise InputError(f"ids[{place}]: found {tokens[place].item()}; allowed: 0 to {tokenizer.vocab_size - 1}")
    dtype = torch.uint16 if tokenizer.vocab_size <= 2**16 else torch.int32
    owner = torch.frombuffer(bytearray.fromhex(tokenizer.fingerprint), dtype=torch.uint8)
    write_tensors(path, {"tokens": tokens.to(dtype), "tokenizer": owner})


def read_tokens(path: str | PathLike[str], tokenizer: Tokenizer | None = None) -> Tensor:
    """The tokens of a file, ``(n,)``, mapped: what is not looked at is not read.

    Args:
        path: what `write_tokens` wrote.
        tokenizer: whose tokens they have to be.

    Raises:
        WeightsError: the file is missing, damaged, or something else.
        InputError: the tokens are another tokenizer's.
    """
    path = Path(path)
    tensors = read_tensors(path)
    tokens, owner = tensors.get("tokens"), tensors.get("tokenizer")
    if tokens is None or owner is None or tokens.dim() != 1 or tokens.dtype not in (torch.uint16, torch.int32):
        raise WeightsError(f"{path}: no token file; write_tokens makes them")
    if tokenizer is not None and bytes(owner.tolist()).hex() != tokenizer.fingerprint:
        raise InputError(f"{path}: its tokens are another tokenizer's than {tokenizer}; encode the text with this one")
    return tokens


class Windows(Dataset):
    """Runs of `length` tokens out of a long text: a map-style dataset, and a source of random batches.

    Args:
        tokens: ``(n,)``, integers of any kind, mapped or not.
        starts: where windows begin.
        length: tokens in a window; to train a language model, one more than it reads.
    """

    def __init__(self, tokens: Tensor, starts: range | Tensor, length: int) -> None:
        self.tokens, self.starts, self.length = tokens, starts, length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        """One window, ``(length,)``, int64."""
        start = int(self.starts[index])
        return self.tokens[start : start + self.length].long()

    def take(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The windows that ``(n,)`` indices mean, negative ones from the end: ``(n, length)``, int64, where the tokens
        are.

        Raises:
            InputError: there is no such window. What stands beyond the last one is another part's.
        """
        indices, count = _integers("indices", indices).long(), len(self)
        if (wrong := (indices < -count) | (indices >= count)).any():
            place = int(wrong.nonzero()[0])
            raise InputError(f"indices[{place}]: found {indices[place].item()}; allowed: {-count} to {count - 1}")
        indices = indices % count
        if isinstance(self.starts, range):
            starts = self.starts.start + self.starts.step * indices
        else:
            starts = self.starts[indices]
        places = starts[:, None] + torch.arange(self.length)
        return self.tokens[places.to(self.tokens.device)].long()

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Windows drawn at random, with replacement: ``(count, length)``, int64."""
        return self.take(torch.randint(len(self), (count,), generator=generator))

    def spread(self, count: int) -> "Windows":
        """`count` of the windows, evenly spaced; all, if there are no more."""
        if count >= len(self):
            return self
        indices = torch.arange(count) * len(self) // count
        starts = self.starts.start + indices if isinstance(self.starts, range) else self.starts[indices]
        return Windows(self.tokens, starts, self.length)


def split_windows(
    tokens: Any,
    length: int,
    parts: Iterable[float] = (0.9, 0.1),
    *,
    split: str = "position",
    seed: int = 0,
) -> list[Windows]:
    """Windows for training, validation, and so on.

    Args:
        tokens: ``(n,)`` integers: a tensor, a list, or an array; ``np.memmap(…, mode="c")`` stays mapped.
        length: tokens in a window.
        parts: the share of each part; together 1.
        split: ``"position"`` cuts the text, so that windows of different parts share no token.
            ``"random_windows"`` deals out all windows of the whole text at random: nearly every token of a validation
            window is in training windows too, and losses measured on it are too good.
        seed: of the dealing.

    Returns:
        One `Windows` a part.

    Raises:
        InputError: tokens that are no integers, shares that are not positive or do not add up, an unknown split, or a
            part too short for a window.
    """
    tokens = _integers("tokens", tokens)
    parts = list(parts)
    if not parts or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-6:
        raise InputError(f"parts: found {parts}; allowed: positive numbers that add up to 1")
    if split not in ("position", "random_windows"):
        raise InputError(f"split: found {split!r}{nearest(split, ('position', 'random_windows'))}")
    if not isinstance(length, int) or length < 1:
        raise InputError(f"length: found {length!r}; allowed: an integer from 1")
    count = len(tokens) if split == "position" else max(0, len(tokens) - length + 1)
    ends = [round(count * sum(parts[: i + 1])) for i in range(len(parts))]
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    if split == "position":
        starts: list[range] | list[Tensor] = [range(first, last - length + 1) for first, last in bounds]
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        starts = [order[first:last] for first, last in bounds]
    for i, part in enumerate(starts):
        if not len(part):
            raise InputError(f"parts[{i}]: {parts[i]} of {len(tokens)} tokens has no window of {length}")
    return [Windows(tokens, part, length) for part in starts]


def _integers(name: str, values: Any) -> Tensor:
    """``(n,)`` integers of any kind, as a tensor: of a tensor or an array the same memory."""
    try:
        if not isinstance(values, Tensor) and not hasattr(values, "__array__"):
            values = list(values)
        tensor = torch.as_tensor(values) if len(values) else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name}: found {values!r:.80}; allowed: integers (n,)") from error
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{name}: found {tensor.dtype} {tuple(tensor.shape)}; allowed: integers (n,)")
    return tensor
