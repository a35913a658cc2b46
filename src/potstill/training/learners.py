"""Several models that learn at the same time as ONE module: each its own objective, parameter group and clipping."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import TrainingError, did_you_mean
from potstill.interfaces import Batch, Progress, Signals, TeacherSource
from potstill.losses.objective import Objective, Term
from potstill.models.inputs import call, respond, teacher_view
from potstill.schemes.lesson import SELF, STUDENT, Learner, Lesson
from potstill.teachers.live import Live, Several
from potstill.training.module import DistillationModule, DistillationOutput


class JointModule(DistillationModule):
    """The student and those who learn beside it; what each says teaches the others, cut from its graph.

    The loss is the sum of the learners' objectives. No gradient of one reaches another, so that each is trained as it
    would be alone with these answers.

    Args:
        lesson: who learns, and from whom.
    """

    def __init__(self, lesson: Lesson) -> None:
        super().__init__(**_parts_of(lesson.student))
        self.others = nn.ModuleDict()
        self._settings = dict(lesson.others)
        self._sources = list(lesson.sources)
        for name, learner in lesson.others.items():
            if hasattr(self.others, name) or "." in name:
                raise TrainingError(f"a learner cannot be called '{name}'; choose another name")
            self.others[name] = DistillationModule(**{"objective": self.objective.hard_only(), **_parts_of(learner)})
        self._check_names()
        owned = [{id(p) for p in each.student.parameters()} for each in self.learners.values()]
        if len(set().union(*owned)) < sum(map(len, owned)):
            raise TrainingError("two learners share parameters, which would be trained twice; copy one of them")

    @property
    def learners(self) -> dict[str, DistillationModule]:
        """Every learner by name, the student first."""
        others = {name: module for name, module in self.others.items() if isinstance(module, DistillationModule)}
        return {STUDENT: self, **others}

    def taught(self, progress: Progress | None = None) -> list[str]:
        """Return the signals that any learner reads from teachers that do not learn, as ``NAME/SIGNAL``."""
        found = []
        for name, module in self.learners.items():
            read = DistillationModule.taught(module, progress)
            found += [full for each in read if (full := self._full(name, each)).partition("/")[0] in self._sources]
        return list(dict.fromkeys(found))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the number of valid positions of each term of each learner."""
        found: dict[str, Tensor] = {}
        for name, module in self.learners.items():
            own = module.objective.counts(self._view(name, batch))
            found |= {_key(name, term): count for term, count in own.items()}
        return found

    def forward(
        self,
        teacher: Signals | None = None,
        counts: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
        **batch: Tensor,
    ) -> Any:
        """Return the sum of the learners' losses; with ``teacher=None`` exactly what the student returns."""
        if teacher is None:
            return call(self.student, batch, labels=True)
        progress = progress or Progress()
        said = {
            name: DistillationModule.signals(module, self._view(name, batch), progress, self._asked(name, progress))
            for name, module in self.learners.items()
        }
        total: Tensor | float = 0.0
        parts: dict[str, Tensor] = {}
        for name, module in self.learners.items():
            own = None if counts is None else _of(name, counts, module)
            heard = self._heard(name, teacher, said)
            loss, found = module._loss(said[name], heard, self._view(name, batch), progress, own)
            total = total + loss
            parts |= {_key(name, term): value for term, value in found.items()}
        return DistillationOutput(loss=torch.as_tensor(total), logits=said[STUDENT].get(self.responses[0]), parts=parts)

    @property
    def pending(self) -> bool:
        """Whether any learner has layers that wait for :meth:`materialize`."""
        return any(module.waits for module in self.learners.values())

    @torch.no_grad()
    def materialize(self, teacher: Signals, batch: Batch) -> None:
        """Make the layers whose sizes depend on signals, by one dry run of every learner on ``batch``."""
        if not self.pending:
            return
        said = {}
        for name, module in self.learners.items():
            module.materialize_extension(self._view(name, batch))
            said[name] = module.dry_run(self._view(name, batch), self._asked(name, None))
        for name, module in self.learners.items():
            module.fit(said[name], {**self._heard(name, teacher, said), **module.own_signals(said[name])})

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Switch gradient checkpointing on in every learner that has it."""
        for module in self.learners.values():
            enable: Any = getattr(module.student, "gradient_checkpointing_enable", None)
            if enable is not None:
                enable(*args, **kwargs)

    def split(self, optimizer: torch.optim.Optimizer, decayed: Collection[int] = ()) -> None:
        """Give each other learner parameter groups of its own, with its own learning rate and weight decay.

        Args:
            optimizer: of all parameters.
            decayed: the ids of those that a weight decay is for: no biases and norms.
        """
        for name, module in self.learners.items():
            if module is not self:
                wanted = self._settings[name]
                split_groups(
                    optimizer,
                    list(module.parameters()),
                    learning_rate=wanted.learning_rate,
                    weight_decay=wanted.weight_decay,
                    decayed=decayed,
                )

    def clip(self, bound: float) -> dict[str, Tensor]:
        """Shorten the gradient of each learner to ``bound`` where it is longer, and return the lengths before."""
        return {name: nn.utils.clip_grad_norm_(own, bound) for name, own in _parameters(self).items()}

    # ---- who hears what --------------------------------------------------------------------------------------------

    def _view(self, name: str, batch: Batch) -> Batch:
        prefix = "" if name == STUDENT else self._settings[name].prefix
        return teacher_view(batch, prefix) if prefix else batch

    def _teachers(self, name: str) -> list[str]:
        """Return the names of all from whom a learner may learn."""
        return [*self._sources, *(each for each in self.learners if each != name)]

    def _full(self, name: str, signal: str) -> str:
        """Return a signal that a learner reads as ``NAME/SIGNAL``: bare names are those of an only teacher."""
        teachers = self._teachers(name)
        known = signal.partition("/")[0] in teachers
        return signal if known or len(teachers) != 1 else f"{teachers[0]}/{signal}"

    def _asked(self, name: str, progress: Progress | None) -> list[str]:
        """Return the signals of a learner that others read."""
        found = []
        for other, module in self.learners.items():
            if other != name:
                read = [self._full(other, each) for each in DistillationModule.taught(module, progress)]
                found += [each.removeprefix(f"{name}/") for each in read if each.startswith(f"{name}/")]
        return list(dict.fromkeys(found))

    def _heard(self, name: str, teacher: Signals, said: Mapping[str, Signals]) -> Signals:
        """Return the signals of all from whom a learner learns; those of an only teacher have their bare names too."""
        heard = dict(teacher)
        for other, signals in said.items():
            if other != name:
                heard |= {f"{other}/{key}": value for key, value in signals.items()}
        teachers = self._teachers(name)
        if len(teachers) == 1:
            heard |= {key.partition("/")[2]: value for key, value in heard.items()}
        return heard

    def _check_names(self) -> None:
        taken = [name for name in (*self._sources, *self.others) if name in (STUDENT, SELF)]
        taken += [name for name in self.others if name in self._sources]
        if taken:
            raise TrainingError(f"a teacher cannot be called '{taken[0]}': the name is taken; choose another")
        for name, module in self.learners.items():
            teachers = self._teachers(name)
            for signal in DistillationModule.taught(module):
                owner = self._full(name, signal).partition("/")[0]
                if owner not in teachers:
                    raise TrainingError(
                        f"the objective of '{name}' reads '{signal}', and its teachers are {', '.join(teachers)}: "
                        f"expected TEACHER/SIGNAL; {did_you_mean(owner, teachers)}"
                    )


def as_sources(teacher: Any, lesson: Lesson) -> dict[str, TeacherSource]:
    """Return teachers by name: a module becomes a source that answers live what the learners read of it.

    Args:
        teacher: a module, a source, several by name, or ``None``.
        lesson: who learns.

    Raises:
        TrainingError: it is neither.
    """
    named = teacher if isinstance(teacher, Mapping) else {} if teacher is None else {"teacher": teacher}
    return {
        name: _as_source(name, each, lesson, alone=len(named) + len(lesson.others) == 1) for name, each in named.items()
    }


def joined(lesson: Lesson) -> tuple[DistillationModule, TeacherSource | None]:
    """Return the module that is trained in a lesson, and the one source that it hears.

    Returns:
        The module; the only source if there is no other teacher and no term says its name, all of them by name
        otherwise, ``None`` without any.
    """
    sources = lesson.sources
    if lesson.others:
        return JointModule(lesson), Several(sources) if sources else None
    module = DistillationModule(**_parts_of(lesson.student))
    by_name = any(signal.partition("/")[0] in sources for signal in module.taught())
    if len(sources) > 1 or by_name:
        return module, Several(sources)
    return module, next(iter(sources.values()), None)


def plain_hard(usual: Mapping[str, Term], lesson: Lesson, objective: Objective) -> Objective:
    """Return the hard terms that any model has: without those on signals that only the student's extension makes.

    Args:
        usual: the student's terms before a scheme arranged them.
        lesson: with the extension.
        objective: the student's, whose mask the responses have.
    """
    extension = lesson.student.extension
    made = [] if extension is None else [n for n, t in usual.items() if any(map(extension.makes, t.student))]
    terms = {name: term for name, term in usual.items() if name not in made}
    whole = Objective(terms or {"hard": Term("cross_entropy")}, response_mask=objective.response_mask)
    return whole.hard_only()


def split_groups(
    optimizer: torch.optim.Optimizer,
    parameters: Collection[nn.Parameter],
    *,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    decayed: Collection[int] = (),
) -> None:
    """Move parameters into groups of their own; a weight decay holds for those whose ids are ``decayed``."""
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        if not moved:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in own]
        settings = {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
        if learning_rate is not None:
            settings["lr"] = learning_rate
        if weight_decay is not None and any(id(p) in decayed for p in moved):
            settings["weight_decay"] = weight_decay
        optimizer.add_param_group({"params": moved, **settings})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _as_source(name: str, teacher: Any, lesson: Lesson, *, alone: bool) -> TeacherSource:
    if isinstance(teacher, nn.Module):
        if any(teacher is learner.model for learner in lesson.learners.values()):
            raise TrainingError("teacher and student are the same object; copy one of them")
        read = [
            s for learner in lesson.learners.values() if learner.objective for s in learner.objective.taps("teacher")
        ]
        own = [s.removeprefix(f"{name}/") for s in read if alone or s.startswith(f"{name}/")]
        taps = [s for s in dict.fromkeys(own) if s != "logits" and not s.startswith("self/")]
        return Live(teacher, taps, forward=lesson.student.forward or respond)
    if not callable(teacher):
        raise TrainingError(
            f"expected a teacher that is a module or a callable of a batch, got {type(teacher).__name__}"
        )
    return teacher  # type: ignore[no-any-return]


def _parts_of(learner: Learner) -> dict[str, Any]:
    found = {"student": learner.model, "forward": learner.forward, "extension": learner.extension}
    return found if learner.objective is None else {**found, "objective": learner.objective}


def _parameters(module: DistillationModule) -> dict[str, list[nn.Parameter]]:
    others = {name: list(each.parameters()) for name, each in module.learners.items() if each is not module}
    theirs = {id(parameter) for each in others.values() for parameter in each}
    return {STUDENT: [p for p in module.parameters() if id(p) not in theirs], **others}


def _key(name: str, term: str) -> str:
    return term if name == STUDENT else f"{name}.{term}"


def _of(name: str, counts: Mapping[str, Tensor], module: DistillationModule) -> dict[str, Tensor]:
    return {term: counts[_key(name, term)] for term, _ in module.objective.named_terms()}
