"""A run's folder: one process at a time, whole files, and events that survive a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from potstill.errors import RunError
from potstill.recipe.document import read_document
from potstill.runs.folder import RunFolder, environment, write_json, write_text

HOLD = """
import sys
from pathlib import Path
from potstill.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        pipe.close()


# the lock


def test_a_folder_in_use_is_refused_and_says_by_whom(tmp_path, holder):
    """Two processes in one folder overwrite each other's checkpoints; the person must find the other one."""
    run = RunFolder(tmp_path / "run")
    with pytest.raises(RunError) as caught, run.locked():
        pytest.fail("the lock was given twice")
    message = str(caught.value)
    assert f"is in use by process {holder.pid} on {socket.gethostname()} since 2" in message
    assert "wait for it or choose --output" in message
    holder.stdin.close()
    assert holder.wait(timeout=20) == 0
    with run.locked():
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    """A lock file that outlives its process would need a person to delete it."""
    run = RunFolder(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=20)
    assert json.loads((run / "lock.json").read_text())["pid"] == holder.pid  # it had no time to tidy up
    with run.locked():
        assert json.loads((run / "lock.json").read_text())["pid"] == os.getpid()
    assert not (run / "lock.json").exists()


def test_a_second_lock_in_the_same_process_is_refused(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.locked():
        with pytest.raises(RunError, match=f"process {os.getpid()}"), RunFolder(tmp_path / "run").locked():
            pass
        assert (run / "lock.json").exists()


def test_a_failure_inside_gives_the_lock_back(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    with run.locked():
        assert run.path.is_dir()


# files


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """A kill between the first and the last byte must leave the old file, not half of the new one."""
    path = tmp_path / "deep" / "metrics.json"
    write_json(path, {"accuracy": 0.5, "name": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"accuracy": 0.5, "name": "ü"}

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"accuracy": 0.9})
    assert json.loads(path.read_text(encoding="utf-8"))["accuracy"] == 0.5
    with path.open(encoding="utf-8") as reader:
        write_json(path, {"accuracy": 0.9})
        assert json.load(reader)["accuracy"] == 0.5  # who reads meanwhile reads the old one to its end
    assert json.loads(path.read_text(encoding="utf-8"))["accuracy"] == 0.9
    write_text(path, "short")
    assert path.read_text(encoding="utf-8") == "short"


def test_what_cannot_be_written_leaves_the_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text()) == [1]


def test_steps_are_done_once_marked(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.is_done("teacher")
    run.mark_done("teacher", samples=3)
    assert RunFolder(tmp_path).is_done("teacher")
    assert not run.is_done("baseline")
    assert json.loads((run / "steps/teacher.json").read_text())["samples"] == 3


def test_clear_deletes_files_and_folders(tmp_path):
    run = RunFolder(tmp_path)
    write_text(run / "checkpoints/a/b.txt", "x")
    write_text(run / "c.txt", "x")
    run.clear("checkpoints")
    run.clear("c.txt")
    run.clear("never there")
    assert list(tmp_path.iterdir()) == []


# events


def test_events_in_order(tmp_path):
    run = RunFolder(tmp_path)
    assert run.events() == []
    run.event("begin", step="teacher")
    run.event("done", step="teacher", note="größer\u2028mehr\nZeilen")
    first, second = run.events()
    assert (first["event"], first["step"]) == ("begin", "teacher")
    assert second["note"] == "größer\u2028mehr\nZeilen"
    assert first["time"] <= second["time"]
    assert len((run / "events.jsonl").read_bytes().split(b"\n")) == 3


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_cut_off_by_a_kill_costs_only_itself(tmp_path, cut):
    """Glued to the half line, the first event after a resume would be lost as well; half a letter is no text."""
    run = RunFolder(tmp_path)
    run.event("begin", step="teacher")
    run.event("done", step="öäü")
    path = run / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    found = [event["step"] for event in run.events()]
    assert found == (["teacher", "öäü"] if cut == 1 else ["teacher"])  # the newline alone is no loss
    run.event("begin", step="baseline")
    assert [event["step"] for event in run.events()] == [*found, "baseline"]


# the recipe


RECIPE = {"name": "a", "seed": 0, "train": {"epochs": 3.0, "learning_rate": 1e-05}, "teachers": {"x": {"model": "m"}}}


def test_the_same_recipe_goes_on(tmp_path):
    run = RunFolder(tmp_path)
    run.claim(RECIPE)
    written = (run / "recipe.resolved.yaml").read_bytes()
    run.claim(json.loads(json.dumps(RECIPE)))
    assert (run / "recipe.resolved.yaml").read_bytes() == written
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"train": {"epochs": 3.0, "learning_rate": 2e-05}}, r"train\.learning_rate"),
        ({"train": {"epochs": 3.0}}, r"train\.learning_rate"),
        ({"teachers": {"x": {"model": "m"}, "y": {"model": "m"}}}, r"teachers\.y"),
        ({"name": "b", "seed": 2}, "name, seed"),
    ],
)
def test_another_recipe_is_refused_and_the_key_named(tmp_path, change, key):
    """Else a teacher of one recipe would meet a student of another in one table of results."""
    run = RunFolder(tmp_path)
    run.claim(RECIPE)
    with pytest.raises(RunError, match=rf"belongs to another recipe \(they differ in {key}\); choose --output"):
        run.claim({**RECIPE, **change})
    run.claim(RECIPE)


def test_a_key_that_says_nothing_is_no_other_recipe(tmp_path):
    """A newer version writes a new key with its default of nothing; runs that are half done must go on."""
    run = RunFolder(tmp_path)
    run.claim(RECIPE)
    run.claim({**RECIPE, "description": None})


NASTY = [
    *("1e5", "1e-3", "12e4567", "0o14", "014", "0x1F", "1_000", "12:30:45", "+1", "-.5", ".5e3", ".", "-"),
    *("no", "yes", "on", "null", "~", "", "true", "2026-11-21", "=", "<<", ".inf", ".nan", " a ", "a: b", "# c", "ü"),
    *("'", '"', "\t", "a\nb", "@x", "`", "%d", "!tag", "&a", "*a", "[a]", "{a}", "x" * 300, "- a", "? a", "\u2028"),
]


def test_every_text_is_read_back_as_it_was(tmp_path):
    """PyYAML writes YAML 1.1; `1e5`, a revision say, is a text there and a number where recipes are read again."""
    run = RunFolder(tmp_path)
    recipe = {"texts": NASTY, "keys": {text: 1 for text in NASTY if text.isprintable() and text != "<<"}}
    numbers = {"numbers": [1e-5, 1e20, 3, -2.5, 0.1, 1e300, True, None]}
    run.claim({**recipe, **numbers})
    run.claim({**recipe, **numbers})
    document = read_document(run / "recipe.resolved.yaml")
    assert document.problems == []
    assert document.tree == {**recipe, **numbers}
    assert yaml.safe_load((run / "recipe.resolved.yaml").read_text(encoding="utf-8")) == {**recipe, **numbers}


def test_environment_says_what_a_figure_depends_on():
    found = environment()
    assert {"potstill", "python", "platform", "processor", "cpus", "threads", "accelerators", "command"} <= set(found)
    assert found["packages"]["torch"].startswith("2.")
    json.dumps(found)
