"""Texts of recipes as data: scalars, lines, hostile texts, `extends` and overrides."""

import os
import random
from pathlib import Path

import pytest

from potstill.errors import Problem
from potstill.recipe.document import Document, Place, parse_document, read_document

RECIPE = """\
name: liar
task: {name: text-classification, max_length: 128}
teacher:
  model: bert
  train: {epochs: 3, learning_rate: 3.0e-5}
objective:
  hard:
    loss: cross_entropy
    weight: 0.3
  soft: {loss: kl, weight: 0.7}
compress:
  - prune: {heads: 0.25}
  - quantize: int8
"""


def only(document: Document) -> Problem:
    assert len(document.problems) == 1, [str(problem) for problem in document.problems]
    return document.problems[0]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


# lines


def test_every_value_knows_its_line():
    document = parse_document(RECIPE, "liar.yaml")
    assert document.problems == []
    lines = {
        (): 1,
        ("name",): 1,
        ("task", "max_length"): 2,
        ("teacher",): 3,
        ("teacher", "train", "learning_rate"): 5,
        ("objective", "hard"): 7,
        ("objective", "hard", "weight"): 9,
        ("objective", "soft", "weight"): 10,
        ("compress",): 11,
        ("compress", 0, "prune", "heads"): 12,
        ("compress", 1): 13,
    }
    assert {path: document.places[path].line for path in lines} == lines
    assert {place.file for place in document.places.values()} == {"liar.yaml"}


def test_every_value_of_the_tree_has_a_place():
    document = parse_document(RECIPE, "liar.yaml")
    assert set(paths_of(document.tree)) == set(document.places)


def test_a_key_is_placed_at_its_key_not_its_value():
    document = parse_document("a:\n\n  b\n", "r.yaml")
    assert document.place(("a",)) == Place("r.yaml", 1)


def test_place_falls_back_to_the_longest_known_prefix():
    document = parse_document(RECIPE, "liar.yaml")
    assert document.place(("objective", "hard", "temperature", 3)) == Place("liar.yaml", 7)
    assert document.place(("unknown",)) == Place("liar.yaml", 1)
    assert document.place(["compress", 1]) == Place("liar.yaml", 13)
    assert Document().place(("a",)) is None


def test_windows_lines_and_byte_order_mark(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: no\r\n")
    document = read_document(tmp_path / "r.yaml")
    assert document.tree == {"a": 1, "b": "no"}
    assert document.places[("b",)].line == 2


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "nothing"),
        ("# only a comment\n", "nothing"),
        ("---\n", "nothing"),
        ("- a", "a list"),
        ("word", "the text 'word'"),
    ],
)
def test_the_top_must_be_a_mapping(text, got):
    problem = only(parse_document(text, "r.yaml"))
    assert problem.message.startswith("expected a mapping")
    assert got in problem.message


# files


def test_reads_a_file(tmp_path):
    document = read_document(write(tmp_path, liar=RECIPE))
    assert document.tree["teacher"]["train"] == {"epochs": 3, "learning_rate": 3e-5}
    assert document.places[("name",)] == Place(str(tmp_path / "liar.yaml"), 1)


@pytest.mark.parametrize("name", ["lair.yaml", "liar.yml", "liar", "Liar.yalm"])
def test_missing_file_names_the_nearest(tmp_path, name):
    write(tmp_path, liar=RECIPE, unrelated="a: 1")
    problem = only(read_document(tmp_path / name))
    assert "no such file" in problem.message
    assert problem.hint == "did you mean 'liar.yaml'?"
    assert problem.file == str(tmp_path / name)


def test_missing_file_with_nothing_near(tmp_path):
    write(tmp_path, liar=RECIPE)
    assert only(read_document(tmp_path / "zzzzzz.yaml")).hint is None


def test_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "no") in str(only(read_document(tmp_path / "no" / "r.yaml")).hint)


def test_folder(tmp_path):
    assert "folder" in only(read_document(tmp_path)).message


def test_too_large(tmp_path):
    path = write(tmp_path, big="a: 1\n" + "#" * (1 << 20))
    assert "1 MiB" in only(read_document(path)).message


def test_just_small_enough(tmp_path):
    path = write(tmp_path, big="a: 1\n" + "#" * ((1 << 20) - 5))
    assert read_document(path).tree == {"a": 1}


def test_not_utf8(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"a: 1\nb: \xff\n")
    problem = only(read_document(tmp_path / "r.yaml"))
    assert "0xff" in problem.message
    assert problem.line == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "r.yaml")
    assert "pipe" in only(read_document(tmp_path / "r.yaml")).message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path, r="a: 1")
    path.chmod(0)
    assert "cannot be read" in only(read_document(path)).message


@pytest.mark.parametrize("name", ["a\0b.yaml", "x" * 5000])
def test_impossible_names(tmp_path, name):
    assert only(read_document(tmp_path / name)).line == 1


