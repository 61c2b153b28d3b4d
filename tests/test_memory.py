from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import autobatch
from autobatch import MemoryReading
from autobatch._memory import format_bytes, memory_budget
from autobatch._memory.oom import is_oom
from autobatch.testing import PaperDevice

GIB = 2**30


def budget(memory_limit, total="16TiB", others=0):
    """Return the budget of a search on a device of which other processes hold a part."""
    device = PaperDevice(total, foreign=others)
    search = {"max_micro_batch_size": 1, "verbose": False}
    report = autobatch.find(device.workload, device=device, memory_limit=memory_limit, **search)
    return report.budget


# Limits


@pytest.mark.parametrize("share", [1e-9, 0.5, 0.9, 1.0])
def test_a_float_up_to_one_is_a_share(share):
    assert budget(share) == int(share * 16 * 2**40)


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (101, 101),
        (8 * GIB, 8 * GIB),
        ("10GiB", 10 * GIB),
        ("512 MB", 512 * 10**6),
        ("1.5 GiB", 3 * GIB // 2),
        ("0.1GB", 10**8),
        ("3 tib", 3 * 2**40),
        ("4 TB", 4 * 10**12),
        ("16 KIB", 16 * 1024),
        ("7kb", 7000),
        ("12B", 12),
        (" 2 MiB ", 2 * 2**20),
    ],
)
def test_integers_and_text_are_bytes(value, nbytes):
    assert budget(value) == nbytes
    assert PaperDevice(value).capacity == nbytes


@pytest.mark.parametrize(
    "value",
    [
        *(
            0,
            -1,
            -GIB,
            0.0,
            -0.5,
            1.0000001,
            12.0,
            float("nan"),
            float("inf"),
            -float("inf"),
        ),
        *(True, False, None, [1], (0.9,), 0.5j),
        *(
            "",
            "GiB",
            "0 GiB",
            "-1 GiB",
            "0.9",
            "90%",
            "1e3 MiB",
            "10 XiB",
            "10 iB",
            "10  GiB",
            "1,5 GiB",
            "inf GiB",
        ),
    ],
)
def test_a_bad_limit_is_refused_in_one_sentence(value):
    with pytest.raises(
        ValueError,
        match=r"^memory_limit=.* must be a share .*, a whole number .* or text",
    ) as caught:
        budget(value)

    message = str(caught.value)
    assert repr(value) in message
    assert message.endswith(".")
    assert ". " not in message


@pytest.mark.parametrize(("value", "limit"), [(np.float32(0.5), 0.5), (np.int64(4096), 4096)])
def test_numpy_scalars_are_accepted(value, limit):
    assert budget(value, total=10_000) == (limit if limit > 1 else limit * 10_000)


@pytest.mark.parametrize(("value", "share"), [(1, "1.0 for 100%"), (90, "0.9 for 90%")])
def test_a_limit_that_could_be_bytes_or_a_share_is_refused(value, share):
    with pytest.raises(
        ValueError,
        match=rf"^memory_limit={value} could mean bytes or a share of the device; write {share} of",
    ):
        budget(value)


@pytest.mark.parametrize("value", [0, -5, True, 0.5, 2.0, None, "0B", "many"])
def test_a_bad_amount_is_refused_and_the_parameter_named(value):
    with pytest.raises(
        ValueError,
        match=r"^capacity=.* must be a whole number of bytes above 0, or text such as",
    ):
        PaperDevice(value)


# Amounts for people


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (12, "12 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (64 * 1024, "64 KiB"),
        (512 * 2**20, "512 MiB"),
        (1000 * 2**20, "1000 MiB"),
        (GIB - 1, "1 GiB"),
        (8160437862, "7.6 GiB"),
        (81559 * 2**20, "79.6 GiB"),
        (int(99.97 * GIB), "100 GiB"),
        (2**40, "1 TiB"),
        (3000 * 2**40, "3000 TiB"),
        (-GIB * 3 // 2, "-1.5 GiB"),
    ],
)
def test_bytes_are_formatted_in_binary_units(nbytes, text):
    assert format_bytes(nbytes) == text


@given(st.integers(min_value=1, max_value=2**50))
@example(GIB - 2**18)
def test_formatted_bytes_can_be_parsed(nbytes):
    assert PaperDevice(format_bytes(nbytes)).capacity == pytest.approx(nbytes, rel=0.05)


# Budgets


def reading(*, total: int, used: int, reserved: int) -> MemoryReading:
    return MemoryReading(total=total, used=used, reserved=reserved, peak=reserved, failures=0)


def test_a_share_refers_to_the_device_minus_other_processes():
    assert budget(0.9, total=1000, others=200) == 700


def test_an_amount_is_limited_by_other_processes():
    assert budget(500, total=1000, others=200) == 500
    assert budget(500, total=1000, others=800) == 200


@pytest.mark.parametrize(("cap", "expected"), [(None, 700), (900, 700), (400, 400)])
def test_a_budget_is_at_most_the_users_cap(cap, expected):
    capped = MemoryReading(total=1000, used=300, reserved=100, peak=0, failures=0, cap=cap)

    assert memory_budget(capped, 0.9) == expected
    assert memory_budget(capped, 10_000) == min(800, cap or 800)


def test_a_budget_may_be_negative():
    assert memory_budget(reading(total=1000, used=950, reserved=0), 0.5) == -450
    assert memory_budget(reading(total=1000, used=1100, reserved=0), 500) == -100


sizes = st.integers(min_value=0, max_value=2**45)


@given(sizes, sizes, sizes, st.floats(0.001, 1.0) | st.integers(2, 2**45))
def test_the_budget_leaves_room_for_other_processes(total, used, reserved, limit):
    seen = reading(total=total, used=used, reserved=reserved)

    assert memory_budget(seen, limit) + seen.foreign <= total


