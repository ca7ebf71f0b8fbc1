"""The whole model: reading a prompt and writing tokens, on the definition and on the best there is.

The definition widens every weight for every token, so there are few tokens to write.
"""

import functools

import pytest

from tilewise import model as models
from tilewise.benchmarks.host import versions
from tilewise.benchmarks.tokens import check, run_test, token_rate
from tilewise.dispatch import use_backend


@functools.cache
def smollm2() -> models.LanguageModel:
    try:
        return models.load("smollm2")
    except models.ModelError as error:
        pytest.skip(str(error))


@functools.cache
def checked(backend: str) -> models.LanguageModel:
    check(smollm2(), backend)
    return smollm2()


@pytest.mark.model
@pytest.mark.parametrize("test", ["pp64", "tg4"])
@pytest.mark.parametrize("backend", ["naive", "auto"])
def bench_model(benchmark, test, backend):
    benchmark.group = f"SmolLM2-135M {test}"
    lm = checked(backend)
    rounds = 3 if benchmark.enabled else 1
    with use_backend(backend):
        benchmark.pedantic(run_test, (lm, test), rounds=rounds, warmup_rounds=rounds // 3)
    if benchmark.enabled:
        rate = token_rate(lm, test, backend, benchmark.stats.stats.data)
        benchmark.extra_info.update(rate.as_dict(), versions=versions())