def test_loop_of_links(tmp_path):
    (tmp_path / "a.yaml").symlink_to(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").symlink_to(tmp_path / "a.yaml")
    only(read_document(tmp_path / "a.yaml"))


# extends


def test_extends_merges_deeply_and_places_follow_the_winner(tmp_path):
    base = "seed: 1\ntrain:\n  epochs: 3\n  batch_size: 8\nexport: [onnx, torch]\n"
    path = write(tmp_path, r="extends: base\n\ntrain:\n  epochs: 5\nexport: [onnx]\n", base=base)
    document = read_document(path)
    assert document.problems == []
    assert document.tree == {"seed": 1, "train": {"epochs": 5, "batch_size": 8}, "export": ["onnx"]}
    own, inherited = str(path), str(tmp_path / "base.yaml")
    assert document.places[("train",)] == Place(own, 3)
    assert document.places[("train", "epochs")] == Place(own, 4)
    assert document.places[("train", "batch_size")] == Place(inherited, 4)
    assert document.places[("export", 0)] == Place(own, 5)
    assert set(document.places) == set(paths_of(document.tree))


def test_null_removes_an_inherited_key(tmp_path):
    path = write(tmp_path, r="extends: base\na: {x: null}\nb: ~\nc: null\n", base="a: {x: {y: 1}, z: 2}\nb: [1, 2]\n")
    document = read_document(path)
    assert document.tree == {"a": {"z": 2}, "c": None}
    assert set(document.places) == set(paths_of(document.tree))


def test_a_scalar_replaces_a_mapping_and_back(tmp_path):
    path = write(tmp_path, r="extends: base\na: 1\nb: {y: 1}\n", base="a: {x: {z: 1}}\nb: 2\n")
    document = read_document(path)
    assert document.tree == {"a": 1, "b": {"y": 1}}
    assert set(document.places) == set(paths_of(document.tree))


def test_later_names_win_over_earlier(tmp_path):
    path = write(tmp_path, r="extends: [one, two.yaml]\nc: 3", one="a: 1\nb: 1\nc: 1", two="b: 2\nc: 2")
    assert read_document(path).tree == {"a": 1, "b": 2, "c": 3}


def test_parents_have_parents_in_their_own_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", mid="extends: low\nb: 2", low="a: 1\nb: 1")
    document = read_document(write(tmp_path, r="extends: sub/mid\nc: 3"))
    assert document.tree == {"a": 1, "b": 2, "c": 3}
    assert document.places[("a",)].file == str(tmp_path / "sub" / "low.yaml")


def test_packaged_recipes_are_found_after_the_neighbours(tmp_path):
    (tmp_path / "packaged").mkdir()
    write(tmp_path / "packaged", hinton="a: packaged", other="b: packaged")
    packaged = {"hinton": tmp_path / "packaged" / "hinton.yaml", "other": tmp_path / "packaged" / "other.yaml"}
    path = write(tmp_path, r="extends: [hinton, other]", other="b: neighbour")
    assert read_document(path, find=packaged.get).tree == {"a": "packaged", "b": "neighbour"}


def test_a_copy_may_extend_the_packaged_recipe_of_its_name(tmp_path):
    (tmp_path / "packaged").mkdir()
    packaged = write(tmp_path / "packaged", hinton="a: 1\nb: 1")
    path = write(tmp_path, hinton="extends: hinton\nb: 2")
    assert read_document(path, find={"hinton": packaged}.get).tree == {"a": 1, "b": 2}


def test_missing_parent_has_its_line_and_a_hint(tmp_path):
    path = write(tmp_path, r="a: 1\nextends:\n  - base\n  - bsae2.yaml\n", base="b: 1", base2="c: 1")
    document = read_document(path)
    problem = only(document)
    assert (problem.file, problem.line, problem.path) == (str(path), 4, ("extends", 1))
    assert problem.hint == "did you mean 'base2.yaml'?"
    assert document.tree == {"a": 1, "b": 1}


def test_missing_parent_in_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", base="b: 1")
    problem = only(read_document(write(tmp_path, r="extends: sub/bsae")))
    assert problem.hint == f"did you mean '{Path('sub/base')}'?"


@pytest.mark.parametrize("name", [".", "..", "/", "a\\0b", "x" * 5000, "nowhere/at/all"])
def test_impossible_parents(tmp_path, name):
    problem = only(read_document(write(tmp_path, r=f'a: 1\nextends: "{name}"')))
    assert problem.path == ("extends",)
    assert problem.line == 2


@pytest.mark.parametrize("names", ["3", "{a: b}", "''", "[base, 4]", "[[base]]", "[" + "base, " * 40 + "]"])
def test_extends_that_is_no_name(tmp_path, names):
    problem = only(read_document(write(tmp_path, r=f"extends: {names}", base="a: 1")))
    assert problem.message.startswith("expected the name of a recipe")


@pytest.mark.parametrize("names", ["~", "[]"])
def test_extends_nothing(tmp_path, names):
    document = read_document(write(tmp_path, r=f"extends: {names}\na: 1"))
    assert (document.tree, document.problems) == ({"a": 1}, [])
    assert set(document.places) == set(paths_of(document.tree))


def test_cycle(tmp_path):
    path = write(tmp_path, a="extends: b\nx: 1", b="\nextends: c", c="y: 1\nextends: [a.yaml]")
    document = read_document(path)
    problem = only(document)
    assert "a.yaml → b.yaml → c.yaml → a.yaml" in problem.message
    assert (problem.file, problem.line) == (str(tmp_path / "c.yaml"), 2)
    assert document.tree == {"x": 1, "y": 1}


def test_extending_oneself(tmp_path):
    assert "itself" in only(read_document(write(tmp_path, a="extends: a.yaml"))).message


def test_a_diamond_is_no_cycle_and_its_problems_come_once(tmp_path):
    path = write(tmp_path, a="extends: [b, c]", b="extends: d", c="extends: d", d="x: 1\nx: 2")
    document = read_document(path)
    assert "written twice" in only(document).message
    assert document.tree == {"x": 1}


@pytest.mark.usefixtures("ends")
def test_many_diamonds_come_to_an_end(tmp_path):
    files = {f"f{n}": f"extends: [{', '.join([f'f{n + 1}'] * 20)}]\nk{n}: {n}" for n in range(20)}
    document = read_document(write(tmp_path, **files, f20="last: 1"))
    assert len(document.tree) == 21


def test_endless_chain(tmp_path):
    files = {f"f{n}": f"extends: f{n + 1}" for n in range(200)}
    assert "extend one another" in only(read_document(write(tmp_path, **files))).message


def test_a_broken_parent_is_reported_at_its_place(tmp_path):
    document = read_document(write(tmp_path, r="extends: base\na: 1", base="x: 1\ny: [1"))
    problem = only(document)
    assert (problem.file, problem.line) == (str(tmp_path / "base.yaml"), 2)
    assert document.tree == {"a": 1}


def test_parse_document_leaves_extends_alone():
    assert parse_document("extends: base", "r.yaml").tree == {"extends": "base"}


# overrides


@pytest.fixture
def liar(tmp_path):
    return write(tmp_path, liar=RECIPE)


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("name=foo", ("name",), "foo"),
        ("train.epochs=3", ("train", "epochs"), 3),
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 1e-3),
        ("data.limit={train: 100}", ("data", "limit"), {"train": 100}),
        ("export=[onnx, torch]", ("export",), ["onnx", "torch"]),
        ("objective.soft.weight=0", ("objective", "soft", "weight"), 0),
        ("compress.1.quantize=int4", ("compress", 1, "quantize"), "int4"),
        ("name='1'", ("name",), "1"),
        ("name=a=b", ("name",), "a=b"),
        ("name=no", ("name",), "no"),
        (" name = x ", ("name",), "x"),
        ("map.0=3", ("map", 0), 3),
        ("name=two words", ("name",), "two words"),
    ],
)
def test_override(liar, override, path, expected):
    document = read_document(liar, [override])
    assert document.problems == []
    got = document.tree
    for key in path:
        got = got[key]
    assert got == expected
    assert document.places[path] == Place("command line", 1)
    assert set(document.places) == set(paths_of(document.tree))


