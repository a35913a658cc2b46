"""The components that a recipe names: their names and options against the registry, all mistakes at once.

It works on the raw tree of a recipe, so that one wrong key elsewhere hides nothing here, and imports neither models
nor trainers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.data.augment import check_augmentations, split_step
from potstill.errors import ComponentError, DataError, Problem, did_you_mean
from potstill.recipe.check_models import check_models
from potstill.recipe.check_teachers import teachers_of
from potstill.recipe.check_terms import check_objective, check_reference
from potstill.recipe.check_training import check_baseline_precision, check_train
from potstill.recipe.schema import SchemeSpec, TaskSpec
from potstill.recipe.trees import Path_, items, named, section, unknown
from potstill.registry import (
    augmentations,
    check_options,
    import_dotted,
    schemes,
    sources,
    synthesizers,
    tasks,
    teacher_sources,
)

_CONTEXT = frozenset({"path", "name", "revision", "base", "splits", "seed"})
"""What a data source is given beside its ``kwargs``."""


def check_components(tree: Mapping[str, Any], *, allow_code: bool, folder: Path | None = None) -> list[Problem]:
    """Return every mistake in the components of a recipe.

    Args:
        tree: the recipe as plain data, after ``extends`` and overrides.
        allow_code: whether dotted paths outside potstill may be imported.
        folder: where the recipe lies; files that it names may lie beside it.
    """
    problems = _task_and_data(tree, allow_code)
    problems += check_models(tree, folder, allow_code=allow_code)
    problems += check_objective(tree.get("objective"), ("objective",), allow_code=allow_code) + check_reference(tree)
    problems += _stages(tree, allow_code)
    problems += _scheme(tree.get("scheme"), ("scheme",), allow_code)
    for path in (("train",), ("baseline", "train")):
        problems += check_train(section(tree, *path), path, allow_code=allow_code)
    problems += check_baseline_precision(section(tree, "train"), section(tree, "baseline", "train"))
    return problems + _ignored(items(section(tree, "preflight").get("ignore")))


def _stages(tree: Mapping[str, Any], allow_code: bool) -> list[Problem]:
    """Every mistake in the stages: their names, terms, settings and schemes."""
    problems: list[Problem] = []
    seen: list[Any] = []
    for place, stage in enumerate(items(tree.get("stages"))):
        path: Path_ = ("stages", place)
        own = section(stage)
        if own.get("name") in seen:
            problems.append(Problem((*path, "name"), f"two stages are called '{own['name']}'", "choose another name"))
        seen.append(own.get("name"))
        problems += check_train(section(own, "train"), (*path, "train"), allow_code=allow_code)
        problems += _scheme(own.get("scheme"), (*path, "scheme"), allow_code)
        if section(own, "scheme").get("name") == "born_again":
            message = "generations are trainings of their own, and cannot be in a stage"
            problems.append(Problem((*path, "scheme", "name"), message, "say `scheme` at the top of the recipe"))
        if section(tree, "scheme").get("name") == "born_again" and not place:
            message = "earlier generations are trained in one stage, as the student would then not be"
            problems.append(Problem(("stages",), message, "leave out `stages`, or the scheme"))
        if own.get("objective") is not None:
            problems += check_objective(own["objective"], (*path, "objective"), allow_code=allow_code)
    return problems


def _scheme(scheme: Any, path: Path_, allow_code: bool) -> list[Problem]:
    """Every mistake in a scheme; a function of one's own that divides the training is code."""
    problems = named(scheme, schemes, path, SchemeSpec, allow_code)
    shares = section(scheme).get("shares")
    if isinstance(shares, str) and not problems:
        try:
            import_dotted(shares, allow_code=allow_code)
        except ComponentError as error:
            problems.append(Problem((*path, "shares"), str(error)))
    return problems


def _ignored(names: Sequence[Any]) -> list[Problem]:
    """Every name under ``preflight.ignore`` that is no check."""
    if not names:
        return []
    from potstill.checks.findings import checks

    return [
        Problem(("preflight", "ignore", place), f"there is no check '{name}'", did_you_mean(name, checks.names()))
        for place, name in enumerate(names)
        if isinstance(name, str) and name not in checks.names()
    ]


