"""One run: teacher, baseline, distilled student, evaluation; each step resumable, and done once.

A step writes what it makes under a temporary name, renames it and then marks itself as done, so a run that is killed
at any point goes on with the same command and comes to the same result.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from torch import nn

from potstill._version import __version__
from potstill.checks.findings import Finding, checks, refuse
from potstill.data.load import Splits
from potstill.errors import PotstillError, RunError, did_you_mean
from potstill.interfaces import Scheme, TeacherSource
from potstill.losses.objective import Objective
from potstill.models.freezing import freeze
from potstill.models.load import Blueprint, load_model, save_model
from potstill.recipe import arguments, build
from potstill.recipe.load import load_recipe
from potstill.recipe.schema import Recipe, TrainSpec
from potstill.runs.cache import Cache, content_hash, table_hash
from potstill.runs.distilling import distil, train_baseline
from potstill.runs.folder import RunFolder, write_json
from potstill.runs.judging import Judgement
from potstill.runs.layers import kept_layers
from potstill.runs.metrics import RunMetrics
from potstill.runs.plan import Plan
from potstill.runs.preflight import after_teachers, before_training
from potstill.runs.processes import process_state
from potstill.runs.teachers import choose_forms, live_teacher
from potstill.runs.teaching import teach
from potstill.runs.training import baseline_settings, make_trainer
from potstill.schemes.lesson import Learner
from potstill.teachers.live import Live
from potstill.training.checkpoints import latest_checkpoint
from potstill.training.precision import matrix_products

logger = logging.getLogger("potstill")

_ONCE = ("evaluate", "report")
"""Steps that one process does for all."""


class Run(Plan):
    """A recipe and its folder.

    Args:
        recipe: what is asked.
        output: the folder; ``runs/NAME-HASH`` if omitted, so that each recipe has its own.
        allow_code: whether dotted paths outside potstill may be imported.
        bars: whether to show progress bars; where standard error is a terminal if omitted.
        cache: where trained teachers are shared; the user's if omitted.
        splits: the data, where they are given and not to be read.
        strict: whether a teacher that is no better than chance is refused; else there is a warning.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path | str | None = None,
        *,
        allow_code: bool = True,
        bars: bool | None = None,
        cache: Cache | None = None,
        splits: Splits | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(recipe, allow_code=allow_code, splits=splits)
        self.tree = recipe.model_dump(mode="json")
        self.folder = RunFolder(Path(output) if output else default_output(recipe))
        self.bars = sys.stderr.isatty() if bars is None else bars
        self.cache = cache or Cache()
        self.strict = strict
        self.notes: list[str] = []

    def execute(self) -> RunMetrics:
        """Do every step that is not done yet and return the metrics.

        Raises:
            RunError: the folder is in use or belongs to another recipe.
            PreflightError: the set-up has a fault that would make the training wrong.
            PotstillError: the recipe asks for what cannot be.
        """
        with self._opened():
            if self.folder.is_done("report"):
                return self.metrics()
            self._teachers_steps()
            if self._has_baseline:
                self._step("baseline", partial(train_baseline, self))
            self._step("distilled", partial(distil, self))
            self._step("evaluate", self._evaluate)
            self._step("report", self._report)
            process_state().wait_for_everyone()
        return self.metrics()

    def _teachers_steps(self) -> None:
        self._step("preflight", self._preflight)
        for name, spec in self.recipe.all_teachers.items():
            if build.is_random(spec):
                self.note(f"the teacher '{name}' is neither trained nor given weights: it teaches noise")
            if spec.source is None and spec.joint is None:
                self._step(name, partial(teach, self, name))
        if self.recipe.all_teachers:
            self._step("teachers", self._check_teachers)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Hold the folder, made and claimed for this recipe."""
        state = process_state()
        transformers.utils.logging.disable_progress_bar()  # one for every file that is read or written
        if self.folder.path.exists() and not self.folder.path.is_dir():
            raise RunError(f"expected a folder for the run, and {self.folder.path} is a file; choose --output")
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the run's folder cannot be made: {error}; choose --output") from error
        with self.folder.locked() if state.is_main_process else nullcontext():
            if state.is_main_process:
                self.folder.claim(self.tree)
                for left in (self.folder / "models").glob("*.tmp"):  # by a process that was killed
                    shutil.rmtree(left)
            state.wait_for_everyone()
            yield

    def prepare_teachers(self) -> None:
        """Do the steps up to the teachers, which are then trained and saved; :meth:`execute` goes on from there.

        Raises:
            RunError, PreflightError, PotstillError: as :meth:`execute`.
        """
        with self._opened():
            self._teachers_steps()

    def metrics(self) -> RunMetrics:
        """Return what ``metrics.json`` holds."""
        return RunMetrics.model_validate_json((self.folder / "metrics.json").read_text(encoding="utf-8"))

    # ---- what the steps share --------------------------------------------------------------------------------------

    @cached_property
    def train_hash(self) -> str:
        """A hash of every value in the training split."""
        return table_hash(self.splits.train)

    @cached_property
    def splits(self) -> Splits:
        """The data, read when first asked for."""
        if not self.bars:
            datasets.disable_progress_bars()
        return super().splits

    @cached_property
    def layers(self) -> dict[str, list[tuple[int | str, int | str]]]:
        """By term, the pairs of layers that the recipe leaves to be found, as this run found them."""
        return kept_layers(self)

    @property
    def _has_baseline(self) -> bool:
        if self.recipe.baseline.enabled and self.label not in self.splits.train.column_names:
            self.note("no baseline: the training split has no labels to train one on")
            return False
        if self.recipe.baseline.enabled and self.splits.transfer is not None:
            usual, steps = (
                spec.options.get("max_steps") for spec in (self.recipe.baseline_train, self._baseline_train)
            )
            many = "" if steps == usual else f" for {steps:,} steps, as many as the student"
            self.note(f"the baseline is trained on the {len(self.splits.train):,} labelled rows{many}")
        changes = _changes(self.recipe.train, self.recipe.baseline_train)
        if self.recipe.baseline.enabled and changes:
            self.note(f"the baseline is trained by settings of its own: {changes}")
        return self.recipe.baseline.enabled

    @property
    def _baseline_train(self) -> TrainSpec:
        return baseline_settings(self, process_state().num_processes)

    def model_folder(self, name: str) -> Path:
        """Return where the model of that name is saved."""
        return self.folder / f"models/{name}"

    def student(self) -> nn.Module:
        """Return a fresh student; the same weights each time, for baseline and distilled student alike."""
        return self.student_of(self.recipe)

    def student_of(self, recipe: Recipe) -> nn.Module:
        """Return a fresh student as a recipe has it, that of a stage: what is frozen may differ."""
        facts = self.task_of("student").facts()
        model = self.student_blueprint.build(facts, seed=self.recipe.seed, allow_code=self.allow_code)
        return freeze(model, recipe.student.freeze)

    @property
    def student_blueprint(self) -> Blueprint:
        """How the student is built."""
        return build.student_blueprint(self.recipe, self.model_folder)

    def load(self, name: str) -> nn.Module:
        """Return a saved model of this run."""
        return load_model(self.model_folder(name), allow_code=self.allow_code)[0]

    # ---- the steps -------------------------------------------------------------------------------------------------

    def _preflight(self) -> None:
        """Look for faults before anything is trained; a folder in which nothing is done yet is given back."""
        logger.info("preflight: %d checks", len(checks.names()))
        try:
            self._examined("preflight", before_training(self, strict=self.strict))
        except PotstillError:
            if process_state().is_main_process:
                self.folder.disclaim()
            raise

    def _check_teachers(self) -> None:
        """Look for faults that only a trained teacher shows, and how the teachers are to answer."""
        self._examined("teachers", after_teachers(self, strict=self.strict))
        choose_forms(self)

    def _examined(self, step: str, findings: Sequence[Finding]) -> None:
        """Refuse errors, warn of warnings; keep all in ``preflight.json``."""
        refuse(findings)
        for finding in findings:
            if finding.level == "warning":
                self.note(f"preflight: {finding}")
        if process_state().is_main_process:
            found = [asdict(finding) for finding in findings]
            write_json(self.folder / "preflight.json", {**self._findings(), step: found})

    def _findings(self) -> dict[str, list[dict[str, Any]]]:
        path = self.folder / "preflight.json"
        found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    def _warnings(self) -> list[str]:
        """Return what the preflight warned of, whenever that was."""
        found = [Finding(**each) for step in self._findings().values() for each in step]
        return [f"preflight: {finding}" for finding in found if finding.level == "warning"]

    def live_teacher(self, name: str, taps: Sequence[str] | None = None) -> Live:
        """Return a saved teacher that answers as the recipe has it; see :func:`potstill.runs.teachers.live_teacher`."""
        return live_teacher(self, name, taps)

    def evaluate(self, split: str = "test") -> RunMetrics:
        """Judge the saved models on a split and return the figures; nothing is written.

        Raises:
            RunError: there is no such split.
        """
        names = ("train", "validation", "test")
        tables = {name: getattr(self.splits, name) for name in names if getattr(self.splits, name) is not None}
        if split not in tables:
            raise RunError(f"there is no split '{split}'; {did_you_mean(split, tables)}")
        if (self.folder / "metrics.json").is_file():
            self.notes = [note for note in self.metrics().notes if note not in self.splits.notes]
        return Judgement(self, tables[split], split).metrics()

    def _evaluate(self) -> None:
        """Judge every model on the test split, which is read once; write figures, answers and examples."""
        self.notes += [warning for warning in self._warnings() if warning not in self.notes]
        judgement = Judgement(self, self.splits.test, "test")
        metrics = judgement.metrics()
        for name, predictions in judgement.answers.items():
            path = self.folder / f"predictions/{name}.test.safetensors"
            path.parent.mkdir(exist_ok=True)
            predictions.save(path)
        write_json(self.folder / "examples.json", {"split": "test", "examples": judgement.examples()})
        write_json(self.folder / "metrics.json", metrics.model_dump(mode="json"))

    def _report(self) -> None:
        """Write what a person reads, ``report.html``."""
        from potstill.report.html import write_report

        logger.info("report: %s", write_report(self.folder.path))

    # ---- training --------------------------------------------------------------------------------------------------

    def train(
        self,
        name: str,
        model: nn.Module,
        spec: TrainSpec,
        objective: Objective,
        *,
        plan: Plan | None = None,
        teachers: Mapping[str, TeacherSource] | None = None,
        learners: Mapping[str, Learner] | None = None,
        scheme: Scheme | None = None,
    ) -> None:
        """Train a model on the training split; goes on from the last whole checkpoint.

        Args:
            name: ``baseline``, ``distilled`` or a teacher's name, with that of a stage after a slash.
            model: what is trained.
            spec: how.
            objective: what it minimises.
            plan: the recipe of a stage; the run's if omitted.
            teachers: who teaches, by name; nobody for an objective of hard terms alone.
            learners: who learns at the same time, by name.
            scheme: who teaches whom.
        """
        checkpoints = self.folder / f"checkpoints/{name}"
        trainer = make_trainer(
            plan or self,
            name,
            model,
            spec,
            objective,
            folder=checkpoints,
            seed=self.seed_of(name.partition("/")[0]),
            teacher=teachers,
            learners=learners,
            scheme=scheme,
            bars=self.bars,
        )
        resume = latest_checkpoint(checkpoints.absolute())
        precision = arguments.precision_of(spec)
        self.event("training", step=name, resumed_from=None if resume is None else resume.name, precision=precision)
        going_on = "" if resume is None else f", going on from {resume.name}"
        logger.info("%s: training in %s%s", name, precision, going_on)
        with matrix_products(precision):
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        if process_state().is_main_process:
            write_json(self.folder / f"history/{name}.json", trainer.state.log_history)

    def save(self, name: str, model: nn.Module, blueprint: Blueprint) -> None:
        """Save a model with all that inference needs, whole or not at all."""
        if not process_state().is_main_process:
            return
        target = self.model_folder(name)
        staged = target.with_name(target.name + ".tmp")
        shutil.rmtree(staged, ignore_errors=True)
        processor = self.processors[name if name in self.processors else "student"]
        save_model(model.to("cpu"), staged, self._card(name, blueprint), processor)
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)

    def _card(self, name: str, blueprint: Blueprint) -> dict[str, Any]:
        task = self.task_of(name)
        how = blueprint.card(task.facts(), allow_code=self.allow_code)
        return {"potstill": __version__, "task": task.name, "settings": task.settings(), **how}

    # ---- bookkeeping -----------------------------------------------------------------------------------------------

    def _step(self, name: str, work: Callable[[], None]) -> None:
        """Do a step unless it is done, then mark it; every process waits for the others."""
        state = process_state()
        state.wait_for_everyone()
        if self.folder.is_done(name):
            if state.is_main_process:
                for kept in ("checkpoints", "stages"):  # of a run that was killed before it could
                    self.folder.clear(f"{kept}/{name}")
            return
        self.event("begin", step=name)
        if name not in _ONCE or state.is_main_process:
            work()
        state.wait_for_everyone()
        if state.is_main_process:
            self.folder.mark_done(name)
            self.event("done", step=name)
            self.folder.clear(f"checkpoints/{name}")
            self.folder.clear(f"stages/{name}")
        state.wait_for_everyone()

    def event(self, event: str, **about: Any) -> None:
        """Note in ``events.jsonl`` what happened, once for all processes."""
        if process_state().is_main_process:
            self.folder.event(event, **about)

    def note(self, text: str) -> None:
        """Warn of what a reader of the figures should know, and keep it for the report."""
        if text not in self.notes:
            self.notes.append(text)
            logger.warning(text)


def _changes(usual: TrainSpec, own: TrainSpec) -> str:
    """Return what differs between two ``train:`` sections, as ``epochs 20 (the student: 60)``."""
    first, second = (spec.model_dump(mode="json") for spec in (usual, own))
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return ", ".join(f"{key} {second.get(key)} (the student: {first.get(key)})" for key in keys)


def open_run(folder: Path, *, allow_code: bool = True, bars: bool | None = None) -> Run:
    """Return the finished run in a folder.

    Raises:
        RunError: the folder holds no run, or one that is not finished.
    """
    resolved = folder / "recipe.resolved.yaml"
    if not resolved.is_file():
        runs = sorted(path.parent.name for path in folder.glob("*/recipe.resolved.yaml"))
        hint = f"; it holds the runs {', '.join(runs)}" if runs else ""
        what = "has no recipe.resolved.yaml" if folder.is_dir() else "is no folder"
        raise RunError(f"expected the folder of a run, and {folder} {what}{hint}")
    run = Run(load_recipe(resolved, allow_code=allow_code), folder, allow_code=allow_code, bars=bars)
    if not run.folder.is_done("evaluate"):
        raise RunError(f"the run in {folder} is not finished; `potstill distill` goes on with it")
    return run


def default_output(recipe: Recipe) -> Path:
    """Return ``runs/NAME-HASH`` under the working directory: the same recipe, the same folder."""
    return Path("runs") / f"{recipe.name}-{content_hash(recipe.model_dump(mode='json', exclude={'preflight'}))[:8]}"
