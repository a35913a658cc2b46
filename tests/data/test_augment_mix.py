"""CutMix, and what a teacher is asked where samples are mixed: about the mixture, never for a mixture of answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from potstill.data.augment import check_augmentations, make_views
from potstill.data.augment_images import cutmix
from potstill.data.batching import InMemory
from potstill.data.draws import Draws
from potstill.errors import CacheError, DataError
from potstill.interfaces import Batch, Signals
from potstill.losses.objective import Term
from potstill.models.plain import ConvNet, Mlp
from potstill.registry import augmentations
from potstill.teachers.cached import Cached
from potstill.teachers.live import Live
from potstill.training.trainer import DistillationTrainer, ready_batch

CUT, MIX = {"cutmix": {"alpha": 1.0}}, {"mixup": {"alpha": 1.0}}


def draws(count: int, start: int = 0, epoch: int = 0) -> Draws:
    return Draws(0, epoch, torch.arange(start, start + count))


class Store:
    """Images that hold their own number in every pixel; indices go round."""

    def __init__(self, count: int, size: tuple[int, int] = (8, 12), **extra: Tensor) -> None:
        number = torch.arange(count).float().reshape(-1, 1, 1, 1)
        self.columns = {
            "sample_id": torch.arange(count),
            "pixel_values": number.expand(count, 3, *size).clone(),
            "labels": torch.arange(count),
            **extra,
        }

    def __call__(self, indices: Tensor) -> Batch:
        return {name: values[indices % len(self.columns["sample_id"])] for name, values in self.columns.items()}


def mixed(store: Store, count: int = 0, **options: float) -> Batch:
    count = count or len(store.columns["sample_id"])
    batch = store(torch.arange(count))
    return cutmix(batch, draws=draws(count), lookup=store, num_classes=len(store.columns["sample_id"]), **options)


class TestCutMix:
    def test_a_box_of_another_image_and_labels_by_the_area_that_is_seen(self) -> None:
        store = Store(400)
        before = {name: values.clone() for name, values in store.columns.items()}
        found = mixed(store)
        assert found["labels"].dtype == torch.float32
        assert all(torch.equal(store.columns[name], value) for name, value in before.items())
        assert torch.equal(found["sample_id"], before["sample_id"])
        partners = set()
        for own, (image, label) in enumerate(zip(found["pixel_values"], found["labels"], strict=True)):
            assert torch.equal(image, image[:1].expand_as(image))  # the same box in all channels
            other = image[0] != own
            share = other.float().mean().item()
            wanted = torch.zeros(400)
            wanted[own] = 1 - share
            if other.any():
                (partner,) = image[0][other].unique().tolist()  # of one other image
                partners.add(partner)
                wanted[int(partner)] += share
                rows, columns = other.any(1).nonzero()[:, 0], other.any(0).nonzero()[:, 0]
                box = torch.zeros_like(other)
                box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
                assert torch.equal(other, box)  # and a rectangle, not some pixels
            torch.testing.assert_close(label, wanted)
        assert len(partners) > 150  # from the whole data set

    @pytest.mark.parametrize("alpha", [1.0, 0.3])
    def test_areas_are_those_of_the_papers_code(self, alpha: float) -> None:
        """Yun et al.: λ from Beta, sides by √(1 − λ), the middle anywhere, what sticks out cut off."""
        count, height, width = 4000, 60, 40
        ours = torch.zeros(count, 1, height, width)
        batch = {"sample_id": torch.arange(count), "pixel_values": ours}
        other = {"sample_id": torch.arange(count), "pixel_values": ours + 1}
        shown = cutmix(batch, draws=draws(count), lookup=lambda _: other, num_classes=2, alpha=alpha)["pixel_values"]
        areas = shown.mean((1, 2, 3)).double().numpy()
        draw, expected = np.random.default_rng(3), []
        for _ in range(count):
            cut = math.sqrt(1 - draw.beta(alpha, alpha))
            spans = []
            for size in (height, width):
                side, middle = int(size * cut), draw.integers(size)
                spans.append(min(max(middle + side // 2, 0), size) - min(max(middle - side // 2, 0), size))
            expected.append(spans[0] * spans[1] / (height * width))
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert np.quantile(areas, quantile) == pytest.approx(np.quantile(expected, quantile), abs=0.035)
        middle = shown[:, 0].mean(0)
        assert float((middle - middle.flip(0)).abs().mean()) < 0.03  # no side is preferred
        assert float((middle - middle.flip(1)).abs().mean()) < 0.03

    def test_it_does_not_depend_on_the_batch_but_on_the_epoch(self) -> None:
        store = Store(50)
        whole = mixed(store)
        batch = store(torch.arange(7, 10))
        part = cutmix(batch, draws=draws(3, start=7), lookup=store, num_classes=50)
        assert all(torch.equal(part[name], whole[name][7:10]) for name in part)
        later = cutmix(store(torch.arange(50)), draws=draws(50, epoch=1), lookup=store, num_classes=50)
        assert not torch.equal(later["pixel_values"], whole["pixel_values"])

    def test_a_teacher_sees_the_same_part_of_the_same_partner_in_its_own_resolution(self) -> None:
        large = torch.arange(40.0).reshape(-1, 1, 1, 1).expand(40, 1, 32, 48)
        first = {"teacher/pixel_values": large}
        store = Store(40)
        store.columns = {**first, **store.columns}  # the student's area decides wherever its entry stands
        found = mixed(store)
        small = (found["pixel_values"] != torch.arange(40).reshape(-1, 1, 1, 1))[:, 0]
        big = (found["teacher/pixel_values"] != torch.arange(40).reshape(-1, 1, 1, 1))[:, 0]
        same = (big.float().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)) > 0.5) == small
        assert same.float().mean() > 0.97
        kept = found["labels"][torch.arange(40), torch.arange(40)]
        apart = small.any((1, 2))
        torch.testing.assert_close(kept[apart], 1 - small.float().mean((1, 2))[apart])

    def test_labels_that_are_unknown_soft_or_missing(self) -> None:
        hidden = mixed(Store(10, labels=torch.tensor([-100, *range(9)])))["labels"]
        assert hidden[0].abs().sum() == 0
        assert set(hidden.sum(1).round(decimals=5).tolist()) == {0.0, 1.0}
        soft = torch.full((10, 10), 0.1)
        assert torch.allclose(mixed(Store(10, labels=soft))["labels"], soft)
        bare = Store(10)
        del bare.columns["labels"]
        assert "labels" not in mixed(bare)

    def test_mixed_twice_a_sample_without_label_stays_without(self) -> None:
        """Else the second partner's label would be all that is left of it, at a part of its weight."""
        columns = Store(30, labels=torch.tensor([-100] * 15 + [0, 1, 2] * 5)).columns
        data = InMemory(columns, make_views([MIX, CUT], key="pixel_values", seed=0, num_classes=3))
        sums = data.__getitems__(list(range(30)))["labels"].sum(1)
        assert torch.all((sums < 1e-6) | ((sums - 1).abs() < 1e-5))
        assert torch.all(sums[:15] < 1e-6)

    def test_bytes_are_cut_as_well(self) -> None:
        store = Store(20)
        store.columns["pixel_values"] = store.columns["pixel_values"].to(torch.uint8)
        assert mixed(store)["pixel_values"].dtype == torch.uint8

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"features": torch.zeros(6, 4)}, r"not 'features' \[6, 4\]"),
            ({"input_ids": torch.zeros(6, 2, dtype=torch.int64)}, r"not 'input_ids' \[6, 2\]"),
            ({"labels": torch.tensor([0, 1, 2, 3, 4, 6])}, "must lie below 6, got 6"),
        ],
    )
    def test_what_it_refuses(self, extra: dict[str, Tensor], message: str) -> None:
        with pytest.raises(DataError, match=message):
            mixed(Store(6, **extra))
        with pytest.raises(DataError, match="the batch has none: sample_id"):
            cutmix({"sample_id": torch.arange(2)}, draws=draws(2), lookup=lambda _: {}, num_classes=2)

    def test_it_is_an_augmentation_of_images_alone(self) -> None:
        assert augmentations.facts("cutmix")["kind"] == "mix"
        assert check_augmentations([CUT, MIX], "image", ("data", "augment")) == []
        for kind in ("tabular", "text"):
            (problem,) = check_augmentations([CUT], kind, ("data", "augment"))
            assert f"there is no {kind} augmentation 'cutmix'" in str(problem)
        assert check_augmentations([MIX], "tabular", ("data", "augment")) == []
        (problem,) = check_augmentations([{"cutmix": {"alpha": 0}}], "image", ())
        assert "greater than 0" in str(problem)


