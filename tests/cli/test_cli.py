"""The command line: what each verb prints, where it prints it, and with what status it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from potstill import __version__, registry
from potstill.cli import app, options
from potstill.experiments.seeds import SeedSummary
from potstill.recipe.load import load_recipe, packaged_recipes
from potstill.runs.folder import RunFolder
from potstill.runs.metrics import RunMetrics
from tests.cli.saying import Command, Said, process, refused

VERBS = ("distill", "check", "plan", "show", "evaluate", "report", "list", "copy", "new", "cache")
KINDS = (
    "recipes",
    "losses",
    "tasks",
    "schemes",
    "teacher_sources",
    "sources",
    "augmentations",
    "synthesizers",
    "models",
    "callbacks",
    "presets",
    "compressors",
)
TINY = ("data.limit.train=64", "train.epochs=2", "teacher.train.epochs=2", "evaluate.resamples=100")
ANSI = re.compile(r"\x1b\[|\r")


class TestHelp:
    def test_of_the_whole_and_of_every_verb(self) -> None:
        runner = CliRunner()
        overview = runner.invoke(app, ["--help"])
        assert overview.exit_code == 0
        for verb in VERBS:
            assert re.search(rf"^\W*{verb}\b", overview.stdout, re.MULTILINE), verb
            page = runner.invoke(app, [verb, "-h"])
            assert page.exit_code == 0
            assert f"{verb} [" in page.stdout
        assert {command.name for command in app.registered_commands} | {"cache"} == set(VERBS)

    @pytest.mark.parametrize(
        ("verb", "words"),
        [
            ("distill", ["recipe", "KEY=VALUE", "--output", "--seeds", "--allow-code", "--quiet", "--verbose"]),
            ("evaluate", ["run", "--split", "--json"]),
            ("copy", ["name", "--force"]),
            ("new", ["--task", "--force"]),
            ("list", [*KINDS]),
        ],
    )
    def test_it_names_what_can_be_said(self, verb: str, words: list[str]) -> None:
        page = CliRunner(env={"COLUMNS": "200"}).invoke(app, [verb, "--help"]).stdout
        for word in words:
            assert word.lower() in page.lower()

    def test_the_version(self, potstill: Command) -> None:
        assert potstill("--version") == Said(0, f"{__version__}\n", "")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["destill"], "No such command 'destill'"),
            (["distill"], "Missing argument"),
            (["distill", "digits", "--seed", "3"], "No such option: --seed"),
        ],
    )
    def test_what_it_does_not_know(self, potstill: Command, arguments: list[str], message: str) -> None:
        refused(potstill(*arguments), message)


class TestList:
    def test_all(self, potstill: Command) -> None:
        said = potstill("list")
        assert said.status == 0
        headings = [line.removesuffix(":") for line in said.out.splitlines() if not line.startswith(" ")]
        assert headings == list(KINDS)
        for name in ("digits", "kl", "image-classification", "offline", "sklearn", "flip", "convnet", "agreement"):
            assert re.search(rf"^  {name} +\S", said.out, re.MULTILINE), name

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_kind_has_every_component_with_a_line_of_its_own(self, potstill: Command, kind: str) -> None:
        said = potstill("list", kind)
        known = list(packaged_recipes()) if kind == "recipes" else getattr(registry, kind).names()
        lines = said.out.splitlines()
        assert [line.split()[0] for line in lines] == known
        assert all(len(line.split()) > 2 for line in lines), "a component without a description"
        assert said.err == ""

    @pytest.mark.parametrize(("kind", "near"), [("loses", "losses"), ("recipe", "recipes"), ("task", "tasks")])
    def test_an_unknown_kind(self, potstill: Command, kind: str, near: str) -> None:
        refused(potstill("list", kind), f"there is no kind '{kind}' to list; did you mean '{near}'?")


class TestShow:
    def test_the_resolved_recipe_and_the_formula(self, potstill: Command, tmp_path: Path) -> None:
        """What is shown is a recipe file, and the same recipe: else it would show something that is not run."""
        changes = ["train.epochs=7", "objective.soft.temperature=2.5", "teacher.kwargs.widths=[4, 8]"]
        said = potstill("show", "digits", *changes)
        assert (said.status, said.err) == (0, "")
        (tmp_path / "shown.yaml").write_text(said.out)
        assert load_recipe(tmp_path / "shown.yaml") == load_recipe("digits", changes)
        tree = yaml.safe_load(said.out)
        assert (tree["train"]["epochs"], tree["teacher"]["kwargs"]["widths"]) == (7, [4, 8])
        formula = [line for line in said.out.splitlines() if line.startswith("#")]
        (soft,) = [line for line in formula if "soft:" in line]
        assert soft.strip("# ") == ("soft: 0.9 · 2.5²·KL(softmax(teacher.logits/2.5) ‖ softmax(student.logits/2.5))")
        (hard,) = [line for line in formula if "hard:" in line]
        assert "0.1 · " in hard

    def test_a_ramp_and_a_projector_show_in_the_formula(self, potstill: Command) -> None:
        ramp = "objective.soft.weight={from: 1.0, to: 0.25, shape: cosine, end: 0.5}"
        hint = "objective.hint={loss: mse, student: stages.0, teacher: stages.0, project: linear, weight: 3}"
        said = potstill("show", "digits", ramp, hint)
        assert "(1→0.25 cosine over 0–0.5 of the training)" in said.out
        assert "3" in said.out.split("hint: ")[1]
        assert "linear(student.stages.0)" in said.out

    @pytest.mark.parametrize("text", ["1e5", "0o17", "no", "null", "12", "2024-01-02", "x: y", "- a", "ä"])
    def test_texts_that_look_like_something_else_stay_texts(self, potstill: Command, tmp_path: Path, text: str) -> None:
        """PyYAML writes for YAML 1.1, recipes are read as YAML 1.2: `1e5` would come back as a number."""
        said = potstill("show", "digits", f"description={json.dumps(text)}")
        (tmp_path / "shown.yaml").write_text(said.out)
        assert load_recipe(tmp_path / "shown.yaml").description == text

    def test_a_mistake_in_an_override(self, potstill: Command) -> None:
        refused(
            potstill("show", "digits", "trian.epochs=3", "train.epochs=-1"),
            "command line:1: trian",
            "did you mean 'train'?",
            "command line:2: train.epochs: expected a number greater than 0",
        )


MISTAKES = """\
name: six
task: {name: image-clasification}
data: {source: sklearn, path: load_digits, valdation: 0.1}
teacher:
  model: potstill:convnet
  kwargs: {width: [8]}
  train: {epochs: -1}
