"""The random numbers of `sample`, which every backend must draw to the last bit."""

import math

import numpy as np
import pytest
import torch

from tilewise.fused.philox import gumbel, gumbel_noise, philox
from tilewise.testing import assert_agrees

MASK = 2**32 - 1


def _python_philox(counter, key):
    """Philox4x32-10 over Python integers, which cannot overflow."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & MASK, p0 >> 32 ^ c[3] ^ k[1], p0 & MASK]
        k = [k[0] + 0x9E3779B9 & MASK, k[1] + 0xBB67AE85 & MASK]
    return c


def _numpy_log(fraction, exponent):
    one, two = np.float32(1), np.float32(2)
    s = fraction / (fraction + two)
    square = s * s
    series = one / np.float32(13)
    for divisor in (11, 9, 7, 5, 3, 1):
        series = series * square + one / np.float32(divisor)
    return exponent.astype(np.float32) * np.float32(math.log(2)) + (s + s) * series


def _numpy_gumbel(words):
    """The steps of the mapping, each one rounded to float32 by numpy."""
    is_upper = words >= 2**31
    tail = np.where(is_upper, MASK - words, words)
    tail = (2 * tail + 1).astype(np.float32) * np.float32(2.0**-33)
    mantissa, exponent = np.frexp(tail)
    fraction = np.where(is_upper, -tail, mantissa - np.float32(1))
    exponential = -_numpy_log(fraction, np.where(is_upper, 0, exponent))
    mantissa, exponent = np.frexp(exponential)
    return -_numpy_log(mantissa - np.float32(1), exponent)


def _some_words():
    edges = [0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, MASK - 1, MASK]
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.tensor(edges), torch.randint(0, 2**32, (20_000,), generator=generator)])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    """The known-answer vectors of Random123."""
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert [int(word) for word in words] == expected
    assert _python_philox(counter, key) == expected


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3, 2**63 - 1, -1])
def test_every_token_has_its_own_counter(seed):
    sample_ids = torch.tensor([0, 3, 2**35 + 1, -2])
    positions = torch.tensor([0, 70_000, 2**33 + 9, 1])
    noise = gumbel_noise(seed, sample_ids, positions, 10)
    assert noise.dtype == torch.float32
    for row, (sample_id, position) in enumerate(zip(sample_ids, positions, strict=True)):
        for token in range(10):
            sample = int(sample_id) % 2**64
            counter = [token // 4, int(position) % 2**32, sample % 2**32, sample >> 32]
            key = [seed % 2**32, seed % 2**64 >> 32]
            word = _python_philox(counter, key)[token % 4]
            assert noise[row, token] == gumbel(torch.tensor([word]))


def test_noise_is_defined_to_the_last_bit():
    words = _some_words()
    assert np.array_equal(gumbel(words).numpy(), _numpy_gumbel(words.numpy()))


@pytest.mark.parametrize(
    ("word", "noise"),
    [
        (0, "-0x1.90a3aa0000000p+1"),
        (2**31 - 1, "0x1.774f280000000p-2"),
        (2**31, "0x1.774f280000000p-2"),
        (MASK, "0x1.6dfb520000000p+4"),
        (0xD16CFE09, "0x1.9afbd40000000p+0"),
    ],
)
def test_noise_has_these_very_bits(word, noise):
    assert float(gumbel(torch.tensor([word]))).hex() == noise


def test_noise_is_the_double_logarithm():
    words = _some_words()
    upper = words >= 2**31
    u = (words.double() + 0.5) / 2**32
    one_minus_u = (2.0**32 - words.double() - 0.5) / 2**32
    exponential = torch.where(upper, -torch.log1p(-one_minus_u), -u.log())
    truth = -exponential.log()
    # Where the noise crosses 0, log(2) and the series cancel: an error of some steps at 1 remains.
    assert_agrees(gumbel(words)[:, None], truth.float()[:, None], truth[:, None], floor=3.0)


def test_noise_reaches_far_enough_for_unlikely_tokens():
    """A float32 uniform ends at 1 - 2^-24, its noise at 16.6: tokens of 1e-7 would die out."""
    noise = gumbel(torch.arange(MASK - 4, MASK + 1))
    assert noise.isfinite().all()
    assert (noise.diff() > 0).all()
    assert noise[-1] > 22.8
    assert gumbel(torch.tensor([0])).isfinite()
