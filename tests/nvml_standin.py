"""A machine with NVIDIA cards, on paper: what `pynvml` and `torch.cuda` would say of it."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

GIB = 2**30
CONTEXT = GIB // 2  # bytes of a CUDA context: this process's, outside torch's allocator


class NVMLError(Exception):
    """As pynvml raises it."""


@dataclass(eq=False)
class Card:
    """One physical card, or one MIG instance of a card.

    Args:
        uuid: With neither "GPU-" nor "MIG-" before it.
        total: Bytes, as NVML counts them.
        others: Bytes that other processes hold; may be set again at any time.
        instances: What MIG cut the card into; none where MIG is off.
    """

    uuid: str
    total: int = 80 * GIB
    others: int = 0
    instances: tuple[Card, ...] = ()
    # This process's allocator
    reserved: int = 0
    peak: int = 0
    share: float = 1.0
    retries: int = 0
    ooms: int = 0

    @property
    def seen_by_cuda(self) -> int:
        """Bytes; a little less than NVML's total, as on real cards."""
        return self.total - self.total // 150

    @property
    def free(self) -> int:
        return self.total - self.others - CONTEXT - self.reserved


@dataclass(eq=False)
class FakeGpu:
    """A machine with cards, put in place of `pynvml` and `torch.cuda` by `install`.

    Args:
        cards: In NVML's order.
        visible: CUDA_VISIBLE_DEVICES; None leaves it unset.
        cuda_order: Position in `cards` of CUDA's device 0, 1, …: what CUDA_DEVICE_ORDER changes.
        refusals: NVML function or "mem_get_info" by name, and what it says instead of answering; may change at any time.
        calls: How often each NVML function was called.
    """

    cards: tuple[Card, ...] = field(default_factory=lambda: (Card("aaaa-0"),))
    visible: str | None = None
    cuda_order: tuple[int, ...] | None = None
    refusals: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        """Put the machine in place until the test ends."""
        if self.visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", self.visible)
        monkeypatch.setitem(sys.modules, "pynvml", self._pynvml())
        for name, function in self._torch_cuda().items():
            monkeypatch.setattr(torch.cuda, name, function, raising=False)
        return self

    @property
    def devices(self) -> list[Card]:
        """The cards this process was given, as torch counts them."""
        order = self.cuda_order or range(len(self.cards))
        in_cuda_order = [self.cards[position] for position in order]
        if self.visible is None:
            return in_cuda_order
        named = {f"GPU-{card.uuid}": card for card in self.cards}
        named |= {
            f"MIG-{part.uuid}": part for card in self.cards for part in card.instances
        }
        return [
            in_cuda_order[int(entry)]
            if entry.isdecimal()
            else next(card for name, card in named.items() if name.startswith(entry))
            for entry in self.visible.split(",")
        ]

    def allocate(self, index: int, nbytes: int) -> None:
        """What torch's allocator does: refuse what passes the cap or the card, having retried once."""
        card = self.devices[index]
        if (
            card.reserved + nbytes > card.share * card.seen_by_cuda
            or nbytes > card.free
        ):
            card.retries += 1
            card.ooms += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes."
            )
        card.reserved += nbytes
        card.peak = max(card.peak, card.reserved)

    @contextlib.contextmanager
    def holding(self, index: int, nbytes: int) -> Iterator[None]:
        """Allocate, and free at the end."""
        self.allocate(index, nbytes)
        try:
            yield
        finally:
            self.devices[index].reserved -= nbytes

    def _pynvml(self) -> types.ModuleType:
        def asked(name: str) -> None:
            self.calls[name] += 1
            if name in self.refusals:
                raise NVMLError(self.refusals[name])

        def init() -> None:
            asked("nvmlInit")

        def handle(uuid: str) -> Card:
            asked("nvmlDeviceGetHandleByUUID")
            for card in self.cards:
                known = {f"GPU-{card.uuid}": card} | {
                    f"MIG-{part.uuid}": part for part in card.instances
                }
                if uuid in known:
                    return known[uuid]
            raise NVMLError("Not Found")

        def mig_mode(card: Card) -> list[int]:
            asked("nvmlDeviceGetMigMode")
            cut = bool(card.instances) or card not in self.cards
            return [int(cut), int(cut)]

        def memory(card: Card, version: int | None = None) -> types.SimpleNamespace:
            asked("nvmlDeviceGetMemoryInfo")
            assert version is None, "the two versions count differently"
            free = card.free - sum(part.total - part.free for part in card.instances)
            return types.SimpleNamespace(
                total=card.total, free=free, used=card.total - free
            )

        module = types.ModuleType("pynvml")
        vars(module).update(
            NVMLError=NVMLError,
            nvmlInit=init,
            nvmlDeviceGetHandleByUUID=handle,
            nvmlDeviceGetMigMode=mig_mode,
            nvmlDeviceGetMemoryInfo=memory,
        )
        return module

    def _torch_cuda(self) -> dict[str, object]:
        def properties(index: int) -> types.SimpleNamespace:
            card = self.devices[index]
            # torch tells the UUID of the whole card, also for an instance of it
            whole = next(
                each for each in self.cards if card is each or card in each.instances
            )
            return types.SimpleNamespace(
                name="Paper GPU", total_memory=card.seen_by_cuda, uuid=whole.uuid
            )

        def mem_get_info(index: int) -> tuple[int, int]:
            if "mem_get_info" in self.refusals:
                raise RuntimeError(self.refusals["mem_get_info"])
            card = self.devices[index]
            return card.free - (card.total - card.seen_by_cuda), card.seen_by_cuda

        def reset_peak(index: int) -> None:
            self.devices[index].peak = self.devices[index].reserved

        def set_share(share: float, index: int) -> None:
            assert isinstance(share, float)
            assert 0 <= share <= 1
            self.devices[index].share = share

        def stats(index: int) -> dict[str, int]:
            return {
                "num_alloc_retries": self.devices[index].retries,
                "num_ooms": self.devices[index].ooms,
            }

        return {
            "device_count": lambda: len(self.devices),
            "current_device": lambda: 0,
            "get_device_properties": properties,
            "mem_get_info": mem_get_info,
            "memory_reserved": lambda index: self.devices[index].reserved,
            "max_memory_reserved": lambda index: self.devices[index].peak,
            "memory_stats": stats,
            "reset_peak_memory_stats": reset_peak,
            "get_per_process_memory_fraction": lambda index: self.devices[index].share,
            "set_per_process_memory_fraction": set_share,
            "empty_cache": lambda: None,
            "synchronize": lambda index: None,
        }
