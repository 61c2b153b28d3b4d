"""GPUs by name: memory, and the properties that scratch memory depends on.

Multiprocessors are those of NVIDIA's data sheets. Threads of one are in the CUDA C++ Programming
Guide, in the table of technical specifications per compute capability. Memory is what CUDA reports
as the total, less than on the box; it differs by up to 1 % between drivers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from autobatch._memory.estimate.allocator import MIB
from autobatch._memory.estimate.scratch import Gpu

# By compute capability; sm_90 and sm_100 have cuDNN's attention in torch, sm_80 and later flash
_THREADS: Final = {
    "70": 2048, "75": 1024, "80": 2048, "86": 1536, "89": 1536, "90": 2048, "120": 1536,
}  # fmt: skip
_WITH_CUDNN_ATTENTION: Final = ("90", "100")
_WITHOUT_FLASH_ATTENTION: Final = ("70", "75")
_SMALL_WORKSPACE: Final = 4096 * 1024 * 2 + 16 * 1024 * 8  # cuBLAS's, but for sm_90 and sm_100


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU that can be bought or rented."""

    name: str
    total: int  # memory that CUDA reports, in bytes
    multiprocessors: int
    architecture: str  # compute capability, "90"
    source: str  # origin of the memory in this table

    @property
    def gpu(self) -> Gpu:
        """Properties for scratch memory."""
        threads = _THREADS[self.architecture]
        return gpu_of(self.architecture, self.multiprocessors, threads, has_new_cudnn=True)


def gpu_of(architecture: str, multiprocessors: int, threads: int, *, has_new_cudnn: bool) -> Gpu:
    """Return the properties of a compute capability; those of cuDNN from 9.15 on are new."""
    has_cudnn_attention = architecture in _WITH_CUDNN_ATTENTION
    return Gpu(
        multiprocessors=multiprocessors,
        threads=threads,
        has_cudnn_attention=has_cudnn_attention and has_new_cudnn,
        has_flash_attention=architecture not in _WITHOUT_FLASH_ATTENTION,
        cublas_workspace=32 * MIB if has_cudnn_attention else _SMALL_WORKSPACE,
    )


_MESSAGE: Final = "total capacity in torch's out-of-memory message"
_PROPERTIES: Final = "torch.cuda.get_device_properties"

GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        GpuModel("H200", 150_109_880_320, 132, "90", f"{_PROPERTIES}, measured"),
        GpuModel("H100", 81_080 * MIB, 132, "90", f"{_MESSAGE}: 79.18 GiB; the SXM version"),
        GpuModel("A100-80GB", 81_050 * MIB, 108, "80", f"{_MESSAGE}: 79.15 GiB"),
        GpuModel("A100-40GB", 40_448 * MIB, 108, "80", f"{_MESSAGE}: 39.50 GiB"),
        GpuModel("A10", 22_587 * MIB, 72, "86", f"{_PROPERTIES}: 22587 MB, of an A10G"),
        GpuModel("L4", 22_558 * MIB, 58, "89", f"{_MESSAGE}: 22.03 GiB"),
        GpuModel("L40S", 45_455 * MIB, 142, "89", f"{_MESSAGE}: 44.39 GiB"),
        GpuModel("V100", 16_130 * MIB, 80, "70", f"{_PROPERTIES}: 16130 MB, of 16 GB"),
        GpuModel("T4", 15_095 * MIB, 40, "75", f"{_PROPERTIES}: 15095 MB"),
        GpuModel("RTX 3090", 24_258 * MIB, 82, "86", f"{_MESSAGE}: 23.69 GiB"),
        GpuModel("RTX 4090", 24_207 * MIB, 128, "89", f"{_MESSAGE}: 23.64 GiB"),
        GpuModel("RTX 5090", 32_113 * MIB, 170, "120", f"{_MESSAGE}: 31.36 GiB"),
    )
}
