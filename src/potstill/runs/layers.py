"""The pairs of layers that a recipe leaves to be found: by a rule that needs the depths, or by what the layers say."""

from __future__ import annotations

import json
import logging
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from potstill.interfaces import Batch, Signals, Task
from potstill.knowledge.capture import capture
from potstill.knowledge.layers import candidate_taps, layer_map, match_by_cka
from potstill.knowledge.taps import is_token_signal
from potstill.models.frozen import Frozen
from potstill.models.inputs import teacher_view
from potstill.recipe import build
from potstill.recipe.layers import found_layers
from potstill.recipe.schema import TermSpec
from potstill.runs.folder import write_json
from potstill.runs.processes import process_state

if TYPE_CHECKING:
    from potstill.runs.plan import Plan
    from potstill.runs.steps import Run

logger = logging.getLogger("potstill")

FILE = "layers.json"
_SAMPLES = 64


def find_layers(plan: Plan) -> dict[str, list[tuple[int | str, int | str]]]:
    """Return by term the pairs of layers, the student's and the teacher's, that its ``layers`` come to.

    The models are those before the training; ``auto`` runs both on the first training samples, without gradient.

    Raises:
        ObjectiveError: the rule does not fit the depths.
        SignalError: a model has several towers, or no stages are found in it.
    """
    found: dict[str, list[tuple[int | str, int | str]]] = {}
    samples = _Samples(plan)
    for name, spec in plan.recipe.objective.items():
        if found_layers(spec):
            found[name] = _pairs(samples, name, spec)
            logger.info("objective.%s: layers %s", name, ", ".join(f"{one} ← {other}" for one, other in found[name]))
    return found


def kept_layers(run: Run) -> dict[str, list[tuple[int | str, int | str]]]:
    """Return the pairs that a run found, which stay when it is stopped and goes on."""
    path = run.folder / FILE
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {name: [(one, other) for one, other in pairs] for name, pairs in kept.items()}
    found = find_layers(run)
    if found and run.folder.path.is_dir() and process_state().is_main_process:
        write_json(path, found)
    return found


class _Samples:
    """The models as they are before the training, and what they say of some samples."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._teachers: dict[str, nn.Module] = {}

    @cached_property
    def student(self) -> nn.Module:
        """The student."""
        from potstill.runs.plan import Plan

        return Plan.student(self.plan).eval()

    def teacher(self, name: str) -> nn.Module:
        """Return a teacher."""
        if name not in self._teachers:
            plan = self.plan
            facts = plan.task_of(name).facts()
            made = build.teacher_blueprint(plan.recipe, name).make(
                facts, seed=plan.recipe.seed, allow_code=plan.allow_code
            )
            self._teachers[name] = Frozen(made.model).awake()
        return self._teachers[name]

    @cached_property
    def task(self) -> Task:
        """The task that makes the inputs of all models."""
        return build.prepared_for_distillation(self.plan.recipe, self.plan.task, self.plan.processors)

    @cached_property
    def batch(self) -> Batch:
        """The first samples of the training."""
        plan, recipe = self.plan, self.plan.recipe
        rows = build.training_set(recipe, self.task, recipe.train, plan.splits.train, recipe.seed)
        return rows.__getitems__(list(range(min(_SAMPLES, len(rows)))))

    def view(self, name: str) -> Batch:
        """Return the samples as a teacher sees them."""
        return teacher_view(self.batch, build.teacher_prefix(self.plan.recipe, name))

    def taps(self, model: nn.Module, view: Batch) -> list[str]:
        """Return the layers that can be matched, shallow ones first."""
        with torch.no_grad():
            return candidate_taps(model, lambda each: self.task.forward(each, view))

    @torch.no_grad()
    def says(self, model: nn.Module, taps: list[str], view: Batch) -> Signals:
        """Return what a model says at these taps."""
        with capture(model, taps, detach=True) as signals:
            self.task.forward(model, view)
        return signals


def _pairs(samples: _Samples, name: str, spec: TermSpec) -> list[tuple[int | str, int | str]]:
    owner = _owner(samples.plan, spec)
    student, teacher, view = samples.student, samples.teacher(owner), samples.view(owner)
    ours, theirs = samples.taps(student, samples.batch), samples.taps(teacher, view)
    if spec.layers == "auto":
        own_tokens = f"{build.teacher_prefix(samples.plan.recipe, owner)}input_ids" in samples.batch
        mask = None if own_tokens else samples.batch.get("attention_mask")
        said, taught = samples.says(student, ours, samples.batch), samples.says(teacher, theirs, view)
        found = match_by_cka(said, taught, mask)
        logger.info("objective.%s: CKA of the student's layers (rows) with the teacher's\n%s", name, found)
        return [(_layer(one), _layer(other)) for one, other in found.pairs.items()]
    numbers = layer_map(str(spec.layers), len(ours), len(theirs))
    first = spec.student if isinstance(spec.student, str) else spec.student[0]
    embeddings = is_token_signal(ours[0]) and is_token_signal(theirs[0]) and first in ("logits", "hidden")
    return [
        (_layer(ours[one - 1]) if one else 0, _layer(theirs[other - 1]) if other else 0)
        for one, other in numbers.items()
        if embeddings or (one and other)
    ]


def _layer(tap: str) -> int | str:
    """The number of ``hidden.3``; a module path as it is."""
    return int(tap.rpartition(".")[2]) if is_token_signal(tap) else tap


def _owner(plan: Plan, spec: TermSpec) -> str:
    """Return the teacher whose layers a term compares with."""
    names = list(plan.recipe.all_teachers)
    first = spec.teacher if isinstance(spec.teacher, str) else spec.teacher[0]
    return first.partition("/")[0] if len(names) > 1 else names[0]
