"""The only place where config meets objects: from the sections of a recipe to tasks, data, objectives and trainers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from potstill.data.augment import split_step
from potstill.data.load import Splits, load_splits
from potstill.data.splits import with_transfer
from potstill.errors import DataError, ObjectiveError, TrainingError
from potstill.interfaces import Batch, BatchDataset, Task
from potstill.losses.objective import Objective, Term
from potstill.models.hugging_face import hub_commit
from potstill.models.inputs import TEACHER_PREFIX
from potstill.models.load import Blueprint, read_card
from potstill.recipe.layers import Pairs, spread
from potstill.recipe.schema import ModelSpec, Recipe, TeacherSpec, TermSpec, TrainSpec, WhoSpec
from potstill.registry import callbacks, tasks
from potstill.runs.cache import file_hash
from potstill.training.callbacks import MaxNorm
from potstill.training.optimizers import Choice, find_optimizer, find_scheduler, make_scheduler
from potstill.training.precision import HALVES, chosen_precision

_BY_TOKEN = re.compile(r"(^|[./])(hidden|attention|query|key|value)\.\d+$")

DEFAULTS: dict[str, Any] = {
    "logging_strategy": "steps",
    "logging_steps": 0.02,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": [],
    "remove_unused_columns": False,
    "restore_callback_states_from_checkpoint": True,
    "per_device_eval_batch_size": 256,
    "log_level": "error",
    "logging_nan_inf_filter": False,  # which would log a diverged training as if it went on
    "dataloader_pin_memory": torch.cuda.is_available(),
    "use_cpu": not torch.accelerator.is_available(),
}
"""Training arguments where a recipe says nothing; fractions are shares of the training."""


@dataclass(frozen=True)
class TrainerSetup:
    """What a ``train:`` section means to :class:`DistillationTrainer`."""

    arguments: TrainingArguments
    callbacks: list[TrainerCallback]
    keywords: dict[str, Any] = field(default_factory=dict)


def make_task(recipe: Recipe) -> Task:
    """Return the task, not yet fitted to data."""
    task: Task = tasks.get(recipe.task.name)(**recipe.task.options, augment=list(recipe.data.augment))
    return task


def fitted_task(recipe: Recipe, splits: Splits) -> Task:
    """Return the task, fitted to the training split.

    A transfer set names no classes: then they are those of ``data.labels``, of another split, or of a saved teacher.
    """
    task = make_task(recipe)
    task.fit(splits.train)
    if not task.label_names:
        task.label_names = _label_names(recipe, splits)
    return task


def make_splits(recipe: Recipe, *, allow_code: bool = True) -> Splits:
    """Return the data of a recipe.

    Raises:
        DataError: the data cannot be read or split as asked, or leave nothing to judge on.
    """
    data, label = recipe.data, str(recipe.task.options.get("label", "label"))
    found = load_splits(
        data.source,
        data.path,
        name=data.name,
        revision=data.revision,
        splits=data.splits,
        columns=data.columns,
        limit=data.limit,
        label=label,
        label_names=data.labels,
        validation=data.validation,
        test=data.test,
        seed=data.seed,
        kwargs=data.kwargs,
        allow_code=allow_code,
    )
    if found.test is None:
        raise DataError("there is no test split to judge the models on; say its share as in `data: {test: 0.2}`")
    if data.synthesize is None:
        return found
    features = recipe.task.options.get("features")
    return with_transfer(found, data.synthesize, label=label, features=features, seed=data.seed, allow_code=allow_code)


def make_blueprint(spec: ModelSpec) -> Blueprint:
    """Return how to build a model by its reference."""
    weights = spec.weights if spec.weights is None or "://" in spec.weights else Path(spec.weights).expanduser()
    return Blueprint(spec.model, spec.kwargs, weights, spec.pretrained)


def student_blueprint(recipe: Recipe, saved: Callable[[str], Path] | None = None) -> Blueprint:
    """Return how to build the student.

    Args:
        recipe: the recipe.
        saved: teacher's name to the folder where it is saved, for a student cut from a fine-tuned teacher; without it
            such a student is cut from the teacher as it began.
    """
    spec = recipe.student
    if spec.from_teacher is None:
        fields_ = {key: getattr(spec, key) for key in WhoSpec.model_fields}
        return make_blueprint(ModelSpec(model=spec.model or "", **fields_))
    owner = _owner(recipe)
    whole = make_blueprint(recipe.all_teachers[owner])
    if spec.from_teacher.weights == "finetuned" and saved is not None:
        whole = Blueprint(str(saved(owner)))
    return replace(whole, keep_blocks=tuple(spec.from_teacher.keep_blocks), container=spec.from_teacher.container)


def student_name(recipe: Recipe) -> str:
    """Return the student's reference, or how it is cut."""
    cut = recipe.student.from_teacher
    if cut is None:
        return str(recipe.student.model)
    return f"blocks {', '.join(str(place) for place in cut.keep_blocks)} of {recipe.all_teachers[_owner(recipe)].model}"


