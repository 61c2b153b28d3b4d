"""What tuning and training take of the host's memory: the copy that trials are undone with, and batches made ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from autobatch._host import HostMemory
from autobatch._memory import format_bytes
from autobatch._snapshot import Snapshot
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.data import DataLoader

__all__ = ["ahead", "copied", "room_for_copy"]

_MUCH: Final = 2**30  # bytes of a copy that a person should hear of


def room_for_copy(things: Sequence[Any], ranks: int) -> int:
    """Bytes that a snapshot of these copies to the host; `ranks` processes share it.

    Raises:
        AutobatchError: The host has not that much.
    """
    own = Snapshot.bytes_of(*things)
    needed, available = own * ranks, HostMemory.here().available
    if available is not None and needed > available:
        raise AutobatchError(
            f"To give everything back after its trials, AutoBatch keeps a copy of parameters, buffers, gradients and "
            f"optimizer state on the host: {_for(own, ranks)}, where {format_bytes(available)} are available. Free "
            "host memory, raise the limit of this container or job, or write batch size and accumulation by hand."
        )
    return own


def copied(nbytes: int, ranks: int) -> str | None:
    """What a person should know of that copy."""
    if nbytes <= _MUCH:
        return None
    return (
        "To give everything back, tuning kept a copy of parameters, buffers, gradients and optimizer state on the "
        f"host: {_for(nbytes, ranks)}."
    )


def ahead(
    loader: DataLoader[Any], batch_size: int, bytes_per_sample: int, ranks: int
) -> str | None:
    """What a person should know of the batches that workers make ahead, where the host has no room for them."""
    each = batch_size * bytes_per_sample
    factor = loader.prefetch_factor or 1  # without workers there is none
    needed = loader.num_workers * factor * each
    host = HostMemory.here()
    on_ranks = f" on each of {ranks} ranks" if ranks > 1 else ""
    made = (
        f"num_workers={loader.num_workers} × prefetch_factor={factor} × batches of {batch_size:,} "
        f"({format_bytes(each)} each) would need {format_bytes(needed)} of"
    )
    if host.shared is not None and needed * ranks > host.shared:
        return (
            f"{made} shared memory{on_ranks}, and /dev/shm has {format_bytes(host.shared)}: lower one of the two, or "
            "enlarge it (docker run --shm-size)."
        )
    if host.available is not None and needed * ranks > host.available:
        return f"{made} host memory{on_ranks}, and {format_bytes(host.available)} are available: lower one of the two."
    return None


def _for(nbytes: int, ranks: int) -> str:
    if ranks == 1:
        return format_bytes(nbytes)
    return f"{format_bytes(nbytes)} on each of {ranks} ranks"
