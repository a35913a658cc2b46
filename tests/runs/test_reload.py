"""Students outlive potstill: the libraries they came from read them, with the same answers and the data's own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from torch import nn

from potstill.evaluation.predict import Predictions
from potstill.recipe.load import recipe_from
from potstill.runs.cache import Cache
from potstill.runs.steps import Run
from tests import local_models

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in which one colour prevails, of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split, count in (("train", 48), ("validation", 9), ("test", 24)):
        made = []
        for place in range(count):
            pixels = draw.integers(0, 120, (40 + place % 5, 48, 3), dtype=np.uint8)
            pixels[..., place % 3] += 100
            made.append(Image.fromarray(pixels))
        table = datasets.Dataset.from_dict({"image": made, "label": [i % 3 for i in range(count)]}, features)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def finished(folder: Path, data: Path, student: dict[str, Any], teacher: dict[str, Any] | None = None) -> Run:
    """A short run with a student of some ecosystem."""
    taught = {**(teacher or student), "train": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}}
    recipe = recipe_from(
        {
            "name": "reload",
            "task": {"name": "image-classification"},
            "data": {"source": "files", "path": str(data)},
            "teacher": taught,
            "student": student,
            "objective": {"soft": {"loss": "kl", "temperature": 2.0}, "hard": {"loss": "cross_entropy"}},
            "train": {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3},
            "baseline": {"enabled": False},
            "evaluate": {"latency": False, "resamples": 100},
        }
    )
    run = Run(recipe, folder / "run", bars=False, cache=Cache(folder / "cache"))
    run.execute()
    return run


def said(run: Run, name: str = "distilled") -> torch.Tensor:
    """The logits that the run stored for the test split."""
    return torch.from_numpy(Predictions.load(run.folder / f"predictions/{name}.test.safetensors").logits)


def answers(model: nn.Module, transform: Any, data: Path) -> torch.Tensor:
    """What a model says of the test pictures after a library's own preprocessing."""
    table = datasets.load_dataset("parquet", data_files={"test": str(data / "test.parquet")})["test"]
    with torch.no_grad():
        return model.eval()(torch.stack([transform(picture.convert("RGB")) for picture in table["image"]]))


def test_timm_reads_its_student(tmp_path: Path, pictures: Path) -> None:
    timm = pytest.importorskip("timm")
    run = finished(tmp_path, pictures, {"model": "timm:test_vit", "pretrained": False})
    folder = run.model_folder("distilled")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    torch.testing.assert_close(answers(model, transform, pictures), said(run), atol=1e-5, rtol=1e-5)
    assert model.pretrained_cfg["label_names"] == NAMES


def test_torchvision_reads_its_student(tmp_path: Path, pictures: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    run = finished(tmp_path, pictures, {"model": "torchvision:shufflenet_v2_x0_5", "pretrained": False})
    folder = run.model_folder("distilled")
    model = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=3)
    model.load_state_dict(safetensors.torch.load_file(str(folder / "model.safetensors")))
    transform = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.transforms()
    torch.testing.assert_close(answers(model, transform, pictures), said(run), atol=1e-4, rtol=1e-4)
    assert json.loads((folder / "potstill.json").read_text())["settings"]["label_names"] == NAMES


def test_transformers_reads_its_student(tmp_path: Path, pictures: Path) -> None:
    student = {"model": str(local_models.vit(tmp_path / "vit"))}
    teacher = {"model": str(local_models.vit(tmp_path / "large", size=24, layers=3, seed=5))}
    run = finished(tmp_path, pictures, student, teacher)
    pipeline = transformers.pipeline("image-classification", model=str(run.model_folder("distilled")), top_k=3)
    table = datasets.load_dataset("parquet", data_files={"test": str(pictures / "test.parquet")})["test"]
    scores = said(run).softmax(-1)
    for picture, expected in zip(table["image"], scores, strict=True):
        found = {each["label"]: each["score"] for each in pipeline(picture)}
        assert list(found)
        assert set(found) == set(NAMES)
        assert [found[name] for name in NAMES] == pytest.approx(expected.tolist(), abs=0.02)  # two resizers
    assert said(run, "teacher").shape == (24, 3)
