"""Training arguments that would silently give wrong results are refused, with the right way."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from potstill.errors import TrainingError
from potstill.losses.objective import Objective
from potstill.schemes.lesson import Extension, Lesson
from potstill.teachers.live import leaves


def check_arguments(args: TrainingArguments) -> TrainingArguments:
    """Return the arguments, with non-reentrant checkpointing, or refuse them.

    Raises:
        TrainingError: ``label_smoothing_factor``, re-entrant gradient checkpointing, or several GPUs in one process.
    """
    if getattr(args, "label_smoothing_factor", 0):
        raise TrainingError(
            "label_smoothing_factor would bypass the objective; use objective.hard.label_smoothing "
            '(in Python: Term("cross_entropy", label_smoothing=…))'
        )
    if getattr(args, "n_gpu", 1) > 1:
        raise TrainingError(
            f"{args.n_gpu} GPUs in one process would use DataParallel, which loses taps; start with "
            "`accelerate launch` or `torchrun`, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    for switch in ("gradient_checkpointing", "activation_checkpointing"):
        _use_non_reentrant(args, switch)
    return args


def check_budget(args: TrainingArguments, batch_tokens: int | None, group_by_length: bool) -> None:
    """Refuse a budget of tokens a batch beside settings that contradict it.

    Raises:
        TrainingError: names the setting.
    """
    if batch_tokens is None:
        return
    if batch_tokens < 1:
        raise TrainingError(f"expected batch_tokens above 0, got {batch_tokens}")
    if not group_by_length:
        raise TrainingError(
            "batch_tokens puts samples of like length into one batch, and group_by_length is false; "
            "leave out one of them or say group_by_length: true (in Python: group_by_length=True)"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise TrainingError(f"batch_tokens needs a batch for each process; leave out accelerator_config.{name}")


def check_student(student: nn.Module) -> None:
    """Refuse a student whose gradient checkpointing was switched on with ``use_reentrant=True``.

    Raises:
        TrainingError: says how to switch it on instead.
    """
    for module in student.modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise TrainingError(
                "the student's gradient checkpointing has use_reentrant=True, which changes the gradients of tapped "
                'signals without a word; call gradient_checkpointing_enable({"use_reentrant": False})'
            )


def check_sharding(args: TrainingArguments, lesson: Lesson) -> None:
    """Refuse what cannot be kept in shards: learners beside the student, and averages of it.

    Raises:
        TrainingError: names what there is.
    """
    extension = lesson.student.extension
    if args.torch_compile and extension is not None and type(extension).around is not Extension.around:
        raise TrainingError(
            "torch_compile cannot follow a model whose blocks are replaced in every step; leave out one"
        )
    if not (args.fsdp or args.deepspeed):
        return
    moving = [
        name
        for name, source in lesson.sources.items()
        if any(hasattr(leaf, "after_step") for leaf in leaves(source).values())
    ]
    beside = [*(f"the learner '{name}'" for name in lesson.others), *(f"the teacher '{name}'" for name in moving)]
    beside += ["layers that the student has only while it learns"] * (lesson.student.extension is not None)
    if beside:
        raise TrainingError(
            f"FSDP and DeepSpeed keep parameters in shards, and {beside[0]} cannot be saved from them yet; "
            "use DDP (several processes without `fsdp` and `deepspeed`)"
        )


def _use_non_reentrant(args: Any, switch: str) -> None:
    options = getattr(args, f"{switch}_kwargs", None) or {}
    if options.get("use_reentrant"):
        raise TrainingError(
            f"{switch} with use_reentrant=True changes the gradients of tapped signals without a word; "
            "use use_reentrant=False"
        )
    if getattr(args, switch, False):
        setattr(args, f"{switch}_kwargs", {**options, "use_reentrant": False})


def check_balance(args: TrainingArguments, objective: Objective) -> None:
    """Raise where the gradients of terms cannot be compared: in compiled code, or with parameters in shards.

    Raises:
        TrainingError: names the setting.
    """
    if objective.balance is None:
        return
    others = {"torch_compile": args.torch_compile, "fsdp": args.fsdp, "deepspeed": args.deepspeed}
    wrong = next((name for name, value in others.items() if value), None)
    if wrong is not None:
        raise TrainingError(f"balance: the gradients of the terms cannot be compared under `{wrong}`; leave out one")
