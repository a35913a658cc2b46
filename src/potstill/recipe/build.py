"""The only place where config meets objects: from the sections of a recipe to tasks, data, objectives and trainers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

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
from potstill.recipe.schema import (
    CutSpec,
    ModelSpec,
    Recipe,
    StudentSpec,
    TeacherSpec,
    TermSpec,
    TrainSpec,
    WhoSpec,
)
from potstill.registry import tasks
from potstill.runs.cache import file_hash

_BY_TOKEN = re.compile(r"(^|[./])(hidden|attention|query|key|value)\.\d+$")


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


def make_blueprint(spec: ModelSpec | TeacherSpec) -> Blueprint:
    """Return how to build a model by its reference; for one that may be cut see :func:`teacher_blueprint`."""
    weights = spec.weights if spec.weights is None or "://" in spec.weights else Path(spec.weights).expanduser()
    return Blueprint(spec.model, spec.kwargs, weights, spec.pretrained)


def student_blueprint(recipe: Recipe, saved: Callable[[str], Path] | None = None) -> Blueprint:
    """Return how to build the student.

    Args:
        recipe: the recipe.
        saved: teacher's name to the folder where it is saved, for a student cut from a fine-tuned teacher; without it
            such a student is cut from the teacher as it began.
    """
    return _blueprint(recipe, recipe.student, saved)


def teacher_blueprint(recipe: Recipe, name: str, saved: Callable[[str], Path] | None = None) -> Blueprint:
    """Return how to build a teacher, one that is cut from another teacher included; see :func:`student_blueprint`."""
    return _blueprint(recipe, recipe.all_teachers[name], saved)


def _blueprint(recipe: Recipe, spec: StudentSpec | TeacherSpec, saved: Callable[[str], Path] | None) -> Blueprint:
    if spec.from_teacher is None:
        fields_ = {key: getattr(spec, key) for key in WhoSpec.model_fields}
        return make_blueprint(ModelSpec(model=spec.model or "", **fields_))
    owner = _owner(recipe, spec.from_teacher)
    whole = teacher_blueprint(recipe, owner, saved)
    if spec.from_teacher.weights == "finetuned" and saved is not None:
        whole = Blueprint(str(saved(owner)))
    return replace(whole, keep_blocks=tuple(spec.from_teacher.keep_blocks), container=spec.from_teacher.container)


def student_name(recipe: Recipe) -> str:
    """Return the student's reference, or how it is cut."""
    return model_name(recipe, recipe.student)


def model_name(recipe: Recipe, spec: StudentSpec | TeacherSpec) -> str:
    """Return the reference of a student or teacher, how it is cut, or what kind of source it is."""
    cut = spec.from_teacher
    if cut is not None:
        owner = model_name(recipe, recipe.all_teachers[_owner(recipe, cut)])
        return f"blocks {', '.join(str(place) for place in cut.keep_blocks)} of {owner}"
    source = getattr(spec, "source", None)
    return str(spec.model) if source is None else str(split_step(source)[0])


def fingerprint(spec: ModelSpec | TeacherSpec) -> Any:
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
    blueprints |= {name: teacher_blueprint(recipe, name) for name in recipe.model_teachers}
    specs: dict[str, WhoSpec] = {"student": _whole(recipe, recipe.student)}
    specs |= {name: _whole(recipe, spec) for name, spec in recipe.model_teachers.items()}
    made: dict[str, Any] = {}
    found = {}
    for name, blueprint in blueprints.items():
        other = specs[name].processor
        source = blueprint if other is None else Blueprint(other)
        key = f"{source.model} {dict(source.kwargs)}"
        if key not in made:
            made[key] = source.processor(facts, allow_code=allow_code) or _saved_processor(source, recipe)
        found[name] = made[key]
    return {**dict.fromkeys(recipe.all_teachers, found["student"]), **found}


def _whole(recipe: Recipe, spec: StudentSpec | TeacherSpec) -> WhoSpec:
    """Return the section of the model that a model is cut from, or its own."""
    cut = spec.from_teacher
    return spec if cut is None else _whole(recipe, recipe.all_teachers[_owner(recipe, cut)])


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
    for name in recipe.model_teachers:
        if f"{teacher_prefix(recipe, name)}input_ids" not in batch:
            continue
        for term_name, term in objective.named_terms():
            several, prefixes = len(recipe.all_teachers) > 1, tuple(_prefixes(recipe, name))
            own = [s for s in term.teacher if not term.hard and (not several or s.startswith(prefixes))]
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


def prepared_for_distillation(
    recipe: Recipe, task: Task, processors: Mapping[str, Any], learner: str = "student"
) -> Task:
    """Return a copy of a fitted task that makes the inputs of a learner, the student if omitted, and of every teacher.

    The learner's have plain names; a teacher that learns from others is none of its own teachers.
    """
    others = [name for name in recipe.model_teachers if name != learner]
    return prepared(task, processors[learner], {teacher_prefix(recipe, name): processors[name] for name in others})