def test_overrides_are_numbered_and_the_last_wins(liar):
    document = read_document(liar, ["name=a", "seed=1", "name=b"])
    assert document.tree["name"] == "b"
    assert document.places[("name",)] == Place("command line", 3)
    assert document.places[("seed",)] == Place("command line", 2)


def test_override_replaces_a_mapping_whole(liar):
    document = read_document(liar, ["objective.soft={loss: mse}"])
    assert document.tree["objective"]["soft"] == {"loss": "mse"}
    assert set(document.places) == set(paths_of(document.tree))


@pytest.mark.parametrize("text", ["", "null", "~", " "])
def test_override_with_nothing_removes(liar, text):
    document = read_document(liar, [f"objective.soft={text}"])
    assert "soft" not in document.tree["objective"]
    assert set(document.places) == set(paths_of(document.tree))


def test_override_removes_an_entry_of_a_list(liar):
    document = read_document(liar, ["compress.0=", "compress.0.quantize=int4"])
    assert document.tree["compress"] == [{"quantize": "int4"}]
    assert document.places[("compress", 0)].line == 13
    assert set(document.places) == set(paths_of(document.tree))


def test_null_for_a_key_that_is_not_there_stays_null(liar):
    document = read_document(liar, ["trian.epochs=null"])
    assert document.tree["trian"] == {"epochs": None}
    assert document.place(("trian",)) == Place("command line", 1)


