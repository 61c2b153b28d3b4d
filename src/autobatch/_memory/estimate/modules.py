"""Names of the modules whose forward passes run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from autobatch._undo import Undo

if TYPE_CHECKING:
    import torch


class RunningModules(Undo):
    """The modules that run, the innermost last; known while it lasts.

    Args:
        model: The model; other modules have the name of their class.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._names = {id(part): name for name, part in model.named_modules()}
        self._running: list[str] = []

    def start(self) -> None:
        self.hook(register_module_forward_pre_hook, self._begin)
        # Checkpoints end a forward pass by an exception, too
        self.hook(register_module_forward_hook, self._end, always_call=True)

    @property
    def innermost(self) -> str:
        """Name of the innermost module; empty if none runs."""
        return self._running[-1] if self._running else ""

    def _begin(self, module: torch.nn.Module, _: Any) -> None:
        self._running.append(self._names.get(id(module), type(module).__name__))

    def _end(self, *_: Any) -> None:
        self._running.pop()
