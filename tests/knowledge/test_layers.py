"""Layer maps: the published rules, CKA against its formula, and blocks found in the model that they were cut from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from potstill.errors import ObjectiveError, SignalError
from potstill.knowledge.capture import capture
from potstill.knowledge.layers import candidate_taps, layer_map, linear_cka, match_by_cka
from potstill.models.cifar_resnet import CifarResNet
from potstill.models.plain import ConvNet, Mlp
from potstill.models.student import cut
from tests import local_models


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "expected"),
    [
        ("ratio", 4, 12, {0: 0, 1: 3, 2: 6, 3: 9, 4: 12}),  # TinyBERT-4
        ("ratio", 6, 12, {0: 0, 1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}),
        ("ratio", 4, 6, {0: 0, 1: 2, 2: 3, 3: 5, 4: 6}),  # 1.5 and 4.5 upwards, not to the even number
        ("ratio", 4, 10, {0: 0, 1: 3, 2: 5, 3: 8, 4: 10}),
        ("ratio", 4, 2, {0: 0, 1: 1, 2: 1, 3: 2, 4: 2}),
        ("last", 4, 12, {4: 12}),
        ("first", 3, 12, {1: 1, 2: 2, 3: 3}),
        ("skip", 6, 12, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}),  # the paper's {2, 4, 6, 8, 10}
        ("skip", 3, 12, {1: 4, 2: 8}),
        ("skip", 5, 12, {1: 2, 2: 4, 3: 6, 4: 8}),
        ("pkd_last", 6, 12, {1: 7, 2: 8, 3: 9, 4: 10, 5: 11}),  # the paper's {7, …, 11}
    ],
)
def test_the_rules_are_those_of_the_papers(rule, student, teacher, expected):
    assert layer_map(rule, student, teacher) == expected


def test_maps_of_ones_own():
    assert layer_map({1: 4, 2: 3}, 2, 4) == {1: 4, 2: 3}  # crossing is allowed
    assert layer_map([(0, 0), (2, 4)], 2, 4) == {0: 0, 2: 4}
    assert layer_map([[1, 2]], 2, 4) == {1: 2}  # pairs from YAML are lists
    assert layer_map({"layer1": "stages.0"}, 2, 4) == {"layer1": "stages.0"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ration", "no layer map 'ration'; did you mean 'ratio'"),
        ({3: 1}, r"student has layers 0 \(the embeddings\) to 2, got 3"),
        ({1: 5}, r"teacher has layers 0 \(the embeddings\) to 4, got 5"),
        ({-1: 2}, "got -1"),
        ({1: True}, "numbers or names of layers, got True for the teacher"),
        ({1: 2.0}, r"got 2\.0"),
        ([(1, 2), (1, 3)], "each layer of the student once, got 1 again"),
        ([(1, 2, 3)], "expected pairs"),
        (["12"], "expected pairs"),
        ({1: "layer1"}, "numbers alone or names alone"),
        ({}, "at least one pair"),
    ],
)
def test_wrong_maps(spec, message):
    with pytest.raises(ObjectiveError, match=message):
        layer_map(spec, 2, 4)


def test_rules_that_need_other_depths():
    for rule in ("first", "skip", "pkd_last"):
        with pytest.raises(ObjectiveError, match="teacher of at least 6 blocks, got 4; say 'ratio'"):
            layer_map(rule, 6, 4)
    for rule in ("skip", "pkd_last"):
        with pytest.raises(ObjectiveError, match=r"leaves out the last block.*say 'last'"):
            layer_map(rule, 1, 4)
    with pytest.raises(ObjectiveError, match="at least one block of each"):
        layer_map("ratio", 0, 4)


# ---- CKA ------------------------------------------------------------------------------------------------------------


def cka_of_kernels(x: np.ndarray, y: np.ndarray) -> float:
    """The paper's definition: HSIC of centred kernel matrices, which our formula never makes."""
    size = len(x)
    centring = np.eye(size) - np.ones((size, size)) / size

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        return float(np.trace(k @ centring @ other @ centring)) / (size - 1) ** 2

    k, other = x @ x.T, y @ y.T
    return hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))


