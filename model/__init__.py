"""The reference model: one GPT that runs on tilewise's operations, and real weights for it.

import tilewise.model
lm = tilewise.model.load("smollm2")
print(lm.chat([{"role": "user", "content": "Why is the sky blue?"}]))
"""

from tilewise.model.agreement import GreedyAgreement, greedy_tokens_agree
from tilewise.model.card import Card, LowRank, card, gpt3_table, low_rank
from tilewise.model.config import PRESETS, GPTConfig, ModelError
from tilewise.model.generate import Generation, LanguageModel, Stream, Timings
from tilewise.model.gpt import GPT, PagedBatch
from tilewise.model.load import find, load
from tilewise.model.tokenizer import TextStream, Tokenizer

__all__ = [
    "GPT",
    "PRESETS",
    "Card",
    "GPTConfig",
    "Generation",
    "GreedyAgreement",
    "LanguageModel",
    "LowRank",
    "ModelError",
    "PagedBatch",
    "Stream",
    "TextStream",
    "Timings",
    "Tokenizer",
    "card",
    "find",
    "gpt3_table",
    "greedy_tokens_agree",
    "load",
    "low_rank",
]
