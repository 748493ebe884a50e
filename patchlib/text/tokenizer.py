"""Text to token ids and back."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from ..config import MAX_CLASSES
from ..errors import InputError, WeightsError, require
from ..generation import as_python
from ..layers.token_image import is_integer
from ..registry import model_names
from ..weights.files import write_text
from ..weights.hub import HubRepo
from ..weights.verify import locate

MAX_BYTES = 64 * 2**20  # of a tokenizer's file; those of 250,000 tokens have 20 MB
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """What every tokenizer has.

    Attributes:
        tokens: the vocabulary by id, None where an id is not used.
    """

    tokens: list[str | None]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            InputError: it is no text, or holds half a surrogate pair.
        """

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of valid ids."""

    @abstractmethod
    def to_json(self) -> str:
        """What `save` writes, in the format of the tokenizers library."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.tokens)

    @cached_property
    def end_id(self) -> int | None:
        """The id of GPT-2's end-of-text token, or None: what ``generate(stop=…)`` takes."""
        return self.tokens.index(END_OF_TEXT) if END_OF_TEXT in self.tokens else None

    @cached_property
    def fingerprint(self) -> str:
        """The vocabulary's sha256, in hex: token files and models made for another have another."""
        return hashlib.sha256("\0".join(token or "" for token in self.tokens).encode()).hexdigest()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that form no character become U+FFFD.

        Raises:
            InputError: an id is no integer, or outside the vocabulary.
        """
        if not isinstance(known := as_python(ids), list):
            raise InputError(f"ids: found {known!r:.80}; allowed: a list of ids")
        for place, i in enumerate(known):
            if not is_integer(i) or not 0 <= i < len(self.tokens) or self.tokens[i] is None:
                allowed = f"0 to {self.vocab_size - 1}, the tokenizer's vocabulary"
                raise InputError(f"ids[{place}]: found {i!r:.80}; allowed: {allowed}")
        return self._decode(known)

    def missing(self, vocab_size: int) -> list[int]:
        """The ids below `vocab_size` that no token has: what ``generate(suppress=…)`` takes, for a model whose
        vocabulary is padded."""
        tokens = self.tokens[:vocab_size]
        return [i for i, token in enumerate(tokens) if token is None] + list(range(len(tokens), vocab_size))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, in pieces that end between characters. For byte-level vocabularies, where
        texts of pieces put together are the text of the whole."""
        held: list[int] = []
        for i in ids:
            held.append(i)
            text = self.decode(held)
            if not text.endswith("\ufffd"):
                yield text
                held = []
        if held:
            yield self.decode(held)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Writes ``tokenizer.json``, which `load_tokenizer`, and the tokenizers library, read. Returns its path."""
        path = Path(folder) / "tokenizer.json"
        write_text(path, self.to_json())
        return path

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class ByteTokenizer(Tokenizer):
    """A token a byte of UTF-8; its id is the byte. Needs no file and no library."""

    def __init__(self) -> None:
        self.tokens = list(_BYTE_NAMES)

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps(_BYTE_FILE, ensure_ascii=False)


class BPETokenizer(Tokenizer):
    """Any tokenizer of the tokenizers library (extra ``text``); those made here are GPT-2's byte-level BPE.

    Args:
        backend: a ``tokenizers.Tokenizer``.

    Raises:
        WeightsError: it numbers its tokens absurdly high.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        last = max(vocabulary.values(), default=-1)
        if last >= MAX_CLASSES:
            raise WeightsError(f"tokenizer: found token id {last}; allowed: 0 to {MAX_CLASSES - 1}")
        self.tokens = [None] * (last + 1)
        for token, i in vocabulary.items():
            self.tokens[i] = token

    @classmethod
    def from_files(cls, vocab: str | PathLike[str], merges: str | PathLike[str]) -> "BPETokenizer":
        """GPT-2's form: ``vocab.json`` and ``merges.txt``.

        Raises:
            WeightsError: a file is missing, too large, or something else.
            MissingExtraError: the tokenizers library is not installed.
        """
        tokenizers = require("tokenizers", "text")
        for path in (vocab, merges):
            _read(Path(path))
        try:
            model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises nothing more particular
            raise WeightsError(f"{vocab}, {merges}: no vocabulary and merges of a BPE ({error})") from error
        backend = _byte_level(model)
        if backend.token_to_id(END_OF_TEXT) is not None:
            backend.add_special_tokens([END_OF_TEXT])
        return cls(backend)

    @classmethod
    def train(
        cls,
        source: str | PathLike[str] | Iterable[str],
        vocab_size: int,
        *,
        special_tokens: Iterable[str] = (END_OF_TEXT,),
    ) -> "BPETokenizer":
        """Learns a vocabulary (byte-level BPE, as GPT-2's): the 256 bytes, then the most frequent pairs, merged.

        Args:
            source: the path of a text file, or texts: ``[text]``.
            vocab_size: of the result, at most: a short text does not have so many pairs.
            special_tokens: get the first ids.

        Raises:
            InputError: `vocab_size` leaves no room for bytes and special tokens; the file cannot be read.
            MissingExtraError: the tokenizers library is not installed.
        """
        tokenizers = require("tokenizers", "text")
        special = list(special_tokens)
        if not isinstance(vocab_size, int) or vocab_size < 256 + len(special):
            allowed = f"at least {256 + len(special)}, for the bytes and {len(special)} special tokens"
            raise InputError(f"vocab_size: found {vocab_size!r}; allowed: {allowed}")
        if isinstance(source, (str, PathLike)):
            source = [_text_of(Path(source))]
        backend = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        backend.train_from_iterator(source, trainer)
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self.backend.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        return self.backend.to_str()


