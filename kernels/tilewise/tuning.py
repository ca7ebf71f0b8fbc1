"""Launch configurations that were measured on this very GPU, in place of those that ship.

`tilewise bench --tune` writes them to `<cache folder>/tuned/<GPU>.json`, beside the C++ libraries
(`tilewise.build.cache_folder`), and every later process reads that file at its first launch. So
nothing is ever tuned by a call: the first one takes no longer than the next, and a CUDA graph can
capture it. Versions other than those that were measured use what ships.

A configuration decides how a sum is split, and with it the last bits: they may differ from one GPU
to the next, but not from call to call.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import tilewise
from tilewise import build, native

Configuration = TypeVar("Configuration", bound=NamedTuple)
"""Integers by name, `num_warps` and `num_stages` among them."""


class Asked(NamedTuple):
    """What a kernel asks for: its configuration as it ships, and the sizes that may vary."""

    default: Any
    sizes: Mapping[str, int]


_trial: tuple[Mapping[str, Any], dict[str, Asked]] | None = None


def chosen(
    x: torch.Tensor, name: str, default: Configuration, sizes: Mapping[str, int]
) -> Configuration:
    """The configuration to launch with.

    Args:
        x: decides the GPU.
        name: of the kernel and of all that its configuration depends on.
        default: the one that ships.
        sizes: those of its fields that may be halved, down to so much, or doubled.
    """
    if _trial is not None:
        tried, asked = _trial
        asked[name] = Asked(default, sizes)
        found = tried.get(name)
    elif x.device.type == "cuda":
        found = _table(x.device.index or 0).get(name)
    else:
        found = None
    return default if found is None else default._replace(**found)  # type: ignore[attr-defined]


@contextmanager
def trying(configurations: Mapping[str, Mapping[str, int]]) -> Iterator[dict[str, Asked]]:
    """Within the block these configurations are used, and no table.

    Yields what the calls in the block ask for, by name.
    """
    global _trial
    before = _trial
    _trial = (configurations, {})
    try:
        yield _trial[1]
    finally:
        _trial = before


# --- the file -------------------------------------------------------------------------------------


def path_for(gpu: str) -> Path:
    """Where the configurations for a GPU of this name are kept."""
    return build.cache_folder() / "tuned" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"


def versions() -> dict[str, str | None]:
    """What a configuration was measured with, and what else it may not be used with."""
    return {"tilewise": tilewise.__version__, "triton": native.triton().value}


def read(gpu: str) -> dict[str, dict[str, int]]:
    """The configurations for a GPU by name; empty where none were measured with these versions.

    Raises:
        ValueError: if the file is damaged.
    """
    path = path_for(gpu)
    try:
        data = json.loads(path.read_text())
        configurations: dict[str, dict[str, int]] = data["configurations"]
        return configurations if data["versions"] == versions() else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: holds no configurations; delete it, or tune again") from None


def save(gpu: str, configurations: Mapping[str, Mapping[str, int]]) -> Path:
    """Add configurations to those for a GPU, for this process and those that follow."""
    path = path_for(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"gpu": gpu, "versions": versions(), "configurations": read(gpu) | dict(configurations)}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(data, indent=1) + "\n")
    os.replace(file.name, path)
    _table.cache_clear()
    return path


@functools.cache
def _table(index: int) -> dict[str, dict[str, int]]:
    return read(torch.cuda.get_device_name(index))
