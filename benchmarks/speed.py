"""Training steps, inference and generation against the peers."""

from functools import partial
from typing import NamedTuple

from .runner import Job, Options, Piece, Row, measured


class Work(NamedTuple):
    """One row: contenders, ours first, and how many times faster ours is to be than the others. In bf16 they run under
    autocast; those with "cast" have bf16 weights."""

    piece: Piece
    contenders: tuple[str, ...]
    targets: dict[str, float]

    @property
    def name(self) -> str:
        piece = self.piece
        amount = f"{piece.tokens} tokens" if piece.tokens else f"{piece.side} px"
        return f"{piece.model} {piece.what}, {piece.dtype}, batch {piece.batch}, {amount}, {self.contenders[0]}"


def images(model: str, what: str, dtype: str, batch: int = 4, side: int = 224) -> Piece:
    return Piece(model, {}, what, dtype, batch, side)


LAST = "timm channels_last"  # as a user who knows of it would run ConvMixer
GPT_TINY = {"vocab_size": 1024, "context": 256, "dim": 192, "depth": 6, "heads": 6}
GPT2 = {"vocab_size": 50257, "context": 1024, "dim": 768, "depth": 12, "heads": 12}
WORK = [
    Work(images("convmixer_768_32", "training", "fp32"), ("patchlib", "timm", LAST), {"timm": 1.7}),
    Work(images("convmixer_768_32", "training", "bf16"), ("patchlib", "timm", LAST), {"timm": 2.3}),
    Work(images("convmixer_16", "training", "fp32", 32, 192), ("patchlib", "plain"), {"plain": 1.5}),
    Work(images("convmixer_16", "training", "bf16", 32, 192), ("patchlib", "plain"), {"plain": 1.7}),
    Work(images("convmixer_768_32", "inference", "fp32"), ("patchlib", "timm", LAST), {"timm": 1.4}),
    Work(images("convmixer_768_32", "inference", "fp32"), ("patchlib optimize", "timm", LAST), {"timm": 1.9}),
    Work(
        images("convmixer_768_32", "inference", "bf16"),
        ("patchlib optimize", "timm cast", "timm", LAST),
        {"timm cast": 1.3},
    ),
    Work(images("convnextv2_tiny", "training", "fp32"), ("patchlib", "timm"), {"timm": 1.2}),
    Work(images("convnextv2_tiny", "training", "bf16"), ("patchlib", "timm"), {"timm": 1.3}),
    Work(images("convnextv2_tiny", "inference", "fp32"), ("patchlib", "timm"), {"timm": 1.0}),
    Work(images("convnextv2_tiny", "inference", "bf16"), ("patchlib", "timm"), {"timm": 1.0}),
    Work(images("convnextv2_tiny", "inference", "bf16"), ("patchlib optimize", "timm"), {"timm": 1.5}),
    Work(images("vit_base_patch16_224", "inference", "fp32"), ("patchlib", "timm"), {"timm": 0.98}),
    Work(images("vit_base_patch16_224", "inference", "bf16"), ("patchlib optimize", "timm"), {"timm": 1.05}),
    Work(
        Piece("gpt2", GPT2, "generate", "fp32", 1, tokens=64), ("patchlib", "transformers"), {"transformers": 1.0}
    ),
    Work(
        Piece("gpt_tiny", GPT_TINY, "generate", "fp32", 1, tokens=128),
        ("patchlib", "transformers"),
        {"transformers": 1.0},
    ),
]  # fmt: skip


def run(work: Work, options: Options) -> Row:
    return measured(work.name, work.contenders, work.piece, options, targets=work.targets)


def jobs() -> list[Job]:
    return [Job(work.name, partial(run, work)) for work in WORK]
