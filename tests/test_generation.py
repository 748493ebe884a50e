import numpy as np
import pytest
import torch
from gpt_golden import metadata, read_golden, tiny_gpt
from torch import nn

from patchlib.errors import InputError
from patchlib.generation import Sampling, generate, stream
from patchlib.models.causal_conv_lm import CausalConvLM
from patchlib.models.convnext_lm import ConvNeXtV2LM
from patchlib.models.gpt import GPT


@pytest.fixture(scope="module")
def golden():
    return read_golden()


@pytest.fixture
def model():
    """Confident enough that greedy choices are no near ties."""
    model = GPT(vocab_size=31, context=16, dim=24, depth=2, heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


class Counter(nn.Module):
    """Somebody's own model, without a cache: the next token is how many tokens it was given."""

    def __init__(self):
        super().__init__()
        self.context, self.config = 6, type("Config", (), {"vocab_size": 20})()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.trained_while_called = []

    def next_logits(self, ids):
        self.trained_while_called.append(self.training)
        return self.scale * nn.functional.one_hot(torch.tensor([ids.shape[1]] * len(ids)), 20)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(golden, cache, penalty):
    model, wanted = tiny_gpt(golden), golden[f"greedy.{penalty}"]
    prompts = wanted[:, :6]
    found = generate(model, prompts, 26, temperature=0, repetition_penalty=penalty, cache=cache)
    assert found == wanted.tolist()


def test_filters_are_those_of_transformers(golden):
    filters = metadata("filters")
    assert len(filters) >= 6
    for name, options in filters.items():
        found = Sampling(**options).filter(golden["scores"], golden["scores.ids"])
        torch.testing.assert_close(found, golden[f"filtered.{name}"])


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(20_000, -1)
    ids = torch.zeros(20_000, 1, dtype=torch.int64)
    drawn = Sampling(temperature=0.5, top_k=3).choose(logits, ids, torch.Generator().manual_seed(0))
    found = drawn.bincount(minlength=4) / 20_000
    odds = torch.tensor([0, 1, torch.e**2, torch.e**4])
    torch.testing.assert_close(found, odds / odds.sum(), atol=0.01, rtol=0)


@pytest.mark.parametrize("cache", [True, False])
def test_unequal_prompts_give_what_each_gives_alone(model, cache):
    prompts = [[3], [7, 1, 30, 2, 2, 9], [5, 5], list(range(14)), list(range(20))]
    together = generate(model, prompts, 7, temperature=0, cache=cache)
    assert together == [generate(model, prompt, 7, temperature=0, cache=not cache) for prompt in prompts]
    assert [len(text) - len(prompt) for text, prompt in zip(together, prompts, strict=True)] == [7] * 5


@pytest.mark.parametrize(
    "other",
    [
        CausalConvLM(vocab_size=31, context=16, dim=12, depth=2, kernel_size=3),
        ConvNeXtV2LM(
            vocab_size=31, num_tokens=16, patch_size=4, readout="pool",
            trunk={"kind": "convmixer", "dim": 12, "depth": 1, "kernel_size": 3, "patch_size": 4},
        ),
    ],
    ids=["causal", "windowed"],
)  # fmt: skip
def test_every_language_model_generates(other):
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.4)
    prompts = [[3], [7, 1, 30, 2, 2, 9], list(range(14))]
    texts = generate(other, prompts, 6, temperature=0)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == generate(other, prompt, 6, temperature=0, cache=False)
        with torch.no_grad():
            window = torch.tensor([text[:-1][-16:]])
            assert other.eval()(window)[0, -1].argmax() == text[-1]


def test_beyond_the_context_the_newest_tokens_are_read(model):
    text = generate(model, [1, 2, 3], 40, temperature=0)
    assert len(text) == 43
    with torch.no_grad():
        for end in range(3, 43):
            window = torch.tensor([text[max(0, end - 16) : end]])
            assert model(window)[0, -1].argmax() == text[end]


def test_same_seed_same_text(model):
    options = {"temperature": 2.0, "top_p": 0.95}
    first = generate(model, [[1, 2], [3]], 12, seed=5, **options)
    assert first == generate(model, [[1, 2], [3]], 12, seed=5, **options)
    assert first == generate(model, [[1, 2], [3]], 12, seed=5, cache=False, **options)
    assert first != generate(model, [[1, 2], [3]], 12, seed=6, **options)
    state = torch.get_rng_state()
    generate(model, [1], 3, seed=5)
    assert torch.equal(state, torch.get_rng_state())


