"""Signals as records and back."""

from __future__ import annotations

import pytest
import torch

from potstill.errors import CacheError
from potstill.teachers.encoding import Encoding


def masks(left=False):
    inside = torch.arange(6)[None] < torch.tensor([3, 6, 1, 4])[:, None]
    return inside.flip(1) if left else inside


def signals(inside, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    mask = inside.float()
    hidden = torch.randn(4, 6, 3, generator=draw) * mask[..., None]
    attention = torch.rand(4, 2, 6, 6, generator=draw) * mask[:, None, :, None] * mask[:, None, None]
    query = torch.randn(4, 2, 6, 5, generator=draw) * mask[:, None, :, None]
    logits = torch.randn(4, 7, generator=draw)
    said = {"logits": logits, "hidden.1": hidden, "attention.0": attention, "query.0": query}
    return {name: value.to(dtype) for name, value in said.items()}


AXES = {"hidden.1": (1,), "attention.0": (2, 3), "query.0": (2,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("left", [False, True])
def test_what_goes_in_comes_back(dtype, left):
    inside = masks(left)
    said = signals(inside, dtype)
    encoding = Encoding.of(said, AXES)
    words, counts, lengths = encoding.encode(said, inside)
    back = encoding.decode(words, lengths, inside)
    assert counts.sum() == len(words)
    for name, value in said.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], value), name


def test_a_record_does_not_depend_on_the_padding_of_its_batch():
    inside = masks()
    said = signals(inside)
    encoding = Encoding.of(said, AXES)
    words, counts, lengths = encoding.encode(said, inside)
    first = words[: counts[0]]
    alone = {
        "logits": said["logits"][:1],
        "hidden.1": said["hidden.1"][:1, :3],
        "attention.0": said["attention.0"][:1, :, :3, :3],
        "query.0": said["query.0"][:1, :, :3],
    }
    again, _, _ = encoding.encode(alone, torch.ones(1, 3, dtype=torch.bool))
    assert (first == again).all()
    wider = torch.cat([masks(), torch.zeros(4, 2, dtype=torch.bool)], 1)
    back = encoding.decode(words, lengths, wider)
    assert torch.equal(back["hidden.1"][:, :6], said["hidden.1"])
    assert back["hidden.1"][:, 6:].abs().sum() == 0


def test_integers_and_images_without_tokens():
    said = {"logits": torch.randn(3, 5), "feature": torch.randn(3, 2, 4, 4), "code": torch.arange(3)[:, None]}
    encoding = Encoding.of(said, {}, precision="fp16")
    words, _, lengths = encoding.encode(said, None)
    back = encoding.decode(words, lengths, None)
    assert torch.equal(back["code"], said["code"])
    assert torch.equal(back["feature"], said["feature"].half().float())
    assert back["feature"].dtype == torch.float32


@pytest.mark.parametrize("axes", [{}, {"logits": (1,)}])
def test_the_most_likely_classes_and_the_mass_of_the_others(axes):
    said = {"logits": torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(1)) * 3}
    inside = torch.ones(4, 6, dtype=torch.bool) if axes else None
    encoding = Encoding.of(said, axes, top_k=8)
    words, counts, lengths = encoding.encode(said, inside)
    back = encoding.decode(words, lengths, inside)["logits"]
    top = said["logits"].topk(8, -1)
    assert torch.equal(back.gather(-1, top.indices), top.values)
    exact, kept = said["logits"].softmax(-1), back.softmax(-1)
    assert torch.allclose(exact.gather(-1, top.indices), kept.gather(-1, top.indices), atol=1e-6)  # the tail is right
    others = kept.scatter(-1, top.indices, torch.nan)
    spread = others.nan_to_num(-1).amax(-1) - others.nan_to_num(2).amin(-1)
    assert spread.abs().max() < 1e-6  # and even
    assert int(counts[0]) * 8 < 6 * 50 * 4


def test_many_classes():
    said = {"logits": torch.randn(2, 70000, generator=torch.Generator().manual_seed(0))}
    said["logits"][:, [3, 69999]] = torch.tensor([9.0, 17.0])
    encoding = Encoding.of(said, {}, top_k=3, precision="bf16")
    words, _, lengths = encoding.encode(said, None)
    back = encoding.decode(words, lengths, None)["logits"]
    assert torch.equal(back.argmax(-1), said["logits"].argmax(-1))


def test_numbers_that_do_not_fit_are_refused():
    said = {"logits": torch.tensor([[1e6, 2.0]])}
    encoding = Encoding.of(said, {}, precision="fp16")
    with pytest.raises(CacheError, match=r"reaches 1e\+06, which float16 cannot hold; store it in bf16 or fp32"):
        encoding.encode(said, None)
    minus = {"logits": torch.tensor([[-torch.inf, 2.0]])}
    words, _, lengths = encoding.encode(minus, None)
    assert torch.equal(encoding.decode(words, lengths, None)["logits"], minus["logits"])


def test_mistakes_are_named():
    said = {"logits": torch.randn(2, 4)}
    with pytest.raises(CacheError, match="top_k below the 4 classes"):
        Encoding.of(said, {}, top_k=4)
    with pytest.raises(CacheError, match="'layer' cannot be cached: expected a tensor"):
        Encoding.of({"layer": (said["logits"],)}, {})
    encoding = Encoding.of(said, {})
    with pytest.raises(CacheError, match=r"expected the teacher's 'logits' to be \[4\]"):
        encoding.encode({"logits": torch.randn(2, 5)}, None)
    with pytest.raises(CacheError, match="gave no 'logits'"):
        encoding.encode({"other": torch.randn(2, 5)}, None)


def test_an_encoding_is_plain_data():
    encoding = Encoding.of(signals(masks()), AXES, precision="bf16", top_k=2)
    assert Encoding.from_plain(encoding.plain()).parts == encoding.parts
