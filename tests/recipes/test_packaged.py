"""Every packaged recipe: it loads, its formula shows, one batch goes through, and a run of two steps ends with figures.

Recipes are found by themselves. One whose data or models lie on the hub is tried on tiny stand-ins of the same layout:
``DATA`` and ``MODELS`` say how those of an id are made.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from potstill.losses.objective import Objective
from potstill.models.cifar_resnet import CifarResNet
from potstill.models.load import load_model
from potstill.recipe.build import make_term
from potstill.recipe.load import load_recipe, packaged_recipes
from potstill.recipe.schema import Recipe, WhoSpec
from potstill.runs.cache import Cache
from potstill.runs.steps import Run, open_run
from tests import local_models
from tests.runs.tried import dry_run

FOLDER = Path(__file__).parent.parent.parent / "src/potstill/recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
NEVER_SKIPPED = ("digits", "mnist-small", "mnist-hinton", "mnist-hinton-shifted", "synthetic-tabular", "munge-forest")
SHORT = ("evaluate.resamples=100", "evaluate.latency=false", "train.max_steps=2", "train.dataloader_num_workers=0")


def mnist(folder: Path) -> None:
    """``train.parquet`` and ``test.parquet`` with the columns ``image`` (28×28, grey, PNG) and ``label`` (0 to 9)."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    draw = np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 20)):
        labels = [i % 10 for i in range(count)]
        pictures = []
        for label in labels:
            picture = Image.new("L", (28, 28))
            place = tuple(int(x) for x in draw.integers(6, 12, 2))
            ImageDraw.Draw(picture).text(place, str(label), fill=255)
            pictures.append(picture)
        table = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features)
        table.to_parquet(str(folder / f"{split}.parquet"))


def texts(column: str, names: list[str]) -> Callable[[Path], None]:
    """Three splits with a column of texts and ``label``, the test split of a set of the hub with hidden labels."""

    def write(folder: Path) -> None:
        features = datasets.Features({column: datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        for split, count in (("train", 60), ("validation", 18), ("test", 18)):
            rows = [text for text, _ in local_models.SENTENCES * count][:count]
            hidden = split == "test" and column == "sentence"
            labels = [-1 if hidden else place % len(names) for place in range(count)]
            table = datasets.Dataset.from_dict({column: rows, "label": labels}, features)
            table.to_parquet(str(folder / f"{split}.parquet"))

    return write


def photos(column: str, size: tuple[int, int], names: list[str]) -> Callable[[Path], None]:
    """``train`` and ``test`` with colour pictures, those of ImageNet of all shapes."""

    def write(folder: Path) -> None:
        features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=names)})
        draw = np.random.default_rng(0)
        for split, count in (("train", 24), ("test", 8)):
            shapes = [(size[0], size[1] + (7 * place if size[0] > 32 else 0), 3) for place in range(count)]
            pictures = [Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8)) for shape in shapes]
            labels = [place % len(names) for place in range(count)]
            table = datasets.Dataset.from_dict({column: pictures, "label": labels}, features)
            table.to_parquet(str(folder / f"{split}.parquet"))

    return write


LIAR = ["false", "half-true", "mostly-true", "true", "barely-true", "pants-fire"]
DATA: dict[str, Callable[[Path], None]] = {
    "ylecun/mnist": mnist,
    "ucsbnlp/liar": texts("statement", LIAR),
    "stanfordnlp/sst2": texts("sentence", ["negative", "positive"]),
    "uoft-cs/cifar10": photos("img", (32, 32), [str(place) for place in range(10)]),
    "ILSVRC/imagenet-1k": photos("image", (60, 40), [f"class {place}" for place in range(1000)]),
}
"""How to write a few rows of a data set of the hub, in its own layout, into a folder."""

MODELS: dict[str, Callable[[Path], Any]] = {
    "bert-base-uncased": lambda folder: local_models.bert(folder, max_position_embeddings=128),
    "distilbert-base-uncased": local_models.distilbert,
    "sentence-transformers/all-MiniLM-L6-v2": lambda folder: local_models.bert(folder, layers=6),
}
"""How to save a tiny model of the same kind as a model of the hub into a folder."""


def published(folder: Path) -> Path:
    """Weights as their authors published them: below a key, with a prefix on every name."""
    with torch.random.fork_rng(devices=[]):
        state = CifarResNet(56, 10).state_dict()
    file = folder / "resnet56-4bfd9763.th"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "best_prec1": 93.4}, file)
    return file


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def on_the_hub(spec: WhoSpec) -> bool:
    """Whether a reference is neither potstill's nor of another ecosystem nor a folder."""
    model = getattr(spec, "model", None)
    return model is not None and ":" not in model and not Path(model).expanduser().exists()


