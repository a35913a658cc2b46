"""Views of samples: augmentations from a recipe, in order, as a pure function of (seed, epoch, sample id)."""

from __future__ import annotations

import pytest
import torch

from potstill.data.augment import check_augmentations, make_views, split_step
from potstill.data.batching import InMemory
from potstill.errors import DataError

PATH = ("data", "augment")


def images(size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample_id": torch.arange(size) * 7 + 1,
        "pixel_values": torch.rand(size, 1, 6, 6, generator=generator),
        "labels": torch.arange(size) % 3,
    }


def dataset(steps, *, seed=0, finish=None, size=6, order=None) -> InMemory:
    columns = images(size)
    if order is not None:
        columns = {name: value[order] for name, value in columns.items()}
    views = make_views(steps, key="pixel_values", seed=seed, num_classes=3, finish=finish)
    return InMemory(columns, views)


def whole(data: InMemory) -> dict[str, torch.Tensor]:
    return data.__getitems__(list(range(len(data))))


ALL = ["flip", {"shift": {"pixels": 2}}, {"crop": {"padding": 2}}, {"mixup": {"alpha": 1.0}}]


@pytest.mark.parametrize("steps", [["flip"], [{"shift": {"pixels": 2}}], [{"mixup": {"alpha": 1.0}}], ALL])
def test_views_do_not_depend_on_the_batch(steps):
    """Order, batch size, epoch before or the global generator must not matter: else a resumed run differs."""
    data = dataset(steps, seed=3)
    data.set_epoch(2)
    expected = whole(data)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for rows in ([3], [5, 0], [4, 4], [5, 4, 3, 2, 1, 0]):
        batch = data.__getitems__(rows)
        for name in ("pixel_values", "labels"):
            torch.testing.assert_close(batch[name], expected[name][rows], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    data.set_epoch(0)
    assert not torch.equal(whole(data)["pixel_values"], expected["pixel_values"])
    data.set_epoch(2)
    assert torch.equal(whole(data)["pixel_values"], expected["pixel_values"])
    assert not torch.equal(whole(dataset(steps, seed=4))["pixel_values"], expected["pixel_values"])


def test_views_follow_the_sample_id_not_the_place():
    steps = ["flip", {"shift": {"pixels": 2}}]
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    expected = whole(dataset(steps))["pixel_values"]
    assert torch.equal(whole(dataset(steps, order=order))["pixel_values"], expected[order])


def test_the_same_step_twice_draws_twice():
    """Two flips with one coin would cancel out and augment nothing."""
    once = whole(dataset(["flip"], size=40))["pixel_values"]
    twice = whole(dataset(["flip", "flip"], size=40))["pixel_values"]
    plain = images(40)["pixel_values"]
    unchanged = (twice == plain).flatten(1).all(1)
    assert 0 < unchanged.sum() < 40
    assert not torch.equal(once, twice)


def test_steps_run_in_the_order_written():
    def difference(steps):
        return whole(dataset(steps, finish=None))["pixel_values"]

    first = difference([{"shift": {"pixels": 3, "fill": 9.0}}, {"crop": {"padding": 3, "fill": 5.0}}])
    second = difference([{"crop": {"padding": 3, "fill": 5.0}}, {"shift": {"pixels": 3, "fill": 9.0}}])
    assert not torch.equal(first, second)


def test_normalisation_comes_after_the_steps_and_before_the_mixing():
    order = []

    def finish(pixels):
        order.append("finish")
        return pixels * 2 - 1

    plain = whole(dataset([{"shift": {"pixels": 2}}]))["pixel_values"]
    found = whole(dataset([{"shift": {"pixels": 2}}], finish=finish))["pixel_values"]
    torch.testing.assert_close(found, plain * 2 - 1)
    assert order == ["finish"]
    mixed = whole(dataset([{"mixup": {"alpha": 1.0}}]))["pixel_values"]
    torch.testing.assert_close(
        whole(dataset([{"mixup": {"alpha": 1.0}}], finish=finish))["pixel_values"], mixed * 2 - 1
    )


def test_mixing_comes_last_wherever_it_is_written():
    before = whole(dataset([{"mixup": {"alpha": 1.0}}, "flip"]))
    after = whole(dataset(["flip", {"mixup": {"alpha": 1.0}}]))
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    assert torch.equal(before["labels"], after["labels"])


def test_mixed_partners_have_their_own_views():
    """The partner must be augmented by its own id: with λ = 0 the mix is the partner's view in this epoch."""
    data = dataset(["flip", {"mixup": {"alpha": 1.0}}], size=12)
    views = whole(dataset(["flip"], size=12))["pixel_values"].flatten(1)
    batch = whole(data)
    shares = batch["labels"]
    assert torch.allclose(shares.sum(-1), torch.ones(12))
    for sample in range(12):
        # the mixed image lies on the line between its own view and that of some sample
        own, mixed = views[sample], batch["pixel_values"].flatten(1)[sample]
        gaps = []
        for partner in range(12):
            line = views[partner] - own
            ratio = ((mixed - own) @ line / (line @ line).clamp_min(1e-12)).clamp(0, 1)
            gaps.append(float((own + ratio * line - mixed).abs().max()))
        assert min(gaps) < 1e-5


def test_without_steps_nothing_is_drawn():
    assert torch.equal(whole(dataset([]))["pixel_values"], images()["pixel_values"])
    assert torch.equal(whole(dataset([]))["labels"], images()["labels"])


def test_the_batch_keeps_its_other_entries():
    batch = whole(dataset(["flip"]))
    assert torch.equal(batch["labels"], images()["labels"])
    assert torch.equal(batch["sample_id"], images()["sample_id"])


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("flip", ("flip", {})),
        ({"shift": {"pixels": 2}}, ("shift", {"pixels": 2})),
        ({"flip": None}, ("flip", {})),
        ({"flip": {}}, ("flip", {})),
    ],
)
def test_split_step(step, expected):
    assert split_step(step) == expected


