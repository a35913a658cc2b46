"""From a file to a recipe: `extends`, overrides, packaged names, and all mistakes with file, line and hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from potstill.errors import RecipeError
from potstill.models.load import CARD
from potstill.recipe.load import find_recipe, load_recipe, packaged_recipes, recipe_from

TEXT = """\
name: digits
task: {name: image-classification}
data: {source: sklearn, path: load_digits}
teacher:
  model: potstill:mlp
  kwargs: {hidden: [64]}
  train: {epochs: 3, learning_rate: 1e-3}
student:
  model: potstill:mlp
objective:
  soft: {loss: kl, weight: 0.7, temperature: 4}
  hard: {loss: cross_entropy, weight: 0.3}
train: {epochs: 5, batch_size: 16}
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(error: pytest.ExceptionInfo[RecipeError]) -> list[str]:
    return str(error.value).split("\n")


def test_a_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, TEXT))
    assert recipe.name == "digits"
    assert recipe.teacher.train.learning_rate == 1e-3
    assert recipe.objective["soft"].options == {"temperature": 4}
    assert recipe.all_teachers == {"teacher": recipe.teacher}
    assert recipe.scheme.name == "offline"
    assert recipe.baseline.enabled


def test_a_recipe_cannot_be_changed_afterwards(tmp_path):
    recipe = load_recipe(write(tmp_path, TEXT))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


def test_the_same_from_a_dictionary(tmp_path):
    tree = load_recipe(write(tmp_path, TEXT)).model_dump(mode="json")
    again = recipe_from(tree)
    assert again.model_dump(mode="json") == tree
    assert recipe_from(json.loads(json.dumps(tree))) == again


def test_overrides(tmp_path):
    path = write(tmp_path, TEXT)
    recipe = load_recipe(path, ["train.epochs=7", "objective.soft.weight={from: 1, to: 0}", "train.epochs=8", "seed=4"])
    assert recipe.train.epochs == 8
    assert recipe.objective["soft"].weight == {"from": 1, "to": 0}
    assert recipe.seed == 4
    without = load_recipe(path, ["teacher=null", "objective.soft=null"])
    assert without.teacher is None
    assert list(without.objective) == ["hard"]


def test_a_mistake_in_an_override_names_the_command_line(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, TEXT), ["seed=1", "objective.soft.temperature=-1", "train.epoks=3"])
    assert lines(caught) == [
        "command line:2: objective.soft.temperature: loss 'kl': input should be greater than 0, got -1",
        "command line:3: train.epoks: unknown key 'epoks'; did you mean 'epochs'?",
    ]


def test_extends(tmp_path):
    write(tmp_path, TEXT, "base.yaml")
    path = write(
        tmp_path,
        "extends: base\nname: warm\nobjective:\n  soft: {temperature: 8}\n  hard: null\ntrain: {epochs: 9}\n",
    )
    recipe = load_recipe(path)
    assert recipe.name == "warm"
    assert recipe.objective["soft"].options == {"temperature": 8}
    assert recipe.objective["soft"].weight == 0.7
    assert list(recipe.objective) == ["soft"]
    assert (recipe.train.epochs, recipe.train.batch_size) == (9, 16)


def test_a_packaged_recipe_can_be_extended(tmp_path):
    recipe = load_recipe(write(tmp_path, "extends: digits\nseed: 3\n"))
    packaged = load_recipe("digits")
    assert recipe.model_dump() == {**packaged.model_dump(), "seed": 3}


def test_a_mistake_is_in_the_file_that_makes_it(tmp_path):
    base = write(tmp_path, TEXT.replace("loss: kl", "loss: klx"), "base.yaml")
    path = write(tmp_path, "extends: base\nstudent:\n  model: potstill:mpl\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert lines(caught) == [
        f"{base}:11: objective.soft.loss: there is no loss 'klx'; did you mean 'kl'?",
        f"{path}:3: student.model: there is no model 'mpl'; did you mean 'mlp'?",
    ]


