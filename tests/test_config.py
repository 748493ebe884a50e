"""Configs check themselves, go to JSON and back, and are changed by `replace`."""

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import patchlib
from patchlib import registry
from patchlib.config import (
    BaseConfig,
    choice,
    flag,
    group,
    integer,
    integers,
    kind,
    number,
    plain,
    size,
    stages,
)
from patchlib.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """One field of each sort."""

    i: int = integer(3, 1, 9)
    oi: int | None = integer(None, 1, 9, optional=True)
    n: float = number(0.5, 0, 1)
    f: bool = flag(True)
    c: str = choice("a", "a", "b")
    s: int | tuple[int, int] = size(4, 100)
    t: tuple[int, ...] = integers((1, 2), 0, 9, most=3)
    g: dict[str, Any] = group(x=integer(1, 0, 5), y=flag(False), z=kind("norm", None, optional=True))
    k: dict[str, Any] = kind("mlp", {"kind": "gelu", "ratio": 4.0})
    o: dict[str, Any] | None = kind("pos_embed", None, optional=True)
    p: dict[str, Any] = kind("pool", {"kind": "avg", "norm": False}, shared=("norm",))
    st: tuple[dict[str, Any], ...] = stages(({"kind": "convmixer", "dim": 8},))

    def check(self):
        if self.i == 7 and self.n == 0:
            raise ConfigError("Config.i: found 7 with n=0; allowed: any other")


