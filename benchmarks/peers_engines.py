"""The engines that can run the GGUF file, each behind the same two methods.

`peers_worker.py` reads this file by its path in a process of its own, where tilewise, and with it
torch, may not be: only what an engine imports itself counts as its memory, and no two engines share
a thread pool. So there is nothing but the standard library up here.

An engine is made before the model is opened, and importing its libraries is all that its `__init__`
does. `open(path, threads, context)` loads the file for at most `context` tokens. `generate(prompt,
count)` reads token ids and greedily writes exactly `count`, end tokens or not; it returns

    the new token ids, the seconds until the first of them was known, how many tokens were read

where the clock starts with the call. What an engine does not set here is at its own default.
"""

from __future__ import annotations

import time
from importlib import metadata


class Tilewise:
    """The reference model of this package.

    Args:
        dtype, act: as in `tilewise.model.load`.
    """

    def __init__(self, dtype: str = "float32", act: str | None = None) -> None:
        import torch

        import tilewise.model

        self._torch, self._load = torch, tilewise.model.load
        self._options = {"dtype": getattr(torch, dtype), "act": act}
        self.version = tilewise.__version__

    def open(self, path: str, threads: int, context: int) -> None:
        self._torch.set_num_threads(threads)
        self._model = self._load(path, **self._options)

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], float, int]:
        generation = self._model.generate(prompt, count, ignore_eos=True)
        timings = generation.timings
        return generation.token_ids, timings.first_token_seconds, timings.prompt_tokens


class LlamaCpp:
    """llama.cpp, by the Python binding that compiles it from source."""

    def __init__(self) -> None:
        import llama_cpp

        self._llama = llama_cpp.Llama
        self.version = llama_cpp.__version__

    def open(self, path: str, threads: int, context: int) -> None:
        # Not at its default of 8192, flash attention is the faster way here; a batch that takes
        # the whole prompt is what other engines do.
        self._model = self._llama(
            path,
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], float, int]:
        started = time.perf_counter()
        self._model.reset()  # or else it would keep what the last prompt began with, too
        stream = self._model.generate(prompt, temp=0.0)
        tokens = [next(stream)]
        first_seconds = time.perf_counter() - started
        read = self._model.n_tokens
        while len(tokens) < count:
            tokens.append(next(stream))
        stream.close()
        return tokens, first_seconds, read


class OpenVino:
    """OpenVINO GenAI, which reads GGUF files itself.

    It keeps every prompt's keys and values and answers at once where one begins as another did.
    """

    def __init__(self) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai = numpy, openvino, openvino_genai
        self.version = metadata.version("openvino-genai")

    def open(self, path: str, threads: int, context: int) -> None:
        self._model = self._genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], float, int]:
        genai = self._genai
        arrivals = []

        class Arrivals(genai.StreamerBase):
            def write(self, token):
                arrivals.append(time.perf_counter())
                return genai.StreamingStatus.RUNNING

            def end(self):
                pass

        config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        ids = self._openvino.Tensor(self._numpy.array([prompt], self._numpy.int64))
        started = time.perf_counter()
        result = self._model.generate(ids, config, Arrivals())
        read = result.perf_metrics.get_num_input_tokens()
        return list(result.tokens[0]), arrivals[0] - started, read