@pytest.mark.parametrize(("rows", "ours", "theirs"), [(20, 5, 7), (6, 9, 30), (50, 1, 4)])
def test_cka_is_the_alignment_of_centred_kernels(rows, ours, theirs):
    x, y = randn(rows, ours, seed=1) + 3, randn(rows, theirs, seed=2)
    y[:, 0] += 2 * x[:, 0]
    assert linear_cka(x, y).item() == pytest.approx(cka_of_kernels(x.numpy(), y.numpy()), abs=1e-12)
    assert linear_cka(x.float(), y.float()).item() == pytest.approx(cka_of_kernels(x.numpy(), y.numpy()), abs=1e-5)


def test_cka_by_hand():
    """x = (1, −1, 0, 0) and y = (1, 0, −1, 0): ⟨x, y⟩² / (⟨x, x⟩⟨y, y⟩) = 1/4."""
    x, y = torch.tensor([[1.0], [-1], [0], [0]]), torch.tensor([[1.0], [0], [-1], [0]])
    assert linear_cka(x, y).item() == pytest.approx(0.25, abs=1e-6)
    assert linear_cka(x, x.roll(2, 0)).item() == pytest.approx(0, abs=1e-6)


def test_cka_does_not_see_rotations_shifts_and_scales():
    x, y = randn(30, 6, seed=3), randn(30, 8, seed=4)
    rotation = torch.linalg.qr(randn(6, 6, seed=5)).Q
    value = linear_cka(x, y)
    torch.testing.assert_close(linear_cka(1000 * x @ rotation + 7, y), value)
    torch.testing.assert_close(linear_cka(x[:, torch.randperm(6)], y), value)
    torch.testing.assert_close(linear_cka(y, x), value)
    torch.testing.assert_close(linear_cka(x, x @ rotation), torch.tensor(1.0).double())
    assert linear_cka(x, x @ torch.diag(torch.arange(1.0, 7).double())) < 0.999  # but it does see a stretch


def test_cka_at_the_edges():
    assert linear_cka(torch.full((5, 3), 7.3), torch.randn(5, 2)) == 0  # constant features
    big = 1e12 * randn(20, 4).float()
    assert linear_cka(big, big).item() == pytest.approx(1, abs=1e-5)
    half = randn(20, 4).bfloat16()
    assert linear_cka(half, half).dtype == torch.float32
    with pytest.raises(ObjectiveError, match=r"got \[3, 2\] and \[4, 2\]"):
        linear_cka(torch.zeros(3, 2), torch.zeros(4, 2))


# ---- matching -------------------------------------------------------------------------------------------------------


def named(prefix: str, signals: list[Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{place}": signal for place, signal in enumerate(signals)}


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (2, 4), (3, 5), (4, 4), (4, 2), (3, 1)])
def test_the_match_is_the_best_of_all_that_keep_the_order(ours, theirs):
    """Against every monotone assignment there is; a greedy choice per layer fails this."""
    for seed in range(10):
        base = randn(9, 3, seed=seed)
        student = named("s", [base + randn(9, 3, seed=100 + 10 * seed + i) for i in range(ours)])
        teacher = named("t", [base + randn(9, 3, seed=500 + 10 * seed + i) for i in range(theirs)])
        found = match_by_cka(student, teacher)
        matrix = np.array([[cka_of_kernels(s.numpy(), t.numpy()) for t in teacher.values()] for s in student.values()])
        np.testing.assert_allclose(found.matrix.numpy(), matrix, atol=1e-6)
        choose = itertools.combinations if ours <= theirs else itertools.combinations_with_replacement
        best = max(choose(range(theirs), ours), key=lambda columns: sum(matrix[range(ours), columns]))
        assert found.pairs == {f"s{row}": f"t{column}" for row, column in enumerate(best)}
        assert found.similarity == pytest.approx({f"s{row}": matrix[row, column] for row, column in enumerate(best)})


def test_of_equal_layers_the_shallowest_is_taken():
    layer = randn(9, 3, seed=1)
    found = match_by_cka({"s": layer}, {"t0": randn(9, 3, seed=2), "t1": layer, "t2": layer})
    assert found.pairs == {"s": "t1"}


def test_shared_embeddings_do_not_attract_every_layer():
    """All layers of a student are a little like the teacher's first one; they must not all be matched to it."""
    student = named("s", [randn(40, 4, seed=1) + step * randn(40, 4, seed=2 + step) for step in range(3)])
    teacher = named("t", [randn(40, 4, seed=1) + step * randn(40, 4, seed=20 + step) for step in range(6)])
    assert len(set(match_by_cka(student, teacher).pairs.values())) == 3