def load_tokenizer(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Tokenizer:
    """The tokenizer that lies beside weights: ``tokenizer.json``, or else ``vocab.json`` and ``merges.txt``.

        load_tokenizer("gpt_tiny.tiny_shakespeare")
        load_tokenizer("hf-hub:openai-community/gpt2")
        load_tokenizer("path/to/folder")

    Args:
        source: what `create_model` takes: a model's name with or without a tag, ``hf-hub:user/name[@revision]`` or
            ``local-dir:folder``; or a path, of a folder or of a ``tokenizer.json``. A folder that is called as a model
            is ``./name``.
        revision, cache_dir, token, local_files_only: as in huggingface_hub.

    Raises:
        UnknownNameError: no weights have the model's name.
        WeightsError: there is none, or the file is damaged.
        HubError: the Hub does not have it, or does not answer.
        MissingExtraError: the tokenizers library is not installed; only `ByteTokenizer`'s file does without it.
    """
    name = str(source)
    if isinstance(source, str) and name.partition(".")[0] in model_names():
        name = locate(name)[0]
    if name.startswith("hf-hub:"):
        cache = None if cache_dir is None else Path(cache_dir)
        repo = HubRepo.parse(name.removeprefix("hf-hub:"), revision, cache, token, local_files_only)
        path = repo.file("tokenizer.json", optional=True)
        if path is None:
            return BPETokenizer.from_files(repo.file("vocab.json"), repo.file("merges.txt"))
    else:
        path = Path(name.removeprefix("local-dir:")).expanduser()
        folder = path
        if path.is_dir():
            path = folder / "tokenizer.json"
            if not path.exists() and (folder / "vocab.json").exists():
                return BPETokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
    content = _read(path)
    if content == _BYTE_FILE:
        return ByteTokenizer()
    tokenizers = require("tokenizers", "text")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more particular
        raise WeightsError(f"{path}: no file of a tokenizer ({error}); fetch or save it again") from error
    return BPETokenizer(backend)


def _read(path: Path) -> Any:
    """A JSON file's content, or None of a file that is none. Raises `WeightsError` if it is missing or too large."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise WeightsError(f"{path}: found {path.stat().st_size} bytes; allowed: at most {MAX_BYTES}")
        return json.loads(path.read_bytes()) if path.suffix == ".json" else None
    except OSError as error:
        allowed = "a tokenizer is a tokenizer.json, or a vocab.json with a merges.txt"
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); {allowed}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); fetch or save it again") from error


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no text file in UTF-8 ({error})") from error


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise InputError(f"text: found {type(text).__name__}; allowed: a string")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at character {error.start}"
        raise InputError(f"text: found {found}, half a surrogate pair; allowed: what UTF-8 can hold") from error


def _byte_level(model: Any) -> Any:
    """A tokenizer of the library that cuts text as GPT-2 does."""
    tokenizers = require("tokenizers", "text")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _byte_names() -> list[str]:
    """GPT-2's printable character for each byte: its own in Latin-1, or, where that is not seen, one from 256 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unseen = sorted(set(range(256)) - seen)
    return [chr(byte if byte in seen else 256 + unseen.index(byte)) for byte in range(256)]


_BYTE_NAMES = _byte_names()
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_BYTE_FILE: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": _BYTE_LEVEL, "post_processor": None, "decoder": _BYTE_LEVEL,
    "model": {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {name: byte for byte, name in enumerate(_BYTE_NAMES)}, "merges": [],
    },
}  # fmt: skip
