"""A term over several layers: ``layers: {1: 2, 2: 4, 3: 6}`` is a term for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from potstill.errors import ObjectiveError
from potstill.recipe.schema import TermSpec

Pairs: TypeAlias = Sequence[tuple[int | str, int | str]]


def found_layers(spec: TermSpec) -> bool:
    """Return whether the layers of a term are known only with the models at hand, as for ``ratio`` and ``auto``."""
    return isinstance(spec.layers, str)


def spread(name: str, spec: TermSpec, pairs: Pairs | None = None) -> dict[str, TermSpec]:
    """Return the terms of a term by name: one a pair of layers, ``NAME_1_2``; itself where it has no layers.

    Args:
        name: the term's.
        spec: the term.
        pairs: the student's layers and the teacher's, where ``layers`` only says how they are found.

    Raises:
        ObjectiveError: the layers are to be found, and no pairs are given; or two terms would have one name.
    """
    if spec.layers is None:
        return {name: spec}
    if isinstance(spec.layers, Mapping):
        pairs = [(_number(one), _number(other)) for one, other in spec.layers.items()]
    if pairs is None:
        raise ObjectiveError(f"objective.{name}: `layers: {spec.layers}` needs the models; say them as in `{{1: 2}}`")
    made = {}
    for student, teacher in pairs:
        key = "_".join([name, *(str(layer).replace(".", "-").replace(":", "-") for layer in (student, teacher))])
        if key in made:
            raise ObjectiveError(f"objective.{name}: the layers {student} and {teacher} are there twice")
        update = {"student": _at(spec.student, student), "teacher": _at(spec.teacher, teacher), "layers": None}
        made[key] = spec.model_copy(update=update)
    return made


def as_written(name: str, spec: TermSpec) -> dict[str, TermSpec]:
    """Return the terms of a term as far as the recipe alone tells; of layers that are found, one pair i and j."""
    if not found_layers(spec):
        return spread(name, spec)
    ends = {side: _numbered(getattr(spec, side), index) for side, index in (("student", "i"), ("teacher", "j"))}
    return {
        f"{name} (for each pair of layers i and j by {spec.layers})": spec.model_copy(update={**ends, "layers": None})
    }


def _numbered(names: str | list[str], index: str) -> str | list[str]:
    if not isinstance(names, str):
        return [f"{name}.{index}" for name in names]
    return f"{'hidden' if names == 'logits' else names}.{index}"


def _at(names: str | list[str], layer: int | str) -> str | list[str]:
    """``hidden`` at layer 3 is ``hidden.3``; at the path of a module it is that path, of the same teacher."""
    if not isinstance(names, str):
        found = [_at(name, layer) for name in names]
        return [name for name in found if isinstance(name, str)]
    owner, slash, own = names.rpartition("/")
    if isinstance(layer, str):
        return f"{owner}{slash}{layer}"
    return f"{owner}{slash}{'hidden' if own == 'logits' else own}.{layer}"


def _number(layer: int | str) -> int | str:
    """A number that became a text on its way through a file is a number."""
    return int(layer) if str(layer).isdigit() else layer