def _task_and_data(tree: Mapping[str, Any], allow_code: bool) -> list[Problem]:
    problems = named(tree.get("task"), tasks, ("task",), TaskSpec, allow_code)
    parts = section(tree, "task", "tasks")
    for part, spec in parts.items():
        problems += named(spec, tasks, ("task", "tasks", part), TaskSpec, False)
    data = section(tree, "data")
    source = data.get("source")
    if isinstance(source, str):
        problems += _source(source, data, allow_code)
    name = section(next(iter(parts.values()), tree.get("task"))).get("name")
    kind = tasks.facts(name).get("input") if isinstance(name, str) else None
    problems += _synthesizer(data.get("synthesize"), kind, allow_code)
    if kind:
        trained: list[Path_] = [("train",), ("baseline", "train"), ("teacher", "train")]
        trained += [("teachers", owner, "train") for owner in section(tree, "teachers")]
        places = [(path, section(tree, *path)) for path in (("data",), *trained)]
        stages = enumerate(items(tree.get("stages")))
        places += [(("stages", place, "train"), section(stage, "train")) for place, stage in stages]
        for path, own in places:
            problems += check_augmentations(items(own.get("augment")), kind, (*path, "augment"))
            problems += _mixtures(tree, items(own.get("augment")), (*path, "augment"))
            if kind != "text" and own.get("batch_tokens") is not None:
                what = f"batch_tokens counts the tokens of texts, and this is data of the kind '{kind}'"
                problems.append(Problem((*path, "batch_tokens"), what, "use batch_size"))
    return problems


def _mixtures(tree: Mapping[str, Any], steps: Sequence[Any], path: Path_) -> list[Problem]:
    """A teacher that answers for rows as they are knows nothing of two rows mixed."""
    if path[0] in ("teacher", "teachers", "baseline"):  # which are trained on labels
        return []
    kinds = {name: _first(own.get("source")) for name, own in teachers_of(tree).items()}
    readers = [name for name, kind in kinds.items() if kind and teacher_sources.facts(kind).get("reads_rows")]
    mixing = [name for name in map(_first, steps) if name and augmentations.facts(name).get("kind") == "mix"]
    if not readers or not mixing:
        return []
    wrong, reader = mixing[0], readers[0]
    message = f"'{wrong}' mixes rows, and the teacher '{reader}' answers for each row as it is"
    return [Problem(path, message, "leave it out, or take a model for a teacher")]


def _first(step: Any) -> str | None:
    """Return the name of a component that is given as a name or as ``{name: options}``."""
    name = next(iter(step), None) if isinstance(step, Mapping) else step
    return name if isinstance(name, str) else None


def _synthesizer(step: Any, kind: str | None, allow_code: bool) -> list[Problem]:
    where: Path_ = ("data", "synthesize")
    try:
        name, options = split_step(step)
    except DataError:  # anything but a mapping is a mistake that the schema reports
        message = "expected what makes rows as a name or as `name: {option: value}`"
        return [Problem(where, message)] if isinstance(step, Mapping) else []
    wrong = unknown(name, synthesizers, where, allow_code)
    if wrong:
        return wrong
    wanted = synthesizers.facts(name).get("kind", kind)
    if kind is not None and wanted != kind:
        return [Problem(where, f"'{name}' makes rows of the kind '{wanted}', and this is data of the kind '{kind}'")]
    return synthesizers.check(name, options, path=(*where, name), allow_code=allow_code)


def _source(source: str, data: Mapping[str, Any], allow_code: bool) -> list[Problem]:
    try:
        function = sources.get(source, allow_code=allow_code)
    except ComponentError as error:
        return [Problem(("data", "source"), str(error))]
    given = _CONTEXT if source in sources.names() else {key for key in _CONTEXT if data.get(key) is not None}
    label = f"data source '{source}'"
    return check_options(function, section(data, "kwargs"), label=label, path=("data", "kwargs"), reserved=given)