def is_random(spec: TeacherSpec) -> bool:
    """Return whether a teacher certainly knows nothing: an architecture, never trained and without weights."""
    new = spec.model.startswith("potstill:") or not spec.pretrained
    learns = spec.train is not None or spec.joint is not None or spec.source is not None
    return not learns and spec.from_teacher is None and spec.weights is None and new


def make_objective(
    recipe: Recipe,
    task: Task,
    layers: Mapping[str, Pairs] | None = None,
    terms: Mapping[str, TermSpec] | None = None,
) -> Objective:
    """Return the objective of the distilled student, or of a teacher that learns from others.

    Args:
        recipe: the recipe.
        task: whose mask the responses have.
        layers: by term, the pairs of layers that were found for it.
        terms: those of a teacher's own objective; the recipe's, with its balance, if omitted.

    Raises:
        ObjectiveError: a term cannot be made, or its layers are to be found and are not there.
    """
    found = layers or {}
    wanted = recipe.objective if terms is None else terms
    specs = [spread(name, spec, found.get(name)) for name, spec in wanted.items()]
    made = {name: make_term(spec) for each in specs for name, spec in each.items()}
    if len(made) < sum(map(len, specs)):
        raise ObjectiveError("two terms of the objective have one name; rename the one without `layers`")
    balance = None if recipe.balance is None or terms is not None else recipe.balance.model_dump()
    objective = Objective(made, response_mask=task.mask, balance=balance)
    check: Any = getattr(task, "check_objective", None)
    if check is not None:
        check(objective)
    return objective


def signals_of(
    recipe: Recipe, objectives: Sequence[Objective], name: str, among: Collection[str] | None = None
) -> list[str]:
    """Return the signals that terms read from one teacher, by themselves or through a source made of it.

    They go by its name, ``NAME/SIGNAL``, and by bare names where it is the only one.

    Args:
        recipe: the recipe.
        objectives: whose terms.
        name: the teacher's.
        among: the names of all teachers that these objectives have; those of the recipe if omitted.
    """
    read = [signal for objective in objectives for signal in objective.taps("teacher")]
    found = [signal.removeprefix(p) for signal in read for p in _prefixes(recipe, name) if signal.startswith(p)]
    found = [signal for signal in found if "/" not in signal]  # `nli/hidden.3` of a source is one teacher's alone
    if len(recipe.all_teachers if among is None else among) == 1:
        found += [signal for signal in read if not signal.startswith((f"{name}/", "self/"))]
    for other, spec in recipe.all_teachers.items():
        by_task = name in _tasks_of(spec.source) and any(f"{p}logits" in read for p in _prefixes(recipe, other))
        if by_task or (found and _weighs_by_logits(spec.source, name)):
            found.append("logits")
    return list(dict.fromkeys(found))


def _prefixes(recipe: Recipe, name: str) -> list[str]:
    """Return what signals that come from one teacher begin with: its name, or that of a source made of it."""
    found = [f"{name}/"]
    for other, spec in recipe.all_teachers.items():
        if other != name and name in _tasks_of(spec.source):  # which calls what is of one task `TASK/SIGNAL`
            mine = [task for task, one in split_step(spec.source or "")[1]["teachers"].items() if one == name]
            found += [f"{prefix}{task}/" for prefix in _prefixes(recipe, other) for task in mine]
        elif other != name and name in named_in(spec.source):
            found += _prefixes(recipe, other)
    return found


def _tasks_of(source: Any) -> set[str]:
    """Return the teachers of single tasks that a source is made of."""
    kind, options = split_step(source or "none")
    return set(dict(options["teachers"]).values()) if kind == "per_task" else set()


def _weighs_by_logits(source: Any, name: str) -> bool:
    """Return whether a source is an ensemble with this teacher that weighs the layers of each by its logits."""
    kind, options = split_step(source or "none")
    return kind == "ensemble" and options.get("by") == "confidence" and name in named_in(options)


def teacher_taps(recipe: Recipe, objective: Objective, name: str) -> list[str]:
    """Return the taps among the signals that terms read from one teacher: all but its logits."""
    return [tap for tap in signals_of(recipe, [objective], name) if tap.split("/")[-1] != "logits"]


def named_in(value: Any) -> set[str]:
    """Return every text in the options of a source: the teachers that it is made of are among them."""
    if isinstance(value, Mapping):
        return {text for item in value.values() for text in named_in(item)}
    if isinstance(value, list | tuple):
        return {text for item in value for text in named_in(item)}
    return {value} if isinstance(value, str) else set()


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


def _owner(recipe: Recipe, cut: CutSpec) -> str:
    """Return the name of the teacher from which a model is cut."""
    return cut.teacher or next(name for name, spec in recipe.model_teachers.items() if spec.from_teacher is None)


def _label_names(recipe: Recipe, splits: Splits) -> list[str]:
    label = str(recipe.task.options.get("label", "label"))
    tables = [table for table in (splits.validation, splits.test) if table is not None]
    cards = [read_card(Path(spec.model).expanduser()) for spec in recipe.model_teachers.values()]
    found = [
        recipe.data.labels,
        *(getattr(table.features.get(label), "names", None) for table in tables),
        *(card["settings"].get("label_names") for card in cards if card is not None),
    ]
    return list(next((names for names in found if names), []))
