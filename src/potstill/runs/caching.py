"""The teachers of a run, with their answers kept on disk where the recipe says so or where it pays."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from potstill._version import __version__
from potstill.errors import TrainingError
from potstill.interfaces import TeacherSource
from potstill.losses.objective import Objective
from potstill.recipe import build
from potstill.recipe.schema import CacheSpec, Recipe, TrainSpec
from potstill.runs.cache import content_hash, file_hash, table_hash
from potstill.runs.processes import process_state
from potstill.runs.teachers import form_of
from potstill.teachers.cached import Cached
from potstill.teachers.live import Deferred

if TYPE_CHECKING:
    from potstill.runs.plan import Plan
    from potstill.runs.steps import Run

logger = logging.getLogger("potstill")

KIND = "signals"
"""What entries of the user's cache are called that hold teachers' answers."""


_LARGE = 2**31
"""Bytes of a table from which on it is not hashed whole."""


def teacher_source(
    run: Run,
    name: str,
    objectives: Sequence[Objective] | None = None,
    read: Sequence[str] | None = None,
    *,
    train: TrainSpec | None = None,
    strict: bool = False,
) -> TeacherSource:
    """Return a teacher of a run as it is asked: from the cache where that is asked for or pays, else live.

    Args:
        run: with the saved teacher.
        name: the teacher's.
        objectives: of all who learn; the student's if omitted.
        read: the signals that these read of it; found in the objectives if omitted.
        train: how they are trained, which decides what they see; as the student if omitted.
        strict: whether what cannot be kept is an error, and a cache is used in any case.

    Raises:
        TrainingError: a cache is asked for, and random views are drawn without end.
    """
    train = run.recipe.train if train is None else train
    wanted = cache_settings(run.recipe, name, strict=strict, train=train)
    objectives = [run.objective] if objectives is None else objectives
    read = build.signals_of(run.recipe, objectives, name) if read is None else read
    taps = [signal for signal in read if signal != "logits"]
    if wanted is None or not read:
        return run.live_teacher(name, taps)
    return Cached(
        Deferred(partial(run.live_teacher, name, taps), build.teacher_prefix(run.recipe, name)),
        run.cache.root / KIND,
        identity=_identity(run, name, taps, train),
        precision=wanted.precision,
        top_k=wanted.top_k,
        strict=strict,
        unmasked={signal for objective in objectives for signal in objective.unmasked()},
        signals=set(read),
        required=strict or run.recipe.all_teachers[name].cache != "auto",
        room=(len(run.splits.taught_on) * (build.count_views(run.recipe, train) or 1), run.cache.limit),
    )


def close_caches(run: Run | None, teachers: Mapping[str, TeacherSource]) -> None:
    """Give unused space back; say what the caches of a run's training were good for, and make room for others."""
    for name, source in teachers.items():
        if not isinstance(source, Cached):
            continue
        source.close()
        if run is None:
            continue
        every: list[dict[str, int]] = gather_object([asdict(source.counts)])
        total = {key: sum(each[key] for each in every) for key in every[0]}
        if process_state().is_main_process:
            run.folder.event("cache", step="distilled", teacher=name, **total)
        logger.info("%s: %d answers from the cache, %d made", name, total["found"], total["made"])
        for folder in source.folders:
            run.cache.used(folder)


def cache_settings(
    recipe: Recipe, name: str, *, strict: bool = False, train: TrainSpec | None = None
) -> CacheSpec | None:
    """Return how a teacher's answers are kept in a training, the student's if omitted, or ``None`` where they are not.

    Raises:
        TrainingError: a cache is asked for, and random views are drawn without end.
    """
    asked, train = recipe.all_teachers[name].cache, train or recipe.train
    if asked is False and not strict:
        return None
    views = build.count_views(recipe, train)
    if views is None and (asked != "auto" or strict):
        raise TrainingError(
            f"the answers of the teacher '{name}' cannot be cached: each epoch shows new random views; say how many "
            "there are, as in `train: {views: 8}`, or `cache: false`"
        )
    if asked == "auto" and not strict and (views is None or train.epochs <= views):
        return None
    return asked if isinstance(asked, CacheSpec) else CacheSpec()


def cached_teachers(plan: Plan) -> list[str]:
    """Return the teachers whose answers can be kept ahead of the training: models trained by then, and read."""
    fixed = [name for name, spec in plan.recipe.model_teachers.items() if spec.joint is None and spec.task is None]
    several = len(fixed) > 1 or len(plan.recipe.all_teachers) > 1
    return [name for name in fixed if not several or build.signals_of(plan.recipe, [plan.make_objective()], name)]


def _identity(run: Run, name: str, taps: list[str], spec: TrainSpec) -> dict[str, Any]:
    """Return all that a teacher's answers depend on beside the inputs, which are compared one by one."""
    folder = run.model_folder(name)
    files = {
        file.name: file_hash(file) for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json")
    }
    random = build.is_random_view(run.recipe, spec)
    data: dict[str, Any] = {"table": table_identity(run), "task": run.task_of(name).settings()}
    if random:
        data |= {"augment": run.recipe.data.augment if spec.augment is None else spec.augment}
        data |= {"seed": run.recipe.data.seed}
    form = {"precision": precision} if (precision := form_of(run, name)[0]) is not None else {}
    return {"files": content_hash(files), "taps": taps, "data": content_hash(data), "potstill": __version__, **form}


def table_identity(run: Run) -> str:
    """Return a hash of what is taught on: of a large table of some rows, for all inputs are compared in any case."""
    table: Any = run.splits.taught_on
    if table.data.nbytes <= _LARGE:
        return run.train_hash if run.splits.transfer is None else table_hash(table)
    return f"{len(table)} {table_hash(table.select(range(0, len(table), max(1, len(table) // 4096))))}"
