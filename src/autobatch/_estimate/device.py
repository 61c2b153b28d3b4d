"""The GPU of an estimate: by name, by its memory, or the one that is present."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import torch

from autobatch._estimate.band import Guess
from autobatch._memory import MemoryReading, format_bytes, parse_bytes
from autobatch._memory.cuda import CudaProbe, check_allocator
from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.gpus import GPUS
from autobatch._memory.estimate.scratch import Gpu
from autobatch.errors import AutobatchError

# Outside of torch's allocator on an H200, with the modules of a training step: measured
_CONTEXT: Final = 808_255_488
_CONTEXT_ERROR: Final = 300 * 2**20  # on another GPU; not measured
_MEASURED: Final = "H200"
# Added to the band; not measured
_ANOTHER: Final = Guess(f"GPUs other than an {_MEASURED}", 0.01)
_UNKNOWN: Final = Guess("a GPU of unknown type, taken for an H100", 0.02)


@dataclass(frozen=True, slots=True)
class TargetGpu:
    """The GPU that memory is estimated for."""

    name: str  # its name for people
    # Memory before training: what is used is the device context, and other processes
    reading: MemoryReading
    gpu: Gpu  # properties for scratch memory
    guesses: tuple[Guess, ...] = ()  # what was never compared with it
    guesses_of_context: tuple[Guess, ...] = ()  # of its context, which no peak shows


def target_gpu(device: str | int | None) -> TargetGpu:
    """Return the GPU; `ValueError` for an unknown one, `AutobatchError` for one not modelled."""
    try:
        return _target_gpu(device)
    except UntraceableError as error:
        raise AutobatchError(
            f"Memory on this GPU cannot be estimated: {error}; find the batch size on it with "
            "autobatch.find."
        ) from None


def _target_gpu(device: str | int | None) -> TargetGpu:
    check_allocator()
    if device is None or (isinstance(device, str) and device.partition(":")[0] == "cuda"):
        return _present(device)
    known = {_letters(name): model for name, model in GPUS.items()}
    if isinstance(device, str) and (model := known.get(_letters(device))):
        if model.name == _MEASURED:
            return TargetGpu(model.name, _unused(model.total), model.gpu)
        return _guessed(model.name, model.total, model.gpu, _ANOTHER)
    try:
        total = parse_bytes("device", device)
    except ValueError:
        raise ValueError(
            f"device={device!r} is not a known GPU; give one of {', '.join(GPUS)}, an amount of "
            "memory such as '24GiB', or None for the GPU that is present."
        ) from None
    if total <= _CONTEXT:
        raise ValueError(
            f"device={device!r} is a GPU of {format_bytes(total)}, less than CUDA itself takes; give "
            "its memory as text such as '24GiB', or 'cuda:0' for the first one that is present."
        )
    return _guessed(f"GPU of {format_bytes(total)}", total, Gpu(), _UNKNOWN)


def _letters(name: str) -> str:
    """Return a name without what is spelled in several ways: "RTX 4090", "rtx4090", "A100-40"."""
    letters = re.sub(r"[^A-Z0-9]", "", name.upper())
    return letters.removeprefix("NVIDIA").removeprefix("GEFORCE").removesuffix("GB")


def _unused(total: int) -> MemoryReading:
    return MemoryReading(total=total, used=_CONTEXT, reserved=0, peak=0, failures=0)


def _present(device: str | None) -> TargetGpu:
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r} is the GPU that is present, and torch sees none; name one of "
            f"{', '.join(GPUS)}, or give an amount of memory such as '24GiB'."
        )
    probe = CudaProbe(torch.device(device or "cuda").index)
    guesses = () if _MEASURED in probe.name else (_ANOTHER,)
    return TargetGpu(probe.name, probe.read(), probe.gpu(), guesses)


def _guessed(name: str, total: int, gpu: Gpu, guess: Guess) -> TargetGpu:
    context = f"a CUDA context as large as on an {_MEASURED}"
    of_context = Guess(context, _CONTEXT_ERROR / total)
    return TargetGpu(name, _unused(total), gpu, (guess,), (of_context,))
