"""The command `patchlib`: lists, describes, tries, converts, uploads and verifies models.

Exit codes: 0 all went well; 1 something failed, or the output could not be written; 2 the command line is wrong; 130
interrupted (Ctrl-C). Errors are single lines on stderr. With ``--json``, stdout holds one JSON value and nothing else,
``{"error": …}`` after a failure. Nothing heavy is imported before a command needs it.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ConfigError, InputError, PatchlibError, UnknownNameError, WeightsError, nearest, require
from .weights.catalog import SOURCES

if TYPE_CHECKING:
    from torch import Tensor

    from .weights.verify import Check, Reference

_BATCH = 16  # images at once; more are no faster on a CPU, and take memory
_COMPANIONS = ("tokenizer.json", "vocab.json", "merges.txt")  # what language models need beside their weights


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, ``sys.argv[1:]`` if it is left out.

    Returns:
        the exit code: 0, 1 or 130.

    Raises:
        SystemExit: with 2 after a usage error, with 0 after ``--help`` or ``--version``.
    """
    try:
        try:
            return _run(_parse(sys.argv[1:] if argv is None else argv))
        finally:
            with _writing():
                sys.stdout.flush()
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except _UnwritableError as error:
        if not isinstance(error.__cause__, BrokenPipeError):  # which is a reader that has seen enough, such as `head`
            _complain(f"error: the output cannot be written: {error}")
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())  # or Python fails once more when it flushes at exit
        return 1


def _run(args: argparse.Namespace) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _complain(f"warning: {message}")
            return args.run(args)
    except (PatchlibError, OSError) as error:
        file = "" if isinstance(error, PatchlibError) or error.filename is None else f"{error.filename}: "
        _complain(f"error: {file}{_reason(error)}")
        if args.json:
            _print_json({"error": {"kind": type(error).__name__, "message": file + _reason(error)}})
        return 1


# Commands


