"""The whole model: reading a prompt and writing tokens, on the definition and on the best there is.

The definition widens every weight for every token, so there are few tokens to write.
"""

import functools

import pytest

from tilewise import model as models
from tilewise.benchmarks.host import devices, versions
from tilewise.benchmarks.tokens import check, run_test, token_rate
from tilewise.dispatch import use_backend

DEVICES = [
    pytest.param(device, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for device in devices()
]


@functools.cache
def smollm2(device: str) -> models.LanguageModel:
    try:
        return models.load("smollm2", device=device)
    except models.ModelError as error:
        pytest.skip(str(error))


@functools.cache
def checked(backend: str, device: str) -> models.LanguageModel:
    check(smollm2(device), backend)
    return smollm2(device)


@pytest.mark.model
@pytest.mark.parametrize("test", ["pp64", "tg4"])
@pytest.mark.parametrize("backend", ["naive", "auto"])
@pytest.mark.parametrize("device", DEVICES)
def bench_model(benchmark, test, backend, device):
    benchmark.group = f"SmolLM2-135M {test} {device}"
    lm = checked(backend, device)
    rounds = 3 if benchmark.enabled else 1
    with use_backend(backend):
        benchmark.pedantic(run_test, (lm, test), rounds=rounds, warmup_rounds=rounds // 3)
    if benchmark.enabled:
        rate = token_rate(lm, test, backend, benchmark.stats.stats.data)
        benchmark.extra_info.update(rate.as_dict(), versions=versions())
