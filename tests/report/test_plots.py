"""The plots: what is drawn, that models are told apart without colour, and that they work in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from potstill.report import load_run, load_seeds, plots, series
from potstill.report.labels import plain
from potstill.report.run import RunView
from potstill.report.style import looks, to_svg
from potstill.runs.metrics import Estimate
from tests.report import made

EVERY = (plots.metric_bars, plots.learning_curves, plots.cost_scatter, plots.reliability_diagram, plots.class_changes)


def texts(figure: Figure) -> str:
    return "\n".join(found.get_text() for found in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("plot", EVERY)
class TestEvery:
    def test_a_notebook_shows_it(self, plot: Callable[[RunView], Figure], tmp_path: Path) -> None:
        before = dict(matplotlib.rcParams)
        figure = plot(load_run(made.run(tmp_path)))
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert dict(matplotlib.rcParams) == before

    def test_the_same_bytes(self, plot: Callable[[RunView], Figure], tmp_path: Path) -> None:
        view = load_run(made.run(tmp_path))
        assert to_svg(plot(view), "", "p") == to_svg(plot(view), "", "p")

    def test_nothing_to_draw(self, plot: Callable[[RunView], Figure], tmp_path: Path) -> None:
        view = load_run(made.run(tmp_path, made.without_labels(), histories=False, logits=False))
        assert "no" in texts(plot(view))

    def test_models_differ_in_grey(self, plot: Callable[[RunView], Figure], tmp_path: Path) -> None:
        found = looks(load_run(made.run(tmp_path)).metrics).values()
        for part in ("marker", "line", "hatch", "color"):
            assert len({getattr(look, part) for look in found}) == len(found)


class TestMetricBars:
    def test_a_cut_axis_says_so(self, tmp_path: Path) -> None:
        figure = plots.metric_bars(load_run(made.run(tmp_path)))
        assert "axis does not begin at 0" in texts(figure)
        assert not figure.axes[0].patches

    def test_bars_begin_at_zero(self, tmp_path: Path) -> None:
        models = {name: made.model(role, 0.2 if name == "baseline" else 0.9) for name, role in made.ROLES.items()}
        axes = plots.metric_bars(load_run(made.run(tmp_path, made.metrics(models=models)))).axes[0]
        assert axes.get_xlim()[0] == 0
        assert len(axes.patches) == 3

    def test_without_intervals(self, tmp_path: Path) -> None:
        models = {"distilled": made.model("student", metrics={"accuracy": Estimate(value=0.9)})}
        assert "90.0" in texts(plots.metric_bars(load_run(made.run(tmp_path, made.metrics(models=models)))))

    def test_every_seed(self, tmp_path: Path) -> None:
        axes = plots.metric_bars(load_seeds(made.seeds(tmp_path))).axes[0]
        small = [line for line in axes.lines if line.get_markersize() == 5]
        assert len(small) == 9


class TestCostScatter:
    def test_latency_that_was_not_measured(self, tmp_path: Path) -> None:
        models = {name: made.model(role, latency_ms={}) for name, role in made.ROLES.items()}
        figure = plots.cost_scatter(load_run(made.run(tmp_path, made.metrics(models=models))))
        assert len(figure.axes) == 1


class TestClassChanges:
    def test_ordered_by_the_change(self, tmp_path: Path) -> None:
        found = series.classes(load_run(made.run(tmp_path)))
        assert sorted(found.names) == ["setosa", "versicolor", "virginica"]
        assert found.change == sorted(found.change)
        assert (found.reference, found.student, sum(found.count)) == ("teacher", "distilled", 400)

    def test_many_classes(self, tmp_path: Path) -> None:
        found = series.classes(load_run(made.run(tmp_path, classes=1000)))
        assert (len(found.names), found.split) == (20, 10)
        assert found.names[0].startswith("class ")

    def test_answers_over_other_things_than_the_classes_are_left_out(self, tmp_path: Path) -> None:
        """The thresholds of an ordinal task, or a number: whose column is largest says nothing."""
        assert series.judged(load_run(made.run(tmp_path / "two", made.metrics(), classes=2))) == {}
        assert set(series.judged(load_run(made.run(tmp_path / "three")))) == {"teacher", "baseline", "distilled"}

    def test_without_a_teacher_the_baseline_is_the_reference(self, tmp_path: Path) -> None:
        models = {name: made.model(role) for name, role in made.ROLES.items() if name != "teacher"}
        assert series.classes(load_run(made.run(tmp_path, made.metrics(models=models)))).reference == "baseline"


def test_no_text_becomes_a_formula(tmp_path: Path) -> None:
    names = ["$\\frac{1}{2$", "a$b$c", "<script>alert(1)</script>"]
    svg = to_svg(plots.class_changes(load_run(made.run(tmp_path, made.metrics(label_names=names)))), "", "p")
    assert "a$b$c" in svg
    assert "<script" not in svg


def test_long_texts_are_cut() -> None:
    assert plain("a\nb\tc\x00d") == "a b c d"
    assert len(plain("x" * 99)) == 22


def test_learning_curves_without_the_start(tmp_path: Path) -> None:
    figure = plots.learning_curves(load_run(made.run(tmp_path)))
    assert figure.axes[0].get_ylim()[0] > 0.6
    assert "soft" in texts(figure)