def _list(args: argparse.Namespace) -> int:
    from .registry import family_of
    from .weights.catalog import find_weights, list_models, weights_of

    names = list_models(args.pattern, pretrained=args.pretrained, family=args.family)
    if not names:
        known = list_models(pretrained=args.pretrained, family=args.family)
        raise UnknownNameError(f"nothing matches {args.pattern!r}{nearest(args.pattern, known)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        architecture, _, tag = name.partition(".")
        row = {"name": name, "family": family_of(architecture)}
        if args.pretrained:
            entry = find_weights(architecture, tag)
            rows.append({**row, "license": entry.license, "source": entry.source})
        else:
            rows.append({**row, "weights": [entry.tag for entry in weights_of(name)]})
    if args.json:
        _print_json(rows)
    else:
        _print_table([[_cell(value) for value in row.values()] for row in rows], [key.upper() for key in rows[0]])
    return 0


def _info(args: argparse.Namespace) -> int:
    import dataclasses

    from .factory import model_info

    if args.name.startswith(SOURCES):
        raise InputError(f"info: found {args.name!r}; allowed: a registered name, as `patchlib list` shows them")
    info = model_info(args.name)
    if args.json:
        _print_json(dataclasses.asdict(info))
        return 0
    facts = [
        ("family", info.family),
        ("class", info.model),
        ("parameters", f"{info.parameters:,}"),
        ("multiply-adds", f"{info.multiply_adds:,}"),
        ("activations", f"{info.activations:,}"),
        ("input size", " x ".join(map(str, info.input_size))),
        *((f"config.{key}", json.dumps(value)) for key, value in info.config.items()),
    ]
    _print(info.name)
    _print_table([[f"  {key}", value] for key, value in facts])
    if info.weights:
        _print()
        _print_table([[e.full_name, e.license, e.source] for e in info.weights], ["WEIGHTS", "LICENSE", "SOURCE"])
    return 0


def _predict(args: argparse.Namespace) -> int:
    import torch

    from .factory import create_model
    from .models.base import ImageModel
    from .preprocessing import preprocess

    require("PIL.Image", "vision")
    source = _source(args.name)
    shapes = create_model(source, pretrained=True, device="meta")  # which fetches no weights
    if not isinstance(shapes, ImageModel) or not shapes.num_classes:
        raise InputError(f"{args.name}: found {type(shapes).__name__} without classes of images; allowed: a classifier")
    model = create_model(source, pretrained=True)
    prepare, labels = preprocess(model), _labels(model)
    answers: list[dict[str, Any]] = [{"image": name} for name in args.images]
    for start in range(0, len(answers), _BATCH):
        batch = answers[start : start + _BATCH]
        tensors: list[Tensor] = []
        for answer in batch:
            try:
                tensors.append(prepare(_read_image(answer["image"])))
            except (PatchlibError, OSError) as error:
                answer["error"] = _reason(error)
                _complain(f"error: {answer['image']}: {_reason(error)}")
        if not tensors:
            continue
        with torch.inference_mode():
            probabilities = model(torch.cat(tensors)).softmax(dim=1)
        if not bool(probabilities.isfinite().all()):
            raise WeightsError(f"{args.name}: answers with NaN; its weights are damaged: see `patchlib verify`")
        best = probabilities.topk(min(args.top, model.num_classes))
        read = [answer for answer in batch if "error" not in answer]
        for answer, values, indices in zip(read, best.values.tolist(), best.indices.tolist(), strict=True):
            answer["classes"] = [
                {"index": index, "label": labels[index] if labels else None, "probability": value}
                for index, value in zip(indices, values, strict=True)
            ]
        if not args.json:
            _print_predictions(read)
    if args.json:
        _print_json({"model": args.name, "images": answers})
    return 1 if any("error" in answer for answer in answers) else 0


def _convert(args: argparse.Namespace) -> int:
    import torch

    from . import __version__
    from .factory import create_model
    from .weights import verify
    from .weights.save import save_pretrained

    overrides = _overrides(args.set)
    options = {"dtype": "file", "check_finite": True, **overrides}
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    file = Path(args.source).expanduser()
    source = reference = None
    if file.is_file():
        if args.model is None:
            raise InputError(f"{args.source}: a bare file does not say what it is; name its architecture with --model")
        model = create_model(args.model, checkpoint=file, allow_pickle=args.allow_pickle, **options)
    else:
        if args.model is not None:
            raise InputError(f"--model is for a bare file; {args.source} is none")
        source = _source(args.source)
        model = create_model(source, pretrained=True, **options)
        reference = None if overrides else verify.find_reference(source)
    if reference is None:
        reference = verify.Reference(verify.reference_output(model), f"patchlib {__version__}", ())
    if not bool(reference.output.isfinite().all()):  # asked before anything is written
        raise WeightsError(f"{args.source}: answers with NaN or infinity; its weights are damaged; fetch them again")
    folder = save_pretrained(model, args.folder, format=args.format, dtype=dtype)
    if source is not None:
        _carry(_COMPANIONS, source, folder)
    reference = verify.read_reference(_write_reference(model, folder, reference))
    written = create_model(f"local-dir:{folder}", dtype="file")
    checks = [verify.check_finite(written), verify.check_reference(written, reference)]
    passed = all(check.passed for check in checks)
    if args.json:
        answer = {"folder": str(folder), "format": args.format, "passed": passed}
        _print_json({**answer, "checks": [vars(check) for check in checks]})
    else:
        _print(f"{folder}: {type(model).__name__}, in the format of {args.format}")
        _print_checks(checks)
    if not passed:
        _complain(f"error: {folder}: what was written is not what was read; do not use it")
    return 0 if passed else 1


def _push(args: argparse.Namespace) -> int:
    from .factory import create_model
    from .weights.card import model_card
    from .weights.files import write_text
    from .weights.hub import push_folder
    from .weights.save import save_pretrained
    from .weights.verify import find_reference, locate

    source = _source(args.source)
    model = create_model(source, pretrained=True, dtype="file", check_finite=True)
    with tempfile.TemporaryDirectory() as name:
        folder = save_pretrained(model, name, format=args.format)
        _write_reference(model, folder, find_reference(source))
        write_text(folder / "README.md", model_card(model, args.repository))
        ours = locate(source)[0].startswith("local-dir:")  # whereas a card on the Hub is about the repository there
        _carry((*_COMPANIONS, *(["README.md"] if ours else [])), source, folder)
        message = f"Upload {type(model).__name__} with patchlib"
        commit = push_folder(folder, args.repository, private=args.private, revision=args.revision, message=message)
    if args.json:
        _print_json({"repository": args.repository, "format": args.format, "commit": commit})
    else:
        _print(commit)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .factory import create_model
    from .weights.verify import check_finite, check_hash, check_reference, find_reference

    answers: list[dict[str, Any]] = []
    for name in args.names:
        answer: dict[str, Any] = {"name": name, "passed": False, "checks": []}
        answers.append(answer)
        if not args.json:
            _print(name)
        try:
            source = _source(name)
            checks = [check_hash(source)]
            if checks[0].passed is not False:
                model = create_model(source, pretrained=True, dtype="file")
                checks += [check_finite(model), check_reference(model, find_reference(source))]
        except (PatchlibError, OSError) as error:
            answer["error"] = _reason(error)
            _complain(f"error: {name}: {_reason(error)}")
            continue
        answer["passed"] = all(check.passed is not False for check in checks)
        answer["checks"] = [vars(check) for check in checks]
        if not args.json:
            _print_checks(checks)
        if not answer["passed"]:
            _complain(f"error: {name}: verification failed: {', '.join(c.name for c in checks if c.passed is False)}")
    if args.json:
        _print_json(answers)
    return 0 if all(answer["passed"] for answer in answers) else 1


def _generate(args: argparse.Namespace) -> int:
    from .factory import create_model
    from .generation import stream
    from .models.base import LanguageModel
    from .text.tokenizer import load_tokenizer

    source = _source(args.name)
    model = create_model(source, pretrained=True)
    if not isinstance(model, LanguageModel):
        raise InputError(f"{args.name}: found {type(model).__name__}; allowed: a language model")
    tokenizer = load_tokenizer(args.tokenizer or source)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{args.name}: has {model.config.vocab_size} tokens, and the tokenizer {tokenizer.vocab_size}; "
            "give the one that the model was trained with as --tokenizer"
        )
    prompt = args.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")  # the tokenizer refuses what is no UTF-8
    tokens = stream(
        model,
        tokenizer.encode(prompt),
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        args.repetition_penalty,
        stop=tokenizer.end_id,
        seed=args.seed,
        suppress=tokenizer.missing(model.config.vocab_size),
    )
    pieces = tokenizer.decode_stream(token for token in tokens if token != tokenizer.end_id)
    if args.json:
        _print_json({"model": args.name, "prompt": prompt, "text": "".join(pieces)})
        return 0
    _print(prompt, end="")
    for piece in pieces:
        _print(piece, end="", flush=True)
    _print()
    return 0


