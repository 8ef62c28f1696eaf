"""Which device and dtype a run computes with, and how much memory is free there."""

import psutil
import torch

from pipeline.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(asked: str) -> torch.device:
    """Return the device asked for, or for `auto` the accelerator if there is one, else the CPU."""
    if asked == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"compute.device: {asked!r} cannot be used here ({str(error).splitlines()[0]}); use auto, or cpu"
        ) from None
    return device


def choose_dtype(asked: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype asked for, or for `auto` the stored one on an accelerator and float32 on a CPU."""
    if asked != "auto":
        return DTYPES[asked]
    return torch.float32 if device.type == "cpu" else stored


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be had where blocks run: of the accelerator, or of the host for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def total_bytes(device: torch.device) -> int:
    """Return the memory there is where blocks run: of the accelerator, or of the host for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def empty_cache(device: torch.device) -> None:
    """Give back device memory that torch keeps for later; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
