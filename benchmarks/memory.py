"""Memory and time of a training step of ConvMixer-768/32.

The allocator of glibc keeps what is freed in pieces that the next step cannot always use, so a process holds more than
its tensors need. The peak is measured as it is, and with every large tensor given back at once: that is nearly what is
needed, for all contenders alike.
"""

from functools import partial

from .runner import Job, Options, Piece, Row, measured

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
SAVING = "patchlib memory_efficient"


def run(quantity: str, dtype: str, name: str, options: Options) -> Row:
    piece = Piece("convmixer_768_32", {}, "training", dtype, batch=8, side=224)
    contenders = (SAVING, "patchlib", "timm")
    if quantity == "step time":
        return measured(name, contenders, piece, options, targets={"patchlib": 1.1}, share=True)
    environment = GIVE_BACK if quantity == "peak needed" else {}
    once = options._replace(rounds=1, seconds=0)
    return measured(name, contenders, piece, once, unit="MB", targets={"timm": 0.6}, share=True, **environment)


def jobs() -> list[Job]:
    found = []
    for dtype in ("fp32", "bf16"):
        for quantity in ("peak needed", "peak as it is", "step time"):
            name = f"convmixer_768_32 training, {dtype}, batch 8: {quantity}"
            found.append(Job(name, partial(run, quantity, dtype, name)))
    return found