student: {model: "potstill:mlp"}
objective:
  soft:
    loss: kl
    temprature: 4.0
train:
  lr_scheduler_type: cosine
"""

WANTED = [
    (2, "task.name", "did you mean 'image-classification'?"),
    (3, "data.valdation", "did you mean 'validation'?"),
    (6, "teacher.kwargs.width", "did you mean 'widths'?"),
    (7, "teacher.train.epochs", "greater than 0"),
    (12, "objective.soft.temprature", "did you mean 'temperature'?"),
    (14, "train.lr_scheduler_type", "use scheduler"),
]


class TestCheck:
    @pytest.mark.parametrize("name", ["digits", "synthetic-tabular"])
    def test_packaged_recipes_fit(self, potstill: Command, name: str) -> None:
        said = potstill("check", name)
        assert (said.status, said.err) == (0, "")
        lines = said.out.splitlines()
        assert lines[-1] == "everything fits"
        assert any(line.startswith("data: train ") for line in lines)
        assert any(re.fullmatch(r"student: potstill:\w+, [\d,]+ parameters", line) for line in lines)
        assert any(re.fullmatch(r"objective\.soft: [\d.e-]+ on 4 samples", line) for line in lines)

    def test_six_mistakes_at_once(self, tmp_path: Path) -> None:
        """Found one by one, six mistakes are six runs of the command."""
        (tmp_path / "six.yaml").write_text(MISTAKES)
        said = process("check", "six.yaml", cwd=tmp_path, cache=tmp_path)
        refused(said)
        lines = said.err.splitlines()
        assert len(lines) == len(WANTED)
        for line, (number, key, hint) in zip(lines, WANTED, strict=True):
            assert line.startswith(f"six.yaml:{number}: {key}: "), line
            assert hint in line

    def test_what_shows_only_with_the_data(self, potstill: Command, recipe: Path) -> None:
        refused(potstill("check", str(recipe), "data.path=load_irs"), "did you mean 'load_iris'?")
        refused(potstill("check", str(recipe), "task.features=[petal_length]"), "there is no column 'petal_length'")

    def test_no_such_recipe(self, potstill: Command) -> None:
        refused(potstill("check", "digit"), "there is no recipe 'digit'", "did you mean 'digits'?")
        refused(potstill("check", "missing/digits.yaml"), "missing/digits.yaml")

    def test_nothing_is_written(
        self, potstill: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert potstill("check", "flowers.yaml").status == 0
        assert [path.name for path in tmp_path.iterdir()] == ["flowers.yaml"]


class TestCopyAndNew:
    def test_a_copy_is_the_packaged_file(
        self, potstill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert potstill("copy", "digits").out == "wrote digits.yaml\n"
        assert Path("digits.yaml").read_text() == packaged_recipes()["digits"].read_text()
        assert potstill("copy", "digits", "deep/er/mine.yaml").status == 0
        assert load_recipe("deep/er/mine.yaml") == load_recipe("digits")

    def test_no_file_is_overwritten_unasked(self, potstill: Command, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("my work")
        for command in (["copy", "digits", str(path)], ["new", str(path)]):
            refused(potstill(*command), "is there already; choose another name or say --force")
            assert path.read_text() == "my work"
        for command in (["copy", "digits", str(path)], ["new", str(path)]):
            assert potstill(*command, "--force").status == 0
            assert path.read_text() != "my work"
            path.write_text("my work")

    def test_what_cannot_be_copied_or_written(self, potstill: Command, tmp_path: Path) -> None:
        refused(potstill("copy", "digit"), "there is no packaged recipe 'digit'; did you mean 'digits'?")
        refused(potstill("new", str(tmp_path / "x.yaml"), "--task", "image-clasification"), "image-classification")
        (tmp_path / "file").write_text("")
        refused(potstill("copy", "digits", str(tmp_path / "file/x.yaml")), "cannot be written")

    @pytest.mark.parametrize("task", registry.tasks.names())
    def test_a_new_recipe_of_every_task_passes_the_schema(self, potstill: Command, tmp_path: Path, task: str) -> None:
        path = tmp_path / "mine.yaml"
        assert potstill("new", str(path), "--task", task).out == f"wrote {path}\n"
        loaded = load_recipe(path)
        assert (loaded.name, loaded.task.name) == ("mine", task)

    @pytest.mark.parametrize(("file", "name"), [("_draft 2.yaml", "draft-2"), ("größe.yaml", "gr--e"), ("…", "mine")])
    def test_whatever_the_file_is_called(self, potstill: Command, tmp_path: Path, file: str, name: str) -> None:
        assert potstill("new", str(tmp_path / file)).status == 0
        assert load_recipe(tmp_path / file).name.strip("-") in (name, name.strip("-"))

    def test_a_new_recipe_works_once_it_is_told_the_data(self, potstill: Command, tmp_path: Path) -> None:
        rows = [f"{i % 7},{i % 5},{'abc'[i % 3]}" for i in range(60)]
        (tmp_path / "train.csv").write_text("\n".join(["x,y,label", *rows]) + "\n")
        potstill("new", str(tmp_path / "mine.yaml"), "--task", "tabular-classification")
        said = potstill("check", str(tmp_path / "mine.yaml"), "data.path=train.csv")
        assert (said.status, said.out.splitlines()[-1]) == (0, "everything fits")


class TestCache:
    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
        for number, kind in enumerate(("teachers", "teachers", "answers")):
            folder = tmp_path / f"cache/{kind}/key{number}"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(bytes(2**20))
            (folder / ".used").touch()
        return tmp_path / "cache"

    def test_list(self, potstill: Command, cache: Path) -> None:
        lines = potstill("cache", "list").out.splitlines()
        assert len(lines) == 4
        assert sum(re.match(r"teachers +key\d +1\.00 MiB  used \d{4}-", line) is not None for line in lines) == 2
        assert lines[-1] == f"3 entries, 3.00 of 10240 MiB, in {cache}"

    def test_clear(self, potstill: Command, cache: Path) -> None:
        os.utime(cache / "teachers/key0/.used", (time.time() - 3 * 86400,) * 2)
        assert potstill("cache", "clear", "--days", "2").out == "freed 1.00 MiB\n"
        assert potstill("cache", "clear", "teachers").out == "freed 1.00 MiB\n"
        assert [path.name for path in cache.glob("*/*")] == ["key2"]
        assert potstill("cache", "clear").out == "freed 1.00 MiB\n"
        assert potstill("cache", "list").out == f"0 entries, 0.00 of 10240 MiB, in {cache}\n"
        assert potstill("cache", "clear", "teachers").out == "freed 0.00 MiB\n"

    def test_a_kind_that_is_not_there(self, potstill: Command, cache: Path) -> None:
        """Freeing nothing without a word would pass for a success."""
        refused(potstill("cache", "clear", "techers"), "the cache holds no 'techers'; did you mean 'teachers'?")
        assert len(list(cache.glob("*/*"))) == 3


def rows_of(table: str) -> dict[str, list[str]]:
    """The lines of the result table by their first cell."""
    found = {}
    for line in table.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) > 1:
            found.setdefault(cells[0], cells[1:])
    return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Said, Path]:
    """A real process in a folder of its own, with the default output."""
    place = tmp_path_factory.mktemp("digits")
    return process("distill", "digits", *TINY, cwd=place, cache=place / "cache"), place


class TestDistill:
    def test_the_table_and_the_folder(self, digits: tuple[Said, Path]) -> None:
        said, place = digits
        assert said.status == 0, said.err
        folder = said.out.splitlines()[-1].removeprefix("run: ")
        assert re.fullmatch(r"runs/digits-[0-9a-f]{8}", folder)
        metrics = RunMetrics.model_validate_json((place / folder / "metrics.json").read_text())
        lines = said.out.splitlines()
        assert lines[0].strip() == "digits: test split, 898 samples, seed 0"
        header = next(line for line in lines if "teacher" in line)
        assert header.split() == ["teacher", "baseline", "distilled"]
        table = rows_of(said.out)
        for name in ("accuracy", "f1_macro"):
            assert table[name] == [f"{model.metrics[name].value:.4f}" for model in metrics.models.values()]
        assert table["parameters"] == [f"{model.parameters:,}" for model in metrics.models.values()]
        assert {"95 % interval", "size on disk, KiB", "latency, batch 1, ms", "latency, batch 32, ms"} <= set(table)
        assert f"distilled − baseline: {100 * metrics.gain.value:+.2f} points" in said.out
        assert f"note: {metrics.notes[0]}" in lines

    def test_plain_text_where_there_is_no_terminal(self, digits: tuple[Said, Path]) -> None:
        """Colours and bars in a log file or a pipe are noise; a line that is folded cannot be searched for."""
        said, _ = digits
        for text in (said.out, said.err):
            assert not ANSI.search(text)
            assert "%|" not in text
        assert any(
            line.startswith("distilled − baseline") and line.endswith("seeds)") for line in said.out.splitlines()
        )

    def test_the_log_is_on_stderr_with_a_line_for_each_step(self, digits: tuple[Said, Path]) -> None:
        said, _ = digits
        lines = said.err.splitlines()
        assert all(re.match(r"\d\d:\d\d:\d\d \w+: ", line) for line in lines), said.err
        for name in ("teacher", "baseline", "distilled"):
            assert any(line.endswith(f"{name}: training in fp32") for line in lines)
            assert any(f"{name}: step " in line and "accuracy" in line for line in lines)

    def test_the_same_command_again_does_nothing_more(
        self, digits: tuple[Said, Path], potstill: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said, place = digits
        monkeypatch.chdir(place)
        (events,) = place.glob("runs/*/events.jsonl")
        before = events.read_text()
        again = potstill("distill", "digits", *TINY)
        assert (again.status, again.out, again.err) == (0, said.out, "")
        assert events.read_text() == before

    def test_the_teacher_is_shared_with_the_next_recipe_and_quiet_is_silent(self, digits: tuple[Said, Path]) -> None:
        _, place = digits
        arguments = ("distill", "digits", *TINY, "objective.soft.weight=0.5", "--quiet", "--output", "other")
        said = process(*arguments, cwd=place, cache=place / "cache")
        assert (said.status, said.err) == (0, "")
        assert said.out.splitlines()[-1] == "run: other"
        assert any(event["event"] == "reused" for event in RunFolder(place / "other").events())

    def test_another_recipe_on_the_same_folder(self, potstill: Command, recipe: Path, tmp_path: Path) -> None:
        arguments = ("distill", str(recipe), "--output", str(tmp_path / "run"))
        assert potstill(*arguments).status == 0
        refused(
            potstill(*arguments, "train.epochs=2"),
            "belongs to another recipe (they differ in train.epochs); choose --output",
        )
        (tmp_path / "file").write_text("")
        refused(potstill("distill", str(recipe), "-o", str(tmp_path / "file")), "is a file; choose --output")

    def test_verbose_says_more(self, potstill: Command, recipe: Path, tmp_path: Path) -> None:
        usual = potstill("distill", str(recipe), "--output", str(tmp_path / "usual"))
        more = potstill("distill", str(recipe), "--output", str(tmp_path / "more"), "--verbose")
        assert "loss/soft" not in usual.err
        assert "distilled: step " in more.err
        assert "loss/soft" in more.err
        usual_table, more_table = (said.out.split("\nreport: ")[0] for said in (usual, more))
        assert usual_table == more_table

    def test_brackets_and_colons_are_no_markup(self, potstill: Command, recipe: Path, tmp_path: Path) -> None:
        """rich would swallow `[red]` and turn `:smile:` into a picture: the path printed would not be the path."""
        folder = tmp_path / "out[red] :smile:"
        said = potstill("distill", str(recipe), "--quiet", "--output", str(folder))
        assert said.out.splitlines()[-1] == f"run: {folder}"

    def test_a_mistake_that_only_training_shows(self, potstill: Command, recipe: Path, tmp_path: Path) -> None:
        changes = ("train.callbacks=[{early_stopping: {metric: acuracy}}]", "--output", str(tmp_path / "x"))
        said = potstill("distill", str(recipe), "--quiet", *changes)
        refused(said, "no evaluation gives the metric 'acuracy'; did you mean 'accuracy'?")


class TestSeeds:
    def test_each_seed_is_a_run_and_the_summary_is_their_spread(
        self, potstill: Command, recipe: Path, tmp_path: Path
    ) -> None:
        arguments = ("distill", str(recipe), "seed=5", "--quiet", "--output", str(tmp_path / "many"))
        said = potstill(*arguments, "--seeds", "2")
        assert (said.status, said.err) == (0, "")
        summary = SeedSummary.model_validate_json((tmp_path / "many/summary.json").read_text())
        assert summary.seeds == [5, 6]
        runs = [RunMetrics.model_validate_json((tmp_path / f"many/seed-{s}/metrics.json").read_text()) for s in (5, 6)]
        for name, values in summary.values.items():
            assert values == [run.models[name].metrics["accuracy"].value for run in runs]
        assert runs[0].seed == 5
        table = rows_of(said.out)
        assert table["seed 5"] == [f"{values[0]:.4f}" for values in summary.values.values()]
        assert table["mean"] == [f"{sum(values) / 2:.4f}" for values in summary.values.values()]
        assert said.out.splitlines()[-1] == f"runs: {tmp_path / 'many'}"
        begun = {path: path.stat().st_mtime_ns for path in tmp_path.glob("many/*/events.jsonl")}
        again = potstill(*arguments, "--seeds", "3")
        assert {path: path.stat().st_mtime_ns for path in begun} == begun  # finished ones are not done again
        assert rows_of(again.out)["seed 5"] == table["seed 5"]
        assert "seed 7" in rows_of(again.out)

    def test_at_least_one(self, potstill: Command, recipe: Path) -> None:
        refused(potstill("distill", str(recipe), "--seeds", "0"), "--seeds")


class TestEvaluate:
    @pytest.fixture(scope="class")
    def run(self, digits: tuple[Said, Path]) -> Path:
        (folder,) = digits[1].glob("runs/*")
        return folder

    def test_json_and_nothing_else_on_stdout(self, potstill: Command, run: Path) -> None:
        said = potstill("evaluate", str(run), "--split", "validation", "--json")
        metrics = RunMetrics.model_validate_json(said.out)
        assert (said.status, metrics.split, metrics.samples) == (0, "validation", 180)
        assert "NaN" not in said.out
        assert "answering 180 samples" in said.err

    def test_the_table_of_another_split(self, potstill: Command, run: Path) -> None:
        said = potstill("evaluate", str(run), "--split", "train", "--quiet")
        assert said.err == ""
        assert said.out.splitlines()[0].strip() == "digits: train split, 64 samples, seed 0"
        assert said.out.splitlines()[-1] == f"run: {run}"

    def test_the_figures_of_the_run_stay(self, potstill: Command, run: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        measured = RunMetrics.model_validate_json(potstill("evaluate", str(run), "--json", "--quiet").out)
        stored = RunMetrics.model_validate_json((run / "metrics.json").read_text())
        for name, model in stored.models.items():
            assert measured.models[name].metrics == model.metrics
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    def test_no_such_split(self, potstill: Command, run: Path) -> None:
        refused(potstill("evaluate", str(run), "--split", "valid"), "no split 'valid'; did you mean 'validation'?")

    def test_no_run(self, potstill: Command, tmp_path: Path) -> None:
        refused(potstill("evaluate", str(tmp_path)), "expected the folder of a run")
        refused(potstill("evaluate", str(tmp_path / "missing")), "expected the folder of a run")

    def test_an_unfinished_run(self, potstill: Command, tmp_path: Path, recipe: Path) -> None:
        folder = RunFolder(tmp_path / "run")
        folder.claim(load_recipe(recipe).model_dump(mode="json"))
        refused(potstill("evaluate", str(tmp_path / "run")), "not finished; `potstill distill` goes on with it")


PARTS = """\
import torch