def models(recipe: Recipe) -> dict[str, WhoSpec]:
    """The models of a recipe by the key that names them."""
    teachers = (
        {"teacher": recipe.teacher} if recipe.teacher else {f"teachers.{k}": v for k, v in recipe.teachers.items()}
    )
    return {"student": recipe.student, **teachers}


def stand_ins(recipe: Recipe, folder: Path) -> list[str]:
    """Overrides that put tiny stand-ins in the place of what lies on the hub."""
    changes = ["task.max_length=32"] if "max_length" in recipe.task.options else []
    if "resize" in recipe.task.options:
        changes += ["task.size=[64, 64]", "task.resize=72"]
    if recipe.data.source == "hub":
        made = folder / "data"
        made.mkdir()
        assert recipe.data.path in DATA, f"say in DATA how rows of {recipe.data.path} look"
        DATA[recipe.data.path](made)
        changes.append(f"data.path={made}")
    for key, spec in models(recipe).items():
        if spec.weights is not None and "://" in spec.weights:
            changes.append(f"{key}.weights={published(folder)}")
        if str(getattr(spec, "model", "")).startswith("torchvision:") and spec.pretrained:
            changes.append(f"{key}.pretrained=false")
        if not on_the_hub(spec):
            continue
        if spec.model not in MODELS:
            assert recipe.name not in NEVER_SKIPPED
            pytest.skip(f"{key} is {spec.model} of the hub, and MODELS has no stand-in for it")
        made = folder / key
        MODELS[spec.model](made)
        changes.append(f"{key}.model={made}")
    return changes


def short(recipe: Recipe) -> list[str]:
    """Overrides that end every training after two steps."""
    trained = [key for key, spec in models(recipe).items() if getattr(spec, "train", None) is not None]
    return [*SHORT, *(f"{key}.train.max_steps=2" for key in trained)]


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_all_are_found_by_name() -> None:
    """A file that `potstill list recipes` does not find is not there for anyone."""
    assert sorted(packaged_recipes().values()) == FILES
    assert set(NEVER_SKIPPED) <= set(packaged_recipes())


def test_it_loads_without_code_and_says_what_it_is(file: Path) -> None:
    recipe = load_recipe(file, allow_code=False)
    assert recipe.name == file.stem
    assert recipe.description.endswith(".")
    assert load_recipe(file.stem) == recipe


def test_its_formula_shows_every_term(file: Path) -> None:
    recipe = load_recipe(file)
    lines = Objective({name: make_term(spec) for name, spec in recipe.objective.items()}).describe().splitlines()
    assert len(lines) == 1 + len(recipe.objective)
    for (name, term), line in zip(recipe.objective.items(), lines[1:], strict=True):
        assert line.startswith(f"  {name}: {make_term(term).weight} · ")
        for option, value in term.options.items():
            assert isinstance(value, str | dict) or f"{value:g}" in line, f"{option} does not show"


def test_a_batch_goes_through_every_term(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, stand_ins(load_recipe(file), tmp_path))
    lines = list(dry_run(recipe, allow_code=False))
    for name in recipe.objective:
        (line,) = [line for line in lines if line.startswith(f"objective.{name}: ")]
        assert np.isfinite(float(line.split()[1]))
    for key in models(recipe):
        assert any(line.startswith(f"{key.split('.')[-1]}: ") for line in lines)


def test_two_steps_of_it_end_with_figures(file: Path, tmp_path: Path) -> None:
    plain = load_recipe(file)
    recipe = load_recipe(file, [*stand_ins(plain, tmp_path), *short(plain)])
    run = Run(recipe, tmp_path / "run", allow_code=False, bars=False, cache=Cache(tmp_path / "cache"))
    metrics = run.execute()
    wanted = [*recipe.all_teachers, *(["baseline"] if recipe.baseline.enabled else []), "distilled"]
    assert list(metrics.models) == wanted
    fitted = [name for name, spec in recipe.all_teachers.items() if spec.model.startswith("sklearn:")]
    for name, model in metrics.models.items():
        assert np.isfinite(model.metrics[metrics.primary].value)
        assert (model.parameters > 0) == (name not in fitted)
        assert load_model(run.model_folder(name), allow_code=False)[1]["task"] == recipe.task.name
    assert wanted[0] in fitted or metrics.models["distilled"].parameters <= metrics.models[wanted[0]].parameters
    trained = [event["step"] for event in run.folder.events() if event["event"] == "training"]
    assert trained[-2:] == wanted[-2:]
    assert open_run(run.folder.path, allow_code=False).evaluate() == metrics