def test_stop_ends_a_text_with_the_stop(model):
    text = generate(model, [1, 2], 12, temperature=0)
    new = text[2:]
    assert generate(model, [1, 2], 12, temperature=0, stop=new[4]) == text[: 2 + new.index(new[4]) + 1]
    pair = new[5:7]
    end = next(i for i in range(1, 12) if new[i - 1 : i + 1] == pair)
    assert generate(model, [1, 2], 12, temperature=0, stop=[pair, [30, 30, 30, 30]]) == text[: 2 + end + 1]
    # a stop in the prompt, or half in it, ends nothing
    assert generate(model, [1, 2], 3, temperature=0, stop=[2, [2, new[0]]])[:3] == text[:3]
    other = generate(model, [9], 12, temperature=0)
    assert generate(model, [[1, 2], [9]], 12, temperature=0, stop=[pair])[0] == text[: 2 + end + 1]
    assert generate(model, [[1, 2], [9]], 12, temperature=0, stop=[new[:1]])[1][: len(other)][0] == 9


def test_a_model_of_ones_own_without_a_cache():
    model = Counter()
    assert generate(model, [0, 0], 6, temperature=0) == [0, 0, 2, 3, 4, 5, 6, 6]
    assert generate(model, torch.tensor([[0, 0, 0]]), 2) == [[0, 0, 0, 3, 4]]
    assert generate(model, [1, 2], 0) == [1, 2]
    assert not any(model.trained_while_called)
    assert model.training


def test_stream_hands_over_what_generate_returns(model):
    prompts = [[3], [7, 1, 30, 2]]
    texts = [list(prompt) for prompt in prompts]
    for tokens in stream(model, prompts, 5, temperature=0):
        assert any(token is not None for token in tokens)
        for text, token in zip(texts, tokens, strict=True):
            text += [] if token is None else [token]
    assert texts == generate(model, prompts, 5, temperature=0)
    assert [3, *stream(model, [3], 5, seed=1)] == generate(model, [3], 5, seed=1)


