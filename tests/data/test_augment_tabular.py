import pytest
import torch

from potstill.data.augment_tabular import noise
from potstill.data.draws import Draws
from potstill.errors import DataError
from potstill.registry import augmentations


def draws(count: int, start: int = 0) -> Draws:
    return Draws(0, 0, torch.arange(start, start + count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_is_a_pure_function_of_the_sample(dtype):
    features = torch.arange(12, dtype=dtype).reshape(4, 3)
    views = noise(features, draws=draws(4))
    assert views.dtype == dtype
    assert not torch.equal(views, features)
    assert torch.equal(noise(features[2:], draws=draws(2, start=2)), views[2:])
    assert torch.equal(features, torch.arange(12, dtype=dtype).reshape(4, 3))


def test_noise_has_its_standard_deviation_in_units_of_the_scale():
    change = noise(torch.zeros(20_000, 2), draws=draws(20_000), std=0.5, scale=torch.tensor([1.0, 10.0]))
    assert change.mean(0).tolist() == pytest.approx([0, 0], abs=0.2)
    assert change.std(0).tolist() == pytest.approx([0.5, 5.0], rel=0.03)
    assert noise(torch.zeros(20_000, 1), draws=draws(20_000), std=0.5).std().item() == pytest.approx(0.5, rel=0.03)


def test_noise_leaves_missing_values_missing():
    views = noise(torch.tensor([[1.0, float("nan")]]), draws=draws(1))
    assert views.isnan().tolist() == [[False, True]]


def test_noise_refuses_integers_and_a_scale_of_another_width():
    with pytest.raises(DataError, match=r"needs floating features, got torch\.int64"):
        noise(torch.zeros(2, 3, dtype=torch.int64), draws=draws(2))
    with pytest.raises(DataError, match=r"scale must have shape \[3\], got \[2\]"):
        noise(torch.zeros(2, 3), draws=draws(2), scale=torch.ones(2))


def test_registration_and_options():
    assert augmentations.facts("noise")["kind"] == "tabular"
    assert any("greater than or equal to 0" in str(each) for each in augmentations.check("noise", {"std": -1}))
