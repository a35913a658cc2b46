"""Errors of pydantic as mistakes that a person can mend."""

import random
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from potstill.errors import Problem
from potstill.recipe.document import Document, Place, parse_document, read_document
from potstill.recipe.problems import ProblemsError, located, problems_of, tidy


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Color(Enum):
    red = "red"
    blue = "blue"


class Cat(Strict):
    kind: Literal["cat"]
    lives: int = 9


class Dog(Strict):
    kind: Literal["dog", "hound"]
    bones: int = 0
    friend: str = "none"

    @model_validator(mode="before")
    @classmethod
    def _same(cls, given: Any) -> Any:
        return given


class Needy(Strict):
    form: Literal["needy"]
    first: int
    second: int


class Easy(Strict):
    form: Literal["easy", "simple"]


class Keep(Strict):
    keep_blocks: list[int]


class Named(Strict):
    model: str
    revision: str | None = None


class Cut(Strict):
    from_teacher: Keep


Alias = TypeAliasType("Alias", Named | int)


class Train(Strict):
    epochs: Annotated[float, Field(gt=0, description="passes over the data")] = 3
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    steps: int | None = None
    learning_rate: float = Field(1e-3, alias="learning-rate")


class Term(BaseModel):
    model_config = ConfigDict(extra="allow")
    loss: str
    weight: float | dict[str, float] = 1.0


class Pets(RootModel[dict[str, Cat]]):
    pass


def _checked(given: Any) -> Any:
    if given == 13:
        raise ValueError("thirteen brings bad luck")
    if given == 14:
        inner = [Problem(("temperature",), "no such option", "did you mean 'temp'?"), Problem((), "needs 'x'")]
        raise ProblemsError(inner)
    if given == 15:
        raise PydanticCustomError("odd", "fifteen is odd")
    return given


class Recipe(Strict):
    name: str = "x"
    seed: int = 0
    train: Train = Field(default_factory=Train)
    nested: Named = Field(default_factory=lambda: Named(model="m"))
    source: Literal["hub", "files", "sklearn"] = "hub"
    color: Color = Color.red
    terms: dict[str, Term] = {}
    items: list[Named] = []
    pet: Cat | Dog | None = None
    tagged: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None
    mixed: Annotated[Cat | Dog, Field(discriminator="kind")] | int | None = None
    called: Annotated[Annotated[Cat, Tag("c")] | Annotated[Dog, Tag("d")], Discriminator(lambda _: "c")] | None = None
    inside: Annotated[Annotated[Cat, Tag("c")] | Annotated[Dog, Tag("d")], Discriminator(lambda _: "d")] | int = 0
    alias: Alias = 0
    need: Needy | Easy | None = None
    day: date | None = None
    student: Named | Cut | None = None
    forms: list[Named | str] = []
    auto: Literal["auto"] | int = "auto"
    length: Annotated[float, Field(gt=0)] | Keep | None = None
    number: float | int = 1
    layers: dict[int, int] = {}
    pair: tuple[int, str] | None = None
    two: Annotated[list[int], Field(min_length=2, max_length=3)] = [1, 2]
    one: Annotated[list[int], Field(min_length=1)] = [1]
    word: Annotated[str, Field(min_length=1, max_length=3)] = "a"
    code: Annotated[str, Field(pattern="^[a-z]+$")] = "a"
    finite: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    flag: bool = False
    lucky: Annotated[float, AfterValidator(_checked)] = 1
    early: Annotated[int, BeforeValidator(_checked)] | Named | None = None
    pets: Pets | None = None
    either: list[int] | dict[str, int] | None = None
    other: int = Field(0, validation_alias=AliasChoices("other-name", "another"))
    anything: Any = None

    @field_validator("anything")
    @classmethod
    def _inner(cls, given: Any) -> Any:
        if isinstance(given, list):
            return TypeAdapter(list[int] | dict[str, int]).validate_python(given)
        return Named.model_validate(given) if isinstance(given, dict) else given


