"""Counter-based random numbers: every number is a pure function of where it is used.

Philox4x32-10 maps a 128-bit counter and a 64-bit key to four 32-bit words by ten rounds of
multiplication. There is no state, so a draw depends on nothing that happens to share the batch.

Everything here is defined to the last bit, so that a kernel in any language draws the same numbers:
the words are integers, and the noise is made from them with +, -, x and / in float32, each rounded
to nearest even as IEEE 754 demands. A kernel must therefore not contract a product and a sum into
one FMA, and must use the correctly rounded division. A library's `log` would not do: its last bit
differs from one library to the next.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011
(doi:10.1145/2063384.2063405).
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_LN_2 = 0.693147182464599609375  # ln 2 rounded to float32

Words = tuple[torch.Tensor, ...]
"""32-bit unsigned words, each held in an int64 tensor."""


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """The four words that Philox4x32-10 gives for four counter words and two key words.

    Args:
        counter: four int64 tensors that broadcast, with values in [0, 2^32).
        key: two words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low word of a 64-bit product, by halves: int64 cannot hold all of it."""
    low = (word & 0xFFFF) * constant
    high = (word >> 16) * constant + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def gumbel_noise(
    seed: int, sample_ids: torch.Tensor, positions: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Standard Gumbel noise for every token that could come next.

    The key is the seed, low word first. Token i is word i % 4 of the counter
    (i // 4, position, sample_id mod 2^32, sample_id >> 32), positions taken mod 2^32.

    Args:
        seed: 64 bits.
        sample_ids, positions: (batch,) int64.
        vocabulary: number of tokens.

    Returns:
        (batch, vocabulary) float32, between -3.14 and 22.88.
    """
    blocks = torch.arange((vocabulary + 3) // 4, device=sample_ids.device)  # (blocks,)
    sample_ids, positions = sample_ids[:, None], positions[:, None]  # (batch, 1)
    counter = (blocks, positions & _MASK, sample_ids & _MASK, sample_ids >> 32 & _MASK)
    words = philox(counter, (seed & _MASK, seed >> 32 & _MASK))
    return gumbel(torch.stack(words, dim=-1).flatten(-2)[:, :vocabulary])


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """-log(-log(u)) in float32, where u = (word + 1/2) / 2^32.

    The noise is large where u is close to 1, and there float32 has no numbers left: rounding u
    would make unlikely tokens less likely still, which acts like a lower temperature (Zheng et
    al., 2024, arXiv:2409.02908). So the upper half of the words keeps 1 - u, which is exact enough
    however small it is.
    """
    is_upper = words >= 2**31
    tail = torch.where(is_upper, _MASK - words, words)  # of u or of 1 - u, the smaller one:
    tail = (2 * tail + 1).to(torch.float32) * 2.0**-33  # in (0, 1/2]
    mantissa, exponent = torch.frexp(tail)
    exponential = -_log(
        torch.where(is_upper, -tail, mantissa - 1), torch.where(is_upper, 0, exponent)
    )
    mantissa, exponent = torch.frexp(exponential)
    return -_log(mantissa - 1, exponent)


def _log(fraction: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """log((1 + fraction) * 2^exponent) for a fraction in [-1/2, 0].

    log(1 + d) = 2 atanh(s) with s = d / (2 + d), and atanh(s) = s + s^3/3 + s^5/5 + ...; as
    |s| <= 1/3, seven terms leave 2e-8. All of the noise is within 3 rounding steps at max(1, |it|).
    """
    s = fraction / (fraction + 2)
    square = s * s
    series = torch.full_like(s, 1 / 13)
    for divisor in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / divisor
    return exponent.to(torch.float32) * _LN_2 + (s + s) * series
