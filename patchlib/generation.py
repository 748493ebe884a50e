"""Text from language models, token by token."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .layers.token_image import is_integer

Prompts = Iterable[int] | Iterable[Iterable[int]] | Tensor
Stop = int | Sequence[int | Sequence[int]] | None


def generate(
    model: Any,
    prompt_ids: Prompts,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Stop = None,
    seed: int | None = None,
    *,
    cache: bool = True,
    suppress: Iterable[int] = (),
) -> list[Any]:
    """Continues one prompt, or several at once, with any language model.

        text = tokenizer.decode(generate(model, tokenizer.encode("O Romeo"), 50, temperature=0))

    The model reads at most its newest `context` tokens. It runs in evaluation mode, and each of its modules is put
    back into the mode it was in, also after an interruption. Prompts of unequal length give what each gives alone
    (greedily; drawn tokens differ, for one sequence of random numbers serves them all).

    Args:
        model: a `LanguageModel`, or any module with `next_logits`, `context` and ``config.vocab_size``.
        prompt_ids: the ids of one prompt, ``(T,)``, or of several: ``(batch, T)``, or a list of any lengths. Lists,
            tensors and numpy arrays are all well.
        max_new_tokens: how many tokens each prompt gets at most.
        temperature: divides the logits, from 1e-6 to 1e6; 0 takes the likeliest token each time.
        top_k: only the `top_k` likeliest tokens can be drawn.
        top_p: only the likeliest tokens that together have this probability can be drawn (nucleus sampling,
            Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).
        repetition_penalty: above 1 makes tokens that are there already less likely (CTRL, Keskar et al. 2019,
            https://arxiv.org/abs/1909.05858). From 1e-6 to 1e6.
        stop: a token id after which a text ends, or several, among them sequences of ids: ``stop=[0, [13, 13]]``.
        seed: the same seed gives the same text, on the same kind of device; None draws from torch's own generator.
        cache: use the model's `start` and `step`, if it has them, while the text fits the context.
        suppress: ids that are never drawn. Where the model's vocabulary is padded, ``tokenizer.missing(vocab_size)``
            are those that have no text.

    Returns:
        One list of ids, the prompt's and the new ones (a stop included), or a list of such lists.

    Raises:
        InputError: the model generates no text, a prompt is empty, ids are no integers or outside the vocabulary, or
            an option is out of range.
    """
    prompts, single = _as_lists(prompt_ids)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, suppress)
    for tokens in _Run(model, prompts, max_new_tokens, sampling, stop, seed, cache).steps():
        for prompt, token in zip(prompts, tokens, strict=True):
            if token is not None:
                prompt.append(token)
    return prompts[0] if single else prompts


def stream(
    model: Any,
    prompt_ids: Prompts,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Stop = None,
    seed: int | None = None,
    *,
    cache: bool = True,
    suppress: Iterable[int] = (),
) -> Iterator[Any]:
    """`generate`, as an iterator that hands each new token over at once.

        for piece in tokenizer.decode_stream(stream(model, tokenizer.encode("O Romeo"))):
            print(piece, end="", flush=True)

    The arguments are checked at the call. Leaving the loop early, or Ctrl-C, ends it cleanly.

    Returns:
        An iterator over the new ids of one prompt; of several prompts, over lists with one entry a prompt: its new
        id, or None where it has ended or a longer prompt is still being read.
    """
    prompts, single = _as_lists(prompt_ids)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, suppress)
    steps = _Run(model, prompts, max_new_tokens, sampling, stop, seed, cache).steps()
    return (tokens[0] for tokens in steps) if single else steps


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen by its logits; the arguments are those of `generate`.

    Raises:
        InputError: one is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    suppress: Iterable[int] = ()

    def __post_init__(self) -> None:
        def check(name: str, *rule: Any) -> None:
            object.__setattr__(self, name, _check(name, getattr(self, name), *rule))

        # float32, in which logits are divided, holds what comes of these
        check("temperature", float, lambda v: v == 0 or 1e-6 <= v <= 1e6, "0, or a number from 1e-6 to 1e6")
        check("repetition_penalty", float, lambda v: 1e-6 <= v <= 1e6, "a number from 1e-6 to 1e6")
        if self.top_k is not None:
            check("top_k", int, lambda v: v >= 1, "an integer from 1, or None")
        if self.top_p is not None:
            check("top_p", float, lambda v: 1e-6 <= v <= 1, "a number from 1e-6 to 1, or None")
        if not isinstance(suppress := as_python(self.suppress), list):
            raise InputError(f"suppress: found {suppress!r:.80}; allowed: a list of token ids")
        object.__setattr__(self, "suppress", tuple(suppress))

    def filter(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Logits ``(batch, vocab_size)`` of what follows ``(batch, T)`` ids, with the penalty, the temperature and
        the filters applied in this order; what cannot be drawn is ``-inf``."""
        logits = logits.float()
        if self.suppress:
            logits = logits.index_fill(1, torch.tensor(self.suppress, device=logits.device), -torch.inf)
        if self.repetition_penalty != 1:
            seen = logits.gather(1, ids)
            seen = torch.where(seen < 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
            logits = logits.scatter(1, ids, seen)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            values, order = logits.sort(dim=1, descending=True)
            probabilities = values.softmax(dim=1)
            likelier = probabilities.cumsum(dim=1) - probabilities
            values = values.masked_fill(likelier >= self.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(1, order, values)
        return logits

    def choose(self, logits: Tensor, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token for each sample, ``(batch,)``."""
        logits = self.filter(logits, ids)
        if self.temperature == 0:
            return logits.argmax(dim=1)
        return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


class _Run:
    """One generation. At any time all samples are equally long, so that no model needs padding or masks: a prompt that
    is longer than the shortest gives its own tokens instead of drawn ones until it is read."""

    def __init__(
        self,
        model: Any,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Stop,
        seed: int | None,
        cache: bool,
    ) -> None:
        if not callable(getattr(model, "next_logits", None)):
            raise InputError(f"model: found {type(model).__name__}; allowed: a language model")
        vocab_size = model.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"prompt {i} is empty; give at least one token")
            _check_ids(f"prompt {i}", prompt, vocab_size)
        _check_ids("suppress", sampling.suppress, vocab_size)
        if len(set(sampling.suppress)) == vocab_size:
            raise InputError("suppress: found the whole vocabulary; allowed: less, so that there is something to draw")
        if seed is not None:
            seed = _check("seed", seed, int, lambda v: -(2**63) <= v < 2**64, "an integer of 64 bits, or None")
        max_new_tokens = _check("max_new_tokens", max_new_tokens, int, lambda v: v >= 0, "an integer from 0")
        self.model, self.sampling, self.cache = model, sampling, cache and hasattr(model, "start")
        self.device = next(model.parameters()).device
        self.lengths = [len(prompt) for prompt in prompts]
        self.ends = [length + max_new_tokens for length in self.lengths]
        self.stops = _as_stops(stop, vocab_size)
        self.generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        self.prompts = prompts

    @torch.no_grad()
    def steps(self) -> Iterator[list[int | None]]:
        """The new token of each prompt, None where there is none."""
        batch, length = len(self.prompts), min(self.lengths)
        ids = torch.zeros(batch, max(self.lengths), dtype=torch.int64)
        for row, prompt in zip(ids, self.prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        texts = [list(prompt) for prompt in self.prompts]
        ended = [end == length for end, length in zip(self.ends, self.lengths, strict=True)]
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            state = None
            while not all(ended):
                active = [not e and n <= length for e, n in zip(ended, self.lengths, strict=True)]
                if not any(active):  # nothing to draw until the next prompt is read: jump there
                    length = min(n for e, n in zip(ended, self.lengths, strict=True) if not e)
                    state = None
                    continue
                logits, state = self._read(ids[:, :length], state)
                drawn = self.sampling.choose(logits, ids[:, :length], self.generator)
                if length == ids.shape[1]:
                    ids = F.pad(ids, (0, length))  # twice as long, not `max_new_tokens` at once: a stop may come first
                ids[:, length] = torch.where(torch.tensor(active, device=self.device), drawn, ids[:, length])
                length += 1
                tokens: list[int | None] = [t if a else None for t, a in zip(drawn.tolist(), active, strict=True)]
                for i, token in enumerate(tokens):
                    if token is not None:
                        texts[i].append(token)
                        ended[i] = length == self.ends[i] or self._stopped(texts[i], length - self.lengths[i])
                yield tokens
        finally:
            for module in training:
                module.training = True

    def _read(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits of what follows, from the newest tokens that the model can read, and its cache."""
        context = self.model.context
        if not self.cache or ids.shape[1] > context:  # positions move with the window, so that no cache holds
            return self.model.next_logits(ids[:, -context:]), None
        if state is None:
            return self.model.start(ids)
        return self.model.step(ids[:, -1:], state)

    def _stopped(self, text: list[int], new: int) -> bool:
        return any(len(end) <= new and text[-len(end) :] == end for end in self.stops)


def as_python(values: Any) -> Any:
    """Tensors, arrays and their numbers as Python's lists and numbers, and other iterables as lists of such."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, Iterable) and not isinstance(values, (str, Mapping)):
        return [as_python(value) for value in values]
    return values


def _as_lists(prompt_ids: Prompts) -> tuple[list[list[Any]], bool]:
    """Prompts as fresh lists, and whether there was one alone."""
    if isinstance(prompt_ids, Tensor) and (prompt_ids.dim() not in (1, 2) or prompt_ids.is_floating_point()):
        found = f"{prompt_ids.dtype} of shape {tuple(prompt_ids.shape)}"
        raise InputError(f"prompt_ids: found {found}; allowed: integers (T,) or (batch, T)")
    prompts = as_python(prompt_ids)
    if not isinstance(prompts, list) or not prompts:
        raise InputError(f"prompt_ids: found {prompts!r:.80}; allowed: token ids, as a tokenizer's encode gives them")
    several = [isinstance(prompt, list) for prompt in prompts]
    if any(several) and not all(several):
        found = f"{prompts[several.index(False)]!r:.80} beside a list"
        raise InputError(f"prompt_ids: found {found}; allowed: the ids of one prompt, or one list a prompt")
    return (prompts, False) if any(several) else ([prompts], True)


def _as_stops(stop: Stop, vocab_size: int) -> list[list[int]]:
    if stop is None:
        return []
    words = as_python(stop)
    stops = [word if isinstance(word, list) else [word] for word in (words if isinstance(words, list) else [words])]
    if not all(stops):
        raise InputError("stop: found an empty sequence; allowed: token ids, and sequences of at least one")
    for i, word in enumerate(stops):
        _check_ids(f"stop {i}", word, vocab_size)
    return stops


def _check_ids(where: str, ids: Iterable[Any], vocab_size: int) -> None:
    for j, token in enumerate(ids):
        if not is_integer(token) or not 0 <= token < vocab_size:
            allowed = f"integers from 0 to {vocab_size - 1}, the model's vocabulary"
            raise InputError(f"{where}, token {j}: found {token!r:.80}; allowed: {allowed}")


def _check(name: str, value: Any, kind: type, allows: Callable[[Any], bool], allowed: str) -> Any:
    """The value, as Python's own number."""
    number = as_python(value)
    if not (is_integer(number) or isinstance(number, kind)) or isinstance(number, bool) or not allows(number):
        raise InputError(f"{name}: found {value!r:.80}; allowed: {allowed}")
    return number