def samples(kind: str, steps: list, count: int = 24, **settings: int) -> InMemory:
    draw = torch.Generator().manual_seed(0)
    key, shape = ("pixel_values", (1, 6, 6)) if kind == "image" else ("features", (5,))
    columns = {
        key: torch.randn(count, *shape, generator=draw),
        "labels": torch.arange(count) % 3,
        "sample_id": torch.arange(count),
    }
    data = InMemory(columns, make_views(steps, key=key, seed=1, num_classes=3))
    data.views = settings.get("views")
    return data


def teacher(kind: str) -> nn.Module:
    """A model whose answer to a mixture is no mixture of its answers."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return (ConvNet(1, 3, [8]) if kind == "image" else Mlp(5, 3, [16])).eval()


class Asked:
    """A live teacher that remembers what it was asked and what it said."""

    def __init__(self, model: nn.Module) -> None:
        self.live, self.model = Live(model), model
        self.batches: list[Batch] = []
        self.answers: list[Signals] = []

    def __call__(self, batch: Batch) -> Signals:
        self.batches.append(dict(batch))
        self.answers.append(self.live(batch))
        return self.answers[-1]


KINDS = pytest.mark.parametrize(("kind", "step"), [("image", CUT), ("image", MIX), ("tabular", MIX)])


@KINDS
def test_the_teacher_of_a_training_answers_what_the_student_is_shown(kind: str, step: dict, tmp_path: Path) -> None:
    """The mixed input goes to both: the answers are those to the mixture, not a mixture of two answers."""
    key = "pixel_values" if kind == "image" else "features"
    shown: list[Tensor] = []
    torch.manual_seed(0)
    student = ConvNet(1, 3, [4]) if kind == "image" else Mlp(5, 3, [4])
    student.register_forward_pre_hook(lambda _, args, kwargs: shown.append(kwargs[key].clone()), with_kwargs=True)
    model, data = teacher(kind), samples(kind, [step])
    source = Asked(model)
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=6, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = DistillationTrainer(
        model=student,
        teacher=source,
        objective={"soft": Term("kl", temperature=2.0), "hard": Term("cross_entropy")},
        args=arguments,
        train_dataset=data,
        data_collator=ready_batch,
    )
    trainer.train()
    assert len(shown) == len(source.batches) == 8
    for place, (seen, asked, answer) in enumerate(zip(shown, source.batches, source.answers, strict=True)):
        assert torch.equal(seen, asked[key])  # both see one and the same mixture
        with torch.no_grad():
            torch.testing.assert_close(answer["logits"], model(seen))
        torch.testing.assert_close(asked["labels"].sum(1), torch.ones(6))
        if step is MIX:
            mixture = mixed_answers(model, kind, epoch=place // 4)[asked["sample_id"]]
            assert (answer["logits"] - mixture).abs().max() > 1e-3


def mixed_answers(model: nn.Module, kind: str, *, epoch: int) -> Tensor:
    """The answers to the samples as they are, mixed as the samples are: what the teacher must not be taken to say."""
    plain = samples(kind, [])
    with torch.no_grad():
        columns = {**plain.columns, "features": model(plain.columns["pixel_values" if kind == "image" else "features"])}
    columns.pop("pixel_values", None)
    data = InMemory(columns, make_views([MIX], key="features", seed=1, num_classes=3))
    data.set_epoch(epoch)
    return data.__getitems__(list(range(len(data))))["features"]


@KINDS
def test_replayed_mixtures_are_found_in_a_cache_and_others_refused(kind: str, step: dict, tmp_path: Path) -> None:
    key = "pixel_values" if kind == "image" else "features"
    model, data = teacher(kind), samples(kind, [step], views=2)
    cached = Cached(model, tmp_path)
    orders = [torch.randperm(24, generator=torch.Generator().manual_seed(place)).tolist() for place in range(6)]
    for epoch, order in enumerate(orders):
        data.set_epoch(epoch)
        for start in range(0, 24, 5):  # other batches each time, the last one smaller
            batch = data.__getitems__(order[start : start + 5])
            with torch.no_grad():
                torch.testing.assert_close(cached(batch)["logits"], model(batch[key]), atol=1e-5, rtol=1e-5)
    assert (cached.counts.made, cached.counts.found) == (48, 96)
    endless = samples(kind, [step])  # a new mixture each time, under no number of its own
    endless.set_epoch(9)
    batch = endless.__getitems__([0, 1, 2])
    with pytest.raises(CacheError, match="have other inputs than those"):
        cached({**batch, "view": torch.zeros(3, dtype=torch.int64)})


def test_another_partner_of_the_same_sample_is_not_taken_for_the_first(tmp_path: Path) -> None:
    """What was mixed with a data set of another size or order is another question, with the same id and view."""
    cached = Cached(teacher("tabular"), tmp_path)
    cached(samples("tabular", [MIX], views=1).__getitems__([0, 1, 2]))
    with pytest.raises(CacheError, match="have other inputs than those"):
        cached(samples("tabular", [MIX], count=25, views=1).__getitems__([0, 1, 2]))
