"""YAML 1.2 scalars, tags, duplicate keys, aliases, syntax errors and hostile texts."""

import math
import random

import pytest

from potstill.errors import Problem
from potstill.recipe.document import Document, parse_document


def value(text):
    document = parse_document(f"x: {text}", "r.yaml")
    assert document.problems == []
    return document.tree["x"]


def only(document: Document) -> Problem:
    assert len(document.problems) == 1, [str(problem) for problem in document.problems]
    return document.problems[0]


# scalars


# fmt: off
SCALARS = [
    ("1e-3", 1e-3), ("1.0e-3", 1e-3), (".5", 0.5), ("1e5", 1e5), ("1.", 1.0), ("+1.5", 1.5), ("-2E+3", -2000.0),
    ("0", 0), ("-17", -17), ("+3", 3), ("007", 7), ("0x1F", 31), ("0o17", 15), (".inf", math.inf),
    ("-.INF", -math.inf), ("true", True), ("True", True), ("TRUE", True), ("false", False), ("null", None),
    ("Null", None), ("~", None), ("", None), ("no", "no"), ("on", "on"), ("yes", "yes"), ("Off", "Off"), ("y", "y"),
    ("tRUE", "tRUE"), ("1_000", "1_000"), ("0b11", "0b11"), ("0X1F", "0X1F"), ("12:30:45", "12:30:45"),
    ("2026-11-21", "2026-11-21"), ("2026-11-21 10:00:00", "2026-11-21 10:00:00"), ("1.2.3", "1.2.3"), ("1e", "1e"),
    ("inf", "inf"), ("nan", "nan"), ("=", "="), ("'1e-3'", "1e-3"), ('"true"', "true"), ("''", ""),
    ('"null"', "null"), ("!!str 3", "3"), ("!!int '3'", 3), ("!!float 3", 3.0), ("!!bool 'true'", True),
    ("|\n  1\n", "1\n"),
]
# fmt: on


@pytest.mark.parametrize(("text", "expected"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text, expected):
    got = value(text)
    assert got == expected
    assert type(got) is type(expected)


def test_nan():
    assert math.isnan(value(".nan"))


def test_arabic_digits_are_a_text():
    assert value("٣") == "٣"


def test_integer_keys_stay_integers():
    assert value("{0: 0, 6: 3, '7': 1}") == {0: 0, 6: 3, "7": 1}


# what is wrong with a text


def test_duplicate_keys_name_both_lines():
    problem = only(parse_document("a: 1\nb: 2\na: 3\n", "r.yaml"))
    assert (problem.path, problem.line) == (("a",), 3)
    assert "lines 1 and 3" in problem.message


def test_duplicate_nested_key_has_its_path():
    assert only(parse_document("t: {a: 1, a: 2}", "r.yaml")).path == ("t", "a")


def test_same_number_written_twice_is_a_duplicate():
    assert "written twice" in only(parse_document("m: {10: 1, 0xA: 2}", "r.yaml")).message


@pytest.mark.parametrize("tag", ["!import", "!!python/object/apply:os.system", "!!set", "!!timestamp", "!<tag:x,1:y>"])
@pytest.mark.parametrize("text", ["x", "[x]", "{x: 1}"])
def test_tags_are_refused(tag, text):
    document = parse_document(f"a: 1\nb: {tag} {text}\n", "r.yaml")
    problem = only(document)
    assert "a recipe is data: tags are not allowed" in problem.message
    assert (problem.path, problem.line) == (("b",), 2)
    assert document.tree["a"] == 1


def test_tag_on_a_key_is_refused():
    assert "tags are not allowed" in only(parse_document("!import a: 1", "r.yaml")).message


def test_core_tag_on_the_wrong_kind_is_refused():
    assert "tags are not allowed" in only(parse_document("a: !!map [1]", "r.yaml")).message


@pytest.mark.parametrize("text", ["!!int x", "!!int 1.5", "!!int true", "!!bool 1", "!!null x", "!!float x"])
def test_core_tag_with_another_text_is_a_problem(text):
    assert only(parse_document(f"a: {text}", "r.yaml")).message.startswith("expected ")


@pytest.mark.parametrize("key", ["true", "1.5", "~", "[a]", "{a: 1}", '"\\e[31m"', '"a\\nb"', "a\u00a0b"])
def test_other_keys_are_refused(key):
    document = parse_document(f"ok: 1\n? {key}\n: 2\n", "r.yaml")
    problem = only(document)
    assert problem.message.startswith("expected a text or a whole number as key")
    assert problem.line == 2
    assert document.tree == {"ok": 1}
    assert "\x1b" not in str(problem)


def test_all_problems_come_at_once():
    document = parse_document("a: 1\na: 2\nb: !x 1\ntrue: 1\nc: 1e999\n", "r.yaml")
    assert [problem.line for problem in document.problems] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1, 2", 1, "expected ',' or ']'"),
        ("a: 1\nb: {x: 1", 2, "expected ',' or '}'"),
        ("a:\n\tb: 1", 2, "use spaces"),
        ("a: b: c", 1, "quotes"),
        ("a: 1\nb: @x", 2, "'@'"),
        ("a: 'x", 1, "never closed"),
        ("a: *x", 1, "'x' has no anchor"),
        ("a:\n  - 1\n b: 2", 3, "indentation"),
        ("a: 1\nb", 2, "expected ':'"),
        ("a: 1\n---\nb: 2", 2, "one YAML document"),
        ("a: 1\nb: \x01", 2, "U+0001"),
        ('a: "\\UFFFFFFFF"', 1, "not valid YAML"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", 1, "not valid YAML"),
        ("%YAML 2.0\n---\na: 1", 1, "not valid YAML"),
        ("a: &x 1\nb: &x 2", 2, "not valid YAML"),
    ],
)
def test_a_syntax_error_is_one_problem_with_its_line(text, line, words):
    document = parse_document(text, "r.yaml")
    problem = only(document)
    assert problem.line == line
    assert words in problem.message
    assert document.tree == {}


