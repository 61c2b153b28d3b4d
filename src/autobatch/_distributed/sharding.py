"""Modules whose parameters are divided among the ranks."""

from __future__ import annotations

import sys
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Final

from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor
    from torch.nn import Module


def is_sharded(module: Module) -> bool:
    """Return True if parameters are divided among ranks: by FSDP, FSDP2 or as DTensors."""
    kinds, tensors = (_fsdp1(), _fsdp2()), _dtensor()
    if any(isinstance(part, kinds) for part in module.modules()):
        return True
    return any(isinstance(each, tensors) for each in module.parameters())


def data_parallel_size(modules: Iterable[Module], ranks: int) -> int | None:
    """Return the number of ranks that train on different data; None if modules do not show it.

    FSDP divides among the ranks that do. Parameters of other kinds that are divided are those of
    one model on several ranks, as in tensor parallelism.
    """
    by_fsdp: list[int] = []
    by_tensors = [1]
    for part in _parts_of(modules):
        if isinstance(part, _fsdp2()):
            groups = part._get_fsdp_state()._fsdp_param_groups
            by_fsdp += [group.mesh_info.mesh.size() for group in groups]
        elif isinstance(part, _fsdp1()):
            nodes = getattr(part, "_inter_node_pg", None)  # of a hybrid strategy
            by_fsdp.append(part.process_group.size() * (nodes.size() if nodes else 1))
        for each in part.parameters(recurse=False):
            if isinstance(each, _dtensor()):
                pairs = zip(each.device_mesh.mesh.shape, each.placements, strict=True)
                by_tensors.append(prod(size for size, place in pairs if place.is_shard()))
    if by_fsdp:
        return max(by_fsdp)
    return ranks // max(by_tensors) if max(by_tensors) > 1 else None


class _Nothing:
    """A class without instances."""


def _loaded(module: str, name: str) -> Any:
    """Return a class of torch that takes seconds to import; `_Nothing` as long as nobody has."""
    return getattr(sys.modules.get(module), name, _Nothing)


_fsdp1: Final = partial(_loaded, "torch.distributed.fsdp", "FullyShardedDataParallel")
_fsdp2: Final = partial(_loaded, "torch.distributed.fsdp", "FSDPModule")
_dtensor: Final = partial(_loaded, "torch.distributed.tensor", "DTensor")
_OFFLOAD: Final = (
    "A {} keeps its parameters on the host (CPU offload), which trials do not measure; tune "
    "without offload, or write the batch size by hand."
)


def check_can_rest(modules: Iterable[Module]) -> None:
    """Refuse sharded modules that could not be brought to rest and restored exactly.

    Raises:
        AutobatchError: What is not supported, in one sentence.
    """
    from torch.nn.parallel import DistributedDataParallel

    for part in _parts_of(modules):
        if any(kind.__name__ == "DeepSpeedEngine" for kind in type(part).__mro__):
            raise AutobatchError(
                "A DeepSpeedEngine keeps state of its own that cannot be restored after a trial; "
                "write train_micro_batch_size_per_gpu and gradient_accumulation_steps into its "
                "configuration by hand."
            )
        if isinstance(part, DistributedDataParallel) and part.static_graph:
            raise AutobatchError(
                "A DistributedDataParallel has static_graph=True, which counts the passes of "
                "trials as well and then fails; tune without it, or write the batch size by hand."
            )
        if isinstance(part, _fsdp1()):
            if not part._use_orig_params:
                raise AutobatchError(
                    "A FullyShardedDataParallel has use_orig_params=False, whose flat parameters "
                    "cannot be restored after a trial; give it use_orig_params=True."
                )
            if part.cpu_offload.offload_params:
                raise AutobatchError(_OFFLOAD.format("FullyShardedDataParallel"))
        elif isinstance(part, _fsdp2()):
            if not hasattr(part, "reset_iter_state"):
                raise AutobatchError(
                    "A trial of a module sharded by fully_shard needs reset_iter_state, which "
                    "torch has from version 2.13 on; upgrade torch, or write the batch size by "
                    "hand."
                )
            if _offloads(part):
                raise AutobatchError(_OFFLOAD.format("module sharded by fully_shard"))


