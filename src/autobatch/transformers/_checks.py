"""Refuse Trainers that cannot be tuned, before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch._distributed.sharding import check_can_rest, is_sharded
from autobatch.errors import AutobatchError
from autobatch.transformers._compat import check_version

if TYPE_CHECKING:
    from collections.abc import Iterator


def check(trainer: Any) -> None:
    """Raise `ValueError` for anything but a Trainer, `AutobatchError` for one not supported."""
    if not hasattr(trainer, "args") or not hasattr(trainer, "training_step"):
        raise ValueError(
            f"trainer={trainer!r} is not a transformers.Trainer; give the one to tune."
        )
    check_version(trainer)
    for problem in _problems(trainer):
        raise AutobatchError(f"This Trainer cannot be tuned: {problem}.")
    check_can_rest([trainer.model])


def _problems(trainer: Any) -> Iterator[str]:
    args, kind = trainer.args, trainer.accelerator.distributed_type.value
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size=True looks for the batch size as well, and starts training again "
            "after it has failed; leave that argument out"
        )
    if hasattr(args, "steps_per_generation"):  # of TRL's GRPOConfig and RLOOConfig
        yield (
            "steps_per_generation, the number of steps for which it makes samples at once, was "
            "derived from the accumulation when its arguments were made"
        )
    if args.n_gpu > 1:
        yield (
            f"nn.DataParallel would split each batch among its {args.n_gpu} GPUs; start one "
            "process for each with torchrun"
        )
    if kind == "DEEPSPEED":
        yield "DeepSpeed sets batch size and accumulation itself; train it without autobatch"
    elif kind == "XLA":
        yield "XLA compiles the step again for each batch size; train it without autobatch"
    elif kind == "FSDP" or trainer.is_fsdp_enabled or args.fsdp:
        yield (
            "accelerate's FSDP divides the model when training begins, which cannot be undone; "
            "shard it with from_pretrained(distributed_config=DistributedConfig(fsdp_size=…))"
        )
    elif kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        yield f"autobatch does not know its distributed_type ({kind})"
    elif is_sharded(trainer.model) and not trainer.is_distributed_loading_by_transformers:
        yield (
            "its model was sharded before the Trainer was made, which then does not know it; shard "
            "it with from_pretrained(distributed_config=DistributedConfig(fsdp_size=…))"
        )
    config = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    shared = {
        "tensor": trainer.get_tp_size(),
        "context": trainer.get_cp_size(),
        "sequence": trainer.get_sp_size(),
        "expert": getattr(config, "ep_size", 1),
        "pipeline": getattr(config, "pp_size", 1),
    }
    for name, size in shared.items():
        if size > 1:
            yield (
                f"{size} ranks share one model by {name} parallelism, which no test has proven to "
                "train the same after tuning; set the batch size manually"
            )
    if trainer.train_dataset is None:
        yield "it has no train_dataset"
