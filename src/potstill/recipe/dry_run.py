"""A recipe tried out on one batch: data read, models built, every term computed; nothing is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from potstill.data.batching import batches
from potstill.data.load import Splits
from potstill.errors import ModelError, TrainingError, did_you_mean
from potstill.evaluation.cost import parameters
from potstill.interfaces import Progress
from potstill.recipe import build
from potstill.recipe.schema import Recipe
from potstill.teachers.live import Live, Several
from potstill.training.module import DistillationModule


def dry_run(recipe: Recipe, *, allow_code: bool = True, batch_size: int = 4) -> Iterator[str]:
    """Yield what was found, a line a finding; the teachers are untrained where the recipe would train them.

    Raises:
        PotstillError: the first thing that does not fit, with what was expected.
    """
    splits = build.make_splits(recipe, allow_code=allow_code)
    task = build.fitted_task(recipe, splits)
    tables = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    yield "data: " + ", ".join(f"{name} {len(table)}" for name, table in tables.items() if table is not None)
    for note in splits.notes:
        yield f"data: {note}"
    if task.label_names:
        yield f"labels: {', '.join(task.label_names)}"
    objective = build.make_objective(recipe, task)
    build.check_labels(objective, splits.train, str(recipe.task.options.get("label", "label")))
    processors = build.find_processors(recipe, task, allow_code=allow_code)
    fitted, task = task, build.prepared_for_distillation(recipe, task, processors)
    student = build.student_blueprint(recipe).build(task.facts(), seed=recipe.seed, allow_code=allow_code)
    yield f"student: {build.student_name(recipe)}, {parameters(student):,} parameters"
    teachers = {}
    for name, spec in recipe.all_teachers.items():
        facts = build.prepared(fitted, processors[name]).facts()
        built = build.make_blueprint(spec).make(facts, seed=recipe.seed, allow_code=allow_code)
        model = built.model
        if spec.train is None and spec.labels is None:
            task.check_labels(built.labels, f"the teacher '{name}'")
        taps, prefix = build.teacher_taps(recipe, objective, name), build.teacher_prefix(recipe, name)
        teachers[name] = Live(model, taps, forward=task.forward, prefix=prefix)
        weights = ", random weights" if build.is_random(spec) else ""
        if built.fresh:
            weights = f", new weights: {', '.join(built.fresh[:4])}{', …' if len(built.fresh) > 4 else ''}"
        if weights and spec.train is None:
            weights += "; it teaches noise, say `train:`"
        yield f"{name}: {spec.model}, {parameters(model):,} parameters{weights}"
    batch = next(batches(task.dataset(splits.train, training=True, seed=recipe.seed), batch_size))
    build.check_tokens(recipe, objective, batch)
    source = Several(teachers) if len(teachers) > 1 else next(iter(teachers.values()), None)
    parts: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        module = DistillationModule(student, objective, forward=task.forward)
        try:
            signals = source(dict(batch)) if source is not None else {}
            task.forward(student, batch)
        except (ValueError, RuntimeError, IndexError) as error:
            raise ModelError(f"a model cannot take what the task gives it: {error}") from error
        module.materialize(signals, batch)
        for step in (999, 0):  # late too, for a ramp may begin at 0, where a term is not computed
            parts |= module(signals, progress=Progress(step, 1000), **batch).parts
    answers = task.answers(task.forward(student, batch)["logits"].detach().numpy())
    metrics = task.metrics(answers, batch["labels"].numpy()) if "labels" in batch else {}
    models = {"student": student, **{name: live.model.model for name, live in teachers.items()}}
    _check_training(recipe, splits, models, ["loss", *metrics])
    for name in filter(parts.__contains__, objective.terms):
        yield f"objective.{name}: {float(parts[name]):.4g} on {len(batch['sample_id'])} samples"


def _check_training(
    recipe: Recipe, splits: Splits, models: Mapping[str, torch.nn.Module], metrics: Sequence[str]
) -> None:
    """Make the settings of every training, so that what cannot be shows now and not after hours."""
    label = str(recipe.task.options.get("label", "label"))
    evaluates = splits.validation is not None and label in splits.validation.column_names
    trained = {"student": recipe.train, **{name: spec.train for name, spec in recipe.all_teachers.items()}}
    for name, spec in trained.items():
        if spec is not None:
            build.apply_dropout(models[name], spec.dropout)
            where = Path(tempfile.gettempdir()) / "potstill"
            setup = build.make_training(spec, folder=where, seed=0, bars=False, evaluates=evaluates, allow_code=True)
            wanted = (setup.arguments.metric_for_best_model or "loss").removeprefix("eval_")
            if evaluates and wanted not in metrics:
                raise TrainingError(
                    f"{name}: no evaluation gives the metric '{wanted}'; {did_you_mean(wanted, metrics)}"
                )
