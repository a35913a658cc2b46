"""Teacher and student of the Python door: by their configurations, and as sections of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

from potstill.distillation import DistillationConfig, FeatureDistillation
from potstill.errors import SignalError, TaskError, TrainingError, did_you_mean
from potstill.knowledge.layers import candidate_taps
from potstill.knowledge.taps import is_token_signal
from potstill.models.load import ORIGINS
from potstill.models.origins import Built
from potstill.recipe import build
from potstill.recipe.schema import ModelSpec
from potstill.registry import tasks

logger = logging.getLogger(__name__)

ALIASES = {
    "nli": "text-classification",
    "sequence-classification": "text-classification",
    "qa": "question-answering",
    "multiple-choice": "multiple-choice",
    "causal-lm": "causal-language-modelling",
    "masked-lm": "masked-language-modelling",
    "seq2seq": "sequence-to-sequence",
}
"""Other names of tasks; ``classification`` is that of texts or images, as the data hold them."""

TRAIN = {"epochs": 3.0, "batch_size": 32, "learning_rate": 5e-5, "weight_decay": 0.01}
"""How models are trained where nothing else is said, as a recipe's ``train``."""


@dataclass(frozen=True)
class TeacherConfig:
    """Who teaches.

    Attributes:
        model_name_or_path: a reference as in a recipe: hub id, local folder, ``timm:NAME``, ``torchvision:NAME``, ….
        task_type: a name of ``potstill list tasks``, or ``classification``, ``nli``, ….
        num_labels: classes; compared with the data.
        train: ``"auto"`` fine-tunes a teacher whose head for the task is new, with a notice; ``True`` always, ``False``
            never (a new head is then warned of); a dictionary is a recipe's ``teacher.train``.
        labels: ``"dataset"`` where its outputs are the data's classes in their order, whatever names it has for them.
        kwargs: options of the model.
        weights: a file of weights to load into it.
        cache: whether its answers are kept on disk: ``"auto"`` where the student sees each sample more than once,
            ``True``, ``False``, or settings such as ``{"precision": "fp16", "top_k": 64}``.
    """

    model_name_or_path: str
    task_type: str = "classification"
    num_labels: int | None = None
    labels: Literal["dataset"] | None = None
    train: Literal["auto"] | bool | Mapping[str, Any] = "auto"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    cache: bool | Literal["auto"] | Mapping[str, Any] = "auto"


@dataclass(frozen=True)
class StudentConfig:
    """Who learns: a named model, or blocks of the teacher.

    Attributes:
        model_name_or_path: as the teacher's; ``None`` where ``keep_blocks`` are given.
        task_type: as the teacher's.
        num_labels: classes; compared with the data.
        pretrained: whether a named model begins with its trained weights, or new.
        keep_blocks: the teacher's blocks that the student is cut from, counted from 0; nothing else is then given.
        block_weights: those with which the teacher began (``"pretrained"``) or ended (``"finetuned"``).
        kwargs: options of the model.
        weights: a file of weights to load into it.
    """

    model_name_or_path: str | None = None
    task_type: str = "classification"
    num_labels: int | None = None
    pretrained: bool = True
    keep_blocks: Sequence[int] | None = None
    block_weights: Literal["pretrained", "finetuned"] = "pretrained"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None


