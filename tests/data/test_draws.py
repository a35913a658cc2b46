import numpy as np
import pytest
import torch

from potstill.data.draws import Draws

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# drawn once; a change of these numbers changes every augmented run and voids every teacher cache
GOLDEN_INTEGERS = [[435159, 133500], [673015, 292695], [426647, 532486]]
GOLDEN_UNIFORM = [0.4351593852043152, 0.6730154752731323, 0.42664796113967896]
GOLDEN_NORMAL = [-0.1632535457611084, 0.4482552409172058, -0.18491463363170624]
GOLDEN_SEED = 6382312578919725625
GOLDEN_SCOPE = [37409, 333533, 249530]


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def test_a_number_depends_on_its_coordinates_alone():
    alone = Draws(1, 2, ids(7))
    among = Draws(1, 2, ids(3, 7, 9))
    for draw in (
        lambda d: d.uniform("a", 3),
        lambda d: d.integers("a", 0, 1000, 2, 2),
        lambda d: d.normal("a"),
    ):
        assert torch.equal(draw(alone)[0], draw(among)[1])


def test_the_first_numbers_do_not_depend_on_how_many_are_drawn():
    draws = Draws(0, 0, torch.arange(5))
    assert torch.equal(draws.uniform("words", 9)[:, :4], draws.uniform("words", 4))


@pytest.mark.parametrize("other", [(2, 0, 5, "a"), (1, 1, 5, "a"), (1, 0, 6, "a"), (1, 0, 5, "b")])
def test_every_coordinate_matters(other):
    seed, epoch, sample, name = other
    assert not torch.equal(Draws(1, 0, ids(5)).uniform("a", 4), Draws(seed, epoch, ids(sample)).uniform(name, 4))


def test_negative_and_large_coordinates_are_distinct():
    values = [Draws(seed, 0, ids(0)).uniform("a").item() for seed in (-1, 0, 1, 2**63, 2**64 - 2)]
    assert len(set(values)) == 5
    samples = Draws(0, 0, ids(-1, 0, 2**62, -(2**63))).uniform("a")
    assert len(set(samples.tolist())) == 4


def test_scopes_are_apart_and_pure():
    draws = Draws(0, 0, torch.arange(4))
    first, second = draws.scope("0"), draws.scope("1")
    assert torch.equal(first.sample_id, draws.sample_id)
    assert torch.equal(first.uniform("a"), draws.scope("0").uniform("a"))
    assert len({tuple(each.uniform("a").tolist()) for each in (draws, first, second)}) == 3


def test_streams_never_change():
    draws = Draws(42, 3, ids(0, 1, 59_999))
    assert draws.integers("golden", 0, 1_000_000, 2).tolist() == GOLDEN_INTEGERS
    assert draws.uniform("golden").tolist() == pytest.approx(GOLDEN_UNIFORM, abs=1e-7)
    assert draws.normal("golden").tolist() == pytest.approx(GOLDEN_NORMAL, abs=1e-5)
    assert draws.generator(1, "golden").initial_seed() == GOLDEN_SEED
    assert draws.scope("x").integers("golden", 0, 1_000_000).tolist() == GOLDEN_SCOPE


def test_uniform_statistics():
    values = Draws(0, 0, torch.arange(20_000)).uniform("u", 10)
    assert values.dtype == torch.float32
    assert values.shape == (20_000, 10)
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    assert float(values.double().mean()) == pytest.approx(0.5, abs=0.004)  # 6 standard errors
    assert float(values.double().var()) == pytest.approx(1 / 12, abs=0.002)
    counts = np.histogram(values.numpy(), bins=64, range=(0, 1))[0]
    chi2 = ((counts - 3125) ** 2 / 3125).sum()
    assert 25 < chi2 < 125  # 63 degrees of freedom


def test_normal_statistics():
    values = Draws(0, 0, torch.arange(20_000)).normal("n", 10).double()
    assert float(values.mean()) == pytest.approx(0, abs=0.014)
    assert float(values.var()) == pytest.approx(1, abs=0.02)
    assert float((values**3).mean()) == pytest.approx(0, abs=0.06)
    assert float((values**4).mean()) == pytest.approx(3, abs=0.15)
    assert torch.isfinite(values).all()


def test_integers_cover_the_range_evenly():
    values = Draws(0, 0, torch.arange(30_000)).integers("i", -1, 2)
    assert values.dtype == torch.int64
    assert sorted(values.unique().tolist()) == [-1, 0, 1]
    assert torch.bincount(values + 1).double().sub(10_000).abs().max() < 500
    large = Draws(0, 0, torch.arange(1000)).integers("i", 5, 5 + 2**53)
    assert int(large.min()) >= 5
    assert int(large.max()) < 5 + 2**53


@pytest.mark.parametrize("bounds", [(3, 3), (3, 2), (0, 2**53 + 1)])
def test_integers_refuse_an_empty_or_too_wide_range(bounds):
    with pytest.raises(ValueError, match="high must lie above low"):
        Draws(0, 0, ids(1)).integers("i", *bounds)


def test_neighbours_are_uncorrelated():
    sample = torch.arange(20_000)
    base = Draws(5, 0, sample).uniform("a", 2)
    bound = 6 / 20_000**0.5
    assert abs(correlation(base[:-1, 0], base[1:, 0])) < bound  # neighbouring ids
    assert abs(correlation(base[:, 0], base[:, 1])) < bound  # numbers of one sample
    for other in (
        Draws(5, 1, sample).uniform("a", 2),
        Draws(6, 0, sample).uniform("a", 2),
        Draws(5, 0, sample).uniform("b", 2),
        Draws(5, 0, sample + 2**32).uniform("a", 2),
        Draws(5, 0, sample).scope("a").uniform("a", 2),
    ):
        assert abs(correlation(base, other)) < bound


def test_generator_is_pure_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    draws = Draws(0, 0, ids(4, 5))
    first = torch.rand(3, generator=draws.generator(1, "g"))
    assert torch.equal(first, torch.rand(3, generator=Draws(0, 0, ids(5)).generator(0, "g")))
    assert not torch.equal(first, torch.rand(3, generator=draws.generator(0, "g")))
    assert torch.equal(before, torch.get_rng_state())


def test_an_empty_batch_has_empty_draws():
    draws = Draws(0, 0, torch.empty(0, dtype=torch.int64))
    assert len(draws) == 0
    assert draws.uniform("a", 3).shape == (0, 3)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)]
)
def test_sample_ids_must_be_int64_with_one_axis(wrong):
    with pytest.raises(ValueError, match="sample_id must be int64"):
        Draws(0, 0, wrong)
