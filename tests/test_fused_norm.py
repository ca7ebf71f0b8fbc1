"""The norms: bad input is named, and a residual is what the next layer gets."""

import pytest
import torch

import tilewise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x: must be a torch.Tensor, got list"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x: dtype must be float32 or float16 or"),
        ({"weight": torch.ones(7)}, r"weight: shape must be \(8,\)"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, "weight: dtype must be x's, float32"),
        ({"residual": torch.ones(3, 8)}, r"residual: shape must be \(2, 8\)"),
    ],
)
def test_rms_norm_names_the_bad_argument(change, message):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        tilewise.rms_norm(**arguments)
