"""What is written beside every result: the machine, its versions and its measured ceilings."""

from __future__ import annotations

import os
import platform
import subprocess
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


_STATE = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
"""What nvidia-smi is asked for; `nvidia-smi --help-query-gpu` explains each."""


def gpu_state(device: torch.device | str) -> dict[str, str]:
    """The driver, and the clocks, power and temperature of an NVIDIA GPU at work; {} without one.

    A GPU that is idle lowers its clocks, so it multiplies matrices while it is asked.
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None:
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(_PRODUCTS):
        a @ a
    state = nvidia_smi(str(torch.cuda.get_device_properties(index).uuid))
    torch.cuda.synchronize(device)
    return state


_PRODUCTS = 300  # half a second on an H100


def nvidia_smi(uuid: str) -> dict[str, str]:
    """The state of the GPU with this UUID; {} where nvidia-smi cannot tell."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader"]
    if not uuid.startswith(("GPU-", "MIG-")):
        uuid = f"GPU-{uuid}"
    try:
        done = subprocess.run(
            [*command, f"--id={uuid}"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_STATE, values, strict=True)) if len(values) == len(_STATE) else {}


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
        "gpu_state": gpu_state(device),
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