def test_half_a_character_is_refused():
    document = parse_document('a: "\\uD800"', "r.yaml")
    assert "half a character" in only(document).message
    assert document.tree == {"a": ""}


@pytest.mark.parametrize("text", ["9" * 1000, "0x" + "f" * 1000, "0o" + "7" * 1000, "-" + "9" * 101, "1e999", "-1e400"])
def test_numbers_out_of_range_are_refused(text):
    document = parse_document(f"a: {text}", "r.yaml")
    assert only(document).message.startswith("expected a number")
    assert document.tree == {"a": None}


# anchors, aliases, merge keys


def test_aliases_are_copies():
    document = parse_document("a: &x {k: [1]}\nb: *x\n", "r.yaml")
    assert document.tree["b"] == {"k": [1]}
    assert document.tree["a"]["k"] is not document.tree["b"]["k"]
    assert document.places[("b",)].line == 2
    assert document.places[("b", "k")].line == 1


def test_merge_keys():
    text = "base: &b {x: 1, y: 1}\nmore: &m {y: 2, z: 2}\nall: {<<: [*b, *m], x: 3}\none:\n  y: 5\n  <<: *b\n"
    document = parse_document(text, "r.yaml")
    assert document.problems == []
    assert document.tree["all"] == {"x": 3, "y": 1, "z": 2}
    assert document.tree["one"] == {"x": 1, "y": 5}
    assert document.places[("all", "z")].line == 2


def test_quoted_merge_key_is_a_key():
    assert value("{'<<': 1}") == {"<<": 1}


def test_merging_a_scalar_is_a_problem():
    assert "to merge" in only(parse_document("a: {<<: 1}", "r.yaml")).message


def test_two_merge_keys_are_a_duplicate():
    text = "a: &a {x: 1}\nb: {<<: *a, <<: *a}"
    assert "'<<' is written twice" in only(parse_document(text, "r.yaml")).message


def test_a_mistake_behind_an_alias_is_reported_once():
    assert only(parse_document("a: &a [!x 1]\nb: *a\nc: *a\n", "r.yaml")).line == 1


def laughs(first: str, each: str) -> str:
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {each.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 30)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs("[lol]", "[{}]"), "100,000"),
        (laughs("{k: lol}", "{{<<: [{}]}}"), "100,000"),
        ("x: [" + "a," * 400_000 + "]", "100,000"),
        ("x: " + "[" * 100_000, "deep"),
        ("{a: " * 100_000, "deep"),
        ("- " * 100_000, "deep"),
        ("? " * 100_000, "deep"),
        ("\n".join(f"a{n}: &a{n} {{<<: *a{n - 1}}}" if n else "a0: &a0 {}" for n in range(3000)), "deep"),
        ("\n".join(f"a{n}: &a{n} [*a{n - 1}]" if n else "a0: &a0 []" for n in range(3000)), "deep"),
        ("a: &a [*a]", "itself"),
        ("a: &a {b: [*a]}", "itself"),
        ("a: &a {<<: *a}", "itself"),
        ("&a b: *a\nc: &c {d: *c}", "itself"),
    ],
    ids=range(13),
)
@pytest.mark.usefixtures("ends")
def test_bombs_are_refused(text, words):
    problem = only(parse_document(text, "r.yaml"))
    assert words in problem.message
    assert len(str(problem)) < 300


def test_deep_but_honest_text_is_read():
    assert only_lists(value("[" * 60 + "]" * 60)) == 60


def only_lists(tree):
    return 1 + only_lists(tree[0]) if tree else 1


def test_random_signs_never_raise():
    draw = random.Random(1)
    signs = [
        *"ab01-:?,[]{}#&*!|>'\"%@` \n\t\\~<=.xeU\x85\U0001f600",
        *["<<: ", "- ", ": ", "&a ", "*a ", "!!", "\\u", "\\x"],
    ]
    for _ in range(2000):
        text = "".join(draw.choices(signs, k=draw.randrange(1, 40)))
        document = parse_document(text, "r.yaml")
        assert all(problem.file == "r.yaml" and problem.line >= 1 for problem in document.problems)
        "\n".join(map(str, document.problems)).encode("utf-8")
        repr(document.tree).encode("utf-8")