def document_and_problems(text: str) -> tuple[Document, list[Problem]]:
    document = parse_document(text, "r.yaml")
    assert document.problems == []
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(document.tree)
    return document, problems_of(caught.value, document, Recipe)


def lines(text: str) -> list[str]:
    """The problems of one line of text, without the place."""
    return [str(problem).removeprefix("r.yaml:1: ") for problem in document_and_problems(text)[1]]


# fmt: off
MESSAGES = [
    ("train: {epochs: four}", "train.epochs: expected a number, got the text 'four'"),
    ("train: {epochs: -1}", "train.epochs: expected a number greater than 0, got -1"),
    ("train: {epochs: [3]}", "train.epochs: expected a number, got a list"),
    ("train: {batch_size: 0}", "train.batch_size: expected a number of at least 1, got 0"),
    ("train: {batch_size: 2000000}", "train.batch_size: expected a number of at most 1000000, got 2000000"),
    ("train: {batch_size: 1.5}", "train.batch_size: expected a whole number, got 1.5"),
    ("train: {steps: {}}", "train.steps: expected a whole number, got a mapping"),
    ("train: {learning-rate: x}", "train.learning-rate: expected a number, got the text 'x'"),
    ("train: {epoch: 3}", "train.epoch: unknown key; did you mean 'epochs'?"),
    ("train: {learning_rate: 3}", "train.learning_rate: unknown key; did you mean 'learning-rate'?"),
    ("train: {zzz: 3}", "train.zzz: unknown key; known: batch_size, epochs, learning-rate, steps"),
    ("train: [1]", "train: expected a mapping, got a list"),
    ("trian: {}", "trian: unknown key; did you mean 'train'?"),
    ("3: {}", "3: expected a text as key, got 3"),
    ("name: 3", "name: expected a text, got 3"),
    ("name: true", "name: expected a text, got true"),
    ("name: null", "name: expected a text, got nothing"),
    ("source: fles", "source: expected one of 'hub', 'files', 'sklearn', got 'fles'; did you mean 'files'?"),
    ("source: [hub]", "source: expected one of 'hub', 'files', 'sklearn', got a list"),
    ("source: zzzzz", "source: expected one of 'hub', 'files', 'sklearn', got 'zzzzz'"),
    ("color: bleu", "color: expected one of 'red', 'blue', got 'bleu'; did you mean 'blue'?"),
    ("flag: maybe", "flag: expected true or false, got the text 'maybe'"),
    ("two: [1]", "two: expected at least 2 entries, got 1"),
    ("two: [1, 2, 3, 4]", "two: expected at most 3 entries, got 4"),
    ("one: []", "one: expected at least 1 entry, got 0"),
    ("two: [1, b]", "two.1: expected a whole number, got the text 'b'"),
    ("two: {a: 1}", "two: expected a list, got a mapping"),
    ("pair: [a, b]", "pair.0: expected a whole number, got the text 'a'"),
    ("pair: [1]", "pair.1: missing"),
    ("word: ''", "word: expected a text of at least 1 character, got the text ''"),
    ("word: abcd", "word: expected a text of at most 3 characters, got the text 'abcd'"),
    ("code: A1", "code: expected a text that matches ^[a-z]+$, got the text 'A1'"),
    ("finite: .inf", "finite: expected a finite number, got inf"),
    ("lucky: 13", "lucky: thirteen brings bad luck"),
    ("lucky: 15", "lucky: fifteen is odd"),
    ("layers: {a: 1}", "layers.a: expected a whole number as key, got the text 'a'"),
    ("layers: {0: 0, 6: x}", "layers.6: expected a whole number, got the text 'x'"),
    ("nested: {}", "nested.model: missing"),
    ("terms: {soft: {weight: 1}}", "terms.soft.loss: missing"),
    ("terms: {soft: {los: kl}}", "terms.soft.loss: missing; should 'los' be 'loss'?"),
    ("terms: {soft: {loss: kl, weight: [1]}}", "terms.soft.weight: expected a number or a mapping, got a list"),
    ("terms: {soft: {loss: kl, weight: {to: x}}}", "terms.soft.weight.to: expected a number, got the text 'x'"),
    ("terms: {float: {loss: 3}}", "terms.float.loss: expected a text, got 3"),
    ("items: [{model: a}, {model: 3}]", "items.1.model: expected a text, got 3"),
    ("pets: {tom: {kind: cat, lives: x}}", "pets.tom.lives: expected a whole number, got the text 'x'"),
    ("other-name: x", "other-name: expected a whole number, got the text 'x'"),
    ("anything: {model: 3}", "anything.model: expected a text, got 3"),
    ("anything: {model: a, 'list[x]': 3}", "anything.list[x]: unknown key"),
    # unions
    ("pet: {kind: cow}", "pet.kind: expected one of 'cat', 'dog', 'hound', got 'cow'"),
    ("pet: {kind: dgo}", "pet.kind: expected one of 'cat', 'dog', 'hound', got 'dgo'; did you mean 'dog'?"),
    ("pet: {kind: cat, live: 3}", "pet.live: unknown key; did you mean 'lives'?"),
    ("pet: {kind: dog, bones: x}", "pet.bones: expected a whole number, got the text 'x'"),
    ("pet: {kind: dog, bone: 1}", "pet.bone: unknown key; did you mean 'bones'?"),
    ("pet: {kind: [cat]}", "pet.kind: expected one of 'cat', 'dog', 'hound', got a list"),
    ("pet: {}", "pet.kind: missing"),
    ("pet: 3", "pet: expected a mapping, got 3"),
    ("tagged: {kind: cow}", "tagged.kind: expected one of 'cat', 'dog', 'hound', got 'cow'"),
    ("tagged: {kind: hound, bone: 1}", "tagged.bone: unknown key; did you mean 'bones'?"),
    ("tagged: {}", "tagged.kind: missing"),
    ("tagged: 3", "tagged: expected a mapping, got 3"),
    ("mixed: {kind: cat, lives: x}", "mixed.lives: expected a whole number, got the text 'x'"),
    ("mixed: {kind: cow}", "mixed.kind: expected one of 'cat', 'dog', 'hound', got 'cow'"),
    ("mixed: x", "mixed: expected a mapping or a whole number, got the text 'x'"),
    ("called: {kind: cat, live: 1}", "called.live: unknown key; did you mean 'lives'?"),
    ("inside: {kind: dog, bone: 1}", "inside.bone: unknown key; did you mean 'bones'?"),
    ("tagged: {kind: cat, bone: 1}", "tagged.bone: unknown key; known: kind, lives"),
    ("anything: [a]", "anything.0: expected a whole number, got the text 'a'"),
    ("need: {form: easy, first: 1}", "need.first: unknown key; known: form"),
    ("alias: {model: 3}", "alias.model: expected a text, got 3"),
    ("day: []", "day: expected a valid date, got a list"),
    ("student: {}", "student: expected the key 'model' or 'from_teacher', got none of them"),
    ("student: {model: bert, revison: a}", "student.revison: unknown key; did you mean 'revision'?"),
    ("student: {from_teacher: {keep_blocks: [a]}}",
     "student.from_teacher.keep_blocks.0: expected a whole number, got the text 'a'"),
    ("student: bert", "student: expected a mapping, got the text 'bert'"),
    ("forms: [a, {model: b}, {model: 3}]", "forms.2.model: expected a text, got 3"),
    ("forms: [3]", "forms.0: expected a mapping or a text, got 3"),
    ("auto: atuo", "auto: expected 'auto' or a whole number, got the text 'atuo'; did you mean 'auto'?"),
    ("auto: []", "auto: expected 'auto' or a whole number, got a list"),
    ("length: -1", "length: expected a number greater than 0, got -1"),
    ("length: x", "length: expected a number or a mapping, got the text 'x'"),
    ("length: {keep_blocks: 3}", "length.keep_blocks: expected a list, got 3"),
    ("number: x", "number: expected a number, got the text 'x'"),
    ("early: 13", "early: thirteen brings bad luck"),
    ("early: x", "early: expected a whole number or a mapping, got the text 'x'"),
    ("early: {model: 3}", "early.model: expected a text, got 3"),
    ("either: [a]", "either.0: expected a whole number, got the text 'a'"),
    ("either: {int: a}", "either.int: expected a whole number, got the text 'a'"),
    ("either: x", "either: expected a list or a mapping, got the text 'x'"),
]
# fmt: on


