"""In what precision a teacher computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import nn

from potstill.errors import ComponentError, TrainingError, did_you_mean

Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
"""``int8`` is that of weights and activations of linear layers; everything else in it is fp32."""

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86, and Arm


def has_native_bf16(device: torch.device | str) -> bool:
    """Return whether the processor computes in bfloat16 itself; elsewhere it is emulated and gains nothing."""
    kind = torch.device(device).type
    if kind == "cpu":
        known: Any = getattr(torch.cpu, "get_capabilities", None)
        if known is not None:
            return any(known().get(name, False) for name in _NATIVE_BF16)
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if kind not in ("cuda", "xpu"):
        return False
    of_kind: Any = getattr(torch, kind)
    return bool(of_kind.is_available() and of_kind.is_bf16_supported(including_emulation=False))


def check_precision(precision: str | None, device: torch.device | str | None = None) -> None:
    """Raise if a teacher cannot or should not compute like this.

    Args:
        precision: as asked for.
        device: where the teacher is; ``None`` where that is not known yet.

    Raises:
        TrainingError: there is no such precision, or it is fp16 on a CPU.
        ComponentError: int8, and torchao is missing.
    """
    if precision is not None and precision not in get_args(Precision):
        raise TrainingError(f"there is no precision '{precision}'; {did_you_mean(precision, get_args(Precision))}")
    if precision == "fp16" and device is not None and torch.device(device).type == "cpu":
        raise TrainingError(
            "a teacher in fp16 is three to four times slower than in fp32 on a CPU, which has no fp16 arithmetic; "
            "use bf16"
        )
    if precision == "int8" and find_spec("torchao") is None:
        raise ComponentError("a teacher in int8 needs torchao: pip install 'potstill[int8]'")


def tried_precision(precision: str | None) -> Precision | None:
    """Return the precision in which a teacher is tried out before the training: nothing is compiled or chosen for that.

    Raises:
        TrainingError: there is no such precision.
        ComponentError: int8, and torchao is missing.
    """
    if precision == "auto":
        return None
    check_precision(precision)
    return None if precision == "int8" else cast("Precision | None", precision)


def computing_in(precision: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a teacher computes; ``None`` leaves it to whoever calls."""
    if precision is None:
        return nullcontext()
    return torch.autocast(device.type, _HALF[precision]) if precision in _HALF else _full(device)


@contextmanager
def _full(device: torch.device) -> Iterator[None]:
    """Switch off what makes fp32 products of bf16 ones: autocast, and the setting ``medium``."""
    before = torch.get_float32_matmul_precision()
    if before == "medium":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def quantized(model: nn.Module) -> nn.Module:
    """Return a copy whose linear layers multiply in int8: weights once, activations anew in every batch.

    Raises:
        ComponentError: torchao is missing.
    """
    check_precision("int8")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    smaller = copy.deepcopy(model)
    quantize_(smaller, Int8DynamicActivationInt8WeightConfig())
    return smaller