def loss(student, teacher):
    return (student - teacher).square().mean(-1)

def rows(count=60):
    return {"x": [float(i % 7) for i in range(count)], "label": [i % 3 for i in range(count)]}

def model(in_features, num_labels):
    return torch.nn.Linear(in_features, num_labels)
"""


class TestAllowCode:
    """A recipe from elsewhere must not run code because someone looked at it."""

    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[str]:
        name = f"parts_of_{re.sub('[^a-z]', '_', request.node.name.lower())}"
        (tmp_path / f"{name}.py").write_text(PARTS)
        monkeypatch.syspath_prepend(tmp_path)
        yield name
        sys.modules.pop(name, None)

    @pytest.mark.parametrize(
        ("part", "change"),
        [
            ("loss", "objective.soft.loss={}:loss"),
            ("rows", "data={{source: '{}:rows'}}"),
            ("model", "student.model={}:model"),
        ],
    )
    @pytest.mark.parametrize("verb", ["check", "show", "distill"])
    def test_what_is_refused_and_what_is_allowed(
        self, potstill: Command, recipe: Path, tmp_path: Path, module: str, verb: str, part: str, change: str
    ) -> None:
        arguments = [verb, str(recipe), change.format(module)]
        arguments += ["--output", str(tmp_path / "run"), "--quiet"] if verb == "distill" else []
        refused(
            potstill(*arguments),
            f"'{module}:{part}' would import and run the Python module {module}; allow it with --allow-code",
        )
        assert module not in sys.modules
        assert not (tmp_path / "run").exists()
        allowed = potstill(*arguments, "--allow-code")
        assert allowed.status == 0, allowed.err
        if verb == "distill":
            refused(potstill("evaluate", str(tmp_path / "run")), "--allow-code")
            assert potstill("evaluate", str(tmp_path / "run"), "--allow-code", "--quiet").status == 0


class TestTwoProcesses:
    def test_the_second_is_refused_and_told_by_whom(self, tmp_path: Path, recipe: Path) -> None:
        """Two runs that write one folder would mix their weights."""
        command = [sys.executable, "-m", "potstill", "distill", str(recipe), "train.epochs=5000", "--output", "run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "POTSTILL_CACHE": str(tmp_path / "cache")}
        devnull = subprocess.DEVNULL
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=devnull, stderr=devnull)
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "run/lock.json").exists() and time.monotonic() < deadline:
                assert first.poll() is None
                time.sleep(0.05)
            said = process(*command[3:], cwd=tmp_path, cache=tmp_path / "cache")
            assert first.poll() is None
            refused(said, f"run is in use by process {first.pid} on ", "choose --output")
        finally:
            first.kill()
            first.wait()

    def test_ctrl_c_says_how_to_go_on(self, potstill: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("potstill.runs.steps.Run.execute", interrupted)
        for seeds in ("1", "2"):
            said = potstill("distill", str(recipe), "--seeds", seeds)
            assert (said.status, said.out) == (130, "")
            assert said.err == "stopped; the same command goes on where it was\n"


class TestThreads:
    """Waiting threads sleep where others use the processors."""

    @pytest.fixture(autouse=True)
    def _before_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "torch")
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setattr(options, "_LOOK_S", 0.01)
        monkeypatch.setattr("os.cpu_count", lambda: 4)

    @pytest.mark.parametrize(
        ("worked", "policy"), [((5.0, 5.0), None), ((5.0, 5.006), None), ((5.0, 5.02), "PASSIVE"), ((None, None), None)]
    )
    def test_the_policy(self, worked: Any, policy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = iter(worked)
        monkeypatch.setattr(options, "_worked", lambda: next(seen))
        monkeypatch.setenv("OMP_WAIT_POLICY", "to be undone")
        monkeypatch.delenv("OMP_WAIT_POLICY")
        options.share_cores()
        assert os.environ.get("OMP_WAIT_POLICY") == policy

    @pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
    def test_what_is_set_stays(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, "7")
        monkeypatch.setattr(options, "_worked", lambda: pytest.fail("it looked"))
        options.share_cores()
        assert os.environ[name] == "7"

    def test_the_work_of_all_processors_only_grows(self) -> None:
        before = options._worked()
        if before is None:
            pytest.skip("this system has no /proc/stat")
        sum(range(3_000_000))
        assert options._worked() >= before > 0
