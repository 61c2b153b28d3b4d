"""CUDA's choice of operators, on CPU tensors: attention, dropout, LSTM, and autocast's lists.

Functions are replaced by attribute: torch pops a TorchFunctionMode during `Tensor.backward`, and
checkpoints would recompute other operators than they ran (torch 2.13).
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional as F

from autobatch._memory.estimate.lstm import CudnnLstm
from autobatch._undo import Undo, patched

if TYPE_CHECKING:
    import contextlib

    from autobatch._memory.estimate.scratch import Gpu

_aten: Final[Any] = torch.ops.aten
_HALF: Final = (torch.float16, torch.bfloat16)
_KEY: Final = "AutocastCPU"
_WIDEST_FLASH_HEAD: Final = 256
_BATCH_HEADS_LENGTH_WIDTH: Final = 4


class CudaOperators(Undo):
    """While it lasts, CPU tensors run the operators that tensors on CUDA would run.

    Args:
        gpu: The GPU.
    """

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._attention = partial(_attention, gpu.has_flash_attention)
        self._lstm = CudnnLstm(gpu)

    def start(self) -> None:
        plain = F.dropout

        def functional_dropout(
            input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
        ) -> torch.Tensor:
            return plain(input, p, training, True) if inplace else _dropout(input, p, training)

        attention = self._attention
        replaced = patched(F, scaled_dot_product_attention=attention, dropout=functional_dropout)
        self.enter_context(replaced)
        self.enter_context(patched(torch, dropout=_dropout))
        self.enter_context(patched(torch._VF, lstm=self._lstm))
        # transformers 5 asks for fake tensors, and makes masks for them that it leaves out
        # otherwise
        asked = sys.modules.get("transformers.utils.import_utils")
        if hasattr(asked, "is_fake_tensor"):
            self.enter_context(patched(asked, is_fake_tensor=lambda _: False))
        self._cast_as_cuda()

    def _cast_as_cuda(self) -> None:
        """Register CUDA's lists of autocast on the key of the CPU; the CPU's own are longer."""
        lists = _autocast_lists()
        library = torch.library.Library("aten", "IMPL", _KEY)
        self.callback(library._destroy)
        known = {name for names in lists.values() for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these kernels replace others on purpose
            for registered in torch._C._dispatch_get_registrations_for_dispatch_key(_KEY):
                name = registered.removeprefix("aten::")
                if registered.startswith("aten::") and name not in known:
                    library.impl(name, torch.library.fallthrough_kernel, allow_override=True)
            for kernel, macro in ((_in_float32, "FP32"), (_with_dtype, "FP32_SET_OPT_DTYPE")):
                for name in lists[macro]:
                    if (operator := _operator(name)) is not None:
                        library.impl(name, partial(kernel, operator), allow_override=True)


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or not 0 < p < 1 or not input.numel():
        return _aten.dropout(input, p, train)  # type: ignore[no-any-return]
    return _aten.native_dropout(input, p, True)[0]  # type: ignore[no-any-return]


def _attention(
    has_flash_attention: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention by the kernel that CUDA takes: flash, memory-efficient, or plain products."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (_cast(each, _autocast_dtype()) for each in (query, key, value))
        if attn_mask is not None:
            attn_mask = _cast(attn_mask, _autocast_dtype())
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
    if query.dim() != _BATCH_HEADS_LENGTH_WIDTH:
        plain = _aten._scaled_dot_product_attention_math
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    width = query.size(-1)
    is_half = query.dtype in _HALF
    same_width = width == value.size(-1)
    suits_flash = has_flash_attention and is_half and same_width and width <= _WIDEST_FLASH_HEAD
    if suits_flash and attn_mask is None:
        scale = scale or 1 / math.sqrt(width)
        padded = [
            F.pad(each, (0, -width % 8)) if width % 8 else each for each in (query, key, value)
        ]
        flash = _aten._scaled_dot_product_flash_attention
        result = flash(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return result[..., :width] if width % 8 else result  # type: ignore[no-any-return]
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    keeps_sums = query.requires_grad or key.requires_grad
    efficient = _aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, keeps_sums, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return a mask as numbers to add, its rows padded for aligned reads."""
    if mask.dtype is torch.bool:
        zeros = torch.zeros_like(mask, dtype=query.dtype)
        mask = zeros.masked_fill_(mask.logical_not(), -math.inf)
    length = mask.size(-1)
    padding = -length % (16 if query.dtype in _HALF else 8)
    if padding:
        mask = F.pad(mask, (0, padding))[..., :length]
    return mask.expand(*query.shape[:3], key.size(2))


# Autocast


def _autocast_lists() -> dict[str, list[str]]:
    """Return the operators of each of CUDA's lists, from the headers that torch brings."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text(encoding="utf-8")
    lists = {}
    for macro in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        start = text.index(f"#define AT_FORALL_{macro}(_)")
        body = re.match(r"(?:[^\n]*\\\n)*[^\n]*", text[start:])
        entries = re.findall(r"\b_\((\w+)(?:,\s*(\w+))?\)", body[0] if body else "")
        lists[macro] = [f"{name}.{overload}" if overload else name for name, overload in entries]
    return lists


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_aten, packet, None), overload or "default", None)


def _autocast_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def _outside_autocast() -> contextlib.AbstractContextManager[None]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _in_float32(operator: Any, *args: Any, **kwargs: Any) -> Any:
    with _outside_autocast():
        cast = partial(_cast_all, dtype=torch.float32)
        return operator(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})


def _with_dtype(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator with float32 results, unless the user chose a type."""
    with _outside_autocast():
        if args[0].dtype in _HALF:
            names = [argument.name for argument in operator._schema.arguments]
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            if named.get("dtype") is None:
                return operator(**named | {"dtype": torch.float32})
        return operator(*args, **kwargs)


def _cast_all(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast_all(each, dtype) for each in value)
    return _cast(value, dtype) if isinstance(value, torch.Tensor) else value


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return floating-point tensors in another precision; autocast leaves double as it is."""
    is_cast = tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if is_cast else tensor
