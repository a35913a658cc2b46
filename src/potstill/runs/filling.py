"""A teacher's answers ahead of the training, and what they would take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from potstill.data.batching import length_order
from potstill.errors import TrainingError
from potstill.interfaces import Batch
from potstill.recipe import arguments, build
from potstill.recipe.schema import CacheSpec, TrainSpec
from potstill.runs.cache import Cache
from potstill.runs.caching import KIND, cache_settings, teacher_source
from potstill.runs.plan import Plan
from potstill.runs.processes import process_state
from potstill.runs.training import fit_teacher
from potstill.teachers.cached import Cached, Counts
from potstill.teachers.live import Live
from potstill.teachers.precision import tried_precision
from potstill.training.precision import HALVES, matrix_products

if TYPE_CHECKING:
    from potstill.runs.steps import Run


@dataclass(frozen=True)
class CachePlan:
    """What filling a teacher's cache would take.

    Attributes:
        teacher: its name.
        samples: of the training split.
        views: random views of each.
        bytes_per_sample: of an answer, its place in the index included.
        seconds: that the teacher needs for all answers, on this machine and in one process.
        folder: where the cache lies.
    """

    teacher: str
    samples: int
    views: int
    bytes_per_sample: float
    seconds: float
    folder: Path

    @property
    def bytes(self) -> int:
        """Of all answers."""
        return round(self.bytes_per_sample * self.samples * self.views)


def fill(run: Run, name: str) -> Counts:
    """Ask a teacher of a run for every answer that its cache does not hold; each process for its share.

    Returns:
        What became of the samples, in all processes.

    Raises:
        CacheError: the answers cannot be kept; what is kept stays.
        TrainingError: random views are drawn without end.
    """
    source = teacher_source(run, name, strict=True)
    if not isinstance(source, Cached):
        raise TrainingError(f"no term reads the teacher '{name}', so there is nothing to cache")
    state = process_state()
    source.to(state.device)
    try:
        with torch.no_grad(), computing_as(run.recipe.train, state.device):
            for batch in tqdm(
                _Shares(run, state.process_index, state.num_processes), desc=name, disable=not run.bars, leave=False
            ):
                source({key: value.to(state.device) for key, value in batch.items()})
    finally:
        source.close()
        for folder in source.folders:
            run.cache.used(folder)
    every: list[dict[str, int]] = gather_object([asdict(source.counts)])
    return Counts(**{key: sum(each[key] for each in every) for key in every[0]})


def forecast(plan: Plan, name: str, *, batches: int = 5) -> CachePlan:
    """Return what filling a teacher's cache would take, from a few batches; the teacher need not be trained yet.

    Args:
        plan: what a recipe means.
        name: the teacher's.
        batches: how many are timed, after one that is not.

    Raises:
        TrainingError: random views are drawn without end.
    """
    recipe = plan.recipe
    wanted = cache_settings(recipe, name, strict=True) or CacheSpec()
    device = process_state().device
    task = build.prepared_for_distillation(recipe, plan.task, plan.processors)
    shares = _Shares(plan)
    built = build.teacher_blueprint(recipe, name).make(
        plan.task_of(name).facts(), seed=recipe.seed, allow_code=plan.allow_code
    )
    fit_teacher(plan, name, built.model)
    taps, prefix = build.teacher_taps(recipe, plan.objective, name), build.teacher_prefix(recipe, name)
    precision = tried_precision(recipe.all_teachers[name].precision)
    live = Live(built.model, taps, forward=task.forward, prefix=prefix, precision=precision).to(device)
    places = torch.linspace(0, len(shares.parts) - 1, batches + 1).long().tolist()  # the longest texts come first
    taken, samples = [], 0
    with tempfile.TemporaryDirectory() as folder, computing_as(recipe.train, device):
        cached = Cached(live, folder, identity=name, precision=wanted.precision, top_k=wanted.top_k)
        for turn, place in enumerate([places[-1], *places]):
            made = {key: value.to(device) for key, value in shares.dataset.__getitems__(shares.parts[place]).items()}
            begin = time.perf_counter()
            live(made)
            if turn:
                taken.append(time.perf_counter() - begin)
                samples += len(made["sample_id"])
                cached(made)
        each = cached.bytes_per_sample
        cached.close()
    rows = len(plan.splits.taught_on)
    return CachePlan(name, rows, shares.views, each, sum(taken) / samples * rows * shares.views, Cache().root / KIND)


def computing_as(spec: TrainSpec, device: torch.device) -> AbstractContextManager[Any]:
    """Return the precision in which a training computes, as a context."""
    precision, stack = arguments.precision_of(spec), ExitStack()
    stack.enter_context(matrix_products(precision))
    if precision in HALVES:
        stack.enter_context(torch.autocast(device.type, HALVES[precision]))
    return stack


class _Shares:
    """The batches of every view that this process is to ask for, the longest texts first."""

    def __init__(self, run: Plan, process: int = 0, processes: int = 1) -> None:
        task = build.prepared_for_distillation(run.recipe, run.task, run.processors)
        spec = run.recipe.train
        self.dataset = build.training_set(run.recipe, task, spec, run.splits.taught_on, run.recipe.seed)
        order = length_order(self.dataset)
        places = list(range(len(self.dataset))) if order is None else order.tolist()
        parts = [places[start : start + spec.batch_size] for start in range(0, len(places), spec.batch_size)]
        self.parts = parts[process::processes]
        self.views = build.count_views(run.recipe, spec) or 1

    def __len__(self) -> int:
        return len(self.parts) * self.views

    def __iter__(self) -> Iterator[Batch]:
        for view in range(self.views):
            self.dataset.set_epoch(view)
            for part in self.parts:
                yield self.dataset.__getitems__(part)
