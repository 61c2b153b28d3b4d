"""Recognise the exceptions that mean out of memory."""

from __future__ import annotations

import re
import sys

# Messages of a RuntimeError that means the batch was too large, matched without regard to case.
# Kernels out of shared memory ("out of resource"), asserts and illegal accesses are bugs: they must
# not match.
_MESSAGES = (
    # CUDA, HIP, XPU, MPS, Triton, NCCL ("Cuda failure 'out of memory'"): pytorch#152302
    "out of memory",
    # DataParallel and DataLoader raise the error of a replica again, with its traceback
    "Caught OutOfMemoryError in",
    # Buffers of NCCL are allocated outside the caching allocator: nccl#1235
    "Failed to CUDA calloc",
    # Handle and workspace of cuBLAS
    "CUBLAS_STATUS_ALLOC_FAILED",
    # Workspace of cuDNN
    "CUDNN_STATUS_ALLOC_FAILED",
    # cuDNN has no memory for its handle
    "CUDNN_STATUS_INTERNAL_ERROR",
    # cuDNN has no algorithm left that does without a workspace
    "CUDNN_STATUS_NOT_SUPPORTED",
    # The same in cuDNN's version 8 interface
    "unable to find an engine",
    # The same in cuDNN's version 7 interface: marqo#101
    "unable to find a valid cuDNN algorithm",
    # Linux, if malloc fails
    "DefaultCPUAllocator: can't allocate memory",
    # Windows, if malloc fails
    "DefaultCPUAllocator: not enough memory",
    # Host memory, from C++
    "std::bad_alloc",
    # oneDNN has no scratch memory; "primitive descriptor" would be a bad shape
    "could not create a primitive(?! descriptor)",
    # CUDA kernels with 32-bit indices; a smaller batch may fit: pytorch#80020
    "32-?bit ?index ?math",
    # The same in normalisation, sorting and nonzero
    "INT_MAX elements",
)
_TOO_LARGE = re.compile("|".join(_MESSAGES), re.IGNORECASE)
# Host memory of a process that reads data, at any batch size (torch 2.13, ExceptionWrapper)
_IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")

# Raised while out of memory was being handled, these are bugs of the handler
_BUGS = (AttributeError, ImportError, LookupError, NameError, TypeError)


def is_oom(error: BaseException) -> bool:
    """Return True if an exception, or one that led to it, means that the batch was too large."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        error = pending.pop()
        # An interrupt is never out of memory, even if raised while handling one
        if id(error) in seen or not isinstance(error, Exception):
            continue
        seen.add(id(error))
        if _is_too_large(error):
            return True
        if isinstance(error, ExceptionGroup):
            pending.extend(error.exceptions)
        reason = error.__cause__
        if not error.__suppress_context__ and not isinstance(error, _BUGS):
            reason = error.__context__
        if reason is not None:
            pending.append(reason)
    return False


def _is_too_large(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return _IN_WORKER.match(str(error)) is None
    # If torch was never imported there can be no such error, and the check must not import it
    torch_error = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    if torch_error is not None and isinstance(error, torch_error):
        return True
    return isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error)) is not None
