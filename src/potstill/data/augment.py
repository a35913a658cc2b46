"""Random views of a sample: augmentations from a recipe, applied as a pure function of (seed, epoch, sample id)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from potstill.data.draws import Draws
from potstill.errors import DataError, Problem, did_you_mean
from potstill.interfaces import Batch
from potstill.registry import augmentations

Step = str | Mapping[str, Any]
"""One entry of ``data.augment``: a name, or a name with its options: ``{shift: {pixels: 2}}``."""

Finish = Callable[[Tensor], Tensor] | None
"""Normalisation, applied after the augmentations."""


@dataclass(frozen=True)
class Views:
    """What a training batch goes through: augmentations of the main input, normalisation, mixing of samples.

    Attributes:
        keys: the entries of the view, such as ``pixel_values`` and ``teacher/pixel_values``, each with the stored
            entry that it is made of and its normalisation; stored entries that are not among them are left out.
        seed: the seed of the views.
        steps: pairs of a function and its options, applied to every stored entry in order, with the same draws.
        mixes: the same for functions of the whole batch, applied last.
        num_classes: classes of the task, for soft labels.
    """

    keys: Mapping[str, tuple[str, Finish]]
    seed: int
    steps: tuple[tuple[Callable[..., Any], Mapping[str, Any]], ...] = ()
    mixes: tuple[tuple[Callable[..., Any], Mapping[str, Any]], ...] = ()
    num_classes: int = 0

    @property
    def is_random(self) -> bool:
        """Whether a sample looks different in each epoch."""
        return bool(self.steps or self.mixes)

    def __call__(self, batch: Batch, epoch: int, lookup: Callable[[Tensor], Batch]) -> Batch:
        """Return the view of these samples in this epoch."""
        seen = self._augmented(batch, epoch)
        for place, (mix, options) in enumerate(self.mixes):
            draws = Draws(self.seed, epoch, batch["sample_id"])
            seen = mix(
                seen,
                draws=draws.scope(f"mix {place}"),
                lookup=lambda indices: self._augmented(lookup(indices), epoch),
                num_classes=self.num_classes,
                **options,
            )
        return seen

    def _augmented(self, batch: Batch, epoch: int) -> Batch:
        stored = {name: batch[name] for name, _ in self.keys.values()}
        if self.steps:
            draws = Draws(self.seed, epoch, batch["sample_id"])
            for place, (function, options) in enumerate(self.steps):
                scoped = draws.scope(f"step {place}")
                stored = {name: function(value, draws=scoped, **options) for name, value in stored.items()}
        others = {name: value for name, value in batch.items() if name not in stored}
        made = {
            output: stored[name] if finish is None else finish(stored[name])
            for output, (name, finish) in self.keys.items()
        }
        return {**others, **made}


def check_augmentations(steps: Sequence[Step], kind: str, path: tuple[str | int, ...]) -> list[Problem]:
    """Return every mistake in ``data.augment``: unknown names and options, and those for another kind of input.

    Args:
        steps: the recipe's entries.
        kind: ``image``, ``text`` or ``tabular``: what the task's main input is.
        path: where the entries stand in the recipe.
    """
    problems: list[Problem] = []
    kinds = (kind,) if kind == "text" else (kind, "mix")  # tokens cannot be mixed
    facts = {name: augmentations.facts(name) for name in augmentations.names()}
    known = [n for n, each in facts.items() if each.get("kind") in kinds and each.get("only", kind) == kind]
    for place, step in enumerate(steps):
        try:
            name, options = split_step(step)
        except DataError as error:
            if isinstance(step, Mapping):  # anything else is a mistake that the schema reports
                problems.append(Problem((*path, place), str(error)))
            continue
        if name not in known:
            hint = did_you_mean(name, known)
            problems.append(Problem((*path, place), f"there is no {kind} augmentation '{name}'", hint))
        else:
            problems += augmentations.check(name, options, path=(*path, place, name))
    return problems


def make_views(
    steps: Sequence[Step],
    *,
    seed: int,
    num_classes: int,
    key: str = "",
    finish: Finish = None,
    keys: Mapping[str, tuple[str, Finish]] | None = None,
) -> Views:
    """Return the views that a recipe's ``data.augment`` asks for.

    Args:
        steps: the recipe's entries.
        seed: the seed of the views.
        num_classes: classes of the task, for soft labels.
        key: the entry that is augmented, where there is one.
        finish: its normalisation.
        keys: in place of ``key`` and ``finish``, several entries; see :class:`Views`.

    Raises:
        DataError: an entry is no augmentation or has wrong options.
    """
    parts: dict[str, list[tuple[Callable[..., Any], Mapping[str, Any]]]] = {"steps": [], "mixes": []}
    for step in steps:
        name, options = split_step(step)
        problems = augmentations.check(name, options, allow_code=False)  # of registered ones alone
        if problems:
            raise DataError("; ".join(str(problem) for problem in problems))
        mixes = augmentations.facts(name).get("kind") == "mix"
        parts["mixes" if mixes else "steps"].append((augmentations.get(name, allow_code=False), options))
    made = {key: (key, finish)} if keys is None else dict(keys)
    return Views(made, seed, tuple(parts["steps"]), tuple(parts["mixes"]), num_classes)


def split_step(step: Step) -> tuple[str, Mapping[str, Any]]:
    """Return the name and options of one entry of ``data.augment``.

    Raises:
        DataError: the entry is neither a name nor a mapping of one name to options.
    """
    if isinstance(step, str):
        return step, {}
    if isinstance(step, Mapping) and len(step) == 1:
        name, options = next(iter(step.items()))
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise DataError(f"expected an augmentation as a name or as `name: {{option: value}}`, got {step!r}")