@pytest.mark.parametrize(("text", "message"), MESSAGES, ids=[text for text, _ in MESSAGES])
def test_each_mistake_is_said_once_in_plain_words(text, message):
    assert lines(text) == [message]


def test_a_misspelt_required_key_is_missing_and_unknown():
    assert lines("student: {modle: bert}") == [
        "student.model: missing",
        "student.modle: unknown key; did you mean 'model'?",
    ]


def test_a_tag_that_fits_one_branch_decides():
    assert lines("need: {form: needy}") == ["need.first: missing", "need.second: missing"]


def test_missing_says_what_the_field_is_for():
    class Described(BaseModel):
        epochs: int = Field(description="passes over the data")

    document = parse_document("a: 1", "r.yaml")
    with pytest.raises(ValidationError) as caught:
        Described.model_validate(document.tree)
    assert problems_of(caught.value, document, Described)[0].hint == "passes over the data"


@pytest.mark.parametrize(("word", "meant"), [("Yep", None), ("ON", "true"), ("no", "false"), ("y", "true")])
def test_yes_and_no_are_no_booleans(word, meant):
    class Strictly(BaseModel):
        model_config = ConfigDict(strict=True)
        flag: bool

    document = parse_document(f"flag: {word}", "r.yaml")
    with pytest.raises(ValidationError) as caught:
        Strictly.model_validate(document.tree)
    problem = problems_of(caught.value, document, Strictly)[0]
    assert problem.hint == (f"did you mean {meant}?" if meant else None)


