"""Configs: frozen dataclasses of plain values that check themselves.

A field is declared with one of the functions below, which holds its default and its range:

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        dim: int = integer(512, 1, MAX_DIM)
        mlp: dict = kind("mlp", {"kind": "gelu", "ratio": 4.0})
"""

import copy
import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from .errors import ConfigError, UnknownNameError, nearest
from .registry import block_names, check_options, is_built_in

MAX_DIM = 32_768
MAX_DEPTH = 256
MAX_SIDE = 16_384
MAX_CLASSES = 1_000_000
MAX_NUMBER = 2**53
MAX_ITEMS = 4096  # of a list among a block's options

Check = Callable[[str, Any], Any]


def _fail(where: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{where}: found {_shown(value)}; allowed: {allowed}")


def _shown(value: Any) -> str:
    """A value in a message; of what comes from a file it may be huge."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return f"an integer of {value.bit_length()} bits"
    shown = reprlib.repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _field(default: Any, check: Check, optional: bool = False) -> Any:
    metadata = {"check": _optional(check) if optional else check, "default": default}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _optional(check: Check) -> Check:
    return lambda where, value: None if value is None else check(where, value)


def integer(default: int | None, low: int, high: int, *, optional: bool = False) -> Any:
    """A whole number from `low` to `high`."""
    return _field(default, _integer(low, high), optional)


def _integer(low: int, high: int) -> Check:
    def check(where: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _fail(where, value, f"an integer from {low} to {high}")
        return value

    return check


def number(default: float | None, low: float, high: float, *, optional: bool = False) -> Any:
    """A finite number from `low` to `high`."""
    return _field(default, _number(low, high), optional)


def _number(low: float, high: float) -> Check:
    def check(where: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise _fail(where, value, f"a number from {low:g} to {high:g}")
        return value

    return check


def flag(default: bool) -> Any:
    """True or false."""
    return _field(default, _flag)


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _fail(where, value, "true or false")
    return value


def choice(default: str | None, *options: str, optional: bool = False) -> Any:
    """One of a few words."""
    return _field(default, _choice(*options), optional)


def _choice(*options: str) -> Check:
    def check(where: str, value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise _fail(where, value, ", ".join(map(repr, options)))
        return value

    return check


def size(default: int | tuple[int, int], high: int = MAX_SIDE) -> Any:
    """One side for a square, or (height, width)."""
    return _field(default, _size(high))


def _size(high: int) -> Check:
    one = _integer(1, high)

    def check(where: str, value: Any) -> int | tuple[int, int]:
        if isinstance(value, (list, tuple)):
            if len(value) != 2:
                raise _fail(where, value, "an integer, or two: (height, width)")
            return one(where + ".height", value[0]), one(where + ".width", value[1])
        return one(where, value)

    return check


def integers(default: tuple[int, ...], low: int, high: int, *, most: int = 64) -> Any:
    """A tuple of whole numbers, at least one."""
    return _field(default, _integers(low, high, most))


def _integers(low: int, high: int, most: int = 64) -> Check:
    one = _integer(low, high)

    def check(where: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= most:
            raise _fail(where, value, f"a list of 1 to {most} integers")
        return tuple(one(f"{where}[{i}]", v) for i, v in enumerate(value))

    return check


def group(**members: Any) -> Any:
    """A few options under one name, each declared as a field is; what is left out keeps its default."""
    defaults = {key: member.metadata["default"] for key, member in members.items()}

    def check(where: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _fail(where, value, f"an object with {', '.join(map(repr, members))}")
        for key in value:
            if key not in members:
                raise ConfigError(f"{where} has no option {key!r:.80}{nearest(key, members)}")
        return {key: m.metadata["check"](f"{where}.{key}", value.get(key, defaults[key])) for key, m in members.items()}

    return _field(defaults, check)


def kind(role: str, default: Any, *, shared: tuple[str, ...] = (), optional: bool = False) -> Any:
    """A registered kind of block with its options: ``"name"`` or ``{"kind": name, **options}``.
    Options in `shared` are not the block's own but of what holds it, see `_SHARED`; they keep their defaults."""
    kept = {key: value for key, value in (default or {}).items() if key in shared}

    def check(where: str, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping) and "kind" not in value and default:
            value = {**default, **value}
        spec = block_spec(role, where, value, shared)
        spec |= {key: option for key, option in kept.items() if key not in spec}
        checks = {key: _SHARED[key] for key in shared if key in spec and key in _SHARED}
        return spec | {key: check(f"{where}.{key}", spec[key]) for key, check in checks.items()}

    return _field(default, check, optional)


def _flag_or_kind(where: str, value: Any) -> Any:
    return value if isinstance(value, bool) else block_spec("norm", where, value)


# What PatchEmbed, ViT and the models' heads do with a field of a block's, beside the block.
_SHARED: dict[str, Check] = {
    "stride": _optional(_size(MAX_SIDE)),
    "remainder": _choice("error", "pad", "drop"),
    "covers_prefix": _flag,
    "norm": _flag_or_kind,
}
# What options of built-in blocks may be; a block of the user's may mean by them what it likes.
_OPTIONS: dict[str, Check] = {
    "approximate": _choice("none", "tanh"),
    "axes": _integer(1, 2),
    "drop": _number(0, 0.99),
    "eps": _optional(_number(0, 1)),
    "head_dim": _optional(_integer(1, 4096)),
    "heads": _integer(1, 1024),
    "kernel_size": _size(255),
    "layer_scale": _optional(_number(0, 1000)),
    "ratio": _number(1 / 256, 256),
    "temperature": _number(1e-3, 1e6),
    "widths": _optional(_integers(1, MAX_DIM)),
}


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    if is_built_in(options.get("kind", "linear")):
        for key, value in options.items():
            if key in _OPTIONS:
                _OPTIONS[key](f"{where}.{key}", value)
            elif isinstance(value, Mapping):
                _check_options(f"{where}.{key}", value)


def stages(default: tuple[dict[str, Any], ...]) -> Any:
    """A non-empty list of stages: ``{"kind", "depth", "dim", "downsample", **options of the block}``."""
    own: dict[str, tuple[Check, Any]] = {
        "depth": (_integer(1, MAX_DEPTH), 1),
        "dim": (_integer(1, MAX_DIM), None),
        "downsample": (_integer(1, 64), 1),
    }

    def check(where: str, value: Any) -> tuple[dict[str, Any], ...]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 64:
            raise _fail(where, value, "a list of 1 to 64 stages")
        checked = []
        for i, stage in enumerate(value):
            spec = block_spec("stage", f"{where}[{i}]", stage, tuple(own))
            for key, (allowed, fallback) in own.items():
                spec[key] = allowed(f"{where}[{i}].{key}", spec.get(key, fallback))
            checked.append(spec)
        depth = sum(stage["depth"] for stage in checked)
        if depth > MAX_DEPTH:
            raise _fail(where, f"{depth} blocks in all", f"at most {MAX_DEPTH}")
        return tuple(checked)

    return _field(default, check)


def block_spec(role: str, where: str, value: Any, shared: tuple[str, ...] = ()) -> dict[str, Any]:
    """Checks ``"name"`` or ``{"kind": name, **options}``; the block need not know the options in `shared`."""
    spec = {"kind": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping) or not isinstance(spec.get("kind"), str):
        names = ", ".join(map(repr, block_names(role)))
        raise _fail(where, value, f"the name of a kind ({names}), or an object with 'kind' and options")
    spec = {str(key): plain(f"{where}.{key}", option) for key, option in spec.items()}
    _check_options(where, spec)
    options = {key: option for key, option in spec.items() if key not in ("kind", *shared)}
    try:
        check_options(role, spec["kind"], options, shared=shared)
    except UnknownNameError as error:
        raise ConfigError(f"{where}.kind: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return spec


def plain(where: str, value: Any, depth: int = 4) -> Any:
    """A value that JSON can hold: lists become tuples; numbers beyond any layer's size are refused."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        if not -MAX_CLASSES <= value <= MAX_CLASSES:
            raise _fail(where, value, f"a finite number of at most {MAX_CLASSES}")
        return value
    if depth and isinstance(value, (list, tuple)) and len(value) <= MAX_ITEMS:
        return tuple(plain(f"{where}[{i}]", v, depth - 1) for i, v in enumerate(value))
    if depth and isinstance(value, Mapping) and len(value) <= MAX_ITEMS:
        return {str(key): plain(f"{where}.{key}", v, depth - 1) for key, v in value.items()}
    raise _fail(where, value, "a plain value: number, text, true, false, null, or a short, flat list or object of them")


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What every model's config has: checked fields, `replace`, and a form for JSON and back."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            where = f"{type(self).__name__}.{field.name}"
            object.__setattr__(self, field.name, field.metadata["check"](where, getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raises `ConfigError` where fields, each allowed by itself, do not go together."""

    def replace(self, **overrides: Any) -> Self:
        """A copy with other values.

        A dict with ``kind``, or a kind's name, replaces the field; a dict without updates it.

        Raises:
            ConfigError: there is no such field, or the value is not allowed.
        """
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for key, value in overrides.items():
            if key not in known:
                raise ConfigError(f"{type(self).__name__} has no field {key!r:.80}{nearest(key, known)}")
            if isinstance(value, Mapping) and isinstance(known[key], Mapping) and "kind" not in value:
                overrides[key] = {**known[key], **value}
        return type(self)(**{**known, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {field.name: copy.deepcopy(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote.

        Raises:
            ConfigError: unknown fields, or values that are not allowed.
        """
        if not isinstance(values, Mapping):
            raise _fail(cls.__name__, values, "an object with the config's fields")
        return cls().replace(**{str(key): value for key, value in values.items()})

    @classmethod
    def of(cls, config: Self | None, overrides: Mapping[str, Any]) -> Self:
        """What a model's constructor takes: a config, overrides, or both."""
        if config is not None and not isinstance(config, cls):
            raise _fail("config", config, f"a {cls.__name__}, or its fields as keyword arguments")
        return (cls() if config is None else config).replace(**overrides)
