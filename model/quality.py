"""How much a quantized model loses: perplexity, and its distance from the unquantized model.

Perplexity asks how well the model predicts a text; two models can do so equally well and still say
different things. The Kullback-Leibler divergence asks what quantization changed: how far the
distribution of every next token has moved from the one that the same weights give, dequantized, in
float32, on the naive backend.

The text is cut into windows that do not overlap. Each token of a window's second half is predicted
from all that precede it in the window, and scored; the first half is context only. That is what
llama.cpp's `llama-perplexity` does, so the figures compare, given the same text and window.

The text that comes with the package is the beginning of "The Time Machine" by H. G. Wells (William
Heinemann, London, 1895), after Project Gutenberg's transcription (ebook 35), without chapter
numbers. It is in the public domain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewise.dispatch import use_backend
from tilewise.model.gpt import GPT
from tilewise.model.layers import Experts, QuantEmbedding, Weight, linear, put, set_act
from tilewise.quant import QuantizedTensor, QuantLinear, quantize, quantize_

__all__ = [
    "Logits",
    "Quality",
    "bits_per_weight",
    "cut",
    "dequantized",
    "logits_of",
    "measure_quality",
    "quality_text",
    "requantized",
]

Logits = Callable[[torch.Tensor], torch.Tensor]
"""From the token ids of a window, (seq,), to the logits after each, (seq, vocab_size)."""

_ROWS = 64  # scored at a time: vocabularies are large, and the sums are done in float64


def quality_text() -> str:
    """The English text that comes with the package; some 3300 words, one paragraph to a line."""
    return Path(__file__).with_name("the_time_machine.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Quality:
    """How a model does on a text.

    Args:
        tokens: how many were scored.
        perplexity: the exponential of the mean negative log-likelihood of these tokens.
        kl: mean over them of KL(reference || model), in nats.
        kl_error: the standard error of that mean, the tokens taken as independent.
        kl_p99: the divergence that one token in a hundred exceeds.
        same_top: the share of tokens where both models' most likely token is the same.
    """

    tokens: int
    perplexity: float
    kl: float
    kl_error: float
    kl_p99: float
    same_top: float

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def cut(ids: Sequence[int], window: int, *, bos_id: int | None = None) -> list[torch.Tensor]:
    """Cut a text into windows; what is left at its end and fills none is not used.

    Args:
        ids: the text's tokens.
        window: tokens in each.
        bos_id: takes the place of the first token of every window, as in llama.cpp; for a model
            whose texts begin with such a token.

    Returns:
        int64 tensors (window,).

    Raises:
        ValueError: for a window in which nothing would be scored, or that the text does not fill.
    """
    if window < 4:
        raise ValueError(f"window: must be at least 4, got {window}")
    if len(ids) < window:
        raise ValueError(f"ids: must fill a window of {window} tokens, got {len(ids)}")
    windows = list(torch.tensor(ids)[: len(ids) // window * window].split(window))
    if bos_id is not None:
        for tokens in windows:
            tokens[0] = bos_id
    return windows


@torch.no_grad()
def measure_quality(
    reference: Logits,
    candidates: Mapping[str, Logits],
    windows: Sequence[torch.Tensor],
    *,
    done: Callable[[str], object] = lambda name: None,
) -> tuple[Quality, dict[str, Quality]]:
    """Hold models against a reference, window by window.

    Args:
        reference: the model that the others are compared with.
        candidates: those others, by name.
        windows: what `cut` made of a text; all of one length.
        done: called with a name after each run of a candidate.

    Returns:
        The reference's own result, whose divergence is 0, and each candidate's.
    """
    own, tallies = _Tally(), {name: _Tally() for name in candidates}
    for window in windows:
        expected = _scored(reference(window)).double().log_softmax(-1)
        targets = window[len(window) // 2 + 1 :].to(expected.device)
        own.add(expected, expected, targets)
        for name, logits in candidates.items():
            tallies[name].add(expected, _scored(logits(window)), targets)
            done(name)
    return own.quality(), {name: tally.quality() for name, tally in tallies.items()}


def _scored(logits: torch.Tensor) -> torch.Tensor:
    """The logits that predict the second half of a window; the last predicts what is not in it."""
    return logits[len(logits) // 2 : -1]


class _Tally:
    """What is known of one model, a number for each token scored."""

    def __init__(self) -> None:
        self._nll: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._same: list[torch.Tensor] = []

    def add(self, expected: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Score tokens (n,) given the reference's log-probabilities and logits, (n, vocab_size)."""
        chunks = (part.split(_ROWS) for part in (expected, logits.to(expected.device), targets))
        for p, raw, token in zip(*chunks, strict=True):
            q = raw.double().log_softmax(-1)
            self._nll.append(-q.gather(-1, token[:, None])[:, 0])
            self._kl.append((p.exp() * (p - q)).sum(-1))
            self._same.append(p.argmax(-1) == raw.argmax(-1))

    def quality(self) -> Quality:
        nll, kl, same = (torch.cat(part) for part in (self._nll, self._kl, self._same))
        return Quality(
            tokens=len(nll),
            perplexity=float(nll.mean().exp()),
            kl=float(kl.mean()),
            kl_error=float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else 0.0,
            kl_p99=float(kl.quantile(0.99)),
            same_top=float(same.double().mean()),
        )


