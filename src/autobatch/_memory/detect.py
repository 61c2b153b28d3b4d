"""Choose the memory probe for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autobatch._memory import PROBE_REMEDY
from autobatch._memory.cuda import CudaProbe
from autobatch._memory.host import HostProbe
from autobatch.errors import ProbeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._memory import MemoryProbe

# Back ends by torch's device type; a new one is a class and an entry here
_PROBES: dict[str, Callable[[int | None], MemoryProbe]] = {
    "cpu": lambda _index: HostProbe(),
    "cuda": CudaProbe,
}


def detect(device: str | torch.device | MemoryProbe | None, default: torch.device) -> MemoryProbe:
    """Return the probe for a device, or the probe itself if one is passed.

    Raises:
        ValueError: The device does not exist.
        ProbeError: There is no back end for the device, or its memory cannot be read.
    """
    visible = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    sees = f"this process sees {', '.join(visible)}."
    if device is None:
        device = default
    elif isinstance(device, str):
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device={device!r} is not the name of a device; {sees}") from error
    elif not isinstance(device, torch.device):
        if isinstance(device, type) or not hasattr(device, "limited"):
            raise ValueError(
                f"device={device!r} is neither a MemoryProbe nor the name of a device; {sees}"
            )
        return device
    if device.type not in _PROBES:
        raise ProbeError(
            f"autobatch cannot read the memory of device={str(device)!r}, "
            f"only of {' and '.join(_PROBES)}. {PROBE_REMEDY}"
        )
    if not {device.type, f"{device.type}:{device.index or 0}"}.intersection(visible):
        raise ValueError(f"device={str(device)!r} does not exist; {sees}")
    return _PROBES[device.type](device.index)