# What commands are given


def _source(text: str) -> str:
    """A name or source as `create_model` takes it; of a folder its bare path will do.

    Raises:
        InputError: it is a file, or looks like a path and is none.
    """
    from .registry import model_names

    if text.startswith(SOURCES) or text.partition(".")[0] in model_names():
        return text
    path = Path(text).expanduser()
    if path.is_dir():
        return f"local-dir:{text}"
    if path.is_file():
        raise InputError(
            f"{text}: found a file; allowed: a folder that holds a model; "
            "`patchlib convert FILE FOLDER --model NAME` makes one"
        )
    if "/" in text or os.sep in text:
        hint = (
            f"; a repository of the Hub is called 'hf-hub:{text}'" if re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) else ""
        )
        raise InputError(f"{text}: there is no such folder{hint}")
    return text


def _carry(files: Iterable[str], source: str, folder: Path) -> None:
    """Copies those of the files that lie beside the weights."""
    from .weights.verify import find_file

    for file in files:
        if (path := find_file(source, file)) is not None:
            shutil.copyfile(path, folder / file)


def _write_reference(model: Any, folder: Path, reference: "Reference | None") -> Path:
    """The reference output that the weights came with, or one of this model."""
    from .weights.verify import write_reference

    if reference is None:
        return write_reference(model, folder)
    return write_reference(model, folder, output=reference.output, made_by=reference.made_by)


