"""The Python door: a teacher, a student and a way to distil, on the same engine as the recipes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Image
from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, TrainingArguments

from potstill.data.load import Splits, splits_from
from potstill.errors import DataError, TaskError, TrainingError, did_you_mean
from potstill.interfaces import Task
from potstill.models.load import ORIGINS
from potstill.recipe import build
from potstill.recipe.check_training import MANAGED
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import ModelSpec, Recipe
from potstill.registry import tasks
from potstill.runs.cache import content_hash, table_hash
from potstill.runs.metrics import RunMetrics
from potstill.runs.steps import Run

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

_TRAIN = {"epochs": 3.0, "batch_size": 32, "learning_rate": 5e-5, "weight_decay": 0.01}
_PAIRS = [
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("text1", "text2"),
]
_TEXTS = ("text", "sentence", "statement", "content", "review", "tweet")


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


@dataclass(frozen=True)
class DistillationConfig:
    """How to distil: α·T²·KL of the softened answers + β·cross-entropy on the labels.

    Attributes:
        distillation_type: ``"logit"``, or ``"feature"``, which adds the mean squared error between hidden states.
        temperature: T of the softened answers.
        alpha: weight of the soft loss.
        beta: weight of the loss on the labels; 1 − alpha if omitted. Given ones are taken as they are.
        features: for ``"feature"``: the student's signal to the teacher's, such as ``{"hidden.3": "hidden.6"}``.
        feature_weight: weight of each of these terms.
        text: the column of the texts, or two for pairs; found by itself where there is no doubt.
        image: the column of the images.
        label: the column of the classes; ``label`` or ``labels`` if omitted.
        label_names: names of the classes, where the data have only numbers.
        max_length: tokens at which texts are cut; 128 if omitted, or what the models take at most.
        baseline: whether to train the student without its teacher too, for comparison.
        seed: of everything.
    """

    distillation_type: Literal["logit", "feature"] = "logit"
    temperature: float = 4.0
    alpha: float = 0.7
    beta: float | None = None
    features: Mapping[str, str] = field(default_factory=dict)
    feature_weight: float = 1.0
    text: str | tuple[str, str] | None = None
    image: str | None = None
    label: str | None = None
    label_names: Sequence[str] | None = None
    max_length: int | None = None
    baseline: bool = True
    seed: int = 0


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


@dataclass(frozen=True)
class Distillation:
    """What came out.

    Attributes:
        run: the run, whose models can be loaded again with ``run.load("teacher")``.
    """

    run: Run

    @property
    def metrics(self) -> RunMetrics:
        """The figures, as in ``metrics.json``."""
        return self.run.metrics()

    @cached_property
    def student(self) -> nn.Module:
        """The distilled student."""
        return self.run.load("distilled")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder.path

    @property
    def student_folder(self) -> Path:
        """The student's folder, as ``from_pretrained`` and ``transformers.pipeline`` read it."""
        return self.run.model_folder("distilled")

    @property
    def report(self) -> Path:
        """What a person reads: one HTML file, see :mod:`potstill.report`."""
        return self.run.folder / "report.html"


