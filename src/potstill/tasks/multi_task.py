"""Several classification tasks learned by one model: their classes one after another, one head beside the other."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from potstill.data.mixing import TASK, Mixed, Padding
from potstill.errors import ComponentError, ObjectiveError, PotstillError, TaskError, did_you_mean
from potstill.interfaces import FOREIGN, Batch, Progress, Signals, Task
from potstill.models.inputs import respond
from potstill.registry import losses
from potstill.registry import tasks as known_tasks
from potstill.tasks.classification import Classification

_EXPONENTS = {"sqrt": 0.5, "uniform": 0.0}
_SHARED = ("forward", "mask", "answers", "hard_loss")


@known_tasks.register("multi-task")
class MultiTask(Classification):
    """Several classification tasks of one kind of input for one model, with one output for each class of each task.

    The classes of all tasks stand one after another, called ``TASK/CLASS``. The logits of a sample are those of its own
    task; the others are −10000, so that softmax, cross-entropy and divergences are exactly those of a head for each
    task; ``mse`` is then divided by the number of all classes. What compares all columns with each other, such as label
    smoothing, is refused by :meth:`check_objective`.

    The data are a table with the column ``task``, as the data source ``tasks`` makes it. A batch has ``task`` (int64)
    and, to be named as the ``mask`` of a term, ``task/NAME`` and ``task/NAME/labelled`` (bool); see
    :func:`per_task_terms`. The primary metric ``mean`` is the mean over the tasks of the primary metric of each; that
    and its others are called ``TASK/METRIC``.

    Args:
        tasks: the name of each task to what a recipe's ``task:`` says of it: the ``name`` of a classification task and
            its options.
        sampling: how often a task is seen: ``proportional`` for every row once an epoch; else an epoch has as many
            rows, and of a task with ``n`` of them a share in proportion to ``n^a``, ``a`` being 0.5 for ``sqrt``, 0 for
            ``uniform``, or the number that is given; see :func:`potstill.data.mixing.drawn_rows`. With these, texts of
            like length are not put together.
        augment: entries of ``data.augment``, for all tasks.
    """

    name = "multi-task"
    primary = "mean"

    def __init__(
        self,
        *,
        tasks: dict[str, dict[str, Any]] | None = None,
        sampling: Literal["proportional", "sqrt", "uniform"] | Annotated[float, Field(ge=0, le=1)] = "proportional",
        augment: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {name: _make(name, spec) for name, spec in (tasks or {}).items()}
        self.sampling = sampling
        self.augment = list(augment)
        _check_kinds(self.parts)

    @property
    def exponent(self) -> float | None:
        """The exponent of the sampling; ``None`` where every row is seen once an epoch."""
        value = _EXPONENTS.get(self.sampling) if isinstance(self.sampling, str) else float(self.sampling)
        return None if value == 1 else value

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """The name of each task to the number of its first class and how many classes it has."""
        owners = [name.partition("/")[0] for name in self.label_names]
        return {name: (owners.index(name) if name in owners else 0, owners.count(name)) for name in self.parts}

    def fit(self, train: Dataset) -> None:
        """Learn classes and inputs of every task from its rows; the tasks are then in the order of the table.

        Raises:
            TaskError: the table has other tasks, or a task cannot use its columns.
        """
        if not self.parts:
            raise TaskError("the task 'multi-task' needs `tasks: {NAME: {name: text-classification, …}}`")
        kind = train.features.get(TASK)
        if not isinstance(kind, ClassLabel):
            raise TaskError(
                f"expected a column '{TASK}' that says of which task a row is; `data: {{source: tasks}}` makes it"
            )
        unknown = next((name for name in kind.names if name not in self.parts), None)
        if unknown is not None:
            hint = did_you_mean(unknown, self.parts)
            raise TaskError(f"the recipe has no task '{unknown}', and the data have; {hint}")
        missing = next((name for name in self.parts if name not in kind.names), None)
        if missing is not None:
            raise TaskError(
                f"the data have no task '{missing}', and the recipe has; {did_you_mean(missing, kind.names)}"
            )
        self.parts = {name: copy.copy(self.parts[name]) for name in kind.names}
        super().fit(train)
        for name, part in self.parts.items():
            self._fit(name, part, self.part_table(train, name))
        widths = {name: part.facts().get("in_features") for name, part in self.parts.items()}
        if len(set(widths.values())) > 1 and not any("image_size" in part.facts() for part in self.parts.values()):
            shown = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise TaskError(f"one model takes equally many features of every task, got: {shown}")

    def prepare(self, student: Any, teachers: Mapping[str, Any]) -> None:
        """Let every task take how the models want their inputs; teachers of one task are asked about all rows."""
        self.parts = {name: copy.copy(part) for name, part in self.parts.items()}
        for part in self.parts.values():
            part.prepare(student, teachers)

    def part(self, name: str) -> Task:
        """Return one of the tasks by itself: fitted, with its own classes, prepared as this is.

        With the rows of :meth:`part_table` a model of this task alone is trained and judged.

        Raises:
            TaskError: there is no such task.
        """
        if name not in self.parts:
            raise TaskError(f"there is no task '{name}'; {did_you_mean(name, self.parts)}")
        own: Any = copy.copy(self.parts[name])
        start, count = self.spans[name]
        if count:
            own.label_names = [label.removeprefix(f"{name}/") for label in self.label_names[start : start + count]]
        own.augment = list(self.augment)
        return own  # type: ignore[no-any-return]

    def part_table(self, table: Dataset, name: str) -> Dataset:
        """Return the rows of one task with its own columns, labels and classes; ``sample_id`` stays as it is.

        Raises:
            TaskError: there is no such task.
        """
        own: Any = self.part(name)
        rows = np.flatnonzero(np.asarray(table[TASK][:]) == list(self.parts).index(name))
        chosen = table.select(rows)
        columns = {column: column.removeprefix(f"{name}.") for column in table.column_names if "." in column}
        kept = {column: plain for column, plain in columns.items() if column.startswith(f"{name}.")}
        part = chosen.select_columns([*kept, "sample_id"]).rename_columns(kept)
        if self.label not in table.column_names:
            return part
        if own.label in part.column_names:
            raise TaskError(
                f"the data of the task '{name}' have classes beside the column '{own.label}' of `task.tasks.{name}`; "
                f"say `label: {own.label}` in the data of the task too"
            )
        start, count = self.spans[name]
        names = [label.removeprefix(f"{name}/") for label in table.features[self.label].names[start : start + count]]
        ids = np.asarray(chosen[self.label][:], np.int64)
        return part.add_column(own.label, np.where(ids < 0, -1, ids - start), feature=ClassLabel(names=names))

    def dataset(self, table: Dataset, *, training: bool, seed: int) -> Mixed:
        """Return batches of all tasks; shorter texts are padded to the longest of the batch.

        Raises:
            TaskError: a table without the column ``task``, or what a task raises.
        """
        self.require_column(table, TASK)
        owner = np.asarray(table[TASK][:], np.int64)
        made: dict[str, Any] = {}
        for number, name in enumerate(self.parts):
            part = self.part_table(table, name) if (owner == number).any() else None
            made[name] = None if part is None else self.part(name).dataset(part, training=training, seed=seed)
        return Mixed(
            torch.as_tensor(np.asarray(table["sample_id"][:]), dtype=torch.int64),
            torch.from_numpy(owner),
            made,
            starts={name: start for name, (start, _) in self.spans.items()},
            classes=len(self.label_names),
            padding=_padding(self.parts.values()),
            exponent=self.exponent if training else None,
            seed=seed,
        )

    def forward(self, model: nn.Module, batch: Batch) -> Signals:
        """Return ``logits`` ``[B, C]`` over the classes of all tasks, −10000 for those of others than the sample's.

        A model with another number of outputs knows one task; its logits come back as they are.

        Raises:
            TaskError: the batch does not say of which tasks its samples are.
        """
        said = respond(model, batch)
        logits: Tensor = said["logits"]
        if logits.shape[-1] != len(self.label_names):
            return said
        if TASK not in batch:
            raise TaskError(f"the batch has no entry '{TASK}', so that nothing says of which task a sample is")
        owners = [number for number, (_, count) in enumerate(self.spans.values()) for _ in range(count)]
        foreign = torch.tensor(owners, device=logits.device) != batch[TASK][:, None]
        return {**said, "logits": logits.masked_fill(foreign, FOREIGN)}

    def metrics(self, answers: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """Return the metrics of every task that has labelled samples, as ``TASK/METRIC``, and ``mean``.

        ``mean`` is the mean of each one's primary metric over those tasks.

        Args:
            answers: predicted classes ``[N]`` among those of all tasks.
            labels: ``[N]``; −100 is left out.
        """
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            found |= {f"{name}/{metric}": value for metric, value in self._of(name, part, answers, labels).items()}
        chief = [found[key] for key in (f"{name}/{part.primary}" for name, part in self.parts.items()) if key in found]
        return {self.primary: float(np.mean(chief)), **found} if chief else {}

    def chance(self, labels: NDArray[Any]) -> float:
        """Return the mean over the tasks of the primary metric of the best constant guess for each."""
        each = []
        for name, part in self.parts.items():
            start, count = self.spans[name]
            own = labels[(labels >= start) & (labels < start + count)]
            each += [part.chance(own - start)] if len(own) else []
        return float(np.mean(each)) if each else 0.0

    def facts(self) -> dict[str, Any]:
        """Return ``num_labels`` and ``label_names`` of all tasks, and what the tasks agree in."""
        own = {**super().facts(), "label_names": list(self.label_names)}
        each = [part.facts() for part in self.parts.values()]
        agreed = {
            key: value for key, value in (each[0] if each else {}).items() if all(f.get(key) == value for f in each)
        }
        return {**agreed, **own}

    def settings(self) -> dict[str, Any]:
        """Return the classes, and the name and settings of every task, as plain JSON."""
        parts = {name: {"name": part.name, "settings": self.part(name).settings()} for name, part in self.parts.items()}
        return {**super().settings(), "sampling": self.sampling, "tasks": parts}

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take back what :meth:`settings` returned."""
        super().restore(settings)
        self.sampling, self.parts = settings["sampling"], {}
        for name, about in settings["tasks"].items():
            self.parts[name] = known_tasks.get(about["name"], allow_code=False)()
            self.parts[name].restore(about["settings"])

    def show(self, table: Dataset, rows: list[int]) -> list[list[dict[str, str]]]:
        """Return the name of the task of each row, and what that task shows of it."""
        owner = np.asarray(table[TASK][:])
        shown: list[list[dict[str, str]]] = [[] for _ in rows]
        for number, (name, part) in enumerate(self.parts.items()):
            places = [place for place, row in enumerate(rows) if owner[row] == number]
            if places:
                own = self.part_table(table.select([rows[place] for place in places]), name)
                said = {"name": TASK, "kind": "text", "value": name}
                for place, parts in zip(places, part.show(own, list(range(len(places)))), strict=True):
                    shown[place] = [said, *parts]
        return shown

    def example_inputs(self, batch_size: int) -> Batch:
        """Return the inputs of the task whose samples are the largest, such as the longest texts."""
        each = [part.example_inputs(batch_size) for part in self.parts.values()]
        sizes = [sum(value.numel() for value in batch.values()) for batch in each]
        largest = int(np.argmax(sizes))
        return {**each[largest], TASK: torch.full((batch_size,), largest)}

    def check_objective(self, objective: Any) -> None:
        """Raise if a term on the logits would say something else of them than of a head for each task.

        Every loss is tried on random logits: its values must be those of the separate heads, or for each task the same
        multiple of them.

        Args:
            objective: a :class:`potstill.losses.objective.Objective`.

        Raises:
            ObjectiveError: names the term.
        """
        for name, term in objective.named_terms():
            if term.student == ("logits",) and not self._is_separable(term):
                raise ObjectiveError(
                    f"objective.{name}: {term.loss_name} compares the classes of all tasks with each other, and those "
                    "of other tasks than the sample's say nothing; take a loss of probabilities without label "
                    "smoothing, such as kl or cross_entropy"
                )

    def _is_separable(self, term: Any) -> bool:
        if term.per == "batch":
            return False
        trial = copy.deepcopy(term)
        draw = np.random.default_rng(0)
        said, taught = (torch.from_numpy(draw.normal(size=(8, len(self.label_names)))).float() for _ in range(2))
        for start, count in self.spans.values():
            labels = torch.from_numpy(draw.integers(0, count, 8))
            own = slice(start, start + count)
            wide = [torch.full_like(each, FOREIGN) for each in (said, taught)]
            for whole, each in zip(wide, (said, taught), strict=True):
                whole[:, own] = each[:, own]
            try:
                union = _values(trial, wide[0], wide[1], labels + start)
                alone = _values(trial, said[:, own], taught[:, own], labels)
            except (PotstillError, RuntimeError, ValueError, IndexError):
                return True  # the preflight says what it cannot compare
            ratio = union / alone.where(alone.abs() > 1e-6, torch.ones_like(alone))
            if float((ratio - ratio.mean()).abs().max()) > 1e-3 * float(ratio.mean().abs()):
                return False
        return True

    def _fit(self, name: str, part: Classification, table: Dataset) -> None:
        if not len(table):
            raise TaskError(f"the training split has no rows of the task '{name}'")
        try:
            part.fit(table)
        except TaskError as error:
            raise TaskError(f"the task '{name}': {error}") from error

    def _of(self, name: str, part: Classification, answers: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """Return a task's metrics of its own samples; an answer that is no class of it counts as one more class."""
        start, count = self.spans[name]
        own = (labels >= start) & (labels < start + count)
        if not own.any():
            return {}
        guesses = answers[own] - start
        return part.metrics(np.where((guesses < 0) | (guesses >= count), count, guesses), labels[own] - start)


def per_task_terms(terms: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return the terms of an objective with a weight for each task: ``soft`` becomes ``soft_NAME`` for every task.

    A term on the logits is spread: each of its terms is the mean over the samples of its task, those with a label where
    it needs one, and has the weight of the term times that of the task. Other terms stay as they are.

    Args:
        terms: as a recipe writes them.
        weights: the name of every task to its weight; with 0 it has no term.

    Raises:
        ObjectiveError: a term on the logits has a mask of its own, or a weight that is a schedule.

    Example:
        >>> per_task_terms({"hard": {"loss": "cross_entropy", "weight": 0.5}}, {"nli": 2.0})
        {'hard_nli': {'loss': 'cross_entropy', 'weight': 1.0, 'mask': 'task/nli/labelled'}}
    """
    found: dict[str, dict[str, Any]] = {}
    for name, spec in terms.items():
        own = spec.get("student", "logits")
        if own != "logits":
            found[name] = dict(spec)
            continue
        if spec.get("mask") is not None:
            raise ObjectiveError(
                f"objective.{name} has the mask '{spec['mask']}', and can have none but that of a task"
            )
        ending = "/labelled" if _needs_labels(spec["loss"]) else ""
        for task, weight in weights.items():
            if weight:
                scaled = _scaled(name, spec, weight)
                found[f"{name}_{task}"] = {**spec, "weight": scaled, "mask": f"{TASK}/{task}{ending}"}
    return found


def _make(name: str, spec: Mapping[str, Any]) -> Classification:
    """Return one of the tasks, not yet fitted.

    Raises:
        TaskError: it has no such options, or is no task that chooses one of several classes.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise TaskError(f"a task cannot be called '{name}': expected letters, digits, '-' and '_'")
    options = {key: value for key, value in spec.items() if key != "name"}
    if not isinstance(spec.get("name"), str):
        raise TaskError(f"task.tasks.{name}: expected the `name` of a task, got {dict(spec)}")
    try:
        made = known_tasks.get(spec["name"], allow_code=False)
    except ComponentError as error:
        raise TaskError(f"task.tasks.{name}: {error}") from error
    problems = known_tasks.check(spec["name"], options, path=("task", "tasks", name))
    if problems:
        raise TaskError("\n".join(str(problem) for problem in problems))
    usual = isinstance(made, type) and issubclass(made, Classification) and not issubclass(made, MultiTask)
    if not usual or any(getattr(made, each) is not getattr(Classification, each) for each in _SHARED):
        raise TaskError(
            f"task.tasks.{name}: '{spec['name']}' cannot be one of several tasks, which choose one class for a sample"
        )
    part: Classification = made(**options)
    return part


def _check_kinds(parts: Mapping[str, Classification]) -> None:
    """Raise where tasks have different kinds of inputs: one model takes one."""
    kinds = {name: str(known_tasks.facts(part.name).get("input")) for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise TaskError(f"one model takes one kind of input, and these tasks have several: {shown}")


def _padding(parts: Any) -> dict[str, Padding]:
    """Return what fills up the tokens of every model."""
    found: dict[str, Padding] = {}
    for part in parts:
        for prefix, own in getattr(part, "tokenizers", {}).items():
            left = own.tokenizer.padding_side == "left"
            found |= {f"{prefix}{name}": Padding(0, left) for name in own.tokenizer.model_input_names}
            found |= {f"{prefix}{name}": Padding(value, left) for name, value in own.padding().items()}
    return found


def _needs_labels(loss: str) -> bool:
    target = losses.get(loss)
    labels = inspect.signature(getattr(target, "forward", target)).parameters.get("labels")
    return labels is not None and labels.default is inspect.Parameter.empty


@torch.no_grad()
def _values(term: Any, said: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """Return a term's values of logits by themselves."""
    batch = {"labels": labels, "sample_id": torch.arange(len(labels))}
    values: Tensor = term.values({"logits": said}, dict.fromkeys(term.teacher, taught), batch, Progress(), None)
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def _scaled(name: str, spec: Mapping[str, Any], factor: float) -> Any:
    """Return the weight of a term times a factor; that published with the loss where it has none."""
    weight = spec.get("weight")
    weight = losses.facts(spec["loss"]).get("weight", 1.0) if weight is None else weight
    if isinstance(weight, int | float):
        return weight * factor
    if isinstance(weight, Mapping) and {"from", "to"} <= set(weight):
        return {**weight, "from": weight["from"] * factor, "to": weight["to"] * factor}
    raise ObjectiveError(f"objective.{name}: the weight {weight!r} cannot be multiplied by that of a task")