def _labels(model: Any) -> Sequence[str] | None:
    """The words for a model's classes: its own list, or one that the package has; None if it has none."""
    from .labels import class_names

    labels = model.info.get("labels")
    if isinstance(labels, str):
        labels = class_names(labels)
    if labels is not None and len(labels) != model.num_classes:
        raise ConfigError(
            f"info['labels']: found {len(labels)} names; allowed: {model.num_classes}, one for each class"
        )
    return None if labels is None else [str(label) for label in labels]


def _read_image(name: str) -> Any:
    """The image in a file, or in stdin for ``-``, upright.

    Raises:
        InputError: it is no image that Pillow reads whole.
        OSError: the file cannot be read.
    """
    from PIL import Image, ImageOps

    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise InputError(
            f"too large an image ({_reason(error)}); scale it down, if it comes from where you trust"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise InputError("not an image, or of a format that Pillow does not know") from error
    except Exception as error:  # of damaged files Pillow's readers raise whatever they stumble upon
        raise InputError(f"a damaged image ({_reason(error)})") from error


def _overrides(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Fields of the config that ``--set`` names; nothing else that `create_model` takes."""
    import inspect

    from .factory import create_model

    other = inspect.signature(create_model).parameters.keys() - {"num_classes", "in_chans", "img_size"}
    for key, _ in pairs:
        if key in other:
            raise ConfigError(f"--set {key}: no field of a model's config; `patchlib info NAME` shows them")
    return dict(pairs)


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: FIELD=VALUE, such as num_classes=10")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: an integer from 1")
    return int(text)


# What is printed


class _UnwritableError(Exception):
    """Stdout cannot be written."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _UnwritableError(_reason(error)) from error


def _print(text: str = "", end: str = "\n", flush: bool = False) -> None:
    """To stdout, with what stdout's encoding does not have spelt out."""
    shown = _visible(text)
    encoding = sys.stdout.encoding or "utf-8"
    with _writing():
        print(shown.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=flush)


def _visible(text: str) -> str:
    """The text with what a terminal would act upon spelt out: names in a stranger's file may hold anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _print_json(value: Any) -> None:
    with _writing():
        print(json.dumps(value, indent=2))


def _print_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    lines = [header, *rows] if header else rows
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        _print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_checks(checks: Iterable["Check"]) -> None:
    words = {True: "ok", False: "FAILED", None: "unknown"}
    _print_table([[f"  {words[check.passed]}", check.name, check.detail] for check in checks])


def _print_predictions(answers: Iterable[dict[str, Any]]) -> None:
    for answer in answers:
        _print(answer["image"])
        for entry in answer["classes"]:
            word = entry["label"] if entry["label"] is not None else f"class {entry['index']}"
            _print(f"  {entry['probability']:7.2%}  {word}")


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _complain(text: str) -> None:
    print(f"patchlib: {_visible(' '.join(text.split()))}", file=sys.stderr)


def _reason(error: BaseException) -> str:
    """What happened, in a line, without the errno and the name of the file."""
    said = error.strerror if isinstance(error, OSError) and not isinstance(error, PatchlibError) else None
    return " ".join(str(said or error).split()) or type(error).__name__


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_visible(' '.join(message.split()))} (see {self.prog} --help)\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="patchlib",
        description="Patch-based models: what there is, what they see, and their weights.",
        epilog="Exit codes: 0 all went well; 1 something failed; 2 the command line is wrong; 130 interrupted.",
        allow_abbrev=False,
    )
    from . import __version__

    parser.add_argument("--version", action="version", version=f"patchlib {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    weights = "name.tag (a name alone means its default weights), hf-hub:user/name[@revision], or a folder"

    def add(name: str, run: Any, summary: str, more: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}", allow_abbrev=False
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command

    command = add("list", _list, "list models, or weights")
    command.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default="*", help="with * and ?, or a piece of the name"
    )
    command.add_argument("--pretrained", action="store_true", help="list the name.tag of all weights")
    command.add_argument("--family", help="only this family, for instance vit")

    command = add("info", _info, "show size, cost, config and weights of a model")
    command.add_argument("name", metavar="NAME", help="a registered name")

    command = add("predict", _predict, "say what is on images", "A wrong image is reported, the others are answered.")
    command.add_argument("name", metavar="NAME", help=weights)
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files; - for stdin")
    command.add_argument("--top", type=_count, default=5, metavar="N", help="how many classes (default: 5)")

    command = add(
        "convert", _convert, "write weights to a folder, in another format or precision",
        "What was written is read again and compared; its reference.json lets `verify` do that at any time.",
    )  # fmt: skip
    command.add_argument("source", metavar="SOURCE", help=f"{weights}, or a bare file")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="created if need be; what lies there is replaced")
    command.add_argument("--format", choices=("patchlib", "timm"), default="patchlib", help="default: patchlib")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the file's own")
    command.add_argument("--model", metavar="NAME", help="architecture of a bare file")
    command.add_argument("--allow-pickle", action="store_true", help="let a bare file be a pickle (runs no code in it)")
    command.add_argument(
        "--set", metavar="FIELD=VALUE", type=_pair, action="append", default=[],
        help="a field of the config, such as num_classes=10; may be repeated",
    )  # fmt: skip

    command = add(
        "push", _push, "upload a model to the Hub",
        "The token is the Hub client's own: HF_TOKEN, or what `hf auth login` stored. A README.md in the folder "
        "is taken as the model card; without one it is written.",
    )  # fmt: skip
    command.add_argument("source", metavar="FOLDER_OR_NAME", help=weights)
    command.add_argument("repository", metavar="user/repo", help="created if it does not exist")
    command.add_argument("--format", choices=("patchlib", "timm"), default="patchlib", help="default: patchlib")
    command.add_argument("--private", action="store_true", help="if it is created, as a private one")
    command.add_argument("--revision", help="branch, created if it does not exist (default: main)")

    command = add(
        "verify", _verify, "check weights: hash, finite values, reference output",
        "A check that has nothing to compare with is unknown, which is no failure.",
    )  # fmt: skip
    command.add_argument("names", metavar="NAME", nargs="+", help=weights)

    command = add("generate", _generate, "continue a text with a language model")
    command.add_argument("name", metavar="NAME", help=weights)
    command.add_argument("--prompt", required=True, help="the text; - for stdin")
    command.add_argument("--max-new-tokens", type=_count, default=100, help="default: 100")
    command.add_argument("--temperature", type=float, default=1.0, help="0 for the likeliest text (default: 1)")
    command.add_argument("--top-k", type=_count, help="draw from so many of the likeliest tokens")
    command.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this probability")
    command.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (default: 1)")
    command.add_argument("--seed", type=int, help="the same seed gives the same text")
    command.add_argument("--tokenizer", metavar="SOURCE", help="default: beside the weights")

    if argv and not argv[0].startswith("-") and argv[0] not in commands.choices:
        parser.error(f"no command is named {argv[0]!r}{nearest(argv[0], commands.choices)}")
    return parser.parse_args(argv)