def test_only_tokens_that_count_are_compared():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    student, teacher = randn(3, 4, 5, seed=1), randn(3, 4, 6, seed=2)
    found = match_by_cka({"s": student}, {"t": teacher}, mask)
    expected = cka_of_kernels(student[mask == 1].numpy(), teacher[mask == 1].numpy())
    assert found.matrix.item() == pytest.approx(expected, abs=1e-6)
    assert found.rows == 9
    student[mask == 0], teacher[mask == 0] = 1e6, -1e6
    assert match_by_cka({"s": student}, {"t": teacher}, mask).matrix.item() == pytest.approx(expected, abs=1e-6)


def test_many_tokens_are_thinned_out_to_the_same_ones():
    student, teacher = randn(40, 20, 3, seed=1), randn(40, 20, 4, seed=2)
    teacher[..., :3] += student
    state = torch.get_rng_state()
    found = match_by_cka({"s": student}, {"t": teacher}, rows=500)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.rows == 500
    again = match_by_cka({"s": student}, {"t": teacher}, rows=500)
    assert torch.equal(found.matrix, again.matrix)
    whole = match_by_cka({"s": student}, {"t": teacher}).matrix.item()
    assert found.matrix.item() == pytest.approx(whole, abs=0.05)
    assert found.matrix.item() != whole


def test_maps_are_compared_on_the_smallest_grid():
    student, teacher = randn(6, 3, 8, 8, seed=1), randn(6, 5, 4, 4, seed=2)
    small = student.numpy().reshape(6, 3, 4, 2, 4, 2).mean((3, 5)).transpose(0, 2, 3, 1).reshape(-1, 3)
    rows = teacher.numpy().transpose(0, 2, 3, 1).reshape(-1, 5)
    found = match_by_cka({"s": student}, {"t": teacher})
    assert found.matrix.item() == pytest.approx(cka_of_kernels(small, rows), abs=1e-6)


def test_patches_are_compared_with_the_places_of_a_map():
    teacher = randn(6, 17, 5, seed=1)
    student = teacher[:, 1:].transpose(1, 2).reshape(6, 5, 4, 4)
    assert match_by_cka({"s": student}, {"t": teacher}).matrix.item() == pytest.approx(1, abs=1e-6)


def test_where_places_do_not_correspond_samples_are_compared():
    student, teacher = randn(9, 7, 4, seed=1), randn(9, 5, seed=2)
    found = match_by_cka({"s": student}, {"t": teacher})
    assert found.matrix.item() == pytest.approx(cka_of_kernels(student.numpy().mean(1), teacher.numpy()), abs=1e-6)
    mask = torch.ones(9, 7, dtype=torch.long)
    mask[:, 4:] = 0
    found = match_by_cka({"s": student}, {"t": teacher}, mask)
    assert found.matrix.item() == pytest.approx(
        cka_of_kernels(student.numpy()[:, :4].mean(1), teacher.numpy()), abs=1e-6
    )


def test_a_person_can_read_the_match():
    text = str(match_by_cka({"layer1": randn(9, 3, seed=1)}, {"a": randn(9, 3, seed=2), "b": randn(9, 3, seed=1)}))
    assert text.splitlines()[0].split() == ["a", "b"]
    assert text.splitlines()[1].startswith("layer1 ")
    assert text.endswith("*1.000")


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "message"),
    [
        ({}, {"t": torch.zeros(4, 3)}, None, "at least one signal of each"),
        ({"s": torch.zeros(4, 3)}, {"t": torch.zeros(5, 3)}, None, "one batch, got 4, 5 samples"),
        ({"s": torch.zeros(1, 3)}, {"t": torch.zeros(1, 3)}, None, "at least 2 samples"),
        ({"s": torch.zeros(2, 7, 3)}, {"t": torch.zeros(2, 9, 3)}, torch.ones(2, 7), "mask as long as the tokens"),
    ],
)
def test_what_cannot_be_matched(student, teacher, mask, message):
    with pytest.raises(ObjectiveError, match=message):
        match_by_cka(student, teacher, mask)


# ---- real models ----------------------------------------------------------------------------------------------------


