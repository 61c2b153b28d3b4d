"""The GPU of an estimate: by name, by its memory, or the one that is present."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

import torch

from autobatch._estimate.band import Guess
from autobatch._memory import MemoryReading, format_bytes, parse_bytes
from autobatch._memory.cuda import CudaProbe
from autobatch._memory.estimate.gpus import GPUS, gpu_of
from autobatch._memory.estimate.scratch import Gpu
from autobatch.errors import AutobatchError

# Outside of torch's allocator on an H200, with the modules of a training step: measured
_CONTEXT: Final = 808_255_488
_MEASURED: Final = "H200"
# Added to the band; not measured
_ANOTHER_GPU: Final = 0.01
_UNKNOWN_GPU: Final = 0.02
# Names of the variable in torch 2.13 and before
_SETTINGS: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True, slots=True)
class TargetGpu:
    """The GPU that memory is estimated for.

    Args:
        name: Its name for people.
        reading: Memory before training: what is used is the device context, and other processes.
        gpu: Properties for scratch memory.
        guesses: What was never compared with it.
    """

    name: str
    reading: MemoryReading
    gpu: Gpu
    guesses: tuple[Guess, ...] = ()


def target_gpu(device: str | int | None) -> TargetGpu:
    """Return the GPU; `ValueError` for an unknown one, `AutobatchError` for one not modelled."""
    _check_allocator()
    if device is None or (isinstance(device, str) and device.partition(":")[0] == "cuda"):
        return _present(device)
    known = {_letters(name): model for name, model in GPUS.items()}
    if isinstance(device, str) and (model := known.get(_letters(device))):
        guess = Guess(f"GPUs other than an {_MEASURED}", _ANOTHER_GPU)
        guesses = () if model.name == _MEASURED else (guess,)
        return TargetGpu(model.name, _unused(model.total), model.gpu, guesses)
    try:
        total = parse_bytes("device", device)
    except ValueError:
        raise ValueError(
            f"device={device!r} is not a known GPU; give one of {', '.join(GPUS)}, an amount of "
            "memory such as '24GiB', or None for the GPU that is present."
        ) from None
    guess = Guess("the type of the GPU, taken for an H100", _UNKNOWN_GPU)
    return TargetGpu(f"GPU of {format_bytes(total)}", _unused(total), Gpu(), (guess,))


def _letters(name: str) -> str:
    """Return a name without what is spelled in several ways: "RTX 4090", "rtx4090", "A100-40"."""
    letters = re.sub(r"[^A-Z0-9]", "", name.upper())
    return letters.removeprefix("NVIDIA").removeprefix("GEFORCE").removesuffix("GB")


def _unused(total: int) -> MemoryReading:
    return MemoryReading(total=total, used=_CONTEXT, reserved=0, peak=0, failures=0)


def _present(device: str | None) -> TargetGpu:
    if torch.version.hip is not None:
        raise AutobatchError(
            "estimate models NVIDIA GPUs, and this torch is built for ROCm; "
            "find the batch size on the GPU with autobatch.find."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r} is the GPU that is present, and torch sees none; name one of "
            f"{', '.join(GPUS)}, or give an amount of memory such as '24GiB'."
        )
    index = torch.device(device or "cuda").index
    probe = CudaProbe(index)
    properties = torch.cuda.get_device_properties(
        torch.cuda.current_device() if index is None else index
    )
    architecture = f"{properties.major}{properties.minor}"
    gpu = gpu_of(
        architecture,
        properties.multi_processor_count,
        properties.max_threads_per_multi_processor,
    )
    is_measured = _MEASURED in properties.name
    guesses = () if is_measured else (Guess(f"GPUs other than an {_MEASURED}", _ANOTHER_GPU),)
    return TargetGpu(probe.name, probe.read(), gpu, guesses)


def _check_allocator() -> None:
    for name in _SETTINGS:
        options = [each.strip() for each in os.environ.get(name, "").split(",") if each.strip()]
        changed = [each for each in options if each.lower() not in _AS_BY_DEFAULT]
        if changed:
            raise AutobatchError(
                f"estimate does not model {name}={os.environ[name]}; unset it, or find the batch "
                "size on the GPU with autobatch.find."
            )


_AS_BY_DEFAULT: Final = ("expandable_segments:false", "backend:native")