def test_override_prefers_the_key_as_written(tmp_path):
    path = write(tmp_path, r="m: {'0': a, 1: b}")
    assert read_document(path, ["m.0=x", "m.1=y"]).tree == {"m": {"0": "x", 1: "y"}}


@pytest.mark.parametrize(
    "override",
    ["", "name", "=3", ".name=3", "name.=3", "a..b=1", "." * 5000 + "=1", ".".join("a" * 5000) + "=1", "a\nb=1"],
)
def test_malformed_override(liar, override):
    problem = only(read_document(liar, ["seed=1", override]))
    assert problem.message.startswith("expected key=value")
    assert (problem.file, problem.line) == ("command line", 2)


@pytest.mark.parametrize(
    "text", ["[1", "{a: ", "'x", "@x", "*x", "!import x", "a: b", "- a", "# c", "%x", "\x01", "{a: 1, a: 2}"]
)
def test_override_with_a_value_that_is_no_flow_yaml(liar, text):
    document = read_document(liar, [f"name={text}"])
    problem = only(document)
    assert (problem.file, problem.line, problem.path) == ("command line", 1, ("name",))
    assert "quotes" in problem.hint
    assert document.tree["name"] == "liar"


def test_override_through_a_scalar(liar):
    problem = only(read_document(liar, ["task.name.first=3"]))
    assert problem.message == "expected a mapping or a list at 'task.name', got the text 'text-classification'"
    assert (problem.file, problem.line) == ("command line", 1)


@pytest.mark.parametrize("index", ["2", "-1", "x", "99999999999999999999", "²"])
def test_override_of_an_entry_that_is_not_there(liar, index):
    problem = only(read_document(liar, [f"compress.{index}.quantize=int8"]))
    assert "it has 0 to 1" in problem.message


def test_overrides_cannot_extend(liar):
    assert only(read_document(liar, ["extends=other"])).path == ("extends",)


def test_override_goes_over_what_was_inherited(tmp_path):
    path = write(tmp_path, r="extends: base", base="train: {epochs: 1, lr: 2}")
    document = read_document(path, ["train.epochs=9", "train.lr="])
    assert document.tree == {"train": {"epochs": 9}}


def test_a_broken_file_and_a_broken_override_come_together(tmp_path):
    document = read_document(tmp_path / "no.yaml", ["x", "a=1"])
    assert [problem.line for problem in document.problems] == [1, 1]
    assert document.tree == {"a": 1}


# hostile input


def paths_of(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, below in items:
        yield from paths_of(below, (*path, key))


def check_sane(document: Document) -> None:
    for problem in document.problems:
        assert isinstance(problem, Problem)
        assert problem.file
        assert problem.line >= 1
        str(problem).encode("utf-8")
    for path in paths_of(document.tree):
        assert document.place(path) is not None
        assert all(type(key) in (str, int) for key in path)
    repr(document.tree).encode("utf-8")


def test_random_bytes_never_raise(tmp_path):
    draw = random.Random(0)
    for _ in range(200):
        (tmp_path / "r.yaml").write_bytes(draw.randbytes(draw.randrange(200)))
        document = read_document(tmp_path / "r.yaml")
        check_sane(document)
        assert document.problems


def test_mutated_recipes_never_raise(tmp_path):
    draw = random.Random(2)
    path = tmp_path / "r.yaml"
    base = ("extends: b\nx: &x {k: 1}\ny: {<<: *x, l: [*x, 'q']}\n" + RECIPE).encode()
    write(tmp_path, b=RECIPE)
    for _ in range(400):
        data = bytearray(base)
        for _ in range(draw.randrange(1, 6)):
            place = draw.randrange(len(data))
            piece = draw.choice(
                [bytes([draw.randrange(256)]), b"[", b"}", b"*x", b"\n", b"  ", b"!a ", b": ", b'"', b"~"]
            )
            data[place : place + draw.randrange(3)] = piece
        path.write_bytes(bytes(data))
        check_sane(read_document(path, ["train.epochs=1"]))


def test_random_overrides_never_raise(liar):
    draw = random.Random(3)
    keys = ["name", "task", "compress", "0", "1", "objective", "hard", "loss", "", "x", "²", "-1", "extends"]
    texts = ["", "1", "null", "[1, {a: 2}]", "{", "*a", "!x 1", "'", "#", "a: b", "\ud800", "\0", "[[", "=", "&a [*a]"]
    for _ in range(200):
        overrides = [".".join(draw.choices(keys, k=draw.randrange(1, 5))) + draw.choice(["=", "=", "=", ""])]
        document = read_document(liar, [override + draw.choice(texts) for override in overrides * 3])
        check_sane(document)
        assert set(document.places) == set(paths_of(document.tree))