def fingerprint(spec: ModelSpec) -> Any:
    """Return what decides a model before it is trained, as plain data: the content of its files, not their place."""
    folder = Path(spec.model).expanduser()
    model: Any = spec.model
    if folder.is_dir():
        kinds = (".json", ".safetensors", ".bin", ".txt", ".model", ".py")
        model = {file.name: file_hash(file) for file in sorted(folder.iterdir()) if file.suffix in kinds}
    elif spec.pretrained and ":" not in spec.model:
        model = hub_commit(spec.model, spec.kwargs)
    remote = spec.weights is None or "://" in spec.weights
    return [model, spec.weights if remote else file_hash(Path(str(spec.weights)).expanduser())]


def teacher_prefix(recipe: Recipe, name: str) -> str:
    """Return what a teacher's own entries in a batch begin with."""
    return TEACHER_PREFIX if len(recipe.all_teachers) == 1 else f"{TEACHER_PREFIX}{name}/"


def find_processors(recipe: Recipe, task: Task, *, allow_code: bool = True) -> dict[str, Any]:
    """Return how each model wants its inputs, by the teacher's name or ``student``; equal ones are one object.

    Raises:
        CodeNotAllowedError: code that was not allowed.
        ModelError: a model comes without the tokenizer or image processor that the task needs.
    """
    facts = task.facts()
    if "auto_model" not in facts:  # a task of plain tensors
        return dict.fromkeys(["student", *recipe.all_teachers])
    blueprints = {"student": student_blueprint(recipe)}
    blueprints |= {name: make_blueprint(spec) for name, spec in recipe.all_teachers.items()}
    specs: dict[str, WhoSpec] = {"student": recipe.student, **recipe.all_teachers}
    if recipe.student.from_teacher is not None:
        specs["student"] = recipe.all_teachers[_owner(recipe)]
    made: dict[str, Any] = {}
    found = {}
    for name, blueprint in blueprints.items():
        other = specs[name].processor
        source = blueprint if other is None else Blueprint(other)
        key = f"{source.model} {dict(source.kwargs)}"
        if key not in made:
            made[key] = source.processor(facts, allow_code=allow_code) or _saved_processor(source, recipe)
        found[name] = made[key]
    return found


def _saved_processor(blueprint: Blueprint, recipe: Recipe) -> Any:
    """Return how a plain model that potstill saved had its inputs, where its task has a word for it."""
    card = None if blueprint.folder is None else read_card(blueprint.folder)
    if card is None or card.get("task") != recipe.task.name:
        return None
    task = tasks.get(recipe.task.name)()
    task.restore(card["settings"])
    return getattr(task, "own", None)


def check_tokens(recipe: Recipe, objective: Objective, batch: Batch) -> None:
    """Raise if a term compares positions of texts that teacher and student see as different tokens.

    Raises:
        ObjectiveError: names the term, the signal and what to do.
    """
    for name in recipe.all_teachers:
        if f"{teacher_prefix(recipe, name)}input_ids" not in batch:
            continue
        for term_name, term in objective.named_terms():
            several = len(recipe.all_teachers) > 1
            own = [s for s in term.teacher if not term.hard and (not several or s.startswith(f"{name}/"))]
            signal = next((s for s in own if _BY_TOKEN.search(s)), None)
            if signal is not None:
                raise ObjectiveError(
                    f"objective.{term_name} compares '{signal}' token by token, and the teacher '{name}' and the "
                    "student have different tokenizers; give both the same one with `processor:`, or compare `logits`"
                )


def with_views(task: Task, spec: TrainSpec) -> Task:
    """Return the task with the random views of a ``train:`` section; itself where that says nothing of them."""
    if spec.augment is None:
        return task
    own: Any = copy.copy(task)
    own.augment = list(spec.augment)
    return own  # type: ignore[no-any-return]


def training_set(recipe: Recipe, task: Task, spec: TrainSpec, table: Dataset, seed: int) -> BatchDataset:
    """Return the training batches of a model, with the random views that its ``train:`` section asks for.

    Args:
        recipe: the recipe.
        task: as the models want their inputs.
        spec: how the model is trained.
        table: the samples.
        seed: of the views; those of a fixed number of views are drawn by ``data.seed``.
    """
    drawn = seed if spec.views is None else recipe.data.seed
    made: Any = with_views(task, spec).dataset(table, training=True, seed=drawn)
    if spec.views is not None:
        made.views = spec.views
    return made  # type: ignore[no-any-return]


