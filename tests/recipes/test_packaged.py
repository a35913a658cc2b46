"""Every packaged recipe: it loads, its formula shows, one batch goes through, and a run of two steps ends with figures.

Recipes are found by themselves. One whose data or models lie on the hub is tried on tiny stand-ins of the same layout:
``DATA`` and ``MODELS`` say how those of an id are made.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageDraw

from potstill.errors import ModelError
from potstill.losses.objective import Objective
from potstill.models.load import find_factory, load_model
from potstill.recipe.build import make_term
from potstill.recipe.dry_run import dry_run
from potstill.recipe.load import load_recipe, packaged_recipes
from potstill.recipe.schema import ModelSpec, Recipe
from potstill.runs.cache import Cache
from potstill.runs.steps import Run, open_run

FOLDER = Path(__file__).parent.parent.parent / "src/potstill/recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
NEVER_SKIPPED = ("digits", "mnist-small", "synthetic-tabular")
SHORT = ("evaluate.resamples=100", "evaluate.latency=false", "train.max_steps=2")


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


DATA: dict[str, Callable[[Path], None]] = {"ylecun/mnist": mnist}
"""How to write a few rows of a data set of the hub, in its own layout, into a folder."""

MODELS: dict[str, Callable[[Path], None]] = {}
"""How to save a tiny model of the same kind as a model of the hub into a folder."""


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def on_the_hub(spec: ModelSpec) -> bool:
    """Whether a reference is neither potstill's nor dotted nor a folder."""
    try:
        find_factory(spec.model)
    except ModelError:
        return not Path(spec.model).expanduser().exists()
    return False


def models(recipe: Recipe) -> dict[str, ModelSpec]:
    """The models of a recipe by the key that names them."""
    teachers = (
        {"teacher": recipe.teacher} if recipe.teacher else {f"teachers.{k}": v for k, v in recipe.teachers.items()}
    )
    return {"student": recipe.student, **teachers}


def stand_ins(recipe: Recipe, folder: Path) -> list[str]:
    """Overrides that put tiny stand-ins in the place of what lies on the hub."""
    changes = []
    if recipe.data.source == "hub":
        made = folder / "data"
        made.mkdir()
        assert recipe.data.path in DATA, f"say in DATA how rows of {recipe.data.path} look"
        DATA[recipe.data.path](made)
        changes.append(f"data.path={made}")
    for key, spec in models(recipe).items():
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
        assert line.startswith(f"  {name}: {term.weight} · ")
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
    for name, model in metrics.models.items():
        assert np.isfinite(model.metrics[metrics.primary].value)
        assert model.parameters > 0
        assert load_model(run.model_folder(name), allow_code=False)[1]["task"] == recipe.task.name
    assert metrics.models["distilled"].parameters <= metrics.models[wanted[0]].parameters
    trained = [event["step"] for event in run.folder.events() if event["event"] == "training"]
    assert trained[-2:] == wanted[-2:]
    assert open_run(run.folder.path, allow_code=False).evaluate() == metrics
