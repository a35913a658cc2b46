"""The report of a run: one HTML file that holds everything it shows, for a phone as well as a desk and for paper."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from potstill.report import amounts, words
from potstill.report.run import RunView, SeedsView, load_run, load_seeds
from potstill.report.tables import Table, comparison, plot_tables, seeds_table
from potstill.report.verdict import headlines, verdict, verdict_of_seeds
from potstill.runs.folder import write_text

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

_LONGEST = 400  # characters of a text that are shown


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    Attributes:
        title: its heading.
        svg: the drawing.
        caption: what to read from it.
        tables: the same as numbers, each with its name.
    """

    title: str
    svg: str
    caption: str
    tables: list[tuple[str, Table]]


def write_report(folder: str | Path, target: str | Path | None = None) -> Path:
    """Write the report of a finished run, or of several seeds, as one HTML file, and return its path.

    Args:
        folder: of a run, or of the runs of ``--seeds``.
        target: the file; ``report.html`` in the folder if omitted.

    Raises:
        RunError: the folder is no run, or not finished.
    """
    folder = Path(folder)
    path = Path(target) if target is not None else folder / "report.html"
    if (folder / "recipe.resolved.yaml").exists():
        page = _page(load_run(folder))
    else:
        page = _page_of_seeds(load_seeds(folder), path.parent)
    write_text(path, page)
    return path


def _page(view: RunView) -> str:
    return _template().render(verdict=verdict(view.metrics), headlines=headlines(view.metrics), **_context(view))


def _page_of_seeds(view: SeedsView, home: Path) -> str:
    from potstill.report import plots

    first = view.runs[view.summary.seeds[0]]
    table = seeds_table(view)
    caption = (
        "Large marks are means over the seeds with their 95\u00a0% t-interval, small ones the single seeds. This "
        "interval speaks of the seeds: what another training would give. Those of the single runs speak of the test "
        "samples."
    )
    plot = _plot("seeds", "Every seed", plots.metric_bars(view), caption, [])
    reports = {seed: run.folder / "report.html" for seed, run in view.runs.items()}
    links = [(seed, _address(report, home)) for seed, report in reports.items() if report.is_file()]
    return _template().render(
        verdict=verdict_of_seeds(view),
        headlines=headlines(first.metrics, view),
        seeds={"count": len(view.summary.seeds), "first": view.summary.seeds[0], "table": table, "plot": plot},
        links=links,
        **_context(first),
    )


def _address(report: Path, home: Path) -> str:
    """Return where a report lies, seen from a folder; its whole address where that is on another drive."""
    try:
        return Path(os.path.relpath(report, home)).as_posix()
    except ValueError:
        return report.absolute().as_uri()


def _context(view: RunView) -> dict[str, Any]:
    """What the template shows of a run."""
    recipe = _recipe(view.recipe)
    metrics = view.metrics
    return {
        "metrics": metrics,
        "description": recipe.get("description") or "",
        "task": str((recipe.get("task") or {}).get("name", "")).replace("-", " "),
        "comparison": comparison(view),
        "gains": _gains(view),
        "plots": _plots(view),
        "examples": [_example(example, metrics.label_names) for example in view.examples],
        "recipe": view.recipe,
        "environment": _environment(view.environment),
        "commands": _commands(view),
        "css": resources.files("potstill.report").joinpath("templates/report.css").read_text(encoding="utf-8"),
    }


def _gains(view: RunView) -> list[dict[str, Any]]:
    """The paired tests: against the baseline, against the first teacher."""
    metrics, found = view.metrics, []
    teacher = next(iter(view.named("teacher")), "the teacher")
    share = words.is_share(metrics, metrics.primary)
    for gain, other in ((metrics.gain, "baseline"), (metrics.to_teacher, teacher)):
        if gain is not None:
            found.append(
                {
                    "other": other,
                    "value": words.difference(gain.value, share=share),
                    "interval": words.interval(gain, share=share, signed=True),
                    "p": "" if gain.p != gain.p else amounts.p_value(gain.p),
                    "first": gain.only_first,
                    "second": gain.only_second,
                    "mcnemar": None if gain.mcnemar is None else amounts.p_value(gain.mcnemar),
                }
            )
    return found


