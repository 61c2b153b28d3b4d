"""GPUs by name: memory, and the properties that scratch memory depends on.

Threads of a multiprocessor are in the CUDA C++ Programming Guide, in the table of technical
specifications per compute capability. Memory is what CUDA reports as the total, less than on the
box; it differs by up to 1 % between drivers.
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
    source: str  # origin of memory and multiprocessors

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
_SHEET: Final = "multiprocessors from NVIDIA's data sheet"

# fmt: off
_MODELS: Final = (
    GpuModel("H200", 150_109_880_320, 132, "90", f"{_PROPERTIES}, measured"),
    GpuModel("H100", 81_082 * MIB, 132, "90", f"{_PROPERTIES} of an H100 80GB HBM3"),
    GpuModel("A100-80GB", 81_049 * MIB, 108, "80", "mixbench-cuda (ekondis/mixbench, issue 47)"),
    GpuModel("A100-40GB", 40_339 * MIB, 108, "80",
             "deviceQuery (bottlerocket-os/bottlerocket, pull request 3873)"),
    GpuModel("A10", 22_587 * MIB, 72, "86", f"{_PROPERTIES} of an A10G; {_SHEET}"),
    GpuModel("L4", 22_491 * MIB, 58, "89",
             "deviceQuery (bottlerocket-os/bottlerocket-kernel-kit, pull request 139)"),
    GpuModel("L40S", 45_455 * MIB, 142, "89", f"{_MESSAGE}: 44.39 GiB; {_PROPERTIES}"),
    GpuModel("V100", 16_130 * MIB, 80, "70", f"{_PROPERTIES} of a V100-SXM2-16GB"),
    GpuModel("T4", 15_095 * MIB, 40, "75", f"{_PROPERTIES} on Colab"),
    GpuModel("RTX 3090", 24_258 * MIB, 82, "86",
             f"{_MESSAGE}: 23.69 GiB (ucwxb/GraphAvatar, issue 4); {_SHEET}"),
    GpuModel("RTX 4090", 24_207 * MIB, 128, "89",
             f"{_MESSAGE}: 23.64 GiB (3DTopia/Phidias-Diffusion, issue 8); 128 multiprocessors in "
             "pc2/GPUInspector.jl, issue 11"),
    GpuModel("RTX 5090", 32_117 * MIB, 170, "120",
             "deviceQuery (aikitoria/open-gpu-kernel-modules, issue 1)"),
)
# fmt: on
GPUS: Final = {gpu.name: gpu for gpu in _MODELS}