class TeacherModel:
    """A teacher by its configuration; loaded when it is needed.

    Args:
        config: see :class:`TeacherConfig`.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config

    @cached_property
    def model(self) -> nn.Module:
        """The model as it is before any training, with a head for ``num_labels`` classes."""
        spec = {"weights": self.config.weights}
        return _load(self.config.model_name_or_path, self.config, spec)


class StudentModel:
    """A student by its configuration; loaded when it is needed.

    Args:
        config: see :class:`StudentConfig`.

    Raises:
        TrainingError: the configuration names no model, or a model and blocks of the teacher.
    """

    def __init__(self, config: StudentConfig) -> None:
        if (config.model_name_or_path is None) == (config.keep_blocks is None):
            raise TrainingError("expected StudentConfig to have either model_name_or_path or keep_blocks")
        if config.keep_blocks is not None and (config.kwargs or config.weights or not config.pretrained):
            raise TrainingError("a student cut from its teacher takes no kwargs, weights or pretrained of its own")
        self.config = config

    @cached_property
    def model(self) -> nn.Module:
        """The model as it is before any training; for one cut from its teacher, see the result of a distillation.

        Raises:
            TrainingError: the student is cut from its teacher, which is not known here.
        """
        if self.config.model_name_or_path is None:
            raise TrainingError("this student is cut from its teacher; `Distiller.distill` returns it")
        spec = {"weights": self.config.weights, "pretrained": self.config.pretrained}
        return _load(self.config.model_name_or_path, self.config, spec)


def _load(reference: str, config: TeacherConfig | StudentConfig, spec: Mapping[str, Any]) -> nn.Module:
    name = _kind(reference) if config.task_type == "classification" else known_task(config.task_type)
    labels = config.num_labels or 2
    facts = {**tasks.get(name)().facts(), "num_labels": labels, "label_names": [str(place) for place in range(labels)]}
    if "in_channels" in facts:
        facts["in_channels"] = 3
    return build.make_blueprint(ModelSpec(model=reference, kwargs=dict(config.kwargs), **spec)).build(facts, seed=0)


def _kind(reference: str) -> str:
    """Return whether a model classifies texts or images."""
    if reference.partition(":")[0] in ORIGINS:
        return "image-classification"
    with suppress(OSError, ValueError):
        if type(AutoConfig.from_pretrained(reference)) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            return "image-classification"
    return "text-classification"


def known_task(task_type: str) -> str:
    """Return the registered name of a task.

    Raises:
        TaskError: there is none of that name.
    """
    name = ALIASES.get(task_type, task_type)
    if name not in tasks.names():
        known = ["classification", *tasks.names(), *(alias for alias, task in ALIASES.items() if task in tasks.names())]
        raise TaskError(f"there is no task '{task_type}'; {did_you_mean(task_type, known)}")
    return name


def student_section(student: StudentConfig) -> dict[str, Any]:
    """Return the student as a recipe writes it."""
    if student.keep_blocks is not None:
        return {"from_teacher": {"keep_blocks": list(student.keep_blocks), "weights": student.block_weights}}
    section = {"model": student.model_name_or_path, "kwargs": dict(student.kwargs), "pretrained": student.pretrained}
    return section if student.weights is None else {**section, "weights": student.weights}


def teacher_section(teacher: TeacherConfig) -> dict[str, Any]:
    """Return a teacher as a recipe writes it, without its training."""
    cache = dict(teacher.cache) if isinstance(teacher.cache, Mapping) else teacher.cache
    who: dict[str, Any] = {"model": teacher.model_name_or_path, "kwargs": dict(teacher.kwargs), "cache": cache}
    return who | {key: value for key in ("weights", "labels") if (value := getattr(teacher, key)) is not None}


def lesson(
    teacher: TeacherConfig, made: Callable[[], Built], train: Mapping[str, Any], *, is_random: bool
) -> dict[str, Any] | None:
    """Return how a teacher is trained first, as a recipe's ``train``, or ``None`` where it is not.

    Args:
        teacher: who.
        made: returns the model as it is.
        train: how the student is trained.
        is_random: whether it is an architecture without weights.
    """
    if isinstance(teacher.train, Mapping):
        return {**TRAIN, **teacher.train}
    if teacher.train is False:
        return None
    if teacher.train == "auto":
        fresh = made().fresh
        if not fresh and not is_random:
            return None
        logger.warning(
            "the teacher %s has no trained head for this task (%s): it is fine-tuned first; "
            "TeacherConfig(train=False) leaves it as it is",
            teacher.model_name_or_path,
            ", ".join(fresh[:3]) or "its weights are new",
        )
    return {**TRAIN, **train}


def layer_terms(
    config: DistillationConfig, student: nn.Module, teacher: nn.Module, whose: str = "teacher"
) -> dict[str, dict[str, Any]]:
    """Return the terms on layers as a recipe writes them, for two models that have these layers.

    Raises:
        TrainingError: a model lacks one; says what would fit.
        SignalError: the layers of a model have no numbers.
    """
    named = [isinstance(part, FeatureDistillation) and isinstance(part.student_layers[0], str) for part in config.parts]
    if not all(named):
        try:
            depths = _depth(student, "student"), _depth(teacher, whose)
        except SignalError as error:
            numbered = [type(part).__name__ for part in config.parts if not isinstance(part, FeatureDistillation)]
            if not numbered:
                raise
            raise SignalError(
                f"{numbered[0]} counts blocks by numbers, which models of several towers, or of layers without "
                "numbers, do not have; say FeatureDistillation with their paths, or the terms in a recipe"
            ) from error
        config.check(*depths, whose)
    return config.layers(_heads(student), _heads(teacher))


def check_classes(whose: str, config: TeacherConfig | StudentConfig, names: Sequence[str]) -> None:
    """Raise if a model is to have another number of classes than the data.

    Raises:
        TaskError: says both.
    """
    if config.num_labels is not None and names and config.num_labels != len(names):
        raise TaskError(
            f"the {whose} is to have num_labels={config.num_labels}, and the data have {len(names)} classes: "
            f"{', '.join(names[:12])}"
        )


def _depth(model: nn.Module, whose: str) -> int:
    """Return how many blocks a model has, whose layers have numbers."""
    taps = candidate_taps(model)
    if not is_token_signal(taps[-1]):
        raise SignalError(
            f"the layers of the {whose} ({type(model).__name__}) have no numbers; name them by their paths, as in "
            f"FeatureDistillation(teacher_layers=[…], student_layers=[…]): it has {', '.join(taps[:8])}"
        )
    return int(taps[-1].rpartition(".")[2])


def _heads(model: nn.Module) -> int | None:
    """Return how many attention heads a block of a model has, where its configuration says so."""
    count = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return count if isinstance(count, int) else None