def _plots(view: RunView) -> list[Plot]:
    """Every plot that the run has something for."""
    from potstill.report import plots

    tables, found = plot_tables(view), []
    primary = words.metric_name(view.metrics.primary)
    if tables["bars"].rows:
        caption = (
            f"{primary[:1].upper()}{primary[1:]} on the {view.metrics.split} split with 95\u00a0% intervals over its "
            "samples. Intervals that overlap do not make two models equal: the paired tests compare them on the same "
            "samples."
        )
        found.append(_plot("bars", "How good", plots.metric_bars(view), caption, [("", tables["bars"])]))
        caption = (
            "Further up is better, further left is cheaper. Lines are the 95\u00a0% intervals over the test samples."
        )
        found.append(_plot("cost", "What it costs", plots.cost_scatter(view), caption, [("", tables["cost"])]))
    if tables["curves"].rows or tables["terms"].rows:
        caption = (
            "Above, the validation split while the models were trained; the axis may leave out the first steps. "
            "Below, each term of the student's loss on the training data: one that stays flat teaches nothing more."
        )
        both = [("validation", tables["curves"]), ("terms of the student's loss", tables["terms"])]
        found.append(_plot("curves", "How it learned", plots.learning_curves(view), caption, both))
    if tables["reliability"].rows:
        caption = (
            "On the diagonal a model that is 80\u00a0% sure is right 80\u00a0% of the time; below it, it is too sure. "
            "ECE is the mean distance over 15 bins. Points of fewer than 10 samples are left out of the drawing."
        )
        diagram = plots.reliability_diagram(view)
        found.append(
            _plot("reliability", "Can its confidence be believed", diagram, caption, [("", tables["reliability"])])
        )
    if tables["classes"].rows:
        caption = (
            "The share of each class that is answered right; the line goes from the teacher to the student, largest "
            "loss first. Classes with few samples move by chance: the table has their numbers."
        )
        found.append(
            _plot("classes", "What changed, by class", plots.class_changes(view), caption, [("", tables["classes"])])
        )
    return found


def _plot(name: str, title: str, figure: Figure, caption: str, tables: list[tuple[str, Table]]) -> Plot:
    from markupsafe import Markup, escape

    from potstill.report.style import to_svg

    svg = to_svg(figure, str(escape(f"{title}. {caption}")), name)
    return Plot(title, Markup(svg), caption, [pair for pair in tables if pair[1].rows])


def _example(example: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """One example as the template shows it; only images that are in the file itself are shown."""

    def named(label: Any) -> str:
        return labels[label] if isinstance(label, int) and 0 <= label < len(labels) else f"class {label}"

    label, shown = example.get("label"), []
    for item in example.get("shown", []):
        kind, value = item.get("kind"), str(item.get("value", ""))
        if kind == "image" and not value.startswith("data:image/"):
            continue
        clipped = value if kind == "image" or len(value) <= _LONGEST else value[:_LONGEST] + " …"
        shown.append({"name": item.get("name", ""), "kind": kind, "value": clipped})
    answers = []
    for name, answer in example.get("answers", {}).items():
        confidence = answer.get("confidence")
        sure = "" if confidence is None else f"{100 * confidence:.0f} %"
        right = None if label is None else answer.get("answer") == label
        answers.append({"model": name, "answer": named(answer.get("answer")), "sure": sure, "right": right})
    return {
        "id": example.get("sample_id"),
        "label": None if label is None else named(label),
        "divergence": amounts.number(float(example.get("divergence") or 0.0)),
        "answers": answers,
        "shown": shown,
    }


def _recipe(text: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _environment(environment: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in environment.items():
        if isinstance(value, dict):
            found += [(str(name), str(version)) for name, version in value.items()]
        elif value or value == 0:
            found.append((str(key), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return [pair for pair in found if pair[0] != "command"]


def _commands(view: RunView) -> list[str]:
    """What was typed, where that is known, and what does the run again from its own recipe."""
    typed = str(view.environment.get("command", ""))
    program, _, rest = typed.partition(" ")
    found = [f"potstill {rest}"] if Path(program).name == "potstill" else []
    return [*found, f"potstill distill {shlex.quote(str(view.folder / 'recipe.resolved.yaml'))} --output again"]


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("potstill.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