ALLOWED = {
    "i": [(1, 1), (9, 9)],
    "oi": [(None, None), (5, 5)],
    "n": [(0, 0), (1, 1), (0.25, 0.25)],
    "f": [(True, True), (False, False)],
    "c": [("b", "b")],
    "s": [(1, 1), (100, 100), ((2, 3), (2, 3)), ([2, 3], (2, 3))],
    "t": [((1,), (1,)), ([0, 9, 1], (0, 9, 1))],
    "g": [
        ({}, {"x": 1, "y": False, "z": None}),
        ({"x": 2}, {"x": 2, "y": False, "z": None}),
        ({"z": "rms"}, {"x": 1, "y": False, "z": {"kind": "rms"}}),
    ],
    "k": [
        ("gelu", {"kind": "gelu"}),
        ({"kind": "swiglu", "ratio": 2}, {"kind": "swiglu", "ratio": 2}),
        ({"ratio": 2.5}, {"kind": "gelu", "ratio": 2.5}),
        ({}, {"kind": "gelu", "ratio": 4.0}),
    ],
    "o": [(None, None), ("learned", {"kind": "learned"})],
    "p": [
        ("class", {"kind": "class", "norm": False}),
        ({"norm": True}, {"kind": "avg", "norm": True}),
        ({"kind": "attention", "heads": 2}, {"kind": "attention", "heads": 2, "norm": False}),
    ],
    "st": [
        (
            [
                {"kind": "transformer", "dim": 4, "heads": 2, "downsample": 2},
                {"kind": "convmixer", "depth": 3, "dim": 8},
            ],
            (
                {"kind": "transformer", "depth": 1, "dim": 4, "downsample": 2, "heads": 2},
                {"kind": "convmixer", "depth": 3, "dim": 8, "downsample": 1},
            ),
        ),
    ],
}
REFUSED = {
    "i": [0, 10, -1, 1.0, "3", None, True, [3], 10**400, float("nan")],
    "oi": [0, "3", False],
    "n": [-0.001, 1.001, float("nan"), float("inf"), "0.5", None, True, 10**400],
    "f": [0, 1, "true", None],
    "c": ["c", "A", "", None, 1, ["a"]],
    "s": [0, 101, (1,), (1, 2, 3), (1, 0), "4", None, 1.5, True, (1, "2"), {"height": 1}],
    "t": [(), (1, 2, 3, 4), 1, "12", (1, 10), (1, True), (1, 1.0), None],
    "g": [None, 1, [], "x", {"q": 1}, {"x": 6}, {"y": 1}, {"z": "os.system"}, {1: 2}],
    "k": [None, 1, [], "", "Gelu", "os.system", {"kind": "gelu", "q": 1}, {"kind": 1}, {"ratio": "4"}, {"ratio": 0}],
    "o": ["rotar", {"axes": 1}, 1],
    "p": ["max", {"norm": "yes"}, {"norm": 1}, {"kind": "avg", "heads": 2}, {"norm": {"kind": "batch"}}],
    "st": [
        (), [], None, 1, "convmixer", {}, [1], [[]], ["convmixer"], [{"dim": 8}], [{"kind": "convmixer"}],
        [{"kind": "convmixer", "dim": 8, "depth": 257}], [{"kind": "gelu", "dim": 8}],
        [{"kind": "convmixer", "dim": 8, "heads": 8}], [{"kind": "convmixer", "dim": 8, "depth": 200}] * 2,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value", "wanted"), [(f, *pair) for f, pairs in ALLOWED.items() for pair in pairs])
def test_what_is_allowed_gets_one_form(field, value, wanted):
    config = Config(**{field: value})
    assert getattr(config, field) == wanted
    assert Config().replace(**{field: value}) == config
    assert Config.from_dict({field: value}) == config


@pytest.mark.parametrize(("field", "value"), [(f, value) for f, values in REFUSED.items() for value in values])
def test_what_is_not_names_field_value_and_range(field, value):
    for call in (Config, Config().replace, lambda **fields: Config.from_dict(fields)):
        with pytest.raises(ConfigError, match=rf"^Config\.{field}") as caught:
            call(**{field: value})
        assert any(words in str(caught.value) for words in ("allowed", "has no option", "is named", "did you mean"))
        assert len(str(caught.value)) < 500


def test_fields_may_exclude_each_other():
    with pytest.raises(ConfigError, match=r"Config\.i: found 7 with n=0"):
        Config(i=7).replace(n=0)


def test_a_message_does_not_repeat_a_huge_value():
    for value in ("x" * 10**6, [1] * 10**6, {str(i): i for i in range(1000)}, 10**5000, -(10**5000), [[[[[[]]]]]] * 99):
        with pytest.raises(ConfigError) as caught:
            Config(i=value)
        assert len(str(caught.value)) < 200


def test_deep_nests_are_refused_without_recursion():
    nest: Any = 1
    for _ in range(100_000):
        nest = [nest]
    for fields in ({"i": nest}, {"k": {"kind": "gelu", "ratio": nest}}, {"k": nest}, {"st": nest}):
        with pytest.raises(ConfigError):
            Config(**fields)
    while isinstance(nest, list):  # or its destructor recurses
        nest = nest[0]


# replace


def test_a_dict_with_a_kind_replaces_and_one_without_updates():
    config = Config(k={"kind": "gelu", "ratio": 2.0, "approximate": "tanh"})
    assert config.replace(k={"ratio": 3.0}).k == {"kind": "gelu", "ratio": 3.0, "approximate": "tanh"}
    assert config.replace(k={"kind": "gelu"}).k == {"kind": "gelu"}
    assert config.replace(k="swiglu").k == {"kind": "swiglu"}
    assert config.replace(g={"x": 5}).replace(g={"y": True}).g == {"x": 5, "y": True, "z": None}
    assert config.replace().k == config.k


def test_replace_leaves_the_old_config_alone():
    config = Config()
    before = copy.deepcopy(config)
    config.replace(k={"ratio": 2.0}, g={"x": 2}, i=4)
    assert config == before


def test_a_misspelt_field_names_the_nearest():
    with pytest.raises(ConfigError, match="ViTConfig has no field 'hed'; did you mean 'heads'"):
        patchlib.ViTConfig().replace(hed=3)
    with pytest.raises(ConfigError, match="ViTConfig has no field 'embed_dim'"):
        patchlib.ViT(embed_dim=3)
    with pytest.raises(ConfigError, match=r"ViTConfig\.attention has no option 'qvk_bias'; did you mean 'qkv_bias'"):
        patchlib.ViT(attention={"qvk_bias": False})
    with pytest.raises(ConfigError, match="mlp 'gelu' has no option 'ration'; did you mean 'ratio'"):
        patchlib.ViT(mlp={"ration": 2})


def test_configs_are_frozen():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.i = 5


# to JSON and back


@pytest.mark.parametrize("name", patchlib.list_models())
def test_registered_configs_come_back_from_json(name):
    _, config = registry.find_model(name)
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert type(config).from_dict(values) == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_to_dict_gives_copies():
    config = patchlib.ViTConfig()
    config.to_dict()["mlp"]["ratio"] = 9
    config.to_dict()["tokens"]["class"] = 9
    assert config == patchlib.ViTConfig()


def test_what_a_config_was_made_of_can_change_afterwards():
    given = {"kind": "transformer", "dim": 8, "mlp": {"kind": "gelu", "ratio": 2.0}}
    config = patchlib.PatchNetConfig(stages=[given])
    given["mlp"]["ratio"] = 99
    given["dim"] = 99
    assert config.stages[0]["mlp"] == {"kind": "gelu", "ratio": 2.0}
    assert config.stages[0]["dim"] == 8


def test_defaults_are_not_shared():
    one, other = patchlib.ViTConfig(), patchlib.ViTConfig()
    one.mlp["ratio"] = 99
    assert other.mlp["ratio"] == patchlib.ViTConfig().mlp["ratio"] == 4.0


@pytest.mark.parametrize("value", [None, [], 1, "x", [("i", 3)]])
def test_from_dict_takes_an_object(value):
    with pytest.raises(ConfigError, match=r"Config: found .*an object with the config's fields"):
        Config.from_dict(value)


def test_of_takes_a_config_overrides_or_both():
    assert Config.of(None, {}) == Config()
    assert Config.of(None, {"i": 5}) == Config(i=5)
    assert Config.of(Config(i=5), {"n": 0}) == Config(i=5, n=0)
    for other in (patchlib.ViTConfig(), {"i": 5}, "vit"):
        with pytest.raises(ConfigError, match=r"config: found .*a Config, or its fields"):
            Config.of(other, {})


def test_models_take_a_config_overrides_or_both():
    config = patchlib.ConvMixerConfig(dim=8, depth=2, patch_size=4, img_size=8)
    for model in (
        patchlib.ConvMixer(config, depth=3),
        patchlib.ConvMixer(config.replace(depth=3)),
        patchlib.ConvMixer(dim=8, depth=3, patch_size=4, img_size=8),
    ):
        assert model.config == config.replace(depth=3)
        assert len(model.blocks) == 3
    assert config.depth == 2


def test_plain_values():
    assert plain("x", [1, (2.5, "a"), {"b": [None, True]}]) == (1, (2.5, "a"), {"b": (None, True)})
    for value in (float("nan"), float("inf"), 10**7, 10**400, object(), {1, 2}, b"x", [[[[[[1]]]]]], torch.ones(1)):
        with pytest.raises(ConfigError, match=r"^x"):
            plain("x", value)


# any values at all


def specs(role: str, nested: bool = True) -> st.SearchStrategy:
    """Kinds of a role with options of theirs, likely and unlikely."""

    def options(name):
        taken = registry._options(registry.find_block(role, name)) or {}
        names = sorted(set(taken) | {"stride", "remainder", "norm", "covers_prefix"})
        values = st.one_of(SCALARS, st.lists(st.integers(0, 9), max_size=3))
        if nested:
            values = st.one_of(values, specs("norm", nested=False), specs("mlp", nested=False))
        return st.dictionaries(st.sampled_from(names), values, max_size=2).map(lambda found: {"kind": name, **found})

    return st.sampled_from(registry.block_names(role)).flatmap(options)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 20),
    st.floats(),
    st.sampled_from([0, 10**6, 10**12, 10**400, "", "layer", "tanh", "relu", "pad", "os.system"]),
)
SMALL = {
    patchlib.ViT: {"dim": 16, "depth": 1, "heads": 2, "patch_size": 4, "img_size": 8, "num_classes": 3},
    patchlib.ConvMixer: {"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 4, "img_size": 8, "num_classes": 3},
    patchlib.PatchNet: {"stages": [{"kind": "convmixer", "dim": 8}], "patch_size": 4, "img_size": 8, "num_classes": 3},
}


def any_value(field: str) -> st.SearchStrategy:
    role = {"stages": "stage"}.get(field, field)
    if field == "stages":
        return st.lists(specs(role).map(lambda spec: {"dim": 8, **spec}), min_size=1, max_size=2)
    if role in ("patch_embed", "pos_embed", "mlp", "norm", "pool"):
        return st.one_of(specs(role), specs(role), SCALARS)
    if field == "attention":
        return st.dictionaries(st.sampled_from(["qkv_bias", "head_dim", "norm"]), st.one_of(SCALARS, specs("norm")))
    if field == "tokens":
        return st.dictionaries(st.sampled_from(["class", "register", "distill"]), st.integers(0, 2))
    return st.one_of(SCALARS, st.integers(1, 20), st.floats(0, 1))


@pytest.mark.parametrize("model_class", SMALL)
@settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_any_values_make_a_model_or_an_error_of_ours(model_class, data):
    """Shapes alone, on the meta device: the model is built and run, or the config, the model or its input refuses."""
    names = sorted(field.name for field in dataclasses.fields(model_class.Config))
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=2))
    fields = {**SMALL[model_class], **{name: data.draw(any_value(name)) for name in sorted(chosen)}}
    try:
        config = model_class.Config.from_dict(fields)
        with torch.device("meta"):
            model = model_class(config).eval()
            model(torch.zeros(1, config.in_chans, 8, 8))
    except patchlib.PatchlibError:
        return
    assert json.loads(json.dumps(config.to_dict()))
