"""Every kind of mistake in what a recipe names: found without data, at the right key, with the nearest right name."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from potstill.errors import Problem
from potstill.recipe.check import check_components
from potstill.recipe.check_training import MANAGED

BASE: dict[str, Any] = {
    "name": "a",
    "task": {"name": "image-classification"},
    "data": {"source": "sklearn", "path": "load_digits"},
    "teacher": {"model": "potstill:mlp"},
    "student": {"model": "potstill:mlp"},
    "objective": {"soft": {"loss": "kl", "temperature": 4.0}, "hard": {"loss": "cross_entropy"}},
    "train": {"epochs": 2},
}
TWO = {"large": {"model": "potstill:mlp"}, "small": {"model": "potstill:convnet"}}


def check(*, allow_code: bool = False, **changes: Any) -> list[Problem]:
    tree = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    return check_components(tree, allow_code=allow_code)


def soft(**keys: Any) -> dict[str, Any]:
    return {"objective": {"soft": {"loss": "kl", **keys}}}


def term(**keys: Any) -> dict[str, Any]:
    return {"objective": {"t": keys}}


def train(**keys: Any) -> dict[str, Any]:
    return {"train": keys}


def data(**keys: Any) -> dict[str, Any]:
    return {"data": {**BASE["data"], **keys}}


@pytest.fixture
def mine(tmp_path, monkeypatch) -> str:
    """A person's own module; importing it leaves a mark."""
    (tmp_path / "mine_for_check.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path(__file__).with_name('ran').touch()\n"
        "def loss(student, teacher, *, power: float = 2.0):\n"
        "    return (student - teacher).abs().pow(power).mean(-1)\n"
        "def data(path, *, rows: int = 3):\n"
        "    return {'x': list(range(rows))}\n"
        "def net(num_labels, width: int = 3):\n"
        "    return torch.nn.Linear(width, num_labels)\n"
        "class Task:\n"
        "    def __init__(self, label='label', augment=()):\n"
        "        pass\n"
        "class Optimizer(torch.optim.SGD):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_for_check", raising=False)
    return "mine_for_check"


def test_the_recipe_without_a_mistake_has_none():
    """Every other test changes one thing in it."""
    assert check() == []


GOOD: dict[str, dict[str, Any]] = {
    "ramps": soft(weight={"from": 1, "to": 0}, temperature={"from": 8, "to": 1, "shape": "exponential", "begin": 0.1}),
    "a whole number for a fraction": soft(temperature=4),
    "several signals": soft(student=["a", "b"], teacher=["a", "b"]),
    "a size as a list": {"task": {"name": "image-classification", "size": [8, 8]}},
    "Trainer's own arguments": train(warmup_steps=10, max_grad_norm=1.0, bf16=False),
    "optimizers": train(optimizer={"name": "AdamW", "betas": [0.9, 0.99]}, scheduler="cosine"),
    "schedules": train(optimizer="sgd", scheduler={"name": "StepLR", "step_size": 3, "gamma": 0.5}),
    "callbacks": train(callbacks=["agreement", {"early_stopping": {"patience": 3}}]),
    "augmentations": data(augment=["flip", {"shift": {"pixels": 2}}, {"mixup": {"alpha": 0.2}}]),
    "options of a source": data(source="files", path="x", kwargs={"delimiter": ";"}),
    "several teachers": {
        "teacher": None,
        "teachers": TWO,
        "objective": {"a": {"loss": "kl", "teacher": "large/logits"}, "b": {"loss": "mse", "teacher": ["small/x.1"]}},
    },
    "one of several teachers": {"teacher": None, "teachers": {"large": TWO["large"]}},
    "no teacher and no use for one": {"teacher": None, "objective": {"hard": {"loss": "cross_entropy"}}},
    "a scheme": {"scheme": {"name": "offline"}},
}


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD.keys())
def test_what_is_right_is_no_problem(changes):
    assert check(**changes) == []


