"""Module replacing: the blocks of a student learn in the place of the teacher's, until they stand alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.data.draws import Draws
from potstill.errors import TrainingError, did_you_mean
from potstill.interfaces import Batch, Progress
from potstill.models.frozen import Frozen
from potstill.models.student import block_count, find_blocks
from potstill.registry import schemes
from potstill.schemes.lesson import SELF, STUDENT, Extension, Lesson
from potstill.schemes.progressive import is_layer

Growth = Literal["constant", "linear"]
"""How the probability of a block of the student goes on: it stays until the end, or grows to 1."""


@schemes.register("module_replacing", reference="https://arxiv.org/abs/2002.02925")
class ModuleReplacing:
    """Train the student's blocks inside the teacher, each in the place of some of the teacher's (BERT-of-Theseus).

    The teacher's n blocks are split in order into as many groups as the student has blocks, of sizes that differ by 1
    at most. For every batch each group is replaced, with probability p and independently, by the student's block, which
    then learns between blocks of the teacher. These stay as they are, in eval mode, and pass gradients on. From ``end``
    on the student is trained alone, and in evaluation it is always alone. No other loss than that of the task is
    needed; terms on responses compare those of the mixture.

    Embeddings and head are the student's own and learn all the time, unless ``freeze`` is set. The paper takes the
    teacher's, which are frozen as long as blocks are replaced; a student that is cut from the trained teacher
    (``from_teacher: {weights: finetuned}``) begins with them. The authors' code
    (https://github.com/JetRunner/BERT-of-Theseus) trains the blocks alone, to the end, with dropout in the teacher's;
    its examples have p = 0.7 for a constant schedule and 0.1 at the first step of a linear one.

    Args:
        probability: p; of a linear schedule, p at the first step.
        schedule: ``constant``: p until ``end``; ``linear``: min(1, p + (1 − p) · done / end), done being the share of
            the training that is done.
        end: share of the training from which on the student is alone, above 0; at 1 a constant schedule never ends.
        teacher: name of the teacher, where there are several.
        container: path of the blocks in both models, where there are several stacks; found if omitted.
        freeze: whether the student's embeddings and head stay as they are until ``end``; they must be the teacher's.
            One block of the student then is in its place in every batch, by turns where none is drawn.

    Raises:
        TrainingError: a number out of range.

    Reference: Xu et al. 2020, https://arxiv.org/abs/2002.02925.
    """

    def __init__(
        self,
        *,
        probability: float = 0.5,
        schedule: Growth = "linear",
        end: float = 0.5,
        teacher: str | None = None,
        container: str | None = None,
        freeze: bool = False,
    ) -> None:
        if not (0 <= probability <= 1 and 0 < end <= 1):
            raise TrainingError(
                f"module_replacing expected a probability from 0 to 1 and an end above 0 and up to 1, got "
                f"{probability} and {end}"
            )
        self.probability, self.end, self.teacher, self.freeze = probability, end, teacher, freeze
        self.container = container
        self.schedule: Growth = schedule

    def arrange(self, lesson: Lesson) -> Lesson:
        """Return a lesson whose student learns inside the teacher.

        Raises:
            TrainingError: there is no such teacher, it is of another kind or width than the student, or the objective
                reads what blocks of the student say.
            ModelError: the blocks of a model are not found.
        """
        student = lesson.student
        if student.extension is not None:
            got = type(student.extension).__name__
            raise TrainingError(f"module_replacing expected a student as it is, got one with {got}")
        teacher = self._model(lesson)
        own, theirs = self._blocks(student.model), self._blocks(teacher)
        _check_signals(lesson, own)
        groups = _groups(student.model, own, teacher, theirs)
        if self.freeze:
            _check_frozen(student.model, own, teacher, theirs)
        made = Replacing(own, groups, self.probability_at, seed=lesson.seed, freeze=self.freeze)
        return replace(lesson, student=replace(student, extension=made))

    def probability_at(self, progress: Progress) -> float:
        """Return p at this point of the training; exactly 1 from ``end`` on."""
        done, end = Fraction(progress.step, max(1, progress.total_steps)), Fraction(str(self.end))
        if done >= end:
            return 1.0 if self.schedule == "linear" or end < 1 else self.probability
        if self.schedule == "constant":
            return self.probability
        return self.probability + (1 - self.probability) * float(done / end)

    def _blocks(self, model: nn.Module) -> str:
        if self.container is None:
            return find_blocks(model)
        block_count(model, self.container)  # raises where there are none
        return self.container

    def _model(self, lesson: Lesson) -> nn.Module:
        names = list(lesson.sources)
        if not names or (self.teacher is None and len(names) > 1):
            got = ", ".join(names) or "none"
            hint = "say which with `scheme: {teacher: NAME}`" if names else "add `teacher: {model: MODEL}`"
            raise TrainingError(f"module_replacing expected one trained teacher, got {got}; {hint}")
        name = self.teacher or names[0]
        if name not in names:
            raise TrainingError(f"module_replacing: there is no trained teacher '{name}'; {did_you_mean(name, names)}")
        model: Any = getattr(lesson.sources[name], "model", None)
        if not isinstance(model, nn.Module):
            raise TrainingError(
                f"module_replacing needs the blocks of '{name}' themselves: expected a teacher that is a model, got "
                f"{type(lesson.sources[name]).__name__}"
            )
        return model.awake() if isinstance(model, Frozen) else model


class Replacing(Extension):
    """Puts groups of the teacher's blocks in the place of some of the student's while it answers a batch.

    Which ones is a pure function of the seed, the step and the first sample of the batch. The teacher's blocks are no
    part of this module or of the student: not of their parameters, nor of their states.

    Args:
        container: path of the student's blocks.
        groups: the teacher's blocks for each of them.
        probability: of a block of the student, by the progress.
        seed: of the draws.
        freeze: whether all but the blocks of the student learn nothing while blocks are replaced.
    """

    def __init__(
        self,
        container: str,
        groups: Sequence[Sequence[nn.Module]],
        probability: Any,
        *,
        seed: int,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.container, self.probability, self.seed, self.freeze = container, probability, seed, freeze
        self._groups = [tuple(group) for group in groups]  # in a list, so that nn.Module registers none of them

    def drawn(self, batch: Batch, progress: Progress) -> list[bool]:
        """Return for each block of the student whether it is in its place."""
        ids = batch.get("sample_id")
        first = torch.zeros(1, dtype=torch.int64) if ids is None else ids[:1].cpu()
        numbers = Draws(self.seed, progress.step, first).uniform("module_replacing", len(self._groups))[0]
        return [number < self.probability(progress) for number in numbers.tolist()]

    @contextmanager
    def around(self, model: nn.Module, batch: Batch, progress: Progress) -> Iterator[None]:
        """Let the student be a mixture of its own blocks and the teacher's."""
        if self.probability(progress) >= 1:
            yield
            return
        box = model.get_submodule(self.container)
        names, own = list(box._modules), dict(box._modules)
        blocks = {id(parameter) for parameter in box.parameters()}
        outside = [p for p in model.parameters() if id(p) not in blocks and p.requires_grad]
        drawn = self.drawn(batch, progress)
        if (self.freeze or not outside) and not any(drawn):
            drawn[progress.step % len(drawn)] = True  # or nothing would learn, and the loss have no gradient
        stopped = [p for group in self._groups for each in group for p in each.parameters() if p.requires_grad]
        stopped += outside if self.freeze else []
        cached = _caching(model)
        place = next(model.parameters()).device
        try:
            for config in cached:
                config.use_cache = False
            for parameter in stopped:
                parameter.requires_grad_(False)
            for name, group, stays in zip(names, self._groups, drawn, strict=True):
                if not stays:
                    box._modules[name] = _Group([each.to(place).eval() for each in group])
            yield
        finally:
            box._modules.update(own)
            for parameter in stopped:
                parameter.requires_grad_(True)
            for config in cached:
                config.use_cache = True


class _Group(nn.Module):
    """Blocks of the teacher that run one after another, as one block; other attributes are the first one's."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self._blocks = tuple(blocks)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the last block returns."""
        output: Any = hidden
        for block in self._blocks:
            output = block(output[0] if isinstance(output, tuple) else output, *args, **kwargs)
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_blocks"][0], name)


def _groups(student: nn.Module, own: str, teacher: nn.Module, theirs: str) -> list[list[nn.Module]]:
    """Return the teacher's blocks for each of the student's."""
    short, long = list(student.get_submodule(own)), list(teacher.get_submodule(theirs))  # type: ignore[call-overload]
    if type(short[0]) is not type(long[0]) or len(short) > len(long):
        raise TrainingError(
            f"module_replacing expected a teacher of the student's kind with as many blocks or more, got "
            f"{len(long)} of {type(long[0]).__name__} for {len(short)} of {type(short[0]).__name__}; cut the student "
            "from the teacher, as in `student: {from_teacher: {keep_blocks: [0, 2, 4]}}`"
        )
    for what, of in (("width", _width), ("dtype", _dtype)):
        widths = [{of(model, block) for block in blocks} for model, blocks in ((student, short), (teacher, long))]
        one, other = (" and ".join(sorted(map(str, each - {None} or each))) for each in widths)
        if one != other:
            raise TrainingError(
                f"module_replacing expected blocks of one {what}, as each takes the place of others, got {one} of the "
                f"student and {other} of the teacher"
            )
    groups = []
    for place in range(len(short)):
        numbers = range(place * len(long) // len(short), (place + 1) * len(long) // len(short))
        kinds = {_kind(teacher, long[number], number) for number in numbers}
        if kinds != {_kind(student, short[place], place)}:
            raise TrainingError(
                f"module_replacing: block {place} of the student has {_kind(student, short[place], place)}, and the "
                f"teacher's {', '.join(map(str, numbers))}, whose place it takes, have {' and '.join(map(str, kinds))}"
            )
        groups.append([long[number] for number in numbers])
    return groups


def _width(model: nn.Module, block: nn.Module) -> int | None:
    width: int | None = getattr(getattr(model, "config", None), "hidden_size", None)
    return width or next((p.shape[1] for p in block.parameters() if p.ndim > 1), None)


def _dtype(model: nn.Module, block: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in block.parameters()), None)


def _kind(model: nn.Module, block: nn.Module, number: int) -> str | None:
    """Return the kind of attention of a block, where a model has several."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    found: str | None = kinds[number] if kinds else getattr(block, "attention_type", None)
    return found


def _check_signals(lesson: Lesson, container: str) -> None:
    """Raise where a term reads what blocks of the student say, as these are not always its own."""
    model = lesson.student.model
    for learner, mark in ((lesson.student, SELF), *((each, STUDENT) for each in lesson.others.values())):
        for name, term in [] if learner.objective is None else learner.objective.named_terms():
            read = [signal.removeprefix(f"{mark}/") for signal in term.teacher if signal.startswith(f"{mark}/")]
            for signal in [*(term.student if mark == SELF else ()), *read]:
                if not term.never and is_layer(model, signal) and _is_block(model, signal, container):
                    raise TrainingError(
                        f"module_replacing: the term '{name}' reads '{signal}' of the student, and while blocks of the "
                        "teacher stand in it, that would be theirs at times; compare responses such as logits"
                    )


def _is_block(model: nn.Module, signal: str, container: str) -> bool:
    path = signal.rpartition("@")[0] or signal
    path = path.removeprefix("input:").removeprefix("clone:").partition(":")[0]
    try:
        model.get_submodule(path)
    except AttributeError:
        return True  # hidden.n and its kin
    return f"{path}.".startswith(f"{container}.") or f"{container}.".startswith(f"{path}.")


def _check_frozen(student: nn.Module, own: str, teacher: nn.Module, theirs: str) -> None:
    """Raise if the student's embeddings and head are not the teacher's."""
    known = {name: p for name, p in teacher.named_parameters() if not name.startswith(f"{theirs}.")}
    for name, parameter in student.named_parameters():
        if name.startswith(f"{own}."):
            continue
        other = known.get(name)
        if other is None or other.shape != parameter.shape or not torch.equal(other.to(parameter), parameter):
            raise TrainingError(
                f"module_replacing: with `freeze: true` all but the student's blocks must be the teacher's, and "
                f"'{name}' is not; cut it with `from_teacher: {{weights: finetuned}}`, or leave `freeze` out"
            )


def _caching(model: nn.Module) -> list[Any]:
    """Return the configurations that ask for a cache of keys, in which blocks of two models would share a place."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            found[id(config)] = config
    return list(found.values())