# Out of memory, or not


def raised(error, *, inside=None, cause=None):
    """Return an exception raised while another was handled, or because of it."""
    try:
        if inside is not None:
            try:
                raise inside
            except BaseException:
                raise error  # noqa: B904 -- the implicit context is the point
        if cause is not None:
            raise error from cause
        raise error
    except BaseException as caught:
        return caught


def in_a_circle(first, second):
    first.__context__, second.__context__ = second, first
    return first


CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"
)
ASSERT = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
)
SHAPES = "mat1 and mat2 shapes cannot be multiplied (8x5 and 6x7)"


class NcclError(RuntimeError):
    """Stand-in for torch.distributed.DistBackendError, which CPU builds may lack."""


class OutOfResources(Exception):  # noqa: N818 -- Triton's name
    """Stand-in for triton.runtime.errors.OutOfResources."""


def oom() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(CUDA_OOM)


TOO_LARGE = {
    "torch's own type": torch.OutOfMemoryError("whatever it says"),
    "its old name": torch.cuda.OutOfMemoryError("whatever it says"),
    "host, from Python": MemoryError(),
    "cuda": RuntimeError(CUDA_OOM),
    "cuda driver": RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    "hip": RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
    "xpu": RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."),
    "mps": RuntimeError(
        "MPS backend out of memory (MPS allocated: 17.88 GB, max allowed: 18.13 GB)."
    ),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "nccl": NcclError(
        "NCCL error in: NCCLUtils.hpp:275, unhandled cuda error\nCuda failure 2 'out of memory'"
    ),
    "nccl, buffers": NcclError(
        "NCCL error in: NCCLUtils.hpp:77\nLast error:\nFailed to CUDA calloc async 608 bytes"
    ),
    "cublas": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cudnn, allocation": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn, handle": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "cudnn, workspace": RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
    ),
    "cudnn 8": RuntimeError("GET was unable to find an engine to execute this computation"),
    "cudnn 8, searching": RuntimeError(
        "FIND was unable to find an engine to execute this computation"
    ),
    "cudnn 7": RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    "host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "host, Windows": RuntimeError(
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    ),
    "host, from C++": RuntimeError("std::bad_alloc"),
    "onednn": RuntimeError("could not create a primitive"),
    "indices": RuntimeError("input tensor must fit into 32-bit index math"),
    "indices, convolution": RuntimeError(
        "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false."
    ),
    "indices, nonzero": RuntimeError(
        "nonzero is not supported for tensors with more than INT_MAX elements"
    ),
    "two arguments": RuntimeError(
        "Caught OutOfMemoryError in replica 0 on device 0.", "Original Traceback"
    ),
    "DataParallel": torch.OutOfMemoryError(
        f"Caught OutOfMemoryError in replica 0 on device 0.\n{CUDA_OOM}"
    ),
    "because of": raised(ValueError("step failed"), cause=oom()),
    "because of because of": raised(
        KeyError("x"), cause=raised(ValueError("step failed"), cause=oom())
    ),
    "while handling": raised(ValueError("step failed"), inside=oom()),
    "in a group": ExceptionGroup("ranks", [ValueError("other"), ExceptionGroup("inner", [oom()])]),
    "because of a group": raised(ValueError("step failed"), cause=ExceptionGroup("ranks", [oom()])),
    "in a circle": in_a_circle(ValueError("a"), oom()),
}

SOMETHING_ELSE = {
    "device-side assert": RuntimeError(ASSERT),
    "illegal access": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "shapes": RuntimeError(SHAPES),
    "shared memory": OutOfResources(
        "out of resource: shared memory, Required: 131072, Hardware limit: 101376."
    ),
    "shared memory, compiled": RuntimeError(
        "No valid triton configs. OutOfMemoryError: out of resource: triton_mm"
    ),
    "onednn, shapes": RuntimeError(
        "could not create a primitive descriptor for a matmul primitive"
    ),
    "shared memory of workers": RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. Out of shm."
    ),
    "not torch": ValueError("the log says: CUDA out of memory"),
    "a key": KeyError("out of memory"),
    "a bug in the handler": raised(KeyError("exp_avg_sq"), inside=oom()),
    "no memory at all": RuntimeError(),
    "interrupt": KeyboardInterrupt(CUDA_OOM),
    "interrupt while handling": raised(KeyboardInterrupt(), inside=oom()),
    "exit because of": raised(SystemExit(1), cause=oom()),
    "interrupt in a group": BaseExceptionGroup("ranks", [KeyboardInterrupt(), ValueError("other")]),
    "context denied": raised(
        raised(ValueError("bad value"), cause=ValueError("reason")), inside=oom()
    ),
    "in a circle": in_a_circle(ValueError("a"), ValueError("b")),
}


@pytest.mark.parametrize("error", TOO_LARGE.values(), ids=TOO_LARGE)
def test_out_of_memory_is_recognised_in_all_its_forms(error):
    assert is_oom(error)


@pytest.mark.parametrize("error", SOMETHING_ELSE.values(), ids=SOMETHING_ELSE)
def test_other_errors_are_not_out_of_memory(error):
    assert not is_oom(error)


def test_a_suppressed_context_is_ignored():
    try:
        try:
            raise oom()
        except RuntimeError:
            raise ValueError("batch too large, says the user") from None
    except ValueError as caught:
        error = caught

    assert not is_oom(error)


def test_a_real_allocation_error_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)

    assert is_oom(caught.value)


def test_is_oom_does_not_import_torch():
    code = (
        "import sys; from autobatch._memory.oom import is_oom; "
        "assert is_oom(MemoryError()) and is_oom(RuntimeError('CUDA out of memory.')) and not is_oom(KeyError('x')); "
        "assert 'torch' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
