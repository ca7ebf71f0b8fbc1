"""Tokens per second of a whole model, in the rows that llama-bench prints.

`pp512` reads a prompt of 512 tokens at once, `tg128` writes 128 tokens one by one after a single
one. Prompts are random tokens; the choice of the next one is greedy and counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from tilewise.dispatch import use_backend

if TYPE_CHECKING:
    from tilewise.model import GPT, LanguageModel


@dataclass(frozen=True)
class TokenRate:
    """The result of one test with one backend setting.

    Args:
        model: its name.
        weight_bytes: of the weights in memory.
        backend: "auto", or what every operation was asked to run on.
        device: where the model is.
        threads: CPU threads.
        test: "pp" or "tg" and the number of tokens.
        rates: tokens/s of each repetition.
    """

    model: str
    weight_bytes: int
    backend: str
    device: str
    threads: int
    test: str
    rates: list[float]

    @property
    def mean(self) -> float:
        """Tokens per second."""
        return statistics.mean(self.rates)

    @property
    def std(self) -> float:
        """The standard deviation of the repetitions."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, mean and deviation included, ready for JSON."""
        return asdict(self) | {"mean": self.mean, "std": self.std}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TokenRate:
        """The inverse of `as_dict`."""
        return TokenRate(**{field.name: data[field.name] for field in fields(TokenRate)})


def check(model: LanguageModel, backend: str, *, tokens: int = 3) -> None:
    """Hold the model on `backend` to the greedy text of the model on the definition.

    Raises:
        AssertionError: where the texts part, unless at two all but equally likely tokens.
    """
    from tilewise.model import greedy_tokens_agree

    if backend == "naive":
        return
    prompt = _random_tokens(model, 16)
    texts = {}
    for name in ("naive", backend):
        with use_backend(name):
            texts[name] = model.generate(prompt, tokens, ignore_eos=True).token_ids
    agreement = greedy_tokens_agree(model.gpt, prompt, texts[backend], texts["naive"])
    if not agreement:
        raise AssertionError(f"{model.name} on {backend}: {agreement}")


def _random_tokens(model: LanguageModel, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.gpt.config.vocab_size, (count,), generator=generator).tolist()


def run_test(model: LanguageModel, test: str) -> float:
    """Run "pp<tokens>" or "tg<tokens>" once on the backends in use; returns its seconds."""
    kind, tokens = test[:2], int(test[2:])
    if kind == "pp":
        prompt = _random_tokens(model, tokens)
        return model.generate(prompt, 1, ignore_eos=True).timings.prompt_seconds
    first = _random_tokens(model, 1)
    return model.generate(first, tokens + 1, ignore_eos=True).timings.decode_seconds


def token_rate(model: LanguageModel, test: str, backend: str, seconds: list[float]) -> TokenRate:
    """The result of a test that took `seconds` in each repetition."""
    return TokenRate(
        model=model.name,
        weight_bytes=weight_bytes(model.gpt),
        backend=backend,
        device=str(model.gpt.device),
        threads=torch.get_num_threads(),
        test=test,
        rates=[int(test[2:]) / duration for duration in seconds],
    )


def measure_tokens(
    model: LanguageModel,
    tests: list[str],
    *,
    backend: str = "auto",
    repetitions: int = 5,
    done: Callable[[], object] = lambda: None,
) -> Iterator[TokenRate]:
    """Check the model on a backend; then run each test once to warm up and `repetitions` times.

    Args:
        model: what to run.
        tests: such as "pp512" and "tg128".
        backend: for every operation.
        repetitions: that count.
        done: called after each run.

    Yields:
        The rate of each test as soon as it is known.

    Raises:
        AssertionError: where the model on this backend says something else than on the definition.
    """
    check(model, backend)
    for test in tests:
        seconds = []
        for _ in range(repetitions + 1):
            with use_backend(backend):
                seconds.append(run_test(model, test))
            done()
        yield token_rate(model, test, backend, seconds[1:])


def weight_bytes(gpt: GPT) -> int:
    """Bytes that a model's weights take, each tensor counted once."""
    tensors = (*gpt.parameters(), *gpt.buffers())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def bytes_per_token(gpt: GPT, context: int) -> int:
    """Bytes that writing one token reads at least: the weights, and the cache of `context` tokens.

    An embedding table that is not also the output head is left out: one row of it is read.
    """
    from tilewise.model import card

    read = weight_bytes(gpt)
    if not gpt.config.tied_embeddings:
        read -= weight_bytes(gpt.embedding)
    dtype = str(gpt.dtype).removeprefix("torch.")
    return read + context * card(gpt.config).kv_bytes_per_token(dtype)
