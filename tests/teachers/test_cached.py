"""A cached teacher answers as the live one does, for the very inputs that it was asked, or not at all."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from potstill.errors import CacheError
from potstill.interfaces import Batch
from potstill.models.plain import Mlp
from potstill.teachers.cached import Cached, uncached, weights_hash
from potstill.teachers.live import Deferred, Live, Several
from potstill.teachers.tags import _multipliers, _words, tags
from tests.training import tiny


class Counting:
    """A live teacher that counts how often it is asked."""

    def __init__(self, live: Live) -> None:
        self.live, self.prefix, self.model, self.asked = live, live.prefix, live.model, 0

    def __call__(self, batch):
        self.asked += 1
        return self.live(batch)


def texts(length: int = 12, count: int = 8, seed: int = 0, left: bool = False) -> Batch:
    """Padded texts whose tokens depend on the sample alone, whatever the length of the batch."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 11, (count,), generator=draw)
    ids = torch.randint(5, 50, (count, 10), generator=draw)
    inside = torch.arange(length)[None] < sizes[:, None]
    padded = torch.zeros(count, length, dtype=torch.int64)
    padded[:, :10] = ids
    batch = {"input_ids": torch.where(inside, padded, 0), "attention_mask": inside.long()}
    if left:
        batch = {name: value.flip(1) for name, value in batch.items()}
    return {**batch, "sample_id": torch.arange(count) + 100, "labels": torch.zeros(count, dtype=torch.int64)}


def images(count: int = 16) -> Batch:
    draw = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(count, 1, 4, 4, generator=draw), "sample_id": torch.arange(count)}


def rows(batch: Batch, chosen) -> Batch:
    return {name: value[torch.as_tensor(chosen)] for name, value in batch.items()}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Mlp(16, 5, [8])


@pytest.fixture
def live():
    return Counting(Live(mlp()))


def cached(live, folder: Path, **options) -> Cached:
    return Cached(live, folder, identity="the teacher", **options)


def test_each_sample_is_asked_once_whatever_the_batches(live, tmp_path):
    source, batch = cached(live, tmp_path), images()
    exact = live.live(batch)["logits"]
    for chosen in (range(8), range(8, 16)):
        assert torch.equal(source(rows(batch, chosen))["logits"], exact[list(chosen)])
    assert live.asked == 2
    order = np.random.default_rng(0).permutation(16)
    for chosen in (order[:5], order[5:], order):
        assert torch.equal(source(rows(batch, chosen))["logits"], exact[chosen])
    assert live.asked == 2
    assert (source.counts.made, source.counts.found) == (16, 32)


def test_another_process_finds_them_without_the_teacher(live, tmp_path):
    batch = images()
    made = cached(live, tmp_path)(batch)["logits"]

    def fails() -> Live:
        raise AssertionError("the teacher was loaded")

    assert torch.equal(cached(Deferred(fails), tmp_path)(batch)["logits"], made)


def test_a_deferred_teacher_is_loaded_when_something_is_missing(tmp_path):
    loaded = []

    def load() -> Live:
        loaded.append(1)
        return Live(mlp())

    source = cached(Deferred(load), tmp_path)
    source(images())
    source({**images(4), "sample_id": torch.arange(4) + 50})
    assert loaded == [1]


def test_a_batch_that_is_partly_there_gives_what_is_there_and_keeps_the_rest(live, tmp_path):
    source, batch = cached(live, tmp_path, precision="fp16"), images()
    first = source(rows(batch, range(4)))["logits"]
    both = source(batch)["logits"]
    assert torch.equal(both[:4], first)
    assert torch.equal(both, source(batch)["logits"])  # what is returned is what was kept
    assert (source.counts.made, source.counts.found) == (16, 20)


def test_texts_are_found_under_any_padding_and_their_layers_too(tmp_path):
    teacher = tiny.teacher()
    live = Counting(Live(teacher, ["hidden.1", "hidden.2", "bert.pooler"]))
    source = cached(live, tmp_path)
    short, long = texts(10), texts(20)
    first = source(short)
    asked = live.asked
    again = source(long)
    assert live.asked == asked
    exact = live.live(long)
    inside = long["attention_mask"].bool()
    assert torch.allclose(again["logits"], exact["logits"], atol=1e-6)
    assert torch.equal(again["logits"], first["logits"])
    assert torch.equal(again["bert.pooler"], first["bert.pooler"])
    for name in ("hidden.1", "hidden.2"):
        assert again[name].shape == exact[name].shape
        assert torch.allclose(again[name][inside], exact[name][inside], atol=1e-5)
        assert again[name][~inside].abs().sum() == 0