def signals(model: nn.Module, *args: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    with torch.no_grad(), capture(model, candidate_taps(model)) as found:
        model(*args, **inputs)
    return dict(found)


@pytest.mark.parametrize("seed", [2, 5, 6])
@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 2, 4], [1, 3, 5]])
def test_the_blocks_of_a_cut_bert_are_found(kept, seed, tmp_path):
    """Matched one by one, or with several layers to one, most would go to the first block, which all have in common."""
    folder = local_models.bert(tmp_path / "bert", layers=6, seed=seed, initializer_range=0.1)
    teacher = transformers.BertModel.from_pretrained(folder).eval()
    student = cut(teacher, kept).eval()
    ids = torch.randint(5, teacher.config.vocab_size, (32, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < torch.arange(32)[:, None] % 12 + 4).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert candidate_taps(student) == ["hidden.1", "hidden.2", "hidden.3"]
    found = match_by_cka(signals(student, **inputs), signals(teacher, **inputs), mask)
    assert found.pairs == {f"hidden.{place + 1}": f"hidden.{block + 1}" for place, block in enumerate(kept)}
    assert found.rows == int(mask.sum())


def test_the_layers_of_a_resnet_are_found_in_a_permuted_copy():
    """The same network with its channels in another order computes the same; only the order of layers may matter."""
    torch.manual_seed(0)
    model = CifarResNet(8, 10).eval()
    images = torch.randn(8, 3, 16, 16)
    taps = candidate_taps(model)
    assert taps == ["layer1", "layer2", "layer3"]
    teacher = signals(model, images)
    student = {f"own.{tap}": teacher[tap].flip(1) * 3 for tap in taps}
    found = match_by_cka(student, teacher)
    assert found.pairs == {f"own.{tap}": tap for tap in taps}
    assert min(found.similarity.values()) > 0.999
    off = found.matrix[~torch.eye(3, dtype=torch.bool)]
    assert off.max() < 0.98


# ---- candidates -----------------------------------------------------------------------------------------------------

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}


class Numbered(nn.Module):
    """A plain model whose blocks happen to be called as the hidden states of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.hidden, self.hidden[2]]:
            x = block(x)
        return x


class Two(nn.Module):
    """Two lists of blocks, which have no forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.more = (
            nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)) for _ in range(2)
        )


CANDIDATES = {
    "mlp": (lambda: Mlp(4, 2, hidden=[3, 3]), ["body.2", "body.4"]),
    "convnet": (lambda: ConvNet(3, 2), ["stages.0", "stages.1"]),
    "one stage": (lambda: ConvNet(3, 2, widths=[4]), ["stages.0.2"]),
    "resnet": (lambda: torchvision.models.resnet18(), ["layer1", "layer2", "layer3", "layer4"]),
    "poolings of a vgg": (
        lambda: torchvision.models.vgg11(init_weights=False),
        ["features.2", "features.5", "features.10", "features.15", "features.20"],
    ),
    "timm vit": (lambda: timm.models.VisionTransformer(**VIT), ["blocks.0", "blocks.1", "blocks.2"]),
    "timm convnext": (lambda: timm.create_model("convnext_atto"), [f"stages.{stage}" for stage in range(4)]),
    "timm regnet": (lambda: timm.create_model("regnetx_002"), ["s1", "s2", "s3", "s4"]),
    "timm efficientnet": (lambda: timm.create_model("efficientnet_b0"), [f"blocks.{stage}" for stage in range(7)]),
    "two lists": (Two, ["blocks.0", "blocks.1", "more.0", "more.1"]),
    "a list": (Numbered, ["hidden.0", "hidden.1", "hidden.2"]),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_stages_of_plain_models(name):
    build, expected = CANDIDATES[name]
    with torch.device("meta"):
        model = build()
    assert candidate_taps(model) == expected


def test_candidates_that_are_called_twice_or_give_no_tensor_are_left_out():
    model = Numbered()
    assert candidate_taps(model, lambda m: m(torch.zeros(2, 4))) == ["hidden.0", "hidden.1"]
    assert not any(module._forward_hooks for module in model.modules())


def test_candidates_of_transformers():
    bert = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
    assert candidate_taps(bert) == ["hidden.1", "hidden.2"]
    t5 = transformers.T5Model(transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(SignalError, match=r"several towers \(encoder, decoder\).*'encoder.hidden.1'"):
        candidate_taps(t5)
    with pytest.raises(SignalError, match="no stages are found in Linear"):
        candidate_taps(nn.Linear(3, 3))
