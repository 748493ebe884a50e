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
    ],
)
def test_bad_arguments_are_named_at_the_call(model, arguments, message):
    for function in (generate, stream):
        with pytest.raises(InputError, match=message):
            function(model, **{"prompt_ids": [1], **arguments})


def test_a_model_that_is_no_language_model():
    with pytest.raises(InputError, match="found Linear; allowed: a language model"):
        generate(nn.Linear(2, 2), [1])