# --- the models that are compared -----------------------------------------------------------------


def logits_of(gpt: GPT, backend: str = "auto") -> Logits:
    """The logits of a model whose operations run on a backend."""

    def logits(window: torch.Tensor) -> torch.Tensor:
        with use_backend(backend):
            return gpt(window.to(gpt.device)[None])[0]

    return logits


def dequantized(gpt: GPT) -> GPT:
    """A copy of a model with all its weights in float32."""
    twin = copy.deepcopy(gpt)
    for path, module in list(twin.named_modules()):
        if path == "head" and gpt.config.tied_embeddings:
            continue
        if isinstance(module, QuantEmbedding):
            table = module.weight.dequantize()
            twin.set_submodule(path, nn.Embedding.from_pretrained(table))
        elif isinstance(module, QuantLinear):
            twin.set_submodule(path, linear([module.weight.dequantize()], module.bias))
        elif isinstance(module, Experts):
            for name in ("gate_up", "down"):
                if isinstance(weight := getattr(module, name), QuantizedTensor):
                    setattr(module, name, nn.Parameter(weight.dequantize(), requires_grad=False))
    if gpt.config.tied_embeddings:
        twin.tie_head()
    return twin.float()


def requantized(gpt: GPT, scheme: str, act: str | None = None) -> GPT:
    """A model with the linear layers and the experts of an unquantized one in another format.

    What is not quantized (embeddings, norms, the router of a mixture of experts) is shared.

    Args:
        gpt: left as it is.
        scheme: of `tilewise.quantize`, at its usual group size.
        act: see `tilewise.model.load`.

    Raises:
        ValueError: for a scheme that does not exist.
    """
    shared = {id(tensor): tensor for tensor in (*gpt.parameters(), *gpt.buffers())}
    twin = copy.deepcopy(gpt, shared)
    quantize_(twin, scheme)
    for path, module in list(twin.named_modules()):
        if isinstance(module, Experts):
            weights: dict[str, list[Weight]] = {
                name: [quantize(getattr(module, name), scheme)] for name in ("gate_up", "down")
            }
            put(twin, path, weights)
    set_act(twin, act)
    return twin


def bits_per_weight(gpt: GPT) -> float:
    """Stored bits per weight of the linear layers, scales and padding included, biases not."""
    nbytes = count = 0
    for module in gpt.modules():
        if isinstance(module, QuantLinear | nn.Linear) and not isinstance(module, QuantEmbedding):
            nbytes += module.weight.nbytes
            count += math.prod(module.weight.shape)
        elif isinstance(module, Experts):
            for weight in (module.gate_up, module.down):
                nbytes += weight.nbytes
                count += math.prod(weight.shape)
    return 8 * nbytes / max(1, count)