class Distiller:
    """Distils a teacher into a student.

    Args:
        teacher: who teaches.
        student: who learns.
        config: how; :class:`DistillationConfig` with its defaults if omitted.

    Raises:
        TaskError: teacher and student are for different tasks, or for one that there is not.
    """

    def __init__(self, teacher: TeacherModel, student: StudentModel, config: DistillationConfig | None = None) -> None:
        self.teacher, self.student = teacher, student
        self.config = config or DistillationConfig()
        types = {teacher.config.task_type, student.config.task_type}
        if len({ALIASES.get(each, each) for each in types}) > 1:
            raise TaskError(f"expected teacher and student to have one task_type, got {' and '.join(sorted(types))}")
        self.task_type = teacher.config.task_type
        if self.task_type != "classification":
            _known_task(self.task_type)

    def distill(
        self,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        test_dataset: Any = None,
        args: TrainingArguments | Mapping[str, Any] | None = None,
        output: str | Path | None = None,
    ) -> Distillation:
        """Distil and return what came out; the same call goes on with a run that was stopped.

        Args:
            train_dataset: a ``datasets.Dataset`` (or a data frame, or a dictionary of columns) with texts or images, or
                with ``input_ids`` from the student's tokenizer.
            eval_dataset: what the models are judged on; a fifth of the training rows if omitted.
            test_dataset: if given, the models are judged on it, and ``eval_dataset`` is for choosing.
            args: how student and baseline are trained: ``TrainingArguments``, or keys of a recipe's ``train``; three
                epochs of batches of 32 at a learning rate of 5e-5 if omitted.
            output: the run's folder; that of ``args``, or one under ``runs/``, if omitted.

        Raises:
            PotstillError: data, models and settings do not go together; says what to do.
        """
        tables = _tables(train_dataset, eval_dataset, test_dataset)
        task = self._task(tables["train"])
        label = str(task["label"])
        has_eval = "test" in tables
        splits = splits_from(
            tables,
            label=label,
            label_names=self.config.label_names,
            validation=0 if has_eval else 0.1,
            seed=self.config.seed,
        )
        train = _train_section(args)
        recipe = self._recipe(task, splits, tables, train)
        if output is None and isinstance(args, TrainingArguments):
            output = args.output_dir
        run = Run(recipe, output, splits=splits)
        run.execute()
        return Distillation(run)

    def _recipe(
        self, task: Mapping[str, Any], splits: Splits, tables: Mapping[str, Dataset], train: Mapping[str, Any]
    ) -> Recipe:
        """Return the recipe that this distillation is."""
        teacher, student, names = self.teacher.config, self.student.config, self.config.label_names
        labelled = str(task["label"]) in splits.train.column_names
        cache = dict(teacher.cache) if isinstance(teacher.cache, Mapping) else teacher.cache
        who: dict[str, Any] = {"model": teacher.model_name_or_path, "kwargs": dict(teacher.kwargs), "cache": cache}
        who |= {key: value for key in ("weights", "labels") if (value := getattr(teacher, key)) is not None}
        content = content_hash({name: table_hash(table) for name, table in tables.items()})
        tree: dict[str, Any] = {
            "name": "distiller",
            "seed": self.config.seed,
            "task": dict(task),
            "data": {"source": "given", "path": content, "labels": names and list(names)},
            "teacher": who,
            "student": _student_section(student),
            "objective": self._objective(labelled),
            "train": {**_TRAIN, **train},
            "baseline": {"enabled": self.config.baseline},
        }
        draft = recipe_from(tree)
        fitted = build.fitted_task(draft, splits)
        self._check_labels(fitted)
        lesson = self._lesson(draft, fitted, train)
        return draft if lesson is None else recipe_from({**tree, "teacher": {**who, "train": lesson}})

    def _objective(self, labelled: bool) -> dict[str, Any]:
        config = self.config
        terms: dict[str, Any] = {"soft": {"loss": "kl", "weight": config.alpha, "temperature": config.temperature}}
        beta = 1 - config.alpha if config.beta is None else config.beta
        if labelled or config.beta is not None:
            terms["hard"] = {"loss": "cross_entropy", "weight": beta}
        else:
            logger.warning("the training data have no labels: the student learns from the teacher alone")
        if config.distillation_type == "feature":
            if not config.features:
                raise TrainingError("distillation_type='feature' needs features, such as {'hidden.3': 'hidden.6'}")
            for place, (own, taught) in enumerate(config.features.items()):
                hint = {"loss": "mse", "student": own, "teacher": taught, "project": "linear"}
                terms[f"feature_{place}"] = {**hint, "weight": config.feature_weight}
        elif config.distillation_type != "logit":
            raise TrainingError(f"expected distillation_type 'logit' or 'feature', got '{config.distillation_type}'")
        return terms

    def _lesson(self, recipe: Recipe, task: Task, train: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return how the teacher is trained first, or ``None`` where it is not."""
        wanted = self.teacher.config.train
        if isinstance(wanted, Mapping):
            return {**_TRAIN, **wanted}
        if wanted is True:
            return {**_TRAIN, **train}
        if wanted is False:
            return None
        spec = recipe.all_teachers["teacher"]
        fresh = build.make_blueprint(spec).make(task.facts(), seed=recipe.seed).fresh
        if not fresh and not build.is_random(spec):
            return None
        logger.warning(
            "the teacher %s has no trained head for this task (%s): it is fine-tuned first; "
            "TeacherConfig(train=False) leaves it as it is",
            spec.model,
            ", ".join(fresh[:3]) or "its weights are new",
        )
        return {**_TRAIN, **train}

    def _task(self, train: Dataset) -> dict[str, Any]:
        """Return the recipe's ``task``: its name and the columns of the data."""
        config = self.config
        image = config.image or next((n for n, each in train.features.items() if isinstance(each, Image)), None)
        if self.task_type == "classification":
            name = "text-classification" if image is None else "image-classification"
        else:
            name = ALIASES.get(self.task_type, self.task_type)
        label = config.label or next((n for n in ("label", "labels") if n in train.column_names), "label")
        if name == "image-classification":
            return {"name": name, "label": label, **({} if image is None else {"image": image})}
        if name != "text-classification":
            return {"name": name, "label": label}
        return {"name": name, "label": label, "max_length": config.max_length, **_texts(config.text, train, label)}

    def _check_labels(self, task: Task) -> None:
        found = len(task.label_names)
        for whose, config in (("teacher", self.teacher.config), ("student", self.student.config)):
            if config.num_labels is not None and found and config.num_labels != found:
                raise TaskError(
                    f"the {whose} is to have num_labels={config.num_labels}, and the data have {found} classes: "
                    f"{', '.join(task.label_names[:12])}"
                )


def _load(reference: str, config: TeacherConfig | StudentConfig, spec: Mapping[str, Any]) -> nn.Module:
    name = _kind(reference) if config.task_type == "classification" else _known_task(config.task_type)
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


def _known_task(task_type: str) -> str:
    name = ALIASES.get(task_type, task_type)
    if name not in tasks.names():
        known = ["classification", *tasks.names(), *(alias for alias, task in ALIASES.items() if task in tasks.names())]
        raise TaskError(f"there is no task '{task_type}'; {did_you_mean(task_type, known)}")
    return name


def _student_section(student: StudentConfig) -> dict[str, Any]:
    if student.keep_blocks is not None:
        return {"from_teacher": {"keep_blocks": list(student.keep_blocks), "weights": student.block_weights}}
    section = {"model": student.model_name_or_path, "kwargs": dict(student.kwargs), "pretrained": student.pretrained}
    return section if student.weights is None else {**section, "weights": student.weights}


def _tables(train: Any, evaluation: Any, test: Any) -> dict[str, Dataset]:
    """Return the tables by split: what is judged on is ``test``."""
    chosen, judged = (None, evaluation) if test is None else (evaluation, test)
    given = {"train": train, "validation": chosen, "test": judged}
    return {name: _table(each, name) for name, each in given.items() if each is not None}


def _table(data: Any, name: str) -> Dataset:
    if isinstance(data, Dataset):
        return data.with_format(None)
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # a data frame of pandas
        return Dataset.from_pandas(data, preserve_index=False)
    if isinstance(data, Mapping) and all(isinstance(column, Sequence) for column in data.values()):
        return Dataset.from_dict(dict(data))
    if isinstance(data, Sequence) and data and all(isinstance(row, Mapping) for row in data):
        return Dataset.from_list([dict(row) for row in data])
    raise DataError(
        f"expected the {name} data as datasets.Dataset, a data frame, a dictionary of columns or a list of rows, "
        f"got {type(data).__name__}"
    )


def _texts(wanted: str | Sequence[str] | None, train: Dataset, label: str) -> dict[str, str]:
    """Return the columns of the texts as options of the task."""
    if isinstance(wanted, str):
        return {"text": wanted}
    if wanted is not None:
        return {"text": wanted[0], "pair": wanted[1]}
    texts = [n for n, each in train.features.items() if "string" in str(getattr(each, "dtype", "")) and n != label]
    pair = next((pair for pair in _PAIRS if set(pair) <= set(texts)), None)
    if pair is not None:
        return {"text": pair[0], "pair": pair[1]}
    if "input_ids" in train.column_names:
        return {}
    known = texts if len(texts) == 1 else [name for name in _TEXTS if name in texts]
    if len(known) == 1:
        return {"text": known[0]}
    raise DataError(
        f"expected one column of texts, got the columns {', '.join(train.column_names)}; "
        "say which as DistillationConfig(text=…), or two of them for pairs"
    )


def _train_section(args: TrainingArguments | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the keys of a recipe's ``train`` that training arguments mean."""
    if not isinstance(args, TrainingArguments):
        return dict(args or {})
    if args.seed != TrainingArguments(output_dir=args.output_dir).seed:
        logger.warning("args.seed is not used: say DistillationConfig(seed=%d)", args.seed)
    section: dict[str, Any] = {
        "epochs": args.num_train_epochs,
        "batch_size": args.per_device_train_batch_size,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
    }
    usual = TrainingArguments(output_dir=args.output_dir).to_dict()
    skip = {*MANAGED, "learning_rate", "weight_decay", "logging_dir", "run_name", "label_names", "local_rank"}
    changed = {key: value for key, value in args.to_dict().items() if key not in skip and value != usual.get(key)}
    if args.label_smoothing_factor:
        changed["label_smoothing_factor"] = args.label_smoothing_factor  # refused, with what to say in its place
    return {**section, **changed}