def test_many_options_are_cut_but_the_nearest_is_named():
    class Many(BaseModel):
        x: Literal[tuple(f"option{n}" for n in range(40))]

    document = parse_document("x: option39x", "r.yaml")
    with pytest.raises(ValidationError) as caught:
        Many.model_validate(document.tree)
    problem = problems_of(caught.value, document, Many)[0]
    assert problem.message.count("option") == 13
    assert problem.hint == "did you mean 'option39'?"


def test_long_texts_are_not_repeated():
    assert lines(f"seed: {'x' * 5000}") == ["seed: expected a whole number, got a text of 5000 characters"]


def test_booleans_among_the_options_are_written_as_in_yaml():
    class Maybe(BaseModel):
        x: Literal[True, "auto"]

    document = parse_document("x: 3", "r.yaml")
    with pytest.raises(ValidationError) as caught:
        Maybe.model_validate(document.tree)
    assert problems_of(caught.value, document, Maybe)[0].message == "expected one of true, 'auto', got 3"


def test_problems_of_a_validator_are_put_in_place():
    document, problems = document_and_problems("\nlucky: 14\n")
    assert problems == [
        Problem(("lucky", "temperature"), "no such option", "did you mean 'temp'?", "r.yaml", 2),
        Problem(("lucky",), "needs 'x'", None, "r.yaml", 2),
    ]
    assert document.place(("lucky",)) == Place("r.yaml", 2)


def test_problems_error_reads_as_a_sentence():
    assert str(ProblemsError([Problem(("a",), "bad"), Problem((), "worse")])) == "a: bad; worse"


def test_all_mistakes_come_at_once_in_the_order_of_the_file():
    text = """\
source: fles
student:
  from_teacher:
    keep_blocks: [1, x]
trian: 1
terms:
  soft:
    loss: kl
    weight: heavy
  hard: 3
train:
  batch_size: 8

  epochs: -1
nested:
  revision: a
"""
    problems = document_and_problems(text)[1]
    assert [(problem.line, ".".join(map(str, problem.path))) for problem in problems] == [
        (1, "source"),
        (4, "student.from_teacher.keep_blocks.1"),
        (5, "trian"),
        (9, "terms.soft.weight"),
        (10, "terms.hard"),
        (14, "train.epochs"),
        (15, "nested.model"),
    ]