def is_random_view(recipe: Recipe, spec: TrainSpec) -> bool:
    """Return whether a model that is trained so sees other views of a sample as time goes on."""
    return bool(recipe.data.augment if spec.augment is None else spec.augment)


def count_views(recipe: Recipe, spec: TrainSpec) -> int | None:
    """Return how many views of a sample a model that is trained so sees; ``None`` for views without end."""
    return spec.views if is_random_view(recipe, spec) else 1


def prepared(task: Task, student: Any, teachers: Mapping[str, Any] | None = None) -> Task:
    """Return a copy of a fitted task for these models; see :meth:`potstill.interfaces.Task.prepare`."""
    own = copy.copy(task)
    own.prepare(student, dict(teachers or {}))
    return own


def prepared_for_distillation(recipe: Recipe, task: Task, processors: Mapping[str, Any]) -> Task:
    """Return a copy of a fitted task that makes the inputs of the student and of every teacher."""
    teachers = {teacher_prefix(recipe, name): processors[name] for name in recipe.all_teachers}
    return prepared(task, processors["student"], teachers)


def is_random(spec: TeacherSpec) -> bool:
    """Return whether a teacher certainly knows nothing: an architecture, not trained and without weights."""
    new = spec.model.startswith("potstill:") or not spec.pretrained
    return spec.train is None and spec.weights is None and new


def make_objective(recipe: Recipe, task: Task, layers: Mapping[str, Pairs] | None = None) -> Objective:
    """Return the objective of the distilled student.

    Args:
        recipe: the recipe.
        task: whose mask the responses have.
        layers: by term, the pairs of layers that were found for it.

    Raises:
        ObjectiveError: a term cannot be made, or its layers are to be found and are not there.
    """
    found = layers or {}
    specs = [spread(name, spec, found.get(name)) for name, spec in recipe.objective.items()]
    terms = {name: make_term(spec) for each in specs for name, spec in each.items()}
    if len(terms) < sum(map(len, specs)):
        raise ObjectiveError("two terms of the objective have one name; rename the one without `layers`")
    balance = None if recipe.balance is None else recipe.balance.model_dump()
    return Objective(terms, response_mask=task.mask, balance=balance)


def teacher_taps(recipe: Recipe, objective: Objective, name: str) -> list[str]:
    """Return the taps that the terms read from one teacher: those under its name, or all where it is the only one."""
    taps = [tap for tap in objective.taps("teacher") if tap.split("/")[-1] != "logits"]
    several = len(recipe.all_teachers) > 1
    return [tap.removeprefix(f"{name}/") for tap in taps if not several or tap.startswith(f"{name}/")]


def supervised_objective(task: Task) -> Objective:
    """Return the task's own loss on the labels: how a teacher is trained."""
    return Objective({"hard": Term(task.hard_loss)}, response_mask=task.mask)


def check_labels(objective: Objective, train: Dataset, label: str) -> None:
    """Raise if a term needs labels and the training split has none.

    Raises:
        TrainingError: names the terms and what to do.
    """
    needing = objective.needs_labels()
    if needing and label not in train.column_names:
        raise TrainingError(
            f"the training split has no labels (no column '{label}'), and these terms of the objective need them: "
            f"{', '.join(needing)}; drop them to distil from a transfer set, or name the column in task.label"
        )


def make_training(
    spec: TrainSpec, *, folder: Path, seed: int, bars: bool, evaluates: bool, allow_code: bool = True
) -> TrainerSetup:
    """Return arguments, callbacks and the rest of a trainer's settings.

    Args:
        spec: the ``train:`` section.
        folder: where checkpoints go.
        seed: of shuffling, dropout and views.
        bars: whether to show progress bars.
        evaluates: whether there is a validation split.
        allow_code: whether dotted paths outside potstill may be imported.

    Raises:
        TrainingError: an argument that Trainer refuses.
        ComponentError: an unknown optimizer, scheduler or callback.
    """
    made = [_callback(component, allow_code) for component in spec.callbacks]
    optimizer = find_optimizer(spec.optimizer, allow_code=allow_code)
    scheduler = find_scheduler(spec.scheduler, allow_code=allow_code)
    _check_settings(spec, made, evaluates, optimizer, scheduler)
    wanted = {**DEFAULTS, **_trainer_names(optimizer.trainer, optimizer.options, scheduler.trainer, scheduler.options)}
    for callback in made:
        wanted |= getattr(callback, "training_arguments", {})
    if not evaluates:
        wanted |= {"eval_strategy": "no", "load_best_model_at_end": False}
    if scheduler.target is torch.optim.lr_scheduler.ReduceLROnPlateau:
        wanted.setdefault("metric_for_best_model", "loss")
    wanted |= spec.options
    precision = precision_of(spec)
    if precision in HALVES:
        wanted[precision] = True
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=spec.epochs,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            weight_decay=spec.weight_decay,
            seed=seed,
            data_seed=seed,
            disable_tqdm=not bars,
            **wanted,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise TrainingError(f"train: {error}") from error
    keywords: dict[str, Any] = {
        "projector_learning_rate": spec.projector_learning_rate,
        "group_by_length": spec.group_by_length,
        "batch_tokens": spec.batch_tokens,
    }
    if optimizer.target is not None:
        keywords["optimizer_cls_and_kwargs"] = optimizer.target, {"lr": spec.learning_rate, **optimizer.options}
    keywords["scheduler"] = make_scheduler(scheduler)
    if spec.max_norm is not None:
        made.append(MaxNorm(spec.max_norm))
    return TrainerSetup(arguments, made, keywords)


