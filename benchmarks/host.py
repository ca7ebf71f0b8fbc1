"""What is written beside every result: the machine, its versions and its measured ceilings."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

import tilewise
from tilewise import machine, native


def devices() -> tuple[str, ...]:
    """The devices that PyTorch can use here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def versions() -> dict[str, str]:
    """The versions that decide how fast and how exact a result is."""
    found = {
        "tilewise": tilewise.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
    }
    optional = {"triton": native.triton().value, "cuda": torch.version.cuda}
    return found | {name: value for name, value in optional.items() if value}


def host(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine that a result belongs to, ready for JSON.

    The first call on a device measures its ceilings, which takes a second or two.
    """
    measured = machine.ceilings(device)
    return {
        "processor": machine.processor(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": measured.threads,
        "instruction_set": native.instruction_set().name,
        "gpu": native.gpu().value,
        "versions": versions(),
        "ceilings": {
            "device": measured.device,
            "read_bandwidth": {str(size): rate for size, rate in measured.read_bandwidth.items()},
            "flops": dict(measured.flops),
        },
    }


def ceilings_of(host: dict[str, Any]) -> machine.Ceilings:
    """The ceilings of a `host` that has been through JSON."""
    ceilings = host["ceilings"]
    return machine.Ceilings(
        device=ceilings["device"],
        threads=host["threads"],
        read_bandwidth={int(size): rate for size, rate in ceilings["read_bandwidth"].items()},
        flops=ceilings["flops"],
    )