BAD: list[tuple[str, dict[str, Any], tuple, str]] = [
    # losses
    ("unknown loss", soft(loss="klx"), ("objective", "soft", "loss"), "there is no loss 'klx'; did you mean 'kl'?"),
    (
        "unknown option of a loss",
        soft(temprature=4),
        ("objective", "soft", "temprature"),
        "loss 'kl' has no option 'temprature'; did you mean 'temperature'?",
    ),
    (
        "misspelt key of a term",
        soft(wieght=0.5),
        ("objective", "soft", "wieght"),
        "has no option 'wieght'; did you mean 'weight'?",
    ),
    ("option out of range", soft(temperature=0), ("objective", "soft", "temperature"), "greater than 0, got 0"),
    ("text for a number", soft(temperature="4"), ("objective", "soft", "temperature"), "expected a number, got '4'"),
    ("truth for a number", soft(temperature=True), ("objective", "soft", "temperature"), "expected a number, got True"),
    ("list for a number", soft(temperature=[4]), ("objective", "soft", "temperature"), "valid number, got [4]"),
    (
        "option of another loss",
        term(loss="mse", temperature=4),
        ("objective", "t", "temperature"),
        "it takes no options",
    ),
    (
        "smoothing of the wrong loss",
        soft(label_smoothing=0.1),
        ("objective", "soft", "label_smoothing"),
        "has no option 'label_smoothing'",
    ),
    ("no terms", {"objective": {}}, ("objective",), "expected at least one term, got none"),
    (
        "a name that torch uses",
        {"objective": {"type": {"loss": "mse"}}},
        ("objective", "type"),
        "cannot be called 'type'",
    ),
    # ramps
    (
        "unknown key of a ramp",
        soft(weight={"from": 1, "to": 0, "shap": "cosine"}),
        ("objective", "soft", "weight"),
        "a ramp has no key 'shap'; did you mean 'shape'?",
    ),
    (
        "unknown shape",
        soft(weight={"from": 1, "to": 0, "shape": "cosin"}),
        ("objective", "soft", "weight"),
        "no ramp shape 'cosin'; did you mean 'cosine'?",
    ),
    ("half a ramp", soft(weight={"from": 1}), ("objective", "soft", "weight"), "`from` and `to`, got {'from': 1}"),
    ("half a ramp of an option", soft(temperature={"from": 4}), ("objective", "soft", "temperature"), "needs `from`"),
    (
        "text in a ramp",
        soft(weight={"from": "a", "to": 1}),
        ("objective", "soft", "weight"),
        "number for 'from', got 'a'",
    ),
    (
        "points out of order",
        soft(weight={"from": 1, "to": 0, "begin": 0.8, "end": 0.2}),
        ("objective", "soft", "weight"),
        "begin 0.8 and end 0.2",
    ),
    (
        "exponential through zero",
        soft(weight={"from": 1, "to": 0, "shape": "exponential"}),
        ("objective", "soft", "weight"),
        "above 0, got 1 to 0",
    ),
    (
        "a ramp that ends where the option cannot be",
        soft(temperature={"from": 4, "to": 0}),
        ("objective", "soft", "temperature"),
        "greater than 0, got 0",
    ),
    # task
    (
        "unknown task",
        {"task": {"name": "image-clasification"}},
        ("task", "name"),
        "there is no task 'image-clasification'; did you mean 'image-classification'?",
    ),
    (
        "unknown option of a task",
        {"task": {"name": "image-classification", "siz": [8, 8]}},
        ("task", "siz"),
        "has no option 'siz'; did you mean 'size'?",
    ),
    (
        "wrong type of an option",
        {"task": {"name": "image-classification", "size": 8}},
        ("task", "size"),
        "valid tuple, got 8",
    ),
    (
        "texts in a list of numbers",
        {"task": {"name": "image-classification", "size": ["8", 8]}},
        ("task", "size"),
        "got ['8', 8]",
    ),
    # data
    ("unknown source", data(source="sklern"), ("data", "source"), "there is no data source 'sklern'; did you mean"),
    (
        "unknown option of a source",
        data(source="files", path="x", kwargs={"delimeter": ";"}),
        ("data", "kwargs", "delimeter"),
        "has no option 'delimeter'; did you mean 'delimiter'?",
    ),
    ("unknown augmentation", data(augment=["flop"]), ("data", "augment", 0), "'flop'; did you mean 'flip'?"),
    ("augmentation of another input", data(augment=["flip", "noise"]), ("data", "augment", 1), "no image augmentation"),
    (
        "wrong option of an augmentation",
        data(augment=[{"shift": {"pixels": 0}}]),
        ("data", "augment", 0, "shift", "pixels"),
        "greater than or equal to 1, got 0",
    ),
    (
        "two augmentations in one entry",
        data(augment=[{"flip": {}, "crop": {}}]),
        ("data", "augment", 0),
        "a name or as `name: {option: value}`",
    ),
    # models
    (
        "unknown model",
        {"student": {"model": "potstill:mpl"}},
        ("student", "model"),
        "there is no model 'mpl'; did you mean 'mlp'?",
    ),
    (
        "a student from nowhere",
        {"student": {}},
        ("student",),
        "expected `model`, or `from_teacher: {keep_blocks: [0, 2, 4]}`, got neither",
    ),
    (
        "a student named and cut",
        {"student": {"model": "potstill:mlp", "from_teacher": {"keep_blocks": [0]}}},
        ("student", "model"),
        "a student cut from its teacher takes no `model`",
    ),
    (
        "blocks out of order",
        {"student": {"model": None, "from_teacher": {"keep_blocks": [2, 0, 2]}}},
        ("student", "from_teacher", "keep_blocks"),
        "did you mean [0, 2]?",
    ),
    (
        "cut from a teacher that is not there",
        {"student": {"model": None, "from_teacher": {"keep_blocks": [0], "teacher": "techer"}}},
        ("student", "from_teacher", "teacher"),
        "there is no teacher 'techer'; did you mean 'teacher'?",
    ),
    (
        "a model of timm",
        {"student": {"model": "timm:resnet19"}},
        ("student", "model"),
        "did you mean 'resnet1",
    ),
    (
        "code of Torch Hub",
        {"student": {"model": "torchhub:owner/repo/entry"}},
        ("student", "model"),
        "allow it with --allow-code",
    ),
    (
        "remote code",
        {"student": {"model": "owner/name", "kwargs": {"trust_remote_code": True}}},
        ("student", "model"),
        "allow it with --allow-code",
    ),
    ("no kind of reference", {"student": {"model": "mlp"}}, ("student", "model"), "did you mean 'potstill:mlp'?"),
    (
        "unknown option of a model",
        {"student": {"model": "potstill:mlp", "kwargs": {"hiden": [4]}}},
        ("student", "kwargs", "hiden"),
        "has no option 'hiden'; did you mean 'hidden'?",
    ),
    (
        "wrong type in a model",
        {"teacher": {"model": "potstill:mlp", "kwargs": {"hidden": 64}}},
        ("teacher", "kwargs", "hidden"),
        "valid list, got 64",
    ),
    (
        "unknown model among several teachers",
        {"teacher": None, "teachers": {"x": {"model": "potstill:nlp"}}},
        ("teachers", "x", "model"),
        "did you mean 'mlp'?",
    ),
    (
        "weights that are not there",
        {"teacher": {"model": "potstill:mlp", "weights": "no/where.safetensors"}},
        ("teacher", "weights"),
        "there is none at 'no/where.safetensors'",
    ),
    # teachers
    ("both", {"teachers": TWO}, ("teachers",), "either `teacher` or `teachers`, got both"),
    (
        "none",
        {"teacher": None},
        ("objective", "soft"),
        "compares with a teacher and the recipe has none; add `teacher:`",
    ),
    (
        "which of them",
        {"teacher": None, "teachers": TWO, "objective": {"t": {"loss": "kl"}}},
        ("objective", "t", "teacher"),
        "expected TEACHER/SIGNAL, got 'logits'; known: large, small",
    ),
    (
        "one that is not there",
        {"teacher": None, "teachers": TWO, "objective": {"t": {"loss": "kl", "teacher": "larg/logits"}}},
        ("objective", "t", "teacher"),
        "got 'larg/logits'; did you mean 'large'?",
    ),
    ("the only one by name", soft(teacher="teacher/logits"), ("objective", "soft", "teacher"), "say 'logits'"),
    (
        "the only one of several by name",
        {"teacher": None, "teachers": {"large": TWO["large"]}, **soft(teacher="large/hidden.1")},
        ("objective", "soft", "teacher"),
        "say 'hidden.1'",
    ),
    # scheme
    ("unknown scheme", {"scheme": {"name": "ofline"}}, ("scheme", "name"), "'ofline'; did you mean 'offline'?"),
    ("option of a scheme", {"scheme": {"name": "offline", "k": 1}}, ("scheme", "k"), "has no option 'k'"),
    # training
    ("unknown argument", train(warmup_stps=10), ("train", "warmup_stps"), "did you mean 'warmup_steps'?"),
    ("misspelt key", train(epoch=3), ("train", "epoch"), "unknown key 'epoch'; did you mean 'epochs'?"),
    ("unknown optimizer", train(optimizer="Adamm"), ("train", "optimizer"), "'Adamm'; did you mean 'Adam'?"),
    (
        "option of an optimizer",
        train(optimizer={"name": "SGD", "momentumm": 0.9}),
        ("train", "optimizer", "momentumm"),
        "did you mean 'momentum'?",
    ),
    (
        "type in an optimizer",
        train(optimizer={"name": "SGD", "momentum": "0.9"}),
        ("train", "optimizer", "momentum"),
        "expected a number, got '0.9'",
    ),
    ("unknown scheduler", train(scheduler="cosin"), ("train", "scheduler"), "'cosin'; did you mean 'cosine'?"),
    ("missing option", train(scheduler={"name": "StepLR"}), ("train", "scheduler"), "needs the option 'step_size'"),
    (
        "unknown callback",
        train(callbacks=["agreement", "early_stoping"]),
        ("train", "callbacks", 1, "early_stoping"),
        "did you mean 'early_stopping'?",
    ),
    (
        "option of a callback",
        train(callbacks=[{"early_stopping": {"patience": 0}}]),
        ("train", "callbacks", 0, "early_stopping", "patience"),
        "greater than 0",
    ),
    (
        "two callbacks in one entry",
        train(callbacks=[{"agreement": {}, "early_stopping": {}}]),
        ("train", "callbacks", 0),
        "a name or as `name: {option: value}`",
    ),
    (
        "in a teacher's training",
        {"teacher": {"model": "potstill:mlp", "train": {"optimizer": "Adamm"}}},
        ("teacher", "train", "optimizer"),
        "did you mean 'Adam'?",
    ),
]


