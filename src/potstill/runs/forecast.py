"""What a run will cost, measured on a few of its batches: memory, time of a step, and what would make it faster."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.data.batching import InMemory
from potstill.errors import RunError, TrainingError
from potstill.interfaces import Batch, Signals, TeacherSource
from potstill.recipe import arguments, build
from potstill.recipe.schema import TrainSpec
from potstill.runs.caching import cache_settings
from potstill.runs.plan import Plan
from potstill.runs.processes import process_state
from potstill.runs.training import fit_teacher, make_trainer
from potstill.teachers.cached import Cached
from potstill.teachers.live import Live, Several
from potstill.teachers.precision import tried_precision
from potstill.training.precision import HALVES, matrix_products
from potstill.training.profile import Profile, profile
from potstill.training.trainer import DistillationTrainer

FLOOR, LIVE, CACHED = "student alone", "with its teacher", "with cached answers"
_BATCHES = 6


@dataclass(frozen=True)
class Forecast:
    """What training the student will cost.

    Attributes:
        device: where.
        precision: in which arithmetic.
        cached: whether the run uses a teacher's cache.
        can_be_cached: whether a teacher's answers can be kept: there is one, and no random views without end.
        step_ms: mean time of an optimizer step by how it is done: the student alone, with its teacher, with its
            answers from a cache; those that the recipe has.
        steps: of the whole training of the student.
        memory: bytes by what takes them, at the largest batch.
        faster: what would change the time of a step, with the factor by which it would be shorter; below 1: longer.
    """

    device: str
    precision: str
    cached: bool
    can_be_cached: bool
    step_ms: dict[str, float]
    steps: int
    memory: dict[str, int]
    faster: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of the distilled student's training, all of it with cached answers where there is a cache."""
        own = self.step_ms.get(CACHED if self.cached else LIVE, self.step_ms[FLOOR])
        return own * self.steps / 1000


