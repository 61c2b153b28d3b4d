"""Recognise the exceptions that mean out of memory."""

from __future__ import annotations

import re
import sys

# What a RuntimeError says when a batch was too large. Matched without regard to case; kernels that ran out of shared
# memory ("out of resource"), asserts and illegal accesses are bugs, and must not be found here.
_MESSAGES = (
    "out of memory",  # CUDA, HIP, XPU, MPS, Triton, NCCL ("Cuda failure 'out of memory'"): pytorch#152302
    "Caught OutOfMemoryError in",  # DataParallel and DataLoader re-raise a replica's error with its traceback
    "Failed to CUDA calloc",  # NCCL's buffers lie outside the caching allocator: nccl#1235
    "CUBLAS_STATUS_ALLOC_FAILED",  # its handle and workspace
    "CUDNN_STATUS_ALLOC_FAILED",  # its workspace
    "CUDNN_STATUS_INTERNAL_ERROR",  # what cuDNN says when its handle finds no room
    "CUDNN_STATUS_NOT_SUPPORTED",  # no algorithm left once those that need a workspace are out
    "unable to find an engine",  # the same, from cuDNN's version 8 interface
    "unable to find a valid cuDNN algorithm",  # the same, from its version 7 interface: marqo#101
    "DefaultCPUAllocator: can't allocate memory",  # Linux, where malloc was refused
    "DefaultCPUAllocator: not enough memory",  # Windows
    "std::bad_alloc",  # host memory, from C++
    "could not create a primitive(?! descriptor)",  # oneDNN: no room for scratch; a descriptor is a bad shape
    "32-?bit ?index ?math",  # CUDA kernels that count in 32 bits; one batch less may fit: pytorch#80020
    "INT_MAX elements",  # the same, in normalisation, sorting and nonzero
)
_TOO_LARGE = re.compile("|".join(_MESSAGES), re.IGNORECASE)


def is_oom(error: BaseException) -> bool:
    """Whether an exception, or one that led to it, says that memory ran out or the batch was too large for a kernel."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        error = pending.pop()
        # An interrupt is never out-of-memory, also when it came while one was handled
        if id(error) in seen or not isinstance(error, Exception):
            continue
        seen.add(id(error))
        if _says_too_large(error):
            return True
        if isinstance(error, ExceptionGroup):
            pending.extend(error.exceptions)
        led_to_it = error.__cause__
        if not error.__suppress_context__ and not isinstance(error, _BUGS):
            led_to_it = error.__context__
        if led_to_it is not None:
            pending.append(led_to_it)
    return False


# An error of these kinds while out-of-memory was being handled is a bug in the handler
_BUGS = (AttributeError, ImportError, LookupError, NameError, TypeError)


def _says_too_large(error: Exception) -> bool:
    # Where torch was never imported no error of its kind can exist, and asking must not import it
    torch_error: type[Exception] | None = getattr(
        sys.modules.get("torch"), "OutOfMemoryError", None
    )
    if isinstance(error, MemoryError) or (
        torch_error is not None and isinstance(error, torch_error)
    ):
        return True
    return isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error)) is not None