@pytest.mark.parametrize("step", [{"flip": {}, "crop": {}}, {}, {"flip": 3}, 3, None, ["flip"]])
def test_what_is_no_step(step):
    with pytest.raises(DataError, match="expected an augmentation as a name"):
        split_step(step)


def test_make_views_refuses_wrong_options():
    with pytest.raises(DataError, match="has no option 'pixel'; did you mean 'pixels'"):
        make_views([{"shift": {"pixel": 2}}], key="pixel_values", seed=0, num_classes=3, finish=None)


def test_check_finds_every_mistake_at_its_place():
    steps = [
        "flop",
        {"shift": {"pixels": 0}},
        "flip",
        {"shift": {"size": 2}},
        {"flip": {}, "crop": {}},
        "noise",
        {"mixup": {"alpha": "much"}},
    ]
    problems = check_augmentations(steps, "image", PATH)
    assert [problem.path for problem in problems] == [
        (*PATH, 0),
        (*PATH, 1, "shift", "pixels"),
        (*PATH, 3, "shift", "size"),
        (*PATH, 4),
        (*PATH, 5),
        (*PATH, 6, "mixup", "alpha"),
    ]
    text = [str(problem) for problem in problems]
    assert "there is no image augmentation 'flop'; did you mean 'flip'?" in text[0]
    assert "greater than or equal to 1, got 0" in text[1]
    assert "has no option 'size'" in text[2]
    assert "expected an augmentation as a name or as `name: {option: value}`" in text[3]
    assert "there is no image augmentation 'noise'" in text[4]


def test_check_knows_the_kind_of_input():
    assert check_augmentations(["noise"], "tabular", PATH) == []
    assert check_augmentations(["flip", {"crop": {"padding": 2}}, "mixup"], "image", PATH) == []
    assert [problem.path for problem in check_augmentations(["flip"], "tabular", PATH)] == [(*PATH, 0)]


def several(steps, keys, **columns) -> InMemory:
    return InMemory({**images(12), **columns}, make_views(steps, keys=keys, seed=3, num_classes=3))


def test_every_stored_entry_gets_the_same_draws():
    """Else the teacher answers about another crop than the one the student is shown."""
    doubled = {"wide": images(12)["pixel_values"] * 2}
    keys = {"pixel_values": ("pixel_values", None), "teacher/pixel_values": ("wide", None)}
    batch = whole(several(ALL, keys, **doubled))
    assert set(batch) == {"sample_id", "labels", "view", "pixel_values", "teacher/pixel_values"}
    torch.testing.assert_close(batch["teacher/pixel_values"], 2 * batch["pixel_values"])
    alone = InMemory(images(12), make_views(ALL, key="pixel_values", seed=3, num_classes=3))
    assert torch.equal(batch["pixel_values"], whole(alone)["pixel_values"])
    assert torch.equal(batch["labels"], whole(alone)["labels"])


def test_one_stored_entry_for_two_models_is_augmented_once():
    calls = []

    def finish(pixels):
        calls.append(pixels)
        return pixels + 1

    keys = {"pixel_values": ("pixel_values", None), "teacher/pixel_values": ("pixel_values", finish)}
    batch = whole(several(["flip"], keys))
    assert len(calls) == 1
    assert calls[0] is batch["pixel_values"]
    assert torch.equal(batch["teacher/pixel_values"], batch["pixel_values"] + 1)


def test_views_of_several_entries_do_not_depend_on_the_batch():
    keys = {"pixel_values": ("pixel_values", None), "teacher/pixel_values": ("wide", torch.neg)}
    data = several(ALL, keys, wide=torch.rand(12, 1, 9, 9, generator=torch.Generator().manual_seed(1)))
    expected = whole(data)
    for rows in ([3], [5, 0], list(reversed(range(12)))):
        batch = data.__getitems__(rows)
        assert all(torch.equal(batch[name], expected[name][rows]) for name in expected)
