"""Projectors: chosen by the shapes, with the arithmetic that their names say, trained and saved like any layer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError
from potstill.knowledge.alignment import make_projector
from potstill.knowledge.layouts import grid_of, layouts_of, resized
from potstill.knowledge.projectors import AttentionPool, HeadMix, HeadWidths, Projector

B = 3
VECTOR, TOKENS, MAP = (B, 6), (B, 7, 6), (B, 6, 4, 4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def project(projector: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Call a projector as a term does."""
    return projector(student, teacher) if getattr(projector, "takes_teacher", False) else projector(student)


def made(kind: str, student: Tensor, teacher: Tensor, **options: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_projector(kind, student, teacher, **options)


def layer_of(projector: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Weight [out, in] and bias of the one linear map in a projector."""
    weight, bias = projector.parameters()
    return weight.detach().flatten(1).numpy().astype(float), bias.detach().numpy().astype(float)


# ---- auto: what is chosen, and that it fits -------------------------------------------------------------------------

CHOICES = {
    "equal shapes": (TOKENS, TOKENS, nn.Identity),
    "vectors": (VECTOR, (B, 9), nn.Linear),
    "tokens of another width": (TOKENS, (B, 7, 9), nn.Linear),
    "maps of another width": (MAP, (B, 9, 4, 4), nn.Conv2d),
    "smaller maps": (MAP, (B, 9, 2, 2), Projector),
    "larger maps": (MAP, (B, 9, 8, 6), Projector),
    "shorter tokens": (TOKENS, (B, 5, 9), Projector),
    "longer tokens": (TOKENS, (B, 11, 9), Projector),
    "CNN to ViT": (MAP, (B, 10, 9), Projector),
    "ViT to CNN": ((B, 17, 6), (B, 9, 7, 7), Projector),
    "ViT to ViT of other patches": ((B, 17, 6), (B, 26, 9), Projector),
    "class token to two": ((B, 17, 6), (B, 18, 9), Projector),
    "map to vector": (MAP, (B, 9), Projector),
    "tokens to vector": (TOKENS, (B, 9), AttentionPool),
    "tokens of no grid to map": (TOKENS, (B, 9, 4, 4), AttentionPool),
    "map to tokens of no grid": (MAP, (B, 7, 9), AttentionPool),
    "queries of other heads": ((B, 2, 7, 6), (B, 5, 7, 6), nn.Conv2d),
    "queries of another width": ((B, 2, 7, 6), (B, 2, 7, 9), nn.Linear),
    "queries of other heads and width": ((B, 2, 7, 6), (B, 5, 7, 9), HeadWidths),
    "maps with the channels last": ((B, 4, 4, 6), (B, 4, 4, 9), nn.Linear),
    "channels last to smaller": ((B, 4, 4, 6), (B, 2, 2, 9), Projector),
    "channels last to first": ((B, 4, 4, 6), (B, 9, 2, 2), Projector),
    "channels last to first of the same size": ((B, 4, 4, 6), (B, 9, 4, 4), Projector),
    "channels first to last": (MAP, (B, 2, 2, 9), Projector),
    "video, another width": ((B, 2, 3, 4, 6), (B, 2, 3, 4, 9), nn.Linear),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_finds_a_projector_for_every_pair(name):
    ours, theirs, kind = CHOICES[name]
    student, teacher = randn(*ours, seed=1).requires_grad_(), randn(*theirs, seed=2)
    projector = made("auto", student, teacher)
    assert isinstance(projector, kind)
    out = project(projector, student, teacher)
    assert out.shape == teacher.shape
    assert out.dtype == torch.float32
    out.square().sum().backward()
    assert student.grad.abs().flatten(1).sum(1).min() > 0
    assert all(parameter.dtype == torch.float32 for parameter in projector.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in projector.parameters())


OTHERS = [(TOKENS, (B, 5, 9)), (TOKENS, (B, 7, 9)), (MAP, (B, 9, 2, 2)), ((B, 4, 4, 6), (B, 2, 2, 9))]
OTHERS += [((B, 4, 4, 6), (B, 4, 4, 9))]
CASES = [("auto", ours, theirs) for ours, theirs, kind in CHOICES.values() if kind is not nn.Identity]
CASES += [(kind, *pair) for kind in ("mlp", "attention") for pair in OTHERS] + [
    ("conv", *OTHERS[2]),
    ("conv", *OTHERS[3]),
]


@pytest.mark.parametrize(("kind", "ours", "theirs"), CASES)
def test_a_narrow_type_is_cast_and_another_batch_size_fits(kind, ours, theirs):
    student, teacher = randn(*ours, seed=1), randn(*theirs, seed=2)
    projector = made(kind, student, teacher).eval()
    expected = project(projector, student.bfloat16().float(), teacher)
    value = project(projector, student.bfloat16(), teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(project(projector, student[:1].bfloat16(), teacher[:1]), expected[:1])


def test_the_sizes_of_the_dry_run_hold_without_a_teacher():
    """A term that does not hand over the teacher's signal still gets its shape."""
    student, teacher = randn(B, 7, 6), randn(B, 11, 9)
    for kind in ("auto", "mlp", "attention"):
        projector = made(kind, student, teacher)
        torch.testing.assert_close(projector(student), projector(student, teacher))


@pytest.mark.parametrize("kind", ["auto", "mlp", "attention"])
def test_lengths_may_change_from_batch_to_batch(kind):
    projector = made(kind, randn(B, 7, 6), randn(B, 11, 9))
    for ours, theirs in ((20, 3), (4, 4), (1, 6)):
        assert projector(randn(2, ours, 6), randn(2, theirs, 9)).shape == (2, theirs, 9)


@pytest.mark.parametrize("kind", ["attention", "stretch"])
def test_some_kinds_take_no_tokens_for_patches(kind):
    """A text of 16 tokens is no image, and the next one has another length."""
    projector = made(kind, randn(B, 16, 6), randn(B, 25, 9))
    assert projector(randn(2, 20, 6), randn(2, 3, 9)).shape == (2, 3, 9)


def test_stretching_is_what_auto_does_with_tokens_that_are_no_patches():
    student, teacher = randn(B, 7, 6), randn(B, 11, 9)
    torch.testing.assert_close(made("stretch", student, teacher)(student), made("auto", student, teacher)(student))
    assert made("auto", randn(B, 9, 6), teacher)(randn(B, 8, 6), randn(B, 5, 9)).shape == (B, 5, 9)  # 3 × 3 is no image


@pytest.mark.parametrize("kind", ["auto", "mlp", "conv", "attention"])
def test_image_sizes_may_change_from_batch_to_batch(kind):
    projector = made(kind, randn(B, 6, 4, 4), randn(B, 9, 8, 8))
    assert projector(randn(2, 6, 6, 5), randn(2, 9, 12, 10)).shape == (2, 9, 12, 10)


def test_the_teacher_gives_its_size_alone():
    """Anything more would let the projector copy the answer."""
    student, teacher = randn(*TOKENS, seed=1), randn(B, 11, 9, seed=2)
    for kind in ("auto", "mlp", "attention"):
        projector = made(kind, student, teacher)
        torch.testing.assert_close(projector(student, teacher), projector(student, teacher * math.nan))


# ---- the arithmetic -------------------------------------------------------------------------------------------------


def test_linear_on_tokens_and_maps():
    student = randn(*TOKENS, seed=1)
    projector = made("linear", student, randn(B, 7, 9))
    weight, bias = layer_of(projector)
    np.testing.assert_allclose(projector(student).detach(), student.double().numpy() @ weight.T + bias, atol=1e-6)
    maps = randn(*MAP, seed=2)
    projector = made("linear", maps, randn(B, 9, 4, 4))
    weight, bias = layer_of(projector)
    expected = np.einsum("oc,bchw->bohw", weight, maps.double().numpy()) + bias[:, None, None]
    np.testing.assert_allclose(projector(maps).detach(), expected, atol=1e-6)
    assert set(projector.state_dict()) == {"weight", "bias"}  # as those of older checkpoints


def test_linear_is_made_for_equal_shapes_too():
    assert isinstance(made("linear", randn(*TOKENS), randn(*TOKENS)), nn.Linear)


def test_mlp_is_two_layers_with_gelu_as_wide_as_the_teacher():
    student = randn(*TOKENS, seed=1)
    projector = made("mlp", student, randn(B, 7, 9))
    first, first_bias, second, second_bias = (p.detach().double().numpy() for p in projector.parameters())
    assert (first.shape, second.shape) == ((9, 6), (9, 9))
    inner = student.double().numpy() @ first.T + first_bias
    inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    np.testing.assert_allclose(projector(student).detach(), inner @ second.T + second_bias, atol=1e-6)
    maps = made("mlp", randn(*MAP), randn(B, 9, 4, 4))
    assert [tuple(p.shape) for p in maps.parameters()] == [(9, 6, 1, 1), (9,), (9, 9, 1, 1), (9,)]


def test_conv_normalises_each_channel():
    student = randn(*MAP, seed=1)
    projector = made("conv", student, randn(B, 9, 4, 4))
    out = projector(student).detach().double().transpose(0, 1).flatten(1)
    weight = projector[0].weight.detach().double().flatten(1)
    raw = torch.einsum("oc,bchw->bohw", weight, student.double()).transpose(0, 1).flatten(1)
    expected = (raw - raw.mean(1, keepdim=True)) / (raw.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert projector[0].bias is None  # BatchNorm has one


def test_smaller_maps_are_averages_and_larger_ones_are_interpolated():
    student = randn(B, 6, 4, 4, seed=1)
    projector = made("auto", student, randn(B, 9, 2, 2))
    weight, bias = layer_of(projector)
    means = student.double().numpy().reshape(B, 6, 2, 2, 2, 2).mean((3, 5))
    expected = np.einsum("oc,bchw->bohw", weight, means) + bias[:, None, None]
    np.testing.assert_allclose(projector(student).detach(), expected, atol=1e-6)
    ramp = torch.arange(4.0).repeat(1, 1, 4, 1)  # a ramp stays a ramp, flat at its ends
    np.testing.assert_allclose(resized(ramp, (4, 8))[0, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)


def test_other_lengths_are_interpolated_along_the_tokens():
    student = torch.arange(4.0)[None, :, None].expand(2, 4, 1)
    projector = made("auto", student, randn(2, 7, 3))
    weight, bias = layer_of(projector)
    places = np.clip((np.arange(7) + 0.5) * 4 / 7 - 0.5, 0, 3)
    np.testing.assert_allclose(projector(student)[0].detach(), places[:, None] * weight.T + bias, atol=1e-5)


def test_a_map_becomes_patches_in_their_order_after_a_class_token_of_its_mean():
    student = randn(B, 6, 2, 3, seed=1)
    teacher = randn(B, 7, 9)
    projector = made("auto", student, teacher)
    weight, bias = layer_of(projector)
    rows = student.double().numpy().reshape(B, 6, 6).transpose(0, 2, 1)
    rows = np.concatenate([rows.mean(1, keepdims=True), rows], 1)
    np.testing.assert_allclose(projector(student, teacher).detach(), rows @ weight.T + bias, atol=1e-6)


def test_patches_become_a_map_without_the_class_token():
    student = randn(B, 10, 6, seed=1)
    projector = made("auto", student, randn(B, 9, 3, 3))
    weight, bias = layer_of(projector)
    maps = student[:, 1:].double().numpy().transpose(0, 2, 1).reshape(B, 6, 3, 3)
    expected = np.einsum("oc,bchw->bohw", weight, maps) + bias[:, None, None]
    np.testing.assert_allclose(projector(student).detach(), expected, atol=1e-6)


def test_patches_of_two_transformers_are_matched_as_images():
    """Interpolated along T, the end of one row of patches would be mixed with the beginning of the next."""
    student = torch.zeros(1, 1 + 16, 1)
    student[0, 0] = 100.0
    student[0, 1:, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(4)  # the right half of the image
    teacher = randn(1, 1 + 4 + 64, 1)  # a class token and four registers
    projector = made("auto", student, teacher)
    weight, bias = layer_of(projector)
    out = (projector(student, teacher)[0, :, 0].detach().numpy() - bias) / weight[0]
    np.testing.assert_allclose(out[0], 100, rtol=1e-5)
    np.testing.assert_allclose(out[1:5], 0.5, atol=1e-4)  # the student has no registers: the mean of its patches
    np.testing.assert_allclose(out[5:].reshape(8, 8), np.tile([0, 0, 0, 0.25, 0.75, 1, 1, 1], (8, 1)), atol=1e-4)


def test_the_number_of_prefix_tokens_can_be_said():
    student, teacher = randn(B, 16, 6), randn(B, 9, 4, 4)
    assert layouts_of(student, teacher)[0].prefix == 0
    student = randn(B, 4 + 7, 6)  # told from the number alone, 2 and a grid of 3 × 3
    assert layouts_of(student, teacher)[0].prefix == 2
    assert layouts_of(student, teacher, 7)[0].space == (2, 2)
    assert made("auto", student, teacher, prefix=7)(student, teacher).shape == teacher.shape


def test_a_map_becomes_a_vector_by_its_mean():
    student = randn(*MAP, seed=1)
    projector = made("auto", student, randn(B, 9))
    weight, bias = layer_of(projector)
    np.testing.assert_allclose(
        projector(student).detach(), student.double().numpy().mean((2, 3)) @ weight.T + bias, atol=1e-6
    )


def test_channels_may_be_last_on_either_side():
    student, teacher = randn(B, 4, 4, 6, seed=1), randn(B, 2, 2, 9)
    projector = made("auto", student, teacher)
    weight, bias = layer_of(projector)
    expected = student.double().numpy().reshape(B, 2, 2, 2, 2, 6).mean((2, 4)) @ weight.T + bias
    np.testing.assert_allclose(projector(student, teacher).detach(), expected, atol=1e-6)
    first = made("auto", student, teacher.movedim(-1, 1))
    np.testing.assert_allclose(first(student).detach(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_heads_and_their_width_are_mapped_together():
    student = randn(B, 2, 7, 6, seed=1)
    projector = made("auto", student, randn(B, 5, 7, 9))
    weight, bias = layer_of(projector)
    merged = student.double().numpy().transpose(0, 2, 1, 3).reshape(B, 7, 12) @ weight.T + bias
    expected = merged.reshape(B, 7, 5, 9).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(projector(student).detach(), expected, atol=1e-6)
    assert projector(randn(2, 2, 4, 6)).shape == (2, 5, 4, 9)


def test_attention_pooling_by_its_formula():
    student, teacher = randn(B, 7, 6, seed=1), randn(B, 4, 9)
    pool = made("attention", student, teacher)
    nn.init.normal_(pool.positions)
    queries, positions = (p.detach().double().numpy() for p in (pool.queries, pool.positions))
    assert (queries.shape, positions.shape) == ((4, 9), (7, 9))
    keys = pool.key(student).detach().double().numpy() + positions
    scores = np.einsum("qd,btd->bqt", queries, keys) / 3
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = weights @ pool.value(student).detach().double().numpy()
    np.testing.assert_allclose(pool(student, teacher).detach(), expected, atol=1e-5)


def test_attention_pooling_can_learn_where_to_look():
    """The third of the student's places, whatever is there: only the learned positions can tell which it is."""
    torch.manual_seed(0)
    pool = make_projector("attention", randn(8, 5, 4), randn(8, 1, 4))
    optimizer = torch.optim.Adam(pool.parameters(), 0.03)
    for step in range(200):
        student = randn(32, 5, 4, seed=step)
        loss = (pool(student) - student[:, 2:3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # the mean of all five places is at 0.8


# ---- attention maps -------------------------------------------------------------------------------------------------


def attention(heads: int, tokens: int = 7, seed: int = 0) -> Tensor:
    return randn(B, heads, tokens, tokens, seed=seed).mul(3).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_heads_stay_probabilities(dtype):
    """A 1×1 convolution gives negative numbers, and a divergence between rows that do not sum to 1 is none."""
    student, teacher = attention(2, seed=1).to(dtype), attention(5, seed=2).to(dtype)
    mix = made("auto", student, teacher)
    assert isinstance(mix, HeadMix)
    nn.init.normal_(mix.weight, std=2)
    out = mix(student)
    assert out.shape == teacher.shape
    assert (out >= 0).all()
    torch.testing.assert_close(out.sum(-1), student.float().sum(-1)[:, :1].expand(-1, 5, -1), atol=0.02, rtol=0)
    weights = np.exp(mix.weight.detach().double().numpy())
    weights /= weights.sum(1, keepdims=True)
    expected = sum(weights[:, s, None, None] * student.double().numpy()[:, s, None] for s in range(2))
    np.testing.assert_allclose(out.detach(), expected, atol=1e-6)


def test_heads_are_mixed_in_fp32_under_autocast():
    student = attention(2, tokens=300)
    mix = made("heads", student, attention(3, tokens=300))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mix(student)
    torch.testing.assert_close(out.sum(-1), torch.ones(B, 3, 300), atol=1e-5, rtol=0)


def test_scores_are_no_probabilities():
    student, teacher = randn(B, 2, 7, 7), randn(B, 5, 7, 7)
    assert isinstance(made("auto", student, teacher), nn.Conv2d)
    assert isinstance(made("auto", attention(2), teacher), nn.Conv2d)


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED = [
    ("linear", MAP, (B, 6, 2, 2), r"width alone, got student \[3, 6, 4, 4\] and teacher \[3, 6, 2, 2\].*project: auto"),
    ("linear", TOKENS, VECTOR, "width alone"),
    ("linear", (4,), (5,), "width alone"),
    ("auto", VECTOR, MAP, r"lost its places.*\[3, 6\].*\[3, 6, 4, 4\].*before its pooling"),
    ("auto", VECTOR, TOKENS, "lost its places"),
    ("attention", VECTOR, TOKENS, "lost its places"),
    ("mlp", VECTOR, TOKENS, "lost its places"),
    ("mlp", TOKENS, VECTOR, r"\[3, 7, 6\] and teacher \[3, 6\]; say `project: attention`"),
    ("mlp", TOKENS, MAP, "say `project: attention`"),
    ("conv", TOKENS, (B, 7, 9), "expected a map.*say `project: linear` or `project: mlp`"),
    ("stretch", MAP, TOKENS, r"expected tokens \[B, T, H\]"),
    ("heads", TOKENS, TOKENS, "number of heads alone"),
    ("auto", (B, 7, 6), (2, 5, 6), r"one batch, got student \[3, 7, 6\] and teacher \[2, 5, 6\]"),
    ("auto", (B, 2, 3, 4, 6), (B, 2, 3, 5, 6), "width alone"),
    ("auto", (B, 2, 3, 4, 6), MAP, r"expected a signal \[B, H\]"),
]


@pytest.mark.parametrize(("kind", "ours", "theirs", "message"), REFUSED)
def test_the_impossible_says_what_to_do(kind, ours, theirs, message):
    with pytest.raises(ObjectiveError, match=message):
        make_projector(kind, torch.zeros(ours), torch.zeros(theirs))


def test_attention_maps_of_other_tokens_are_refused():
    with pytest.raises(ObjectiveError, match=r"heads alone.*compare hidden states"):
        make_projector("auto", attention(2, 7), attention(2, 9))


def test_unknown_kinds_and_tuples():
    with pytest.raises(ObjectiveError, match="no projector 'liner'; did you mean 'linear'"):
        make_projector("liner", torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ObjectiveError, match="one signal on each side, got tuple"):
        make_projector("auto", (torch.zeros(2, 3),), torch.zeros(2, 4))  # type: ignore[arg-type]


def test_tokens_that_were_a_grid_must_stay_one():
    projector = made("auto", randn(B, 17, 6), randn(B, 9, 7, 7))
    assert projector(randn(B, 26, 6), randn(B, 9, 7, 7)).shape == (B, 9, 7, 7)
    with pytest.raises(ObjectiveError, match=r"1 tokens and a grid of patches, now it is \[3, 20, 6\]"):
        projector(randn(B, 20, 6), randn(B, 9, 7, 7))
    with pytest.raises(ObjectiveError, match="say `project: stretch` for tokens of text"):
        made("auto", randn(B, 16, 6), randn(B, 25, 9))(randn(B, 20, 6), randn(B, 25, 9))
    with pytest.raises(ObjectiveError, match=r"made for map expected 4 axes, got \[3, 9\]"):
        projector(randn(B, 17, 6), randn(B, 9))


@pytest.mark.parametrize(
    ("tokens", "aspect", "expected"),
    [
        (196, None, ((14, 14), 0)),
        (197, None, ((14, 14), 1)),
        (198, None, ((14, 14), 2)),  # DeiT with its distillation token
        (261, None, ((16, 16), 5)),  # DINOv2 with registers
        (1214, (12, 101), ((12, 101), 2)),  # the audio spectrogram transformer
        (128, None, None),
        (128, (8, 16), ((8, 16), 0)),
        (1, None, None),
    ],
)
def test_grids(tokens, aspect, expected):
    assert grid_of(tokens, aspect=aspect) == expected


# ---- a layer like any other -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
def test_its_state_is_whole(name):
    ours, theirs, _ = CHOICES[name]
    student, teacher = randn(*ours, seed=1), randn(*theirs, seed=2)
    first, second = (make_projector("auto", student, teacher) for _ in range(2))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(project(first, student, teacher), project(second, student, teacher))


@pytest.mark.parametrize("name", ["CNN to ViT", "tokens to vector"])
def test_no_graph_break_under_compile(name):
    ours, theirs, _ = CHOICES[name]
    student, teacher = randn(*ours, seed=1), randn(*theirs, seed=2)
    projector = made("auto", student, teacher)
    torch._dynamo.reset()
    compiled = torch.compile(projector, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher), projector(student, teacher))


def test_it_is_made_where_the_student_is():
    student, teacher = torch.zeros(MAP, device="meta"), torch.zeros(B, 9, 2, 2, device="meta")
    projector = make_projector("auto", student, teacher)
    assert {parameter.device.type for parameter in projector.parameters()} == {"meta"}
    assert projector(student).shape == teacher.shape


def test_a_different_default_type_changes_nothing():
    torch.set_default_dtype(torch.bfloat16)
    try:
        kinds = [
            make_projector(kind, randn(*MAP).float(), randn(B, 9, 2, 2).float()) for kind in ("auto", "conv", "mlp")
        ]
        kinds += [make_projector("attention", randn(*TOKENS).float(), randn(B, 5, 9).float())]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 for each in kinds for p in each.parameters())