def test_the_place_is_that_of_the_value_that_won(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {epochs: -1}\nseed: x\n")
    (tmp_path / "r.yaml").write_text("extends: base\n\nname: 3\n")
    document = read_document(tmp_path / "r.yaml", ["flag=false", "train.batch_size=0"])
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(document.tree)
    problems = problems_of(caught.value, document, Recipe)
    base, own = str(tmp_path / "base.yaml"), str(tmp_path / "r.yaml")
    assert [(problem.path[-1], problem.file, problem.line) for problem in problems] == [
        ("epochs", base, 1),
        ("seed", base, 2),
        ("name", own, 3),
        ("batch_size", "command line", 2),
    ]


def test_a_document_made_in_python_has_no_places():
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"seed": "x"})
    assert problems_of(caught.value, Document({"seed": "x"}), Recipe) == [
        Problem(("seed",), "expected a whole number, got the text 'x'")
    ]


def test_located_fills_in_only_what_is_not_known():
    document = parse_document("\na:\n  b: 1\n", "r.yaml")
    placed = Problem(("a",), "m", None, "other.yaml", 9)
    assert located([Problem(("a", "b", "c"), "m"), placed, Problem(("z",), "m")], document) == [
        Problem(("a", "b", "c"), "m", None, "r.yaml", 3),
        placed,
        Problem(("z",), "m", None, "r.yaml", 2),
    ]


def test_tidy_sorts_and_drops_duplicates_but_keeps_the_order_of_a_line():
    late, early, twin = (Problem((key,), "m", None, "a", line) for key, line in (("x", 10), ("y", 9), ("z", 9)))
    other, nowhere = Problem((), "m", None, "b", 1), Problem((), "m")
    assert tidy(iter([other, late, twin, early, late, nowhere])) == [nowhere, twin, early, late, other]


def random_value(draw: random.Random, depth: int = 0) -> Any:
    scalars = [
        "cat",
        "dog",
        "auto",
        "x",
        "",
        0,
        -1,
        13,
        14,
        15,
        2.5,
        float("inf"),
        float("nan"),
        True,
        None,
        "\x1b[31m",
    ]
    keys = [
        "kind",
        "model",
        "from_teacher",
        "keep_blocks",
        "lives",
        "str",
        "int",
        "Cat",
        "list[int]",
        "[key]",
        "k",
        0,
        7,
    ]
    form = draw.randrange(4) if depth < 4 else 0
    if form < 2:
        return draw.choice(scalars)
    if form == 2:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(keys): random_value(draw, depth + 1) for _ in range(draw.randrange(4))}


def test_whatever_is_asked_each_problem_is_at_something_that_was_written():
    draw = random.Random(0)
    names = [field.alias or name for name, field in Recipe.model_fields.items()]
    failed = 0
    for _ in range(1000):
        tree = {name: random_value(draw) for name in draw.sample(names, 4)}
        document = Document(tree, dict.fromkeys(paths_of(tree), Place("r.yaml", 1)))
        problems = problems_in(document)
        failed += bool(problems)
        for problem in problems:
            path = problem.path[:-1] if problem.path[-1:] == ("temperature",) else problem.path
            assert path in document.places or (problem.message == "missing" and path[:-1] in document.places)
            assert problem.file == "r.yaml"
            assert "function" not in str(problem)
            assert "\x1b" not in str(problem)
    assert failed > 500


def problems_in(document: Document) -> list[Problem]:
    try:
        Recipe.model_validate(document.tree)
    except ValidationError as error:
        return problems_of(error, document, Recipe) or [Problem((), "nothing was said")]
    return []


def paths_of(tree: Any, path: tuple[str | int, ...] = ()) -> Any:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, below in items:
        yield from paths_of(below, (*path, key))
