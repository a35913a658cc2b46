"""What a model answers on a whole split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from potstill.data.batching import InMemory
from potstill.evaluation.predict import Predictions, predict
from potstill.tasks.classification import Classification


def dataset(size=11, labels=True):
    generator = torch.Generator().manual_seed(0)
    columns = {"sample_id": torch.arange(size) * 10 + 3, "features": torch.randn(size, 4, generator=generator)}
    if labels:
        columns["labels"] = torch.arange(size) % 3 - 1
        columns["labels"][columns["labels"] < 0] = -100
    return InMemory(columns)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 256])
def test_the_batch_size_changes_nothing(batch_size):
    """In train mode BatchNorm would answer by the batch, and dropout at random."""
    net, data = model().train(), dataset()
    with torch.no_grad():
        expected = net.eval()(data.columns["features"]).numpy()
    found = predict(net.train(), Classification(), data, batch_size=batch_size)
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)
    assert found.sample_id.tolist() == data.columns["sample_id"].tolist()
    assert found.labels.tolist() == data.columns["labels"].tolist()


def test_mode_and_statistics_are_as_before():
    net = model().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    predict(net, Classification(), dataset())
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.eval()
    predict(net, Classification(), dataset())
    assert not net.training


def test_the_mode_is_put_back_after_a_failure_too():
    """Else a student whose evaluation failed once goes on training without dropout."""

    class Broken(Classification):
        def forward(self, model, batch):
            raise RuntimeError("broken")

    net = model().train()
    with pytest.raises(RuntimeError, match="broken"):
        predict(net, Broken(), dataset())
    assert net.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_put_back():
    net = model().cuda()
    found = predict(net, Classification(), dataset(), device="cpu")
    assert next(net.parameters()).is_cuda
    np.testing.assert_allclose(predict(net, Classification(), dataset(), device="cuda").logits, found.logits, atol=1e-4)


def test_a_split_without_labels():
    assert predict(model(), Classification(), dataset(labels=False)).labels is None


def test_narrow_logits_are_stored_in_fp32():
    """NumPy has no bf16, and metrics on fp16 logits tie where they should not."""
    found = predict(model().bfloat16(), _InBfloat(), dataset())
    assert found.logits.dtype == np.float32


class _InBfloat(Classification):
    def forward(self, model, batch):
        return {"logits": model(batch["features"].bfloat16())}


@pytest.mark.parametrize("labels", [True, False])
def test_saved_and_loaded(tmp_path, labels):
    found = predict(model(), Classification(), dataset(labels=labels))
    found.save(tmp_path / "student.test.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["student.test.safetensors"]
    again = Predictions.load(tmp_path / "student.test.safetensors")
    assert np.array_equal(again.logits, found.logits)
    assert np.array_equal(again.sample_id, found.sample_id)
    assert (again.labels is None) if not labels else np.array_equal(again.labels, found.labels)
    assert again.sample_id.dtype == np.int64