def test_leaving_early_and_interruption_restore_every_module(model):
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    for _ in stream(model, [1], 10):
        assert torch.is_grad_enabled()
        break
    assert [module.training for module in model.modules()] == modes

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.blocks[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, [1], 10)
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": [[1], [2, 31]]}, r"prompt 1, token 1: found 31; allowed: integers from 0 to 30"),
        ({"prompt_ids": [1, -1]}, "token 1: found -1"),
        ({"prompt_ids": [1.5]}, "found 1.5"),
        ({"prompt_ids": [[1], []]}, "prompt 1 is empty"),
        ({"prompt_ids": []}, r"prompt_ids: found \[\]"),
        ({"prompt_ids": "text"}, "prompt_ids: found 'text'; allowed: token ids"),
        ({"prompt_ids": torch.zeros(1, 2)}, r"prompt_ids: found torch.float32 of shape \(1, 2\)"),
        ({"max_new_tokens": -1}, "max_new_tokens: found -1"),
        ({"temperature": -0.1}, "temperature: found -0.1"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": None}, "temperature: found None"),
        ({"top_k": 0}, "top_k: found 0"),
        ({"top_k": 1.5}, "top_k: found 1.5"),
        ({"top_p": 0}, "top_p: found 0"),
        ({"top_p": 1.1}, "top_p: found 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty: found 0"),
        ({"stop": [[]]}, "stop: found an empty sequence"),
        ({"prompt_ids": [[1], 2]}, "prompt_ids: found 2 beside a list"),
        ({"prompt_ids": [True]}, "token 0: found True"),
        ({"prompt_ids": ["a"]}, "token 0: found 'a'"),
        ({"prompt_ids": [None]}, "token 0: found None"),
        ({"prompt_ids": np.array([1.0])}, "token 0: found 1.0"),
        ({"prompt_ids": np.zeros((1, 1, 1), dtype=int)}, r"token 0: found \[0\]"),
        ({"prompt_ids": 3}, "prompt_ids: found 3; allowed: token ids"),
        ({"prompt_ids": None}, "prompt_ids: found None"),
        ({"prompt_ids": {1: 2}}, "prompt_ids: found {1: 2}"),
        ({"temperature": 1e-40}, "temperature: found 1e-40; allowed: 0, or a number from 1e-6 to 1e6"),
        ({"temperature": 1e300}, "temperature: found 1e"),
        ({"temperature": True}, "temperature: found True"),
        ({"temperature": [1.0]}, r"temperature: found \[1.0\]"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty: found 1e-45; allowed: a number from 1e-6 to 1e6"),
        ({"repetition_penalty": 1e300}, "repetition_penalty: found 1e"),
        ({"top_p": 1e-300}, "top_p: found 1e-300"),
        ({"seed": 99999999999999999999999}, "seed: found 99999999999999999999999; allowed: an integer of 64 bits"),
        ({"seed": -(2**63) - 1}, "seed: found -9223372036854775809"),
        ({"seed": 1.5}, "seed: found 1.5"),
        ({"seed": "a"}, "seed: found 'a'"),
        ({"seed": True}, "seed: found True"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: found 1.5"),
        ({"stop": "ab"}, "stop 0, token 0: found 'ab'; allowed: integers from 0 to 30"),
        ({"stop": ["ab"]}, "stop 0, token 0: found 'ab'"),
        ({"stop": True}, "stop 0, token 0: found True"),
        ({"stop": 1.5}, "stop 0, token 0: found 1.5"),
        ({"stop": 31}, "stop 0, token 0: found 31"),
        ({"stop": -1}, "stop 0, token 0: found -1"),
        ({"stop": [3, [4, 31]]}, "stop 1, token 1: found 31"),
        ({"stop": {3: 4}}, "stop 0, token 0: found {3: 4}"),
        ({"suppress": 3}, "suppress: found 3; allowed: a list"),
        ({"suppress": [3, 31]}, "suppress, token 1: found 31"),
        ({"suppress": range(31)}, "suppress: found the whole vocabulary"),
    ],
)
def test_bad_arguments_are_named_at_the_call(model, arguments, message):
    for function in (generate, stream):
        with pytest.raises(InputError, match=message):
            function(model, **{"prompt_ids": [1], **arguments})


def test_numbers_of_numpy_and_torch_are_numbers(model):
    wanted = generate(model, [[1, 2], [3, 4]], 6, 0.5, 3, 0.75, 1.25, seed=3, stop=[[7, 8], 9])
    for ids in (np.array([[1, 2], [3, 4]], dtype=np.uint16), torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),
                [np.array([1, 2]), torch.tensor([3, 4])], [[np.int64(1), torch.tensor(2)], (3, 4)]):  # fmt: skip
        for one, of in ((np.float32, np.int64), (torch.tensor, torch.tensor)):
            stop = [np.array([7, 8]), of(9)]
            options = {"seed": of(3), "stop": stop}
            assert generate(model, ids, of(6), one(0.5), of(3), one(0.75), one(1.25), **options) == wanted
    wanted = generate(model, [1, 2], 3, temperature=0)
    for ids in (np.array([1, 2]), [np.int64(1), np.int64(2)], [torch.tensor(1), torch.tensor(2)], b"\1\2"):
        found = generate(model, ids, 3, temperature=0)
        assert found == wanted
        assert {type(token) for token in found} == {int}


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**64 - 1])
def test_every_seed_of_64_bits(model, seed):
    assert generate(model, [1], 5, seed=seed) == generate(model, [1], 5, seed=seed)


@pytest.mark.parametrize("options", [{"temperature": 1e-6}, {"top_p": 1e-6}, {"repetition_penalty": 1e-6}])
@pytest.mark.parametrize("more", [{}, {"temperature": 1e-6}, {"temperature": 1e6, "repetition_penalty": 1e6}])
def test_the_ends_of_the_ranges_draw(model, options, more):
    assert len(generate(model, [1, 2], 5, seed=0, **{**more, **options})) == 7


@pytest.mark.parametrize("cache", [True, False])
def test_as_many_tokens_as_one_likes_take_no_room_before_they_are_drawn(model, cache):
    tokens = stream(model, [[1, 2], [3]], 99999999999999, temperature=0, cache=cache)
    texts = [list(pair) for pair in zip(*(next(tokens) for _ in range(70)), strict=True)]
    assert [1, 2, *texts[0][1:]] == generate(model, [1, 2], 69, temperature=0)  # the longer waits for the shorter
    assert [3, *texts[1]] == generate(model, [3], 70, temperature=0)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "top_k": 1, "repetition_penalty": 2}])
def test_suppressed_ids_are_never_drawn(model, options):
    drawn = sorted(set(generate(model, [1], 100, **options)[1:]))
    suppress = drawn[: (len(drawn) + 1) // 2]
    assert not {*generate(model, [1], 100, suppress=suppress, **options)[1:]} & {*suppress}
    assert generate(model, [1], 9, suppress=np.array([]).astype(int), **options) == generate(model, [1], 9, **options)


def test_a_model_that_is_no_language_model():
    with pytest.raises(InputError, match="found Linear; allowed: a language model"):
        generate(nn.Linear(2, 2), [1])
