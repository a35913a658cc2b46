"""Which of the launched processes this is, and how they part."""

from __future__ import annotations

import atexit

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Return which of the launched processes this is; without an accelerator they talk through the CPU (gloo)."""
    if not PartialState._shared_state:  # the first to ask: gloo's threads must be joined before the interpreter ends
        atexit.register(_leave_processes)
    return PartialState(cpu=not torch.accelerator.is_available())


def _leave_processes() -> None:
    """Leave the process group; a process that ends inside one can abort after all its work is done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
