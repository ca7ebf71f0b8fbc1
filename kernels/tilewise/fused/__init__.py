"""Fused small operations: norms, rotary embedding, gated activations, sampling.

Each is bound by memory: what fusing saves is a trip of the activations to memory and back.
"""

from tilewise.fused.activation import geglu, swiglu
from tilewise.fused.norm import layer_norm, rms_norm
from tilewise.fused.rotary import rotary_embedding
from tilewise.fused.sampling import sample
from tilewise.fused.tables import (
    LinearScaling,
    Llama3Scaling,
    RotaryScaling,
    RotaryTables,
    rotary_tables,
)

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "RotaryScaling",
    "RotaryTables",
    "geglu",
    "layer_norm",
    "rms_norm",
    "rotary_embedding",
    "rotary_tables",
    "sample",
    "swiglu",
]