def precision_of(spec: TrainSpec) -> str:
    """Return in which precision a model is trained here: ``fp32``, ``medium``, ``bf16`` or ``fp16``.

    Raises:
        TrainingError: a precision that the processor has not, or two of them.
    """
    device = "cpu" if spec.options.get("use_cpu") else torch.accelerator.current_accelerator() or "cpu"
    return chosen_precision(spec.precision, spec.options, device)


def apply_dropout(model: torch.nn.Module, share: float | None) -> None:
    """Set every dropout layer of a model to ``share``; nothing for ``None``.

    Raises:
        TrainingError: the model has no dropout layer.
    """
    if share is None:
        return
    layers = [m for m in model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
    if not layers and share:
        raise TrainingError(f"train.dropout is {share} and {type(model).__name__} has no dropout layer")
    for layer in layers:
        layer.p = share


def make_term(spec: TermSpec) -> Term:
    """Return one term of an objective.

    Raises:
        ObjectiveError: the loss has no such option.
    """
    return Term(
        spec.loss,
        spec.student,
        spec.teacher,
        weight=spec.weight,
        mask=spec.mask,
        project=spec.project,
        scale=spec.scale,
        **spec.options,
    )


def _owner(recipe: Recipe) -> str:
    """Return the name of the teacher from which the student is cut."""
    cut = recipe.student.from_teacher
    return (cut.teacher if cut is not None else None) or next(iter(recipe.all_teachers))


def _label_names(recipe: Recipe, splits: Splits) -> list[str]:
    label = str(recipe.task.options.get("label", "label"))
    tables = [table for table in (splits.validation, splits.test) if table is not None]
    cards = [read_card(Path(spec.model).expanduser()) for spec in recipe.all_teachers.values()]
    found = [
        recipe.data.labels,
        *(getattr(table.features.get(label), "names", None) for table in tables),
        *(card["settings"].get("label_names") for card in cards if card is not None),
    ]
    return list(next((names for names in found if names), []))


def _check_settings(
    spec: TrainSpec, made: list[TrainerCallback], evaluates: bool, optimizer: Choice, scheduler: Choice
) -> None:
    """Refuse what would have no effect, or fail only once the training is under way."""
    unused = sorted({"adam_beta1", "adam_beta2", "adam_epsilon"} & set(spec.options))
    if unused and optimizer.target is not None:
        raise TrainingError(
            f"train.{unused[0]} has no effect on the optimizer '{optimizer.name}'; "
            f"say it as in `optimizer: {{name: {optimizer.name}, betas: [0.9, 0.999], eps: 1.0e-8}}`"
        )
    strategy = str(spec.options.get("eval_strategy", "no"))
    needing = [] if strategy == "no" else [f"eval_strategy: {strategy}"]
    needing += [c.name for c in [scheduler] if c.target is torch.optim.lr_scheduler.ReduceLROnPlateau]
    needing += [
        split_step(component)[0]
        for component, callback in zip(spec.callbacks, made, strict=True)
        if "load_best_model_at_end" in getattr(callback, "training_arguments", {})
    ]
    if needing and not evaluates:
        raise TrainingError(f"train: {needing[0]} needs a validation split with labels, and there is none")


def _callback(component: str | Mapping[str, Any], allow_code: bool) -> TrainerCallback:
    name, options = split_step(component)
    factory: Callable[..., TrainerCallback] = callbacks.get(name, allow_code=allow_code)
    return factory(**options)


def _trainer_names(
    optimizer: str | None, optimizer_options: Mapping[str, Any], scheduler: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    names: dict[str, Any] = {}
    if optimizer is not None:
        names["optim"] = optimizer
        if optimizer_options:
            names["optim_args"] = ",".join(f"{key}={value}" for key, value in optimizer_options.items())
    if scheduler is not None:
        names["lr_scheduler_type"] = scheduler
        if options:
            names["lr_scheduler_kwargs"] = dict(options)
    return names
