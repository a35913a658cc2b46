"""A recipe tried out on one batch: data read, models built, every term computed; nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from potstill.data.batching import batches
from potstill.evaluation.cost import parameters
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
    task = build.make_task(recipe)
    task.fit(splits.train)
    tables = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    yield "data: " + ", ".join(f"{name} {len(table)}" for name, table in tables.items() if table is not None)
    for note in splits.notes:
        yield f"data: {note}"
    if task.label_names:
        yield f"labels: {', '.join(task.label_names)}"
    objective = build.make_objective(recipe, task)
    build.check_labels(objective, splits.train, str(recipe.task.options.get("label", "label")))
    student = build.make_blueprint(recipe.student).build(task.facts(), seed=recipe.seed, allow_code=allow_code)
    yield f"student: {recipe.student.model}, {parameters(student):,} parameters"
    teachers = {}
    taps = [name for name in objective.taps("teacher") if name.split("/")[-1] != "logits"]
    for name, spec in recipe.all_teachers.items():
        model = build.make_blueprint(spec).build(task.facts(), seed=recipe.seed, allow_code=allow_code)
        own = [tap.removeprefix(f"{name}/") for tap in taps if len(recipe.all_teachers) == 1 or tap.startswith(name)]
        teachers[name] = Live(model, own, forward=task.forward)
        yield f"{name}: {spec.model}, {parameters(model):,} parameters"
    batch = next(batches(task.dataset(splits.train, training=True, seed=recipe.seed), batch_size))
    source = Several(teachers) if len(teachers) > 1 else next(iter(teachers.values()), None)
    with torch.random.fork_rng(devices=[]):
        signals = source(dict(batch)) if source is not None else {}
        module = DistillationModule(student, objective, forward=task.forward)
        module.materialize(signals, batch)
        output = module(signals, **batch)
    for name, value in output.parts.items():
        yield f"objective.{name}: {float(value):.4g} on {batch_size} samples"