@pytest.mark.parametrize(("precision", "least"), [(None, 0.0), ("fp32", 0.0), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_what_is_stored_is_as_near_as_its_precision(live, tmp_path, precision, least):
    source, batch = cached(live, tmp_path, precision=precision), images()
    exact, kept = live.live(batch)["logits"], source(batch)["logits"]
    assert kept.dtype == exact.dtype
    assert (kept - exact).abs().max() <= least * exact.abs().max()
    assert torch.equal(kept, source(batch)["logits"])


def test_other_inputs_under_the_same_sample_are_refused(live, tmp_path):
    source, batch = cached(live, tmp_path), images()
    source(batch)
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][3, 0, 2, 1] += 1e-6
    with pytest.raises(CacheError, match=r"1 of 16 samples, 3 the first, have other inputs .*`train.views`"):
        source(changed)


def test_each_view_has_its_own_answers(live, tmp_path):
    source = cached(live, tmp_path)
    views = [{**images(), "view": torch.full((16,), v), "pixel_values": images()["pixel_values"] + v} for v in range(3)]
    answers = [source(view)["logits"] for view in views]
    assert live.asked == 3
    for view, answer in zip(views, answers, strict=True):
        assert torch.equal(source(view)["logits"], answer)
        assert torch.equal(answer, live.live(view)["logits"])
    assert live.asked == 3
    with pytest.raises(CacheError, match="batch of one view, got views 0 to 2"):
        source({**images(3), "view": torch.arange(3)})


def test_another_teacher_another_folder(tmp_path):
    batch = images()
    first, second = Cached(mlp(0), tmp_path), Cached(mlp(1), tmp_path)
    answers = [first(batch)["logits"], second(batch)["logits"]]
    assert torch.equal(answers[1], Live(mlp(1))(batch)["logits"])
    assert not torch.equal(*answers)
    assert len(list(tmp_path.iterdir())) == 2
    again = Cached(mlp(0), tmp_path)
    assert torch.equal(again(batch)["logits"], answers[0])
    assert again.counts.found == 16


def test_a_changed_weight_a_tap_a_precision_are_another_teacher(tmp_path):
    batch, model = images(), mlp()
    Cached(model, tmp_path)(batch)
    Cached(Live(model, ["body.1"]), tmp_path)(batch)
    Cached(model, tmp_path, precision="fp16")(batch)
    with torch.autocast("cpu", torch.bfloat16):
        Cached(model, tmp_path)(batch)
    before = weights_hash(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert weights_hash(model) != before
    changed = Cached(model, tmp_path)
    changed(batch)
    assert changed.counts.made == 16
    assert len(list(tmp_path.iterdir())) == 5


def test_a_source_without_weights_needs_an_identity(tmp_path):
    with pytest.raises(CacheError, match="give `identity`"):
        Cached(lambda batch: {"logits": batch["pixel_values"]}, tmp_path)
    with pytest.raises(CacheError, match="one with a `forward` of its own; give `identity`"):
        Cached(Live(mlp(), forward=lambda model, batch: {"logits": model(batch["pixel_values"])}), tmp_path)


def test_a_batch_without_sample_ids_is_refused(live, tmp_path):
    batch = images()
    del batch["sample_id"]
    with pytest.raises(CacheError, match="sample_id"):
        cached(live, tmp_path)(batch)


def test_damage_is_named_and_only_that_part_is_made_again(live, tmp_path, caplog):
    source, batch = cached(live, tmp_path), images()
    answer = source(batch)["logits"]
    source.close()
    data = next(tmp_path.glob("*/data-*.bin"))
    raw = bytearray(data.read_bytes())
    raw[24 * 5 + 3] ^= 255
    data.write_bytes(bytes(raw))
    again = cached(live, tmp_path)
    with caplog.at_level(logging.WARNING, "potstill"):
        assert torch.equal(again(batch)["logits"], answer)
        assert torch.equal(again(batch)["logits"], answer)
    assert [data.name in record.message and "sample 5" in record.message for record in caplog.records] == [True]
    assert (again.counts.made, again.counts.damaged, again.counts.found) == (1, 1, 31)


def test_a_full_disk_leaves_the_teacher_to_answer(live, tmp_path, monkeypatch, caplog):
    source, batch = cached(live, tmp_path), images()
    kept = source(rows(batch, range(8)))["logits"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("potstill.teachers.store.Store._room", full)
    with caplog.at_level(logging.WARNING, "potstill"):
        for _ in range(2):
            assert torch.equal(source(batch)["logits"], live.live(batch)["logits"])
    assert torch.equal(source(rows(batch, range(8)))["logits"], kept)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert (source.counts.kept_nothing, source.counts.made) == (16, 8)
    with pytest.raises(CacheError, match="goes on with it"):
        cached(live, tmp_path, strict=True)(batch)


def test_the_teachers_own_view_decides(tmp_path):
    """Inputs that only the student reads may change; those of the teacher may not."""
    live = Counting(Live(mlp()))
    source, batch = cached(live, tmp_path), images()
    own = {**batch, "teacher/pixel_values": batch["pixel_values"] + 1}
    answer = source(own)["logits"]
    assert torch.equal(answer, live.live(own)["logits"])
    other = {**own, "pixel_values": batch["pixel_values"] * 2, "labels": torch.ones(16)}
    assert torch.equal(source(other)["logits"], answer)
    with pytest.raises(CacheError):
        source({**own, "teacher/pixel_values": batch["pixel_values"]})


def test_uncached_reaches_every_live_teacher(live, tmp_path):
    source = cached(live, tmp_path)
    assert uncached(source) is live
    assert uncached(live) is live
    both = uncached(Several({"a": source, "b": live}))
    assert both.teachers == {"a": live, "b": live}


def test_other_samples_of_the_same_teacher_come_beside(live, tmp_path):
    source = cached(live, tmp_path)
    source(images(4))
    more = {**images(8), "sample_id": torch.arange(8) + 5000}
    assert torch.equal(source(more)["logits"], live.live(more)["logits"])
    assert torch.equal(source(images(4))["logits"], live.live(images(4))["logits"])


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "attention_mask"])
def test_tags_depend_on_every_token(name):
    batch = {**texts(), "token_type_ids": torch.zeros(8, 12, dtype=torch.int64)}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    before = tags(batch, names)
    assert len(set(before.tolist())) == 8
    changed = {**batch, name: batch[name].clone()}
    changed[name][2, 1] = 0 if name == "attention_mask" else changed[name][2, 1] + 1
    assert np.flatnonzero(tags(changed, names) != before).tolist() == [2]


def test_tags_know_the_order_of_tokens_and_nothing_of_their_padding():
    names = ["input_ids", "attention_mask"]
    before = tags(texts(10), names)
    assert np.array_equal(tags(texts(25), names), before)
    filled = texts(25)
    filled["input_ids"] = torch.where(filled["attention_mask"] == 0, 7, filled["input_ids"])
    assert np.array_equal(tags(filled, names), before)
    swapped = texts(10)
    swapped["input_ids"][:, [0, 1]] = swapped["input_ids"][:, [1, 0]]
    assert (tags(swapped, names) != before).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.uint8, torch.int64])
