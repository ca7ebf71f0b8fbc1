"""tilewise: attention, quantized matmul and a paged KV cache beside the PyTorch that defines them.

The public names are here; `tilewise.model` (the reference GPT), `tilewise.testing` (the agreement
rule) and `tilewise.integrations` are imported by name.
"""

from tilewise.dispatch import (
    BACKENDS,
    BackendError,
    Explanation,
    explain,
    use_backend,
)
from tilewise.fused import rms_norm

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "BackendError",
    "Explanation",
    "explain",
    "rms_norm",
    "use_backend",
]