class Trial:
    """Trainers of one recipe's student in several settings, tried on the same batches in turns.

    Args:
        plan: what the recipe means; its teachers need not be trained.

    Raises:
        RunError: the recipe has stages, a scheme that changes who learns, or teachers that are no fixed models.
    """

    def __init__(self, plan: Plan) -> None:
        recipe = plan.recipe
        moving = [
            *recipe.joint_teachers,
            *(name for name, spec in recipe.all_teachers.items() if spec.source is not None),
        ]
        if moving or recipe.stages or recipe.scheme.name not in ("offline", "progressive"):
            what = (
                f"the teacher '{moving[0]}'" if moving else "`stages`" if recipe.stages else f"`{recipe.scheme.name}`"
            )
            raise RunError(
                f"a forecast is of one training with fixed models for teachers, and this recipe has {what}; time a "
                "short run instead, as with `train.max_steps=20`"
            )
        self.plan = plan
        self.device = process_state().device
        self.folder = tempfile.TemporaryDirectory()

    def forecast(self, *, budget_s: float = 20.0) -> Forecast:
        """Return what the training will cost.

        Args:
            budget_s: after so many seconds no further round of measurements begins.
        """
        recipe, spec = self.plan.recipe, self.plan.recipe.train
        precision = arguments.precision_of(spec)
        trainers = {FLOOR: self.trainer(spec, self._alone)}
        if recipe.all_teachers:
            live = self.live
            trainers[LIVE] = self.trainer(spec, live)
            trainers[CACHED] = self.trainer(spec, self._cached(live))
        cached = any(cache_settings(recipe, name) is not None for name in recipe.all_teachers)
        own = FLOOR if LIVE not in trainers else CACHED if cached else LIVE
        others = {name: self.trainer(changed, trainers[own].teacher) for name, changed in _variants(spec).items()}
        precisions = {name: arguments.precision_of(changed) for name, changed in _variants(spec).items()}
        every = {**trainers, **others}
        seconds = self._measured(every, {**dict.fromkeys(trainers, precision), **precisions}, budget_s)
        faster = {name: seconds[own] / seconds[name] for name in others}
        possible = bool(recipe.all_teachers) and build.count_views(recipe, spec) is not None
        if possible and not cached and spec.epochs > (spec.views or 1):
            faster["teacher.cache=true"] = seconds[LIVE] / seconds[CACHED]
        faster |= self._padding(spec)
        memory = self._memory(trainers[own])
        step_ms = {name: 1000 * seconds[name] for name in trainers}
        return Forecast(
            str(self.device), precision, cached, possible, step_ms, self._steps(trainers[FLOOR]), memory, faster
        )

    def profile(self, *, steps: int = 30, trace: Path | None = None) -> Profile:
        """Return where the time of a step goes, the teacher's answers as the recipe has them."""
        recipe = self.plan.recipe
        quiet = {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        spec = TrainSpec(**{**dict(recipe.train), **quiet})
        cached = any(cache_settings(recipe, name) is not None for name in recipe.all_teachers)
        source = None if not recipe.all_teachers else self._cached(self.live) if cached else self.live
        trainer = self.trainer(spec, source)
        with matrix_products(arguments.precision_of(spec)):
            if cached and source is not None:
                self._ask(trainer, source, steps * trainer.args.gradient_accumulation_steps)
            return profile(trainer, trace=trace)

    def trainer(self, spec: TrainSpec, source: TeacherSource | None) -> DistillationTrainer:
        """Return a trainer of a fresh student."""
        plan = self.plan
        objective = plan.make_objective()
        trainer = make_trainer(
            plan,
            "distilled",
            plan.student(),
            TrainSpec(**{**dict(spec), "callbacks": []}),
            objective if source is not None else objective.hard_only(),
            folder=Path(self.folder.name),
            seed=plan.recipe.seed,
            teacher=source,
        )
        precision = arguments.precision_of(
            spec
        )  # accelerate looks it up in what the last trainer that was made has set
        trainer.accelerator.autocast = partial(_autocast, self.device, precision)
        return trainer

    # ---- inside ----------------------------------------------------------------------------------------------------

    @cached_property
    def live(self) -> TeacherSource:
        """The teachers as they are before any training."""
        plan, recipe = self.plan, self.plan.recipe
        task = build.prepared_for_distillation(recipe, plan.task, plan.processors)
        found: dict[str, TeacherSource] = {}
        for name, spec in recipe.all_teachers.items():
            facts = plan.task_of(name).facts()
            model = build.teacher_blueprint(recipe, name).build(facts, seed=recipe.seed, allow_code=plan.allow_code)
            fit_teacher(plan, name, model)
            taps = build.teacher_taps(recipe, plan.objective, name)
            prefix = build.teacher_prefix(recipe, name)
            live = Live(model, taps, forward=task.forward, prefix=prefix, precision=tried_precision(spec.precision))
            found[name] = live.to(self.device)
        return Several(found) if len(found) > 1 else next(iter(found.values()))

    @cached_property
    def _alone(self) -> TeacherSource | None:
        """What stands in for the teachers where the student is timed alone."""
        labelled = self.plan.label in self.plan.splits.taught_on.column_names
        return None if labelled else _Remembered(self.live)

    def _ask(self, trainer: DistillationTrainer, source: TeacherSource, batches: int) -> None:
        """Let a cache know the answers to the first batches, as it does once every view was shown."""
        dataset: Any = trainer.train_dataset
        state, loader = torch.random.get_rng_state(), trainer.get_train_dataloader()
        views = min(getattr(dataset, "views", None) or 1, -(-batches // len(loader)))
        with trainer.accelerator.autocast():
            for view in range(views):
                dataset.set_epoch(view)
                for _, batch in zip(range(batches), loader, strict=False):
                    source(batch)
        dataset.set_epoch(0)
        torch.random.set_rng_state(state)

    def _cached(self, live: TeacherSource) -> TeacherSource:
        sources = dict(live.teachers) if isinstance(live, Several) else {"teacher": live}
        made: dict[str, TeacherSource] = {}
        for name, each in sources.items():
            folder = Path(self.folder.name) / f"cache-{name}"
            made[name] = Cached(each, folder, identity=name)
        return Several(made) if isinstance(live, Several) else made["teacher"]

    @cached_property
    def batches(self) -> list[Batch]:
        """A few training batches, from the smallest to the largest."""
        places = np.unique(((np.arange(_BATCHES) + 0.5) / _BATCHES * len(self._parts)).astype(int))
        return [self._batch(self._parts[place]) for place in places]

    @cached_property
    def _dataset(self) -> Any:
        plan, recipe = self.plan, self.plan.recipe
        task = build.prepared_for_distillation(recipe, plan.task, plan.processors)
        return build.training_set(recipe, task, recipe.train, plan.splits.taught_on, recipe.seed)

    @cached_property
    def _parts(self) -> list[list[int]]:
        """The places of the samples of each batch of the first epoch, the largest batch last."""
        trainer = self.trainer(self.plan.recipe.train, self._alone)
        with torch.random.fork_rng(devices=[]):
            parts = [list(part) for part in trainer.get_train_dataloader().batch_sampler]
        lengths = np.asarray(getattr(self._dataset, "lengths", np.ones(len(self._dataset), np.int64)))
        return sorted(parts, key=lambda part: len(part) * int(lengths[part].max()))

    def _batch(self, part: list[int]) -> Batch:
        made: Batch = self._dataset.__getitems__(part)
        return {name: value.to(self.device) for name, value in made.items()}

    def _measured(
        self, trainers: Mapping[str, DistillationTrainer], precisions: Mapping[str, str], budget_s: float
    ) -> dict[str, float]:
        """Return the mean time of a step of each in seconds: for each batch its least, for others only add to it."""
        taken: dict[str, list[list[float]]] = {name: [[] for _ in self.batches] for name in trainers}
        steps = {name: _Step(trainer) for name, trainer in trainers.items()}
        end = time.perf_counter() + budget_s
        for turn in range(12):
            for name, step in steps.items():
                for place, batch in enumerate(self.batches):
                    with matrix_products(precisions[name]):
                        begin = self._now()
                        step(batch)
                        if turn:
                            taken[name][place].append(self._now() - begin)
            if turn > 1 and time.perf_counter() > end:
                break
        return {name: statistics.mean(min(each) for each in rows) for name, rows in taken.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _padding(self, spec: TrainSpec) -> dict[str, float]:
        """Return what grouping by length saves, counted in tokens with their padding."""
        train: Any = self.trainer(spec, None).train_dataset
        lengths = getattr(train, "lengths", None)
        if lengths is None or spec.group_by_length:
            return {}
        shuffled = np.random.default_rng(0).permutation(np.asarray(lengths))
        grouped = np.sort(shuffled)
        padded = [sum(part.max() * len(part) for part in _parts(each, spec.batch_size)) for each in (shuffled, grouped)]
        return {"train.group_by_length=true": float(padded[0] / padded[1])}

    def _memory(self, trainer: DistillationTrainer) -> dict[str, int]:
        """Return the bytes that the training takes at the largest of the batches."""
        module = trainer.distillation_module
        step = _Step(trainer, micro_batches=1)
        with _saved(module) as saved:
            step(self._batch(self._parts[-1]))
        optimizer = [v for state in step.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        models = [each.model.model for each in _lives(self.live)] if self.plan.recipe.all_teachers else []
        found = {
            "student": _bytes(module),
            "gradients": trained,
            "optimizer": sum(each.numel() * each.element_size() for each in optimizer),
            "activations": saved[0],
            "teachers": sum(_bytes(model) for model in models),
        }
        dataset: Any = trainer.train_dataset
        if isinstance(dataset, InMemory):
            found["data"] = sum(value.numel() * value.element_size() for value in dataset.columns.values())
        return found

    def _steps(self, trainer: DistillationTrainer) -> int:
        if trainer.args.max_steps > 0:
            return int(trainer.args.max_steps)
        each: int = -(-len(trainer.get_train_dataloader()) // trainer.args.gradient_accumulation_steps)
        return math.ceil(max(1, each) * float(trainer.args.num_train_epochs))


class _Step:
    """One optimizer step as the trainer does it, without what is around it.

    Args:
        trainer: whose.
        micro_batches: how often the batch is run through; as often as the trainer accumulates if omitted.
    """

    def __init__(self, trainer: DistillationTrainer, micro_batches: int | None = None) -> None:
        self.trainer = trainer
        self.micro_batches = micro_batches or trainer.args.gradient_accumulation_steps
        trainer.materialize()
        self.model = trainer.distillation_module
        self.optimizer = trainer.create_optimizer()
        args, samples = trainer.args, len(trainer.train_dataset)
        window = args.per_device_train_batch_size * args.gradient_accumulation_steps
        planned = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * samples / window)
        trainer.state.max_steps, trainer.state.global_step = planned, planned // 2  # in the midst of ramps

    def __call__(self, batch: Batch) -> None:
        trainer = self.trainer
        self.model.train()
        window = [batch] * self.micro_batches
        _, counts = trainer.get_batch_samples(iter(window), len(window), trainer.args.device)
        for each in window:
            with trainer.accelerator.autocast():  # as accelerate wraps the model that it prepares
                loss = trainer.compute_loss(self.model, each, num_items_in_batch=counts)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        trainer.state.global_step += 1


class _Remembered:
    """A teacher that is asked once for each batch: what is left is the student, where no labels teach it alone."""

    def __init__(self, live: TeacherSource) -> None:
        self.live = live
        self.known: dict[int, tuple[Tensor, Signals]] = {}

    def __call__(self, batch: Batch) -> Signals:
        ids = batch["sample_id"]
        if id(ids) not in self.known:
            self.known[id(ids)] = ids, self.live(batch)  # held, so that no other tensor gets its number
        return self.known[id(ids)][1]


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, HALVES[precision]) if precision in HALVES else nullcontext()


def _variants(spec: TrainSpec) -> dict[str, TrainSpec]:
    """Return the settings that may be faster, by how a recipe says them."""
    now = arguments.precision_of(spec)
    base = {key: value for key, value in dict(spec).items() if key not in HALVES}
    found = {}
    for precision in ("fp32", "medium", "bf16"):
        if precision != now:
            try:
                changed = TrainSpec(**{**base, "precision": precision})
                arguments.precision_of(changed)
            except TrainingError:
                continue
            found[f"train.precision={precision}"] = changed
    if spec.optimizer in ("AdamW", "adamw", "adamw_torch"):
        found["train.optimizer=adamw_torch_fused"] = TrainSpec(**{**dict(spec), "optimizer": "adamw_torch_fused"})
    return found


def _parts(lengths: Any, size: int) -> list[Any]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]


def _bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))


def _lives(source: Any) -> list[Any]:
    return list(source.teachers.values()) if isinstance(source, Several) else [source]


@contextmanager
def _saved(module: nn.Module) -> Iterator[list[int]]:
    """Count the bytes that are kept for the backward pass inside the block, the parameters left out."""
    known = {each.untyped_storage().data_ptr() for each in module.parameters()}
    total = [0]

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        yield total
