"""The whole model: reading a prompt and writing tokens, on the definition and on the best there is.

The definition widens every weight for every token, so it gets fewer tokens to write.
"""

import functools

import pytest

from tilewise import model as models
from tilewise.benchmarks.host import versions
from tilewise.benchmarks.tokens import run_test, token_rate
from tilewise.dispatch import use_backend


@functools.cache
def smollm2() -> models.LanguageModel:
    try:
        return models.load("smollm2")
    except models.ModelError as error:
        pytest.skip(str(error))


@pytest.mark.model
@pytest.mark.parametrize("backend", ["naive", "auto"])
@pytest.mark.parametrize("test", ["pp128", "tg8"])
def bench_model(benchmark, test, backend):
    benchmark.group = f"SmolLM2-135M {test}"
    lm = smollm2()
    with use_backend(backend):
        rounds = 3 if benchmark.enabled else 1
        benchmark.pedantic(run_test, (lm, test), rounds=rounds, warmup_rounds=benchmark.enabled)
    if benchmark.enabled:
        rate = token_rate(lm, test, backend, benchmark.stats.stats.data)
        benchmark.extra_info.update(rate.as_dict(), versions=versions())
