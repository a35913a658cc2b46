"""The trainings of the student: its baseline and the distilled one, in one stage or in several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from potstill.losses.objective import Objective
from potstill.models.weights import load_student, save_student
from potstill.recipe import build
from potstill.registry import schemes
from potstill.runs.caching import close_caches
from potstill.runs.folder import write_json
from potstill.runs.lessons import make_sources
from potstill.runs.processes import process_state
from potstill.runs.stages import Stage, stages_of
from potstill.runs.teaching import joint_model, own_objective
from potstill.runs.training import baseline_settings
from potstill.schemes.lesson import STUDENT, Learner

if TYPE_CHECKING:
    from potstill.runs.steps import Run

BASELINE, DISTILLED = "baseline", "distilled"


def distil(run: Run) -> None:
    """Train the student with its teachers, as the scheme has it, and save it and all who learned with it."""
    for name, model in _in_stages(run, DISTILLED).items():
        if name in run.recipe.joint_teachers:
            run.save(name, model, build.teacher_blueprint(run.recipe, name, run.model_folder))
        elif name != STUDENT:
            run.save(name, model, run.student_blueprint)  # an average of the student
        else:
            run.save(DISTILLED, model, run.student_blueprint)


def train_baseline(run: Run) -> None:
    """Train the student without a teacher, in the same stages, and save it."""
    run.save(BASELINE, _in_stages(run, BASELINE)[STUDENT], run.student_blueprint)


def _in_stages(run: Run, model: str) -> dict[str, nn.Module]:
    """Return the models that came out: those that learned, and averages of the student."""
    stages = stages_of(run)
    learn = _learn if model == DISTILLED else _learn_alone
    before: Path | None = None
    models: dict[str, nn.Module] = {}
    for stage in stages:
        folder = run.folder / f"stages/{stage.step(model)}"
        done = f"{model}.{stage.name}"
        if stage.name is None or not run.folder.is_done(done):
            models = _models(run, stage, model, before)
            models |= learn(run, stage, models)
            if stage.name is not None:
                _keep(run, models, folder, done, stage.step(model))
        before = folder
    if not models and before is not None:  # all stages were done before this process began
        models = _models(run, stages[-1], model, before)
        models |= {path.name: _loaded(run, stages[-1], path) for path in before.iterdir() if path.name not in models}
    if run.recipe.stages and process_state().is_main_process:
        _join_histories(run, model, stages)
    return models


def _models(run: Run, stage: Stage, model: str, before: Path | None) -> dict[str, nn.Module]:
    """Return who learns in a stage, with the weights of the one before."""
    models = {STUDENT: run.student_of(stage.plan.recipe)}
    if model == DISTILLED:
        models |= {name: joint_model(run, name) for name in run.recipe.joint_teachers}
    if before is not None:
        for name, each in models.items():
            load_student(each, before / name)
    return models


def _loaded(run: Run, stage: Stage, folder: Path) -> nn.Module:
    model = run.student_of(stage.plan.recipe)
    load_student(model, folder)
    return model


def _learn(run: Run, stage: Stage, models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Train those who learn in a stage, and return averages of the student that were taken."""
    recipe, objective = stage.plan.recipe, stage.plan.objective
    others = {name: _learner(run, name, models[name]) for name in recipe.joint_teachers}
    objectives = [objective, *(each.objective for each in others.values() if each.objective is not None)]
    sources = make_sources(run, objectives, train=recipe.train, student=models[STUDENT])
    scheme = schemes.get(recipe.scheme.name, allow_code=run.allow_code)(**recipe.scheme.options)
    try:
        run.train(
            stage.step(DISTILLED),
            models[STUDENT],
            recipe.train,
            objective,
            plan=stage.plan,
            teachers=sources,
            learners=others,
            scheme=scheme,
        )
    except BaseException:
        close_caches(None, sources)
        raise
    close_caches(run, sources)
    averages = {name: getattr(each, "model", None) for name, each in sources.items() if hasattr(each, "after_step")}
    return {name: each for name, each in averages.items() if isinstance(each, nn.Module)}


def _learn_alone(run: Run, stage: Stage, models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    settings = baseline_settings(stage.plan, process_state().num_processes)
    run.train(stage.step(BASELINE), models[STUDENT], settings, stage.plan.objective.hard_only(), plan=stage.plan)
    return {}


def _learner(run: Run, name: str, model: nn.Module) -> Learner:
    spec = run.recipe.joint_teachers[name]
    objective: Objective | None = None if spec.objective is None else own_objective(run, spec)
    return Learner(
        model,
        objective,
        forward=run.task.forward,
        prefix=build.teacher_prefix(run.recipe, name),
        learning_rate=None if spec.joint is None else spec.joint.learning_rate,
        weight_decay=None if spec.joint is None else spec.joint.weight_decay,
        given=objective is not None,
    )


def _keep(run: Run, models: Mapping[str, nn.Module], folder: Path, done: str, step: str) -> None:
    """Write the weights of a stage, whole or not at all, and mark it as done; every process waits for it."""
    state = process_state()
    if state.is_main_process:
        staged = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(staged, ignore_errors=True)
        for name, model in models.items():
            save_student(model.to("cpu"), staged / name)
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
        run.folder.mark_done(done)
        run.folder.clear(f"checkpoints/{step}")
    state.wait_for_everyone()


def _join_histories(run: Run, model: str, stages: list[Stage]) -> None:
    """Write what was logged in the stages as one history, its steps counted on."""
    whole: list[dict[str, Any]] = []
    done, epochs = 0, 0.0
    for stage in stages:
        lines = json.loads((run.folder / f"history/{stage.step(model)}.json").read_text(encoding="utf-8"))
        for line in lines:
            whole.append({**line, "step": line["step"] + done, "epoch": line["epoch"] + epochs, "stage": stage.name})
        done, epochs = (max([whole[-1][key], start]) for key, start in (("step", done), ("epoch", epochs)))
    write_json(run.folder / f"history/{model}.json", whole)
