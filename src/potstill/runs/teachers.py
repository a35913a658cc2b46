"""The teachers of a run as they answer: in the precision that the recipe says, or in the fastest that is faithful."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from potstill.interfaces import Batch
from potstill.recipe import build
from potstill.runs.folder import write_json
from potstill.runs.processes import process_state
from potstill.teachers.forms import fastest
from potstill.teachers.live import Live
from potstill.teachers.precision import Precision

if TYPE_CHECKING:
    from potstill.runs.steps import Run

logger = logging.getLogger("potstill")

FILE = "teacher-forms.json"
"""Where a run notes what ``precision: auto`` came to, for all its processes and for going on after a stop."""

_BATCHES = 4
_SAMPLES = 128


def live_teacher(run: Run, name: str, taps: Sequence[str] | None = None) -> Live:
    """Return a saved teacher of a run that answers as the recipe has it.

    Args:
        run: with the saved teacher.
        name: the teacher's.
        taps: signals to capture beside its responses; those that the student's terms read if omitted.

    Raises:
        TrainingError: fp16 on a CPU.
        ComponentError: int8 without torchao.
    """
    wanted = build.teacher_taps(run.recipe, run.objective, name) if taps is None else taps
    prefix = build.teacher_prefix(run.recipe, name)
    precision, compiled = form_of(run, name)
    return Live(run.load(name), wanted, forward=run.task.forward, prefix=prefix, precision=precision, compile=compiled)


def form_of(run: Run, name: str) -> tuple[Precision | None, bool]:
    """Return in what precision a teacher answers, ``None`` for the student's, and whether it is compiled."""
    spec = run.recipe.all_teachers[name]
    if spec.precision != "auto":
        return spec.precision, spec.compile
    choose_forms(run)
    chosen = _chosen(run)[name]
    return chosen["precision"], chosen["compile"]


def choose_forms(run: Run) -> None:
    """Measure the forms of every teacher with ``precision: auto``, once for a run and in one process for all.

    Every process calls it, once the teachers are saved; what is chosen stays when the run is stopped and goes on.
    """
    if run.folder.is_done("teachers"):
        return
    state = process_state()
    state.wait_for_everyone()  # or one would read what another has just written, and wait alone
    known = _chosen(run)
    asked = [name for name, spec in run.recipe.model_teachers.items() if spec.precision == "auto"]
    open_ = [name for name in asked if name not in known and run.model_folder(name).is_dir()]
    if not open_:
        return
    if state.is_main_process:
        for name in open_:
            known[name] = _measured(run, name)
            write_json(run.folder / FILE, known)
            run.folder.event("teacher form", step="distilled", teacher=name, **known[name])
    state.wait_for_everyone()


def _chosen(run: Run) -> dict[str, Any]:
    path = run.folder / FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _measured(run: Run, name: str) -> dict[str, Any]:
    """Return the fastest faithful form of a teacher on the first training batches, as plain JSON."""
    device = process_state().device
    choice = fastest(
        run.load(name).to(device),
        _batches(run, device),
        taps=build.teacher_taps(run.recipe, run.objective, name),
        forward=run.task.forward,
        prefix=build.teacher_prefix(run.recipe, name),
        compile=run.recipe.all_teachers[name].compile,
    )
    exact = choice.forms[0]
    for form in choice.forms:
        logger.info(
            "%s: %s: %.2f times as fast as fp32, agreement %.3f, KL %.1e%s",
            name,
            form,
            exact.seconds / form.seconds,
            form.faithfulness.agreement,
            form.faithfulness.divergence,
            "" if form.is_faithful else ", not faithful",
        )
    logger.info("%s: answers in %s", name, choice.form)
    return choice.plain()


def _batches(run: Run, device: Any) -> list[Batch]:
    """Return the first training batches: at least 4, with at least 128 samples, where there are as many."""
    spec = run.recipe.train
    task = build.prepared_for_distillation(run.recipe, run.task, run.processors)
    dataset = build.training_set(run.recipe, task, spec, run.splits.taught_on, run.recipe.seed)
    count = max(_BATCHES, -(-_SAMPLES // spec.batch_size)) * spec.batch_size
    places = list(range(min(count, len(dataset))))
    parts = [places[start : start + spec.batch_size] for start in range(0, len(places), spec.batch_size)]
    return [{key: value.to(device) for key, value in dataset.__getitems__(part).items()} for part in parts]
