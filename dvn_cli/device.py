"""Which device a command computes on, and what it is called."""

import contextlib
import platform
from pathlib import Path

import torch

from dvn_cli import processes
from dvn_cli.errors import InputError
from dvn_cli.files import reason


def choose(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU; otherwise a device by torch's name.

    Raises:
        InputError: there is no such device here.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name in ("auto", "cuda") and available["cuda"] and processes.local_rank() >= torch.cuda.device_count():
        raise InputError(f"there are more processes than the {torch.cuda.device_count()} GPUs of this machine")
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    kind = name.partition(":")[0]
    if kind not in available:
        raise InputError(f"unknown device '{name}': give auto, cpu, cuda or mps")
    if not available[kind]:
        raise InputError(f"there is no device '{name}' here: give {', '.join(k for k, v in available.items() if v)}")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError:
        raise InputError(f"there is no device '{name}' here") from None


def memory_format(name: str, device: torch.device) -> torch.memory_format:
    """How images lie in memory, and all that is computed of them: `channels_last`, `contiguous`, or `auto`.

    `auto` asks no clock, so that equal runs compute alike.
    """
    if name == "auto":
        name = "contiguous" if device.type == "mps" else "channels_last"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def check_compiler(device: torch.device) -> None:
    """Raises InputError unless torch.compile works for the device, for which it wants compilers of the machine's."""
    try:
        torch.compile(lambda values: 2 * values + 1)(torch.ones(3, device=device))
    except Exception as error:  # whatever its parts raise
        raise InputError(f"torch.compile does not work here, leave out compile: {reason(error)}") from error


def title(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