def test_six_mistakes_are_six_lines(tmp_path):
    """One of each kind: syntax of a key, schema, component, option, ramp, training argument."""
    path = write(
        tmp_path,
        """\
name: digits
seeed: 3
task: {name: image-classification}
data:
  source: sklearn
  path: load_digits
  augment: [flop]
teacher: {model: potstill:mlp}
student:
  model: potstill:mlp
  kwargs:
    hidden: [64]
    dropuot: 0.1
objective:
  soft:
    loss: kl
    temperature: warm
    weight:
      from: 1.0
      to: 0.0
      shape: cosin
train:
  epochs: 5
  num_train_epochs: 3
""",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    found = lines(caught)
    assert len(found) == len(caught.value.problems) == 6
    expected = {
        2: ("seeed: unknown key", "did you mean 'seed'?"),
        7: ("data.augment.0: there is no image augmentation 'flop'", "did you mean 'flip'?"),
        13: ("student.kwargs.dropuot: model 'potstill:mlp' has no option 'dropuot'", "did you mean 'dropout'?"),
        17: ("objective.soft.temperature: loss 'kl'", "got 'warm'"),
        18: ("objective.soft.weight: there is no ramp shape 'cosin'", "did you mean 'cosine'?"),
        24: ("train.num_train_epochs: expected another way to say 'num_train_epochs'", "use epochs"),
    }
    for text, (line, (begin, end)) in zip(found, expected.items(), strict=True):
        assert text.startswith(f"{path}:{line}: {begin}"), text
        assert text.endswith(end), text


def test_a_broken_section_hides_no_mistake_in_another(tmp_path):
    text = TEXT.replace("student:\n  model: potstill:mlp\n", "student: 3\n").replace("loss: kl", "loss: klx")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert [problem.path for problem in caught.value.problems] == [("student",), ("objective", "soft", "loss")]


def test_yaml_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"r\.yaml:2: not valid YAML"):
        load_recipe(write(tmp_path, "name: a\n  task: b: c\n"))


@pytest.mark.parametrize("text", ["{}", "", "# nothing\n", "[]", "3", "null"])
def test_an_empty_recipe_says_so(tmp_path, text):
    """An error without a word is the worst of all."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert len(str(caught.value)) > 20
    assert caught.value.problems
    with pytest.raises(RecipeError, match="objective: missing"):
        recipe_from({})


def test_packaged_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "digits" in packaged_recipes()
    assert find_recipe("digits") == packaged_recipes()["digits"]
    assert find_recipe("digits.yaml") == packaged_recipes()["digits"]
    assert find_recipe("no-such") is None
    write(tmp_path, TEXT.replace("name: digits", "name: mine"), "digits.yaml")
    assert load_recipe("digits.yaml").name == "mine"  # a file of one's own comes first
    assert load_recipe("digits").name == "digits"


def test_an_unknown_recipe_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RecipeError, match=r"there is no recipe 'digts', as a file or packaged; did you mean 'digits'\?"
    ):
        load_recipe("digts")
    write(tmp_path, TEXT, "mine.yaml")
    with pytest.raises(RecipeError, match=r"there is no such file; did you mean 'mine.yaml'\?"):
        load_recipe("mien.yaml")


def test_paths_start_from_the_recipe(tmp_path, monkeypatch):
    """A recipe with its weights beside it must work from any working directory."""
    write(tmp_path / "job", "", "teacher.safetensors")
    write(tmp_path / "job", json.dumps({"model": "potstill:mlp", "kwargs": {}}), f"saved/{CARD}")
    write(tmp_path / "job", "x,label\n1,a\n", "table/train.csv")
    text = TEXT.replace("source: sklearn, path: load_digits", "source: files, path: table")
    text = text.replace("  kwargs: {hidden: [64]}\n", "  weights: teacher.safetensors\n")
    text = text.replace("student:\n  model: potstill:mlp", "student:\n  model: saved")
    path = write(tmp_path / "job", text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe(path)
    assert recipe.teacher.weights == str(tmp_path / "job" / "teacher.safetensors")
    assert recipe.student.model == str(tmp_path / "job" / "saved")
    assert recipe.data.path == str(tmp_path / "job" / "table")
    again = recipe_from(recipe.model_dump(mode="json"))  # what a run writes down works from anywhere
    assert again == recipe


def test_code_only_if_allowed(tmp_path, monkeypatch):
    (tmp_path / "mine_for_load_recipe.py").write_text("def loss(student, teacher):\n    return student.sum(-1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, TEXT.replace("loss: kl, weight: 0.7, temperature: 4", "loss: mine_for_load_recipe:loss"))
    with pytest.raises(RecipeError, match=r"r\.yaml:11: objective\.soft\.loss: .*--allow-code"):
        load_recipe(path)
    assert load_recipe(path, allow_code=True).objective["soft"].loss == "mine_for_load_recipe:loss"


@pytest.mark.parametrize("name", ["a/b", "../a", "", " a", "a b", "-a", "ü"])
def test_a_name_that_is_no_folder_name(tmp_path, name):
    """It becomes `runs/NAME-HASH`: a slash in it would write elsewhere."""
    with pytest.raises(RecipeError, match="name: expected a text that matches"):
        load_recipe(write(tmp_path, TEXT), [f'name="{name}"'])
