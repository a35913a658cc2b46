"""How the teachers of a run come to be: loaded, trained on the labels, or taught by other teachers, and saved."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from potstill._version import __version__
from potstill.errors import TrainingError
from potstill.losses.objective import Objective
from potstill.models.origins import Built
from potstill.recipe import build
from potstill.recipe.schema import TeacherSpec
from potstill.runs.cache import content_hash, table_hash
from potstill.runs.lessons import make_sources
from potstill.runs.processes import process_state
from potstill.runs.training import fit_teacher

if TYPE_CHECKING:
    from potstill.runs.steps import Run

logger = logging.getLogger("potstill")


def teach(run: Run, name: str) -> None:
    """Make a teacher of a run as its recipe has it, or take it from the cache, and save it.

    Nothing is done for one that is no model of its own, or is trained together with the student.

    Raises:
        TrainingError: there are no labels to train it on.
        TaskError: it knows other classes.
    """
    spec = run.recipe.all_teachers[name]
    if spec.source is not None or spec.joint is not None:
        return
    key = teacher_key(run, name)
    if spec.train is not None and _fetched(run, name, key):
        return
    blueprint, built = _build(run, name)
    model = built.model
    if spec.train is None:
        _check_trained(run, name, built)
    elif spec.objective is None:
        if run.label not in run.splits.train.column_names:
            raise TrainingError(f"the training split has no labels to train the teacher '{name}' on; give `weights`")
        run.train(name, model, spec.train, build.supervised_objective(run.task_of(name)))
    else:
        objective = own_objective(run, spec)
        build.check_labels(objective, run.splits.taught_on, run.label)
        sources = make_sources(run, [objective], train=spec.train, names=_before(run, name))
        run.train(name, model, spec.train, objective, teachers=sources)
    if process_state().is_main_process and (rows := fit_teacher(run, name, model)):
        run.event("fitted", step=name, rows=rows)
    run.save(name, model, blueprint)
    if spec.train is not None and process_state().is_main_process:
        run.cache.store("teachers", key, run.model_folder(name))


def _build(run: Run, name: str) -> tuple[Any, Built]:
    """Return how a teacher is built, and the teacher as it is before any training here."""
    blueprint = build.teacher_blueprint(run.recipe, name, run.model_folder)
    facts = run.task_of(name).facts()
    return blueprint, blueprint.make(facts, seed=run.seed_of(name), allow_code=run.allow_code)


def own_objective(run: Run, spec: TeacherSpec) -> Objective:
    """Return what a teacher minimises that learns from others."""
    return build.make_objective(run.recipe, run.task, terms=spec.objective or {})


def _check_trained(run: Run, name: str, built: Built) -> None:
    """Raise if a teacher knows other classes, or these in another order; say so if its head knows nothing."""
    if run.recipe.all_teachers[name].labels is None:
        run.task_of(name).check_labels(built.labels, f"the teacher '{name}'")
    if built.fresh:
        new = ", ".join(built.fresh[:3]) + (", …" if len(built.fresh) > 3 else "")
        run.note(f"the teacher '{name}' has no trained head for this task ({new}): say `train:` or it teaches noise")


def teacher_key(run: Run, name: str) -> str:
    """Return a hash of everything that a trained teacher depends on."""
    spec = run.recipe.all_teachers[name]
    validation = run.splits.validation
    data = [run.train_hash, *([] if validation is None else [table_hash(validation)])]
    own = spec.model_dump(mode="json", exclude={"model", "weights", "seed", "cache", "precision", "compile"})
    about: dict[str, Any] = {
        "teacher": {**own, "model": build.fingerprint(spec)},
        "task": run.task_of(name).settings(),
        "data": data,
        "augment": run.recipe.data.model_dump(mode="json")["augment"],
        "seed": run.seed_of(name),
    }
    others = _origins(run, name)
    if others:
        about["others"] = others
    if spec.objective is not None:
        about["taught_on"] = table_hash(run.splits.taught_on)
    return content_hash({**about, "potstill": __version__, "torch": torch.__version__})


def _origins(run: Run, name: str) -> Mapping[str, Any]:
    """Return the keys of the teachers that one is cut from or learns from."""
    spec = run.recipe.all_teachers[name]
    if spec.from_teacher is None and spec.objective is None:
        return {}
    found: dict[str, Any] = {}
    for other in _before(run, name):
        upstream = run.recipe.all_teachers[other]
        form = upstream.model_dump(mode="json", include={"precision", "cache"})
        own = teacher_key(run, other) if upstream.source is None else [upstream.source, run.seed_of(other)]
        found[other] = [own, form]
    return found


def _before(run: Run, name: str) -> list[str]:
    """Return the teachers that a recipe names before one, less those that are trained with the student."""
    names = list(run.recipe.all_teachers)
    return [each for each in names[: names.index(name)] if run.recipe.all_teachers[each].joint is None]


def _fetched(run: Run, name: str, key: str) -> bool:
    """Copy a trained teacher from the cache; every process learns whether there was one."""
    state, target = process_state(), run.model_folder(name)
    if state.is_main_process and not target.is_dir() and run.cache.fetch("teachers", key, target):
        run.event("reused", step=name, key=key)
        logger.info("%s: reused from the cache (%s)", name, key)
    state.wait_for_everyone()
    return bool(target.is_dir())


def joint_model(run: Run, name: str) -> nn.Module:
    """Return a teacher that is trained with the student, as it is before that."""
    built = _build(run, name)[1]
    if run.recipe.all_teachers[name].labels is None:
        run.task_of(name).check_labels(built.labels, f"the teacher '{name}'")
    return built.model