def test_tags_depend_on_every_bit_of_an_image(dtype):
    pixels = (torch.rand(3, 1, 5, 3, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    before = tags({"pixel_values": pixels}, ["pixel_values"])
    raw = pixels.view(torch.uint8).reshape(3, -1)
    for place in range(raw.shape[1]):
        for bit in (0, 7):
            other = raw.clone()
            other[1, place] ^= 1 << bit
            changed = tags({"pixel_values": other.view(dtype).reshape(pixels.shape)}, ["pixel_values"])
            assert np.flatnonzero(changed != before).tolist() == [1]


def test_tags_of_images_that_are_black_and_white_are_all_different():
    """Shifted binary images differ in few bits of each word, all of them high ones."""
    pixels = (torch.rand(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    found = tags({"pixel_values": pixels}, ["pixel_values"])
    assert len(set(found.tolist())) == len({row.numpy().tobytes() for row in pixels})


def _elsewhere(value):
    words = _words(value)
    return (words * _multipliers(words.shape[1], words.device)).sum(1)


@pytest.mark.parametrize("shape", [(3, 4, 4), (5,), (), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_tags_are_the_same_on_every_device(shape, dtype, monkeypatch):
    """What one process makes on an accelerator another finds on a processor."""
    value = (torch.rand(6, *shape, generator=torch.Generator().manual_seed(0)) * 250).to(dtype)
    here = tags({"pixel_values": value}, ["pixel_values"])
    monkeypatch.setattr("potstill.teachers.tags._hashed", lambda v: _elsewhere(v).numpy())
    assert np.array_equal(tags({"pixel_values": value}, ["pixel_values"]), here)
    backwards = (
        torch.flip(value, [0]).flip(0) if value.ndim == 1 else value.transpose(0, -1).contiguous().transpose(0, -1)
    )
    assert np.array_equal(tags({"pixel_values": backwards}, ["pixel_values"]), here)


def test_two_entries_do_not_make_up_for_each_other():
    batch = {**texts(), "token_type_ids": torch.ones(8, 12, dtype=torch.int64)}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    other = {**batch, "input_ids": batch["input_ids"] + 1, "token_type_ids": batch["token_type_ids"] - 1}
    assert not set(tags(batch, names)) & set(tags(other, names))
    pair = {"left": torch.rand(4, 6), "right": torch.rand(4, 6)}
    swapped = {"left": pair["right"], "right": pair["left"]}
    assert not set(tags(pair, ["left", "right"])) & set(tags(swapped, ["left", "right"]))


def test_numbers_beside_a_mask():
    """Sound is padded as texts are; features only happen to be as many."""
    mask = torch.ones(2, 6, dtype=torch.int64)
    for name in ("input_values", "features"):
        batch = {name: torch.rand(2, 6) / 2, "attention_mask": mask}
        assert (tags(batch, [name]) != tags({**batch, name: batch[name] / 3}, [name])).all()
    wider = {"features": torch.rand(2, 6), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    assert np.array_equal(tags(wider, ["features"]), tags({**wider, "attention_mask": mask}, ["features"]))


def test_what_depends_on_the_padding_is_refused_or_live(tmp_path, caplog):
    live = Live(tiny.teacher())
    with pytest.raises(CacheError, match="padded on the left"):
        cached(live, tmp_path)(texts(left=True))
    again = cached(live, tmp_path, required=False)
    assert torch.equal(again(texts(left=True))["logits"], live(texts(left=True))["logits"])
    assert "padded on the left" in caplog.text

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(60, 3)

        def forward(self, input_ids):
            return self.table(input_ids).mean(1)

    with pytest.raises(CacheError, match="reads no attention_mask"):
        cached(Live(Mean()), tmp_path / "mean")(texts())


def test_what_changes_is_live_where_a_cache_is_not_required(live, tmp_path, caplog):
    source, batch = cached(live, tmp_path, required=False), images()
    source(batch)
    changed = {**batch, "pixel_values": batch["pixel_values"] + 1}
    for _ in range(2):
        assert torch.equal(source(changed)["logits"], live.live(changed)["logits"])
    assert len(caplog.records) == 1
    assert source.counts.kept_nothing == 32


@pytest.mark.parametrize("ids", [torch.arange(16) - 3, torch.arange(16) + 2**40])
def test_ids_that_are_no_rows(ids, live, tmp_path):
    with pytest.raises(CacheError, match="row numbers from 0"):
        cached(live, tmp_path)({**images(), "sample_id": ids})


def test_a_signal_of_the_whole_batch_is_refused(tmp_path):
    class Similar(nn.Module):
        def forward(self, pixel_values):
            flat = pixel_values.flatten(1)
            return flat @ flat.T

    with pytest.raises(CacheError, match="depends on the batch that a sample is in"):
        cached(Live(Similar()), tmp_path)(images())


def test_only_what_is_read_is_kept(tmp_path):
    live = Counting(Live(tiny.teacher(), ["hidden.1", "hidden.2"]))
    source = cached(live, tmp_path, signals={"logits", "hidden.2"})
    assert set(source(texts())) == set(source(texts())) == {"logits", "hidden.2"}


def test_a_term_without_a_mask_is_noticed_in_a_full_cache_too(tmp_path):
    live = Counting(Live(tiny.teacher(), ["hidden.1"]))
    cached(live, tmp_path)(texts())
    with pytest.raises(CacheError, match="padded places"):
        cached(live, tmp_path, unmasked={"hidden.1"})(texts())


def test_other_inputs_than_those_of_the_answers_are_named(tmp_path):
    live = Counting(Live(tiny.teacher()))
    cached(live, tmp_path)(texts())
    more = {**texts(), "token_type_ids": torch.ones(8, 12, dtype=torch.int64)}
    with pytest.raises(CacheError, match=r"given to attention_mask, input_ids, and the teacher is asked with"):
        cached(live, tmp_path)(more)


def test_plain_attributes_and_buffers_count(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, k, mean):
            super().__init__()
            self.k = k
            self.register_buffer("mean", torch.tensor(mean), persistent=False)

        def forward(self, pixel_values):
            return (pixel_values.flatten(1) - self.mean) * self.k

    assert len({weights_hash(Scaled(k, mean)) for k in (1, 5) for mean in (0.0, 5.0)}) == 4


def test_a_folder_that_cannot_be_written_leaves_the_teacher_live(live, tmp_path, caplog):
    (tmp_path / "file").write_text("", encoding="utf-8")
    source = cached(live, tmp_path / "file", required=False)
    assert torch.equal(source(images())["logits"], live.live(images())["logits"])
    assert "the teacher answers each time" in caplog.text


def test_a_folder_deleted_meanwhile_loses_nothing_but_the_cache(live, tmp_path, caplog):
    import shutil

    source = cached(live, tmp_path, required=False)
    source(images(8))
    source.close()
    shutil.rmtree(tmp_path)
    more = {**images(8), "sample_id": torch.arange(8) + 50}
    assert torch.equal(source(more)["logits"], live.live(more)["logits"])
