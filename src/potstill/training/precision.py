"""In which precision a model is trained, and the context that makes it so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from potstill.errors import TrainingError
from potstill.teachers.precision import has_native_bf16

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def chosen_precision(wanted: str | None, options: Mapping[str, Any], device: torch.device | str) -> str:
    """Return ``fp32``, ``medium``, ``bf16`` or ``fp16``.

    Args:
        wanted: ``train.precision``; ``auto`` is bf16 where the processor computes in it, else fp32.
        options: training arguments, which may have ``bf16`` or ``fp16``.
        device: where the model is trained.

    Raises:
        TrainingError: both say something, or fp16 is to be computed on a CPU.
    """
    said = [name for name in HALVES if options.get(name)]
    if wanted is not None and said:
        raise TrainingError(f"train.precision is {wanted} and train.{said[0]} is true; leave out one of them")
    precision = wanted or (said[0] if said else "fp32")
    if precision == "auto":
        precision = "bf16" if has_native_bf16(device) else "fp32"
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise TrainingError(
            "a CPU has no fp16 arithmetic, and trains in it several times slower than in fp32; use bf16"
        )
    return precision


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Let fp32 matrix products be made of bf16 ones inside the block where ``precision`` is ``medium``.

    Sums stay in fp32; see ``torch.set_float32_matmul_precision``.
    """
    before = torch.get_float32_matmul_precision()
    if precision == "medium":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