@pytest.mark.parametrize(("changes", "path", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_each_mistake_once_at_its_key(changes, path, words):
    problems = check(**changes)
    assert [problem.path for problem in problems] == [path], [str(problem) for problem in problems]
    assert words in str(problems[0])


@pytest.mark.parametrize("key", MANAGED)
def test_what_a_recipe_says_in_another_way(key):
    """Passed on to Trainer, `seed` or `output_dir` would silently win over the run's own."""
    problems = check(**train(**{key: 1}))
    assert [problem.path for problem in problems] == [("train", key)]
    assert problems[0].hint == f"use {MANAGED[key]}"


def test_many_mistakes_at_once():
    """One after the other, each costs a person another start of the program."""
    found = check(
        task={"name": "image-classification", "siz": 3},
        data={"source": "sklearn", "path": "x", "augment": ["flop"]},
        student={"model": "potstill:mpl"},
        objective={"soft": {"loss": "klx"}, "hint": {"loss": "mse", "weight": {"from": 1}}},
        scheme={"name": "ofline"},
        train={"optimizer": "Adamm", "callbacks": ["stop"], "num_train_epochs": 3},
    )
    assert {problem.path for problem in found} == {
        ("task", "siz"),
        ("data", "augment", 0),
        ("student", "model"),
        ("objective", "soft", "loss"),
        ("objective", "hint", "weight"),
        ("scheme", "name"),
        ("train", "optimizer"),
        ("train", "callbacks", 0, "stop"),
        ("train", "num_train_epochs"),
    }


JUNK = (None, 3, "text", [], [3], {}, {"name": 3}, {"name": None}, {"model": [1]}, {"loss": {}}, {3: 4}, [[[]]], True)


@pytest.mark.parametrize("section", ["task", "data", "teacher", "teachers", "student", "objective", "scheme", "train"])
def test_sections_of_any_kind_are_left_to_the_schema(section):
    """It works on the raw tree, so nothing that a person can write may make it fail."""
    for junk in JUNK:
        assert isinstance(check(**{section: junk}), list)
        assert isinstance(check(**{section: {"x": junk, "name": junk, "loss": junk}}), list)
    assert isinstance(check_components({}, allow_code=False), list)


CODE: dict[str, tuple[dict[str, Any], tuple]] = {
    "loss": (term(loss="mine_for_check:loss"), ("objective", "t", "loss")),
    "task": ({"task": {"name": "mine_for_check:Task"}}, ("task", "name")),
    "source": (data(source="mine_for_check:data"), ("data", "source")),
    "model": ({"student": {"model": "mine_for_check:net"}}, ("student", "model")),
    "optimizer": (train(optimizer="mine_for_check:Optimizer"), ("train", "optimizer")),
}


@pytest.mark.parametrize(("changes", "path"), CODE.values(), ids=CODE.keys())
def test_code_runs_only_if_allowed(mine, tmp_path, changes, path):
    """A recipe is data: reading one from the net must not import a module."""
    problems = check(**changes)
    assert [problem.path for problem in problems] == [path]
    assert "would import and run the Python module mine_for_check; allow it with --allow-code" in str(problems[0])
    assert not (tmp_path / "ran").exists()
    assert check(**changes, allow_code=True) == []
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "reference",
    ["potstill.runs.folder:os.system", "potstill.runs.folder:shutil.rmtree", "potstill.registry:import_dotted"],
)
def test_our_own_modules_are_no_way_to_other_code(reference):
    """`potstill.runs.folder:os.system` begins with our name and runs a shell."""
    problems = check(student={"model": reference, "kwargs": {}})
    assert [problem.path for problem in problems] == [("student", "model")]
    assert "--allow-code" in str(problems[0])


def test_options_of_own_code_are_checked_too(mine):
    problems = check(**term(loss=f"{mine}:loss", pwoer=2), allow_code=True)
    assert [str(problem) for problem in problems] == [
        f"objective.t.pwoer: loss '{mine}:loss' has no option 'pwoer'; did you mean 'power'?"
    ]
    problems = check(**data(source=f"{mine}:data", kwargs={"row": 2}), allow_code=True)
    assert [problem.path for problem in problems] == [("data", "kwargs", "row")]
    problems = check(**data(source=f"{mine}:data", path=None), allow_code=True)
    assert "needs the option 'path'" in str(problems[0])


def test_own_code_that_is_not_there(mine):
    problems = check(**term(loss=f"{mine}:lose"), allow_code=True)
    assert "has no attribute 'lose'; did you mean 'loss'?" in str(problems[0])
    problems = check(**term(loss="no_such_module:loss"), allow_code=True)
    assert "the module no_such_module cannot be imported" in str(problems[0])


@pytest.mark.parametrize("name", ["baseline", "distilled", "evaluate", "preflight", "teachers", "report"])
def test_a_teacher_cannot_take_the_name_of_a_step(name):
    """As `baseline` it would stand for the baseline, and the gain would be measured against the teacher."""
    tree = {"teachers": {name: {"model": "potstill:mlp"}}}
    problems = check_components(tree, allow_code=False)
    assert [(p.path, name in p.message) for p in problems] == [(("teachers", name), True)]
