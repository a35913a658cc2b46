"""Who teaches whom in a training of a run: the sources, and the teachers of other kinds made of the recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import nn

from potstill.data.augment import split_step
from potstill.errors import TrainingError
from potstill.interfaces import TeacherSource
from potstill.losses.objective import Objective
from potstill.recipe import build
from potstill.recipe.schema import TrainSpec
from potstill.registry import teacher_sources
from potstill.runs.cache import content_hash
from potstill.runs.caching import KIND, cache_settings, table_identity, teacher_source
from potstill.teachers.cached import Cached
from potstill.teachers.context import SourceContext
from potstill.teachers.live import Deferred

if TYPE_CHECKING:
    from potstill.runs.plan import Plan
    from potstill.runs.steps import Run

logger = logging.getLogger("potstill")


def make_sources(
    run: Run,
    objectives: Sequence[Objective],
    *,
    train: TrainSpec,
    names: Collection[str] | None = None,
    student: nn.Module | None = None,
) -> dict[str, TeacherSource]:
    """Return the teachers of a training that do not learn in it, by name; models that nobody reads are not loaded.

    Args:
        run: with its saved teachers.
        objectives: those of all who learn.
        train: how they are trained.
        names: the teachers that there are; all that are not trained with the student if omitted.
        student: who learns, for sources that follow it.
    """
    recipe = run.recipe
    present = [name for name, spec in recipe.all_teachers.items() if spec.joint is None] if names is None else names
    among = recipe.all_teachers if names is None else names
    made: dict[str, TeacherSource] = {}
    for name in present:
        read = build.signals_of(recipe, objectives, name, among)
        if names is not None and not read and recipe.all_teachers[name].source is not None:
            continue  # nobody asks it here, and it may need what only the student's training has
        if recipe.all_teachers[name].source is None:
            made[name] = teacher_source(run, name, objectives, read, train=train) if read else _unread(run, name)
        else:
            source = make_source(run, name, made, read, student=student, table=run.splits.taught_on)
            made[name] = _kept(run, name, source, objectives, train)
    return made


def judged_sources(run: Run, table: Dataset) -> dict[str, Callable[[], TeacherSource]]:
    """Return how to make the sources that are no models of the run, as they answer the rows of a table, by name.

    Those that follow the student are models of the run by then.

    Args:
        run: with its saved teachers.
        table: the rows.
    """
    recipe = run.recipe
    names = {name for name, spec in recipe.all_teachers.items() if spec.source and not follows_student(spec.source)}

    def make(name: str) -> TeacherSource:
        if name not in names:
            return Deferred(partial(run.live_teacher, name, []), build.teacher_prefix(recipe, name))
        before = list(recipe.all_teachers)[: list(recipe.all_teachers).index(name)]
        needed = [each for each in before if each in build.named_in(recipe.all_teachers[name].source)]
        made = {each: make(each) for each in needed}
        return make_source(run, name, made, ["logits"], student=None, table=table)

    return {name: partial(make, name) for name in recipe.all_teachers if name in names}


def follows_student(source: Any) -> bool:
    """Return whether a source is made of the student, so that it is a model of the run once that is trained."""
    return bool(teacher_sources.facts(split_step(source)[0]).get("follows_student", False))


def make_source(
    run: Plan, name: str, made: Mapping[str, TeacherSource], read: Sequence[str], *, student: Any, table: Dataset
) -> TeacherSource:
    """Return a teacher that is no model of the run.

    Args:
        run: what the recipe means.
        name: the teacher's.
        made: the other teachers, those that it is made of among them.
        read: the signals that are read of it.
        student: who learns, for sources that follow it.
        table: the rows that it is asked about.

    Raises:
        PotstillError: options or the table do not fit.
    """
    kind, options = split_step(run.recipe.all_teachers[name].source or "")
    context = SourceContext(
        name=name,
        teachers=dict(made),
        student=student,
        table=table,
        label=run.label,
        label_names=run.task.label_names,
        taps=[signal for signal in read if signal != "logits"],
        forward=run.task.forward,
        prefix=build.teacher_prefix(run.recipe, name),
        seed=run.seed_of(name),
    )
    source: TeacherSource = teacher_sources.get(kind, allow_code=run.allow_code)(context, **options)
    return source


def _unread(run: Run, name: str) -> Deferred:
    return Deferred(partial(run.live_teacher, name, []), build.teacher_prefix(run.recipe, name))


def _kept(run: Run, name: str, source: Any, objectives: Sequence[Objective], train: TrainSpec) -> TeacherSource:
    """Return a source with its answers kept on disk, where it says what they depend on: one that is asked elsewhere."""
    identity, spec = getattr(source, "identity", None), run.recipe.all_teachers[name]
    if identity is None and spec.cache not in ("auto", False):
        raise TrainingError(f"the answers of the teacher '{name}' are made anew each time; leave out its `cache`")
    endless = build.count_views(run.recipe, train) is None
    if identity is None or spec.cache is False or (endless and spec.cache == "auto"):
        return source  # type: ignore[no-any-return]
    wanted = cache_settings(run.recipe, name, strict=True, train=train)
    return Cached(
        source,
        run.cache.root / KIND,
        identity={"source": content_hash(identity), "data": table_identity(run)},
        precision=None if wanted is None else wanted.precision,
        top_k=None if wanted is None else wanted.top_k,
        unmasked={signal for objective in objectives for signal in objective.unmasked()},
        required=spec.cache != "auto",
    )
