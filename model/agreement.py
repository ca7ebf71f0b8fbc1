"""Whether two backends' greedy texts agree, where neither can be exact.

Two backends round differently, so where two tokens are all but equally likely they may choose
differently, and from there on their texts have nothing to do with each other. What can be judged is
the first token that differs: by the agreement rule (`tilewise.testing`), each logit may be off by
twice the naive error plus one rounding step, so both choices are right if in float64 neither
token's logit is further below the best than such errors of the two logits together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tilewise.dispatch import use_backend
from tilewise.model.gpt import GPT

__all__ = ["GreedyAgreement", "greedy_tokens_agree"]


@dataclass(frozen=True)
class GreedyAgreement:
    """How two greedy continuations compare.

    Args:
        agrees: whether they are the same, or part at a near-tie.
        common: how many tokens they share.
        gap: where they part, how far below the best token's logit the less likely of the two
            tokens has its own, in float64.
        allowed: how far rounding can put it there.
    """

    agrees: bool
    common: int
    gap: float = 0.0
    allowed: float = 0.0

    def __bool__(self) -> bool:
        return self.agrees

    def __str__(self) -> str:
        if not self.allowed:
            return f"all {self.common} tokens are the same" if self.agrees else "lengths differ"
        verdict = "a near-tie" if self.agrees else "no near-tie"
        return (
            f"{self.common} tokens are the same, then {verdict}: a logit is {self.gap:.3g} below "
            f"the best, and rounding explains {self.allowed:.3g}"
        )


def greedy_tokens_agree(
    gpt: GPT, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> GreedyAgreement:
    """Compare two greedy continuations of a prompt by the agreement rule.

    Args:
        gpt: the model that both came from. It runs twice more, where they differ: naively in its
            own dtype and in float64.
        prompt: token ids.
        ours, theirs: the continuations, generated with temperature 0.

    Returns:
        The verdict, which is true where they agree.
    """
    common = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        common += 1
    if common == min(len(ours), len(theirs)):
        return GreedyAgreement(len(ours) == len(theirs), common)

    context = torch.tensor([[*prompt, *ours[:common]]], device=gpt.device)
    with torch.no_grad(), use_backend("naive"):
        naive = gpt(context)[0, -1]
        truth = copy.deepcopy(gpt).double()(context)[0, -1]
    step = torch.finfo(naive.dtype).eps * truth.abs().max()
    error = 2 * (naive - truth).abs().max() + step
    gap = float(truth.max() - torch.minimum(truth[ours[common]], truth[theirs[common]]))
    allowed = 2 * float(error)  # one logit too high by that much, the other too low
    return GreedyAgreement(gap <= allowed, common, gap, allowed)
