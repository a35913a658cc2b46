"""From names to components: found by themselves, their options checked, foreign code only if allowed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from potstill import registry
from potstill.errors import CodeNotAllowedError, ComponentError
from potstill.losses.divergence import kl
from potstill.models.plain import Mlp
from potstill.registry import Registry, check_options, import_dotted, signature_options, takes_any_keyword

ALL = [value for value in vars(registry).values() if isinstance(value, Registry)]


def function(
    student: Any,
    teacher: Any,
    *,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    layers: list[int] | None = None,
    mode: str = "fast",
    deep: bool = False,
    count: int = 3,
    place: Path | None = None,
    pair: tuple[float, float] = (0.0, 1.0),
) -> None:
    """A component with options of every kind."""


class Component:
    """A component that is a class."""

    def __init__(self, width: int, depth: int = 1, **rest: Any) -> None:
        """Take options."""


class Callable_:
    """A component that is an object."""

    def __call__(self, student: Any, *, power: float = 2.0) -> None:
        """Take options."""


RESERVED = ("student", "teacher")


def problems(options: dict[str, Any]) -> list[str]:
    return [str(p) for p in check_options(function, options, label="loss 'f'", path=("t",), reserved=RESERVED)]


# looking up


def test_components_are_found_without_an_import():
    """A new file in the folder is enough; nothing imports it by name."""
    fresh = Registry("loss", "potstill.losses")
    assert fresh._entries == {}
    known = registry.losses.names()
    assert known == sorted(known)
    assert {"kl", "mse", "cosine", "cross_entropy"} <= set(known)
    assert registry.losses.get("kl") is kl
    assert registry.models.get("mlp") is Mlp


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.kind)
def test_every_registry_can_be_walked(each):
    for name in each.names():
        target = each.get(name)
        assert each.name_of(target) == name
        assert (target.__doc__ or "").strip(), f"{each.kind} '{name}' has no docstring"
        assert isinstance(each.options(target), dict)


def test_facts_are_a_copy():
    facts = registry.losses.facts("kl")
    assert facts["per"] == "position"
    facts["per"] = "batch"
    assert registry.losses.facts("kl")["per"] == "position"
    assert registry.losses.facts("mine:loss") == {}


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ComponentError, match=r"there is no loss 'k1'; did you mean 'kl'\?"):
        registry.losses.get("k1")


def test_registering():
    mine = Registry("thing", "json")

    @mine.register("one", per="sample")
    def one() -> None:
        """A thing."""

    assert mine.get("one") is one
    assert mine.names() == ["one"]
    assert mine.facts("one") == {"per": "sample"}
    assert mine.name_of(one) == "one"
    assert mine.name_of(kl) == "potstill.losses.divergence:kl"


def test_a_name_is_taken_once():
    """Two losses of one name: which one trained would depend on the order of imports."""
    mine = Registry("thing", "json")
    mine.register("one")(kl)
    mine.register("one")(kl)  # a module that is reloaded registers the same thing again
    with pytest.raises(ComponentError, match=r"the thing 'one' is already defined by potstill\.losses\.divergence:kl"):
        mine.register("one")(function)
    assert mine.get("one") is kl


# dotted paths


@pytest.fixture
def mine(tmp_path, monkeypatch) -> str:
    (tmp_path / "mine_for_registry.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
        "class Outer:\n    def loss(student, teacher):\n        pass\n"
    )
    (tmp_path / "broken_for_registry.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_for_registry", raising=False)
    return "mine_for_registry"


def test_a_dotted_path_needs_no_registration(mine):
    found = registry.losses.get(f"{mine}:Outer.loss")
    assert found.__qualname__ == "Outer.loss"
    assert registry.losses.name_of(found) == f"{mine}:Outer.loss"


def test_foreign_code_is_not_even_imported_unless_allowed(mine, tmp_path):
    with pytest.raises(
        CodeNotAllowedError, match=rf"'{mine}:Outer' would import and run the Python module {mine}; allow"
    ):
        registry.losses.get(f"{mine}:Outer", allow_code=False)
    assert not (tmp_path / "ran").exists()
    assert registry.losses.check(f"{mine}:Outer", {}, path=("t",), allow_code=False)[0].path == ("t",)
    assert not (tmp_path / "ran").exists()
    import_dotted(f"{mine}:Outer")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "path",
    [
        "os:system",
        "potstill.runs.folder:os.system",
        "potstill.runs.folder:shutil.rmtree",
        "potstill.runs.folder:write_text",
        "potstill.registry:import_dotted",
        "potstill.registry:importlib.import_module",
        "potstill.losses.divergence:kl.__globals__",
        "potstillery:x",
        "builtins:exec",
    ],
)
def test_our_own_modules_open_no_way_to_anything_else(path):
    """Only what is registered may be named without permission: our modules import `os` like any other."""
    with pytest.raises(CodeNotAllowedError, match="allow it with --allow-code"):
        import_dotted(path, allow_code=False)


def test_a_registered_component_may_be_named_by_its_path():
    assert import_dotted("potstill.losses.divergence:kl", allow_code=False) is kl
    assert import_dotted("potstill.models.plain:Mlp", allow_code=False) is Mlp


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:x", "the module no_such_module_here cannot be imported"),
        ("broken_for_registry:x", "cannot be imported: No module named 'no_such_module_at_all'"),
        ("mine_for_registry:Oter", "has no attribute 'Oter'; did you mean 'Outer'"),
        ("mine_for_registry:Outer.lose", "has no attribute 'lose'; did you mean 'loss'"),
        ("mine_for_registry:", "has no attribute ''"),
        (":x", "cannot be imported"),
        (".relative:x", "cannot be imported"),
        ("..:x", "cannot be imported"),
    ],
)
def test_what_is_not_there(mine, path, message):
    with pytest.raises(ComponentError, match=message):
        import_dotted(path)


# options


def test_options_are_what_can_be_given_by_keyword():
    options = signature_options(function, RESERVED)
    assert list(options) == ["temperature", "layers", "mode", "deep", "count", "place", "pair"]
    assert options["temperature"].default == 1.0
    assert not options["temperature"].required
    assert list(signature_options(Component)) == ["width", "depth"]
    assert signature_options(Component)["width"].required
    assert list(signature_options(Callable_(), ("student",))) == ["power"]
    assert takes_any_keyword(Component)
    assert not takes_any_keyword(function)


def test_right_options_are_no_problem():
    assert problems({}) == []
    assert problems({"temperature": 4, "layers": [1, 2], "mode": "slow", "deep": True, "count": 0}) == []
    assert problems({"temperature": 4.5, "layers": None, "place": "a/b", "pair": [0, 0.5]}) == []


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        ({"temprature": 1.0}, "t.temprature", "loss 'f' has no option 'temprature'; did you mean 'temperature'?"),
        ({"student": 1.0}, "t.student", "has no option 'student'"),
        ({"temperature": 0}, "t.temperature", "greater than 0, got 0"),
        ({"temperature": "4"}, "t.temperature", "expected a number, got '4'"),
        ({"temperature": True}, "t.temperature", "expected a number, got True"),
        ({"temperature": None}, "t.temperature", "got None"),
        ({"count": "3"}, "t.count", "expected a whole number, got '3'"),
        ({"count": 3.0}, "t.count", "expected a whole number, got 3.0"),
        ({"count": 3.5}, "t.count", "got 3.5"),
        ({"count": False}, "t.count", "expected a whole number, got False"),
        ({"deep": "yes"}, "t.deep", "expected true or false, got 'yes'"),
        ({"deep": 1}, "t.deep", "expected true or false, got 1"),
        ({"mode": 3}, "t.mode", "valid string, got 3"),
        ({"layers": 3}, "t.layers", "got 3"),
        ({"layers": ["1", 2]}, "t.layers", "got ['1', 2]"),
        ({"layers": [1, "x"]}, "t.layers.1", "got 'x'"),
        ({"pair": ["0", 1]}, "t.pair", "got ['0', 1]"),
        ({"pair": [0, 1, 2]}, "t.pair", "got [0, 1, 2]"),
    ],
)
def test_wrong_options(options, path, words):
    """What pydantic would convert is not what the component gets: '4' reaches it as a text."""
    found = problems(options)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}: ")
    assert words in found[0]


def test_all_wrong_options_at_once():
    found = problems({"temprature": 1.0, "count": "3", "temperature": -1, "layers": ["a", 1, "b"]})
    assert [text.split(": ")[0] for text in found] == [
        "t.temprature",
        "t.count",
        "t.temperature",
        "t.layers.0",
        "t.layers.2",
    ]


def test_a_value_that_fits_no_branch_is_one_problem():
    def takes(*, mix: float | list[int] | None = 1.0) -> None: ...

    found = [str(p) for p in check_options(takes, {"mix": "much"}, label="loss 't'")]
    assert len(found) == 1
    assert found[0].startswith("mix: loss 't': input should be a valid number")
    assert found[0].endswith("or input should be a valid list, got 'much'")


def test_missing_options():
    found = check_options(Component, {"depth": 2}, label="model 'c'", path=("m",))
    assert [str(problem) for problem in found] == ["m: model 'c' needs the option 'width'"]
    assert check_options(Component, {"width": 2, "anything": "goes"}, label="model 'c'") == []


def test_a_component_without_options():
    def bare(student: Any) -> None: ...

    found = check_options(bare, {"x": 1}, label="loss 'b'", reserved=("student",))
    assert [str(problem) for problem in found] == ["x: loss 'b' has no option 'x'; it takes no options"]


def test_annotations_that_cannot_be_resolved_are_left_unchecked():
    def later(*, width: NoSuchName = 1) -> None: ...  # noqa: F821

    assert check_options(later, {"width": object()}, label="loss 'l'") == []
    assert len(check_options(later, {"wdith": 1}, label="loss 'l'")) == 1


def test_functions_and_types_of_their_own_are_options_too():
    def takes(*, call: Callable[[int], int] = abs, kind: type = int, mix: float | str = 1.0) -> None: ...

    assert check_options(takes, {"call": abs, "kind": str, "mix": "auto"}, label="loss 't'") == []
    assert check_options(takes, {"mix": 2}, label="loss 't'") == []