def check_no_pipeline(things: Iterable[object]) -> None:
    """Refuse pipeline parallelism: what a stage receives is the data of another rank.

    Raises:
        AutobatchError: An object is a stage or a schedule of `torch.distributed.pipelining`.
    """
    for thing in things:
        kinds = type(thing).__mro__
        if any(kind.__module__.startswith("torch.distributed.pipelining") for kind in kinds):
            raise AutobatchError(
                f"The workload uses a {type(thing).__name__} of pipeline parallelism, whose trials "
                "would wait for other ranks; write the size of its micro-batches by hand."
            )


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this rank holds; any other tensor as it is."""
    if not isinstance(tensor, _dtensor()):
        return tensor
    from torch import no_grad

    with no_grad():  # otherwise a step of autograd
        part: Tensor = tensor.to_local()
        return part


def maker_of(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that makes a tensor like this one of its local part."""
    if not isinstance(tensor, _dtensor()):
        return lambda part: part
    return partial(
        _dtensor().from_local,
        device_mesh=tensor.device_mesh,
        placements=tensor.placements,
        run_check=False,  # a collective
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def bring_to_rest(modules: Iterable[Module]) -> None:
    """Bring FSDP to rest after a step that failed, or after a forward pass alone.

    Otherwise FSDP and its modules disagree about the parameters that are there. All ranks have to
    do this, or none: the next forward pass gathers what is not there. Gradients are lost.
    """
    for part in _parts_of(modules):
        # The root is known from its first forward pass on (private, torch 2.13)
        if isinstance(part, _fsdp2()):
            state = part._get_fsdp_state()
            if state._is_root:
                part.reset_iter_state()
            for group in state._fsdp_param_groups:
                _forget_gradients(group.fsdp_params)
        elif isinstance(part, _fsdp1()) and part._is_root:
            _bring_fsdp1_to_rest(part)


def register_hooks(module: Module) -> None:
    """Register the hooks that FSDP2 registers in the first forward pass, which it does only once.

    They let `state_dict` hold shards also where parameters are gathered. Attributes captured before
    would be restored without them, after a trial that ran that pass (private, torch 2.13).
    """
    for part in _parts_of([module]):
        if isinstance(part, _fsdp2()):
            for group in part._get_fsdp_state()._fsdp_param_groups:
                group._register_state_dict_hooks()


def _forget_gradients(parameters: Iterable[Any]) -> None:
    """Drop gradients of gathered parameters, to which the next backward pass would add."""
    for each in parameters:
        each.unsharded_accumulated_grad = None
        if hasattr(each, "_unsharded_param"):
            each._unsharded_param.grad = None


def _bring_fsdp1_to_rest(root: Any) -> None:
    """Do what the end of a backward pass does, also after half a step (torch 2.13).

    That is `_post_backward_final_callback` of `torch.distributed.fsdp._runtime_utils`, without what
    is true only after a whole backward pass. Parameters are always given back: its own check takes
    a root for sharded after a forward pass.
    """
    from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
    from torch.distributed.fsdp._runtime_utils import _reshard

    if root.compute_device.type != "cpu":
        root._device_handle.current_stream().synchronize()
    order = root._exec_order_data
    order.handles_post_forward_order.clear()
    if order.is_first_iter:
        order.handles_pre_forward_order.clear()
    for state in root._all_fsdp_states:
        state.training_state = TrainingState.IDLE
        handle = state._handle
        if not handle:
            continue
        handle._training_state = HandleTrainingState.IDLE
        _reshard(state, handle, free_unsharded_flat_param=True)
        flat = handle.flat_param
        if hasattr(flat, "_post_backward_hook_state"):
            flat._post_backward_hook_state[-1].remove()
            del flat._post_backward_hook_state
        if hasattr(flat, "_saved_grad_shard"):
            del flat._saved_grad_shard
        flat.grad = None
        flat._post_backward_called = False
        handle._ran_pre_backward_hook = False
        handle._needs_pre_forward_unshard = False
        handle._needs_pre_backward_unshard = False
        handle._post_forward_index = None
        handle._prefetched = False
    root._post_backward_callback_queued = False


def _parts_of(modules: Iterable[Module]) -> Iterator[Any]:
    """Yield each module within these once."""
    parts = {id(part): part for module in modules for part in module.modules()}
    yield from parts.values()


def _offloads(part: Any) -> bool:
    groups = part._get_fsdp_state()._fsdp_param_groups
    return any(group.offload_policy.__class__.__name__ == "CPUOffloadPolicy" for group in groups)
