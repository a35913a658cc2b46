"""Layers that student and teacher share are computed once, and every bit is as if they had not been."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from potstill.interfaces import Batch
from potstill.losses.objective import Objective, Term
from potstill.models.cifar_resnet import CifarResNet
from potstill.models.freezing import freeze
from potstill.models.inputs import respond
from potstill.models.student import cut
from potstill.teachers.cached import Cached
from potstill.teachers.live import Live
from potstill.teachers.shared import SharedLayers, Sharing
from potstill.training.precision import matrix_products
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import arguments, flat, pairs

SHARED = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}


def bert(layers: int = 4, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=60, num_hidden_layers=layers, num_labels=3, **{**SIZES, **changes})
    return transformers.BertForSequenceClassification(config).eval()


def student_of(teacher: nn.Module, keep: tuple[int, ...] = (0, 1, 3), frozen: list[str] | None = None) -> Any:
    return freeze(cut(teacher, keep), SHARED if frozen is None else frozen).train()


def texts(count: int = 4, length: int = 9, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (count, length), generator=draw)
    mask = torch.arange(length)[None] < torch.randint(4, length + 1, (count, 1), generator=draw)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def images(seed: int = 0) -> Batch:
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


class Counts:
    """How often modules of a class are computed, looked at from where no hook and no replaced forward matters."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
        self.calls = 0
        real: Any = kind.forward

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return real(module, *args, **kwargs)

        patch.setattr(kind, "forward", forward)

    def taken(self) -> int:
        found, self.calls = self.calls, 0
        return found


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts the attentions of BERT: one in each block."""
    from transformers.models.bert.modeling_bert import BertSelfAttention

    return Counts(monkeypatch, BertSelfAttention)


def step(layers: SharedLayers, teacher: nn.Module, student: nn.Module, batch: Batch, **live: Any) -> dict[str, Any]:
    """Teacher, then student; in the same context."""
    with layers:
        Live(teacher, **live)(batch)
        return respond(student, batch)


# ---- alone ---------------------------------------------------------------------------------------------------------


def test_the_pairs_of_a_student_that_was_cut():
    teacher = bert()
    assert SharedLayers(student_of(teacher), teacher).pairs == [(path, path) for path in SHARED]


def test_a_block_that_is_not_frozen_or_not_equal_is_no_pair():
    teacher = bert()
    assert SharedLayers(cut(teacher, [0, 1]).train(), teacher).pairs == []
    by_hand = cut(teacher, [0, 1]).train()
    by_hand.bert.embeddings.requires_grad_(False)  # and still with dropout
    assert SharedLayers(by_hand, teacher).pairs == []
    other = student_of(teacher, frozen=["bert.encoder.layer.0"])
    with torch.no_grad():
        for parameter in other.bert.encoder.layer[0].parameters():
            parameter.add_(torch.finfo(torch.float32).eps)
    assert SharedLayers(other, teacher).pairs == []


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}, {"num_attention_heads": 4}])
def test_nor_is_one_with_other_settings(change: dict[str, Any]):
    teacher = bert()
    other = bert(**change)
    other.load_state_dict(teacher.state_dict())
    found = SharedLayers(student_of(other, frozen=["bert.encoder.layer.0"]), teacher)
    assert ("bert.encoder.layer.0", "bert.encoder.layer.0") not in found.pairs
    batch = texts()
    wanted = respond(student_of(other, frozen=["bert.encoder.layer.0"]).eval(), batch)["logits"]
    assert torch.equal(step(found, teacher, student_of(other).eval(), batch)["logits"], wanted)


class Scaled(nn.Module):
    """A layer that asks its configuration while it runs."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(scale=scale)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.config.scale


def test_nor_is_one_with_another_configuration():
    teacher, student = (nn.Sequential(Scaled(scale), nn.Linear(4, 3)) for scale in (1.0, 2.0))
    student.load_state_dict(teacher.state_dict())
    assert SharedLayers(freeze(student, ["0"]), teacher.eval()).pairs == [("0.layer", "0.layer")]
    student[0].config.scale = 1.0
    assert SharedLayers(student, teacher).pairs == [("0", "0")]


def test_of_equal_blocks_that_of_the_same_path_is_meant():
    block = nn.Linear(4, 4)
    teacher = nn.Sequential(block, copy.deepcopy(block), nn.Linear(4, 3)).eval()
    assert SharedLayers(freeze(copy.deepcopy(teacher), ["0", "1"]), teacher).pairs == [("0", "0"), ("1", "1")]


def test_shared_blocks_are_computed_once(attentions: Counts):
    teacher = bert()
    student = student_of(teacher)
    layers = SharedLayers(student, teacher)
    step(layers, teacher, student, texts())
    assert attentions.taken() == 4 + 1, "the teacher's blocks, and the one of the student that learns"
    Live(teacher)(texts())
    respond(student, texts())
    assert attentions.taken() == 4 + 3, "outside the context all is as it was"


def test_other_inputs_are_computed(attentions: Counts):
    teacher = bert()
    student = student_of(teacher).eval()
    layers, others = SharedLayers(student, teacher), texts(seed=5)
    wanted = respond(student, others)["logits"]
    attentions.taken()
    with layers:
        Live(teacher)(texts())
        assert torch.equal(respond(student, others)["logits"], wanted)
    assert attentions.taken() == 4 + 3
    padded = {**texts(), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    wanted = respond(student, padded)["logits"]
    attentions.taken()
    with layers:
        Live(teacher)(texts())
        assert torch.equal(respond(student, padded)["logits"], wanted)
    assert attentions.taken() == 4 + 3, "equal tokens under another mask"


def test_equal_inputs_in_other_tensors_are_known(attentions: Counts):
    teacher = bert()
    student = student_of(teacher)
    with SharedLayers(student, teacher):
        Live(teacher)(texts())
        respond(student, {name: value.clone() for name, value in texts().items()})
    assert attentions.taken() == 4 + 1


def test_a_block_after_one_that_was_left_out_is_computed(attentions: Counts):
    teacher = bert()
    student = student_of(teacher, keep=(0, 2, 3)).eval()
    wanted = respond(student, texts())["logits"]
    attentions.taken()
    layers = SharedLayers(student, teacher)
    for _ in range(5):
        assert torch.equal(step(layers, teacher, student, texts())["logits"], wanted)
        assert attentions.taken() == 4 + 2
    assert layers.pairs == [(path, path) for path in SHARED[:2]], "what is of no use is given up"


def test_what_learns_before_a_frozen_block_gets_its_gradient(attentions: Counts):
    """The embeddings are equal as long as nothing is learned, and the gradient goes through the frozen block."""
    teacher = bert()
    student = student_of(teacher, frozen=["bert.encoder.layer.0"]).eval()
    layers, table = SharedLayers(student, teacher), student.bert.embeddings.word_embeddings.weight
    assert layers.pairs == [("bert.encoder.layer.0", "bert.encoder.layer.0")]
    step(layers, teacher, student, texts())["logits"].square().sum().backward()
    assert attentions.taken() == 4 + 3
    found, table.grad = table.grad, None
    respond(student, texts())["logits"].square().sum().backward()
    assert torch.equal(found, table.grad)


def test_another_precision_is_not_shared(attentions: Counts):
    teacher = bert()
    student = student_of(teacher).eval()
    wanted = respond(student, texts())["logits"]
    attentions.taken()
    found = step(SharedLayers(student, teacher), teacher, student, texts(), precision="bf16")
    assert torch.equal(found["logits"], wanted)
    assert attentions.taken() == 4 + 3
    with matrix_products("medium"):
        step(SharedLayers(student, teacher), teacher, student, texts(), precision="fp32")
    assert attentions.taken() == 4 + 3, "products of bfloat16 in the student alone"
    with torch.autocast("cpu", torch.bfloat16):
        step(SharedLayers(student, teacher), teacher, student, texts())
    assert attentions.taken() == 4 + 1, "both in bfloat16"


def test_weights_that_change_are_seen(attentions: Counts):
    teacher = bert()
    student = student_of(teacher).eval()
    layers = SharedLayers(student, teacher)
    step(layers, teacher, student, texts())
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        teacher.bert.encoder.layer[1].output.dense.bias.add_(1.0)
    attentions.taken()
    wanted = respond(student, texts())["logits"]
    attentions.taken()
    assert torch.equal(step(layers, teacher, student, texts())["logits"], wanted)
    assert attentions.taken() == 4 + 2
    teacher.load_state_dict(before)
    step(layers, teacher, student, texts())
    assert attentions.taken() == 4 + 1


def test_taps_of_shared_blocks_are_read_on_both_sides(attentions: Counts):
    """The states of a shared block are there to tap; where something inside it is tapped, it is computed."""
    teacher = bert()
    student, batch = student_of(teacher), texts()
    layers = SharedLayers(student, teacher)
    taps = ["hidden.0", "hidden.1", "hidden.2", "bert.encoder.layer.1", "bert.embeddings"]
    inner = [*taps, "attention.1", "bert.encoder.layer.1.output.dense"]
    wanted = Live(cut(teacher, [0, 1, 3]).eval(), inner)(batch)
    attentions.taken()
    for asked, computed in ((taps, 4 + 1), (inner, 4 + 3)):
        with layers:
            said = Live(teacher, asked)(batch)
            own = Live(student, asked)(batch)
        assert attentions.taken() == computed
        assert all(torch.equal(own[tap], wanted[tap]) for tap in asked)
        assert all(torch.equal(own[tap], said[tap]) for tap in asked)
        assert all(own[tap].data_ptr() != said[tap].data_ptr() for tap in asked), "a student may write to its own"
        student.train()


def test_outputs_that_someone_writes_to():
    """After a batch norm comes a ReLU in place: what the teacher's became is not what the student's said."""
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 30)).eval()
    student = freeze(copy.deepcopy(teacher), ["0", "1"]).train()
    student[2] = nn.Tanh()
    wanted = student(images()["pixel_values"])
    with SharedLayers(student, teacher) as layers:
        assert layers.pairs == [("0", "0"), ("1", "1")]
        said = Live(teacher, ["clone:0"])(images())
        assert torch.equal(student(images()["pixel_values"]), wanted)
        assert not torch.equal(said["clone:0"], wanted)


def test_inputs_that_someone_writes_to():
    """What a block of the teacher was given is another thing when it was overwritten, even if it is the student's."""

    class Writes(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = x * 1
            said = self[0](inner)
            return said + inner.relu_()

    class Student(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](x.relu()))

    teacher = Writes(nn.Linear(4, 4)).eval()
    student = freeze(Student(copy.deepcopy(teacher[0]), nn.Linear(4, 3)), ["0"])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    wanted = student(x)
    with SharedLayers(student, teacher) as layers:
        assert layers.pairs == [("0", "0")]
        Live(teacher)({"features": x})
        assert torch.equal(student(x), wanted)


def test_a_student_that_writes_to_a_shared_output_changes_no_signal():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 30)).eval()
    student = freeze(copy.deepcopy(teacher), ["0"]).train()
    student[1] = nn.ReLU(inplace=True)
    wanted = Live(teacher, ["0"])(images())["0"]
    with SharedLayers(student, teacher):
        said = Live(teacher, ["0"])(images())["0"]
        student(images()["pixel_values"])
    assert torch.equal(said, wanted)


def make(name: str) -> tuple[nn.Module, nn.Module, list[str], Batch]:
    torch.manual_seed(0)
    if name == "distilbert":
        sizes = {"dim": 16, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}
        config = transformers.DistilBertConfig(vocab_size=60, n_layers=3, **sizes)
        model = transformers.DistilBertForSequenceClassification(config)
        return model, cut(model, [0, 2]), ["distilbert.embeddings", "distilbert.transformer.layer.0"], texts()
    if name == "vit":
        sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
        config = transformers.ViTConfig(image_size=32, patch_size=8, num_hidden_layers=3, **sizes)
        model = transformers.ViTForImageClassification(config)
        block = next(path for path, each in model.named_modules() if type(each).__name__ == "ViTLayer")
        return model, cut(model, [0, 2]), ["vit.embeddings", block], images()
    if name == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        model = transformers.ResNetForImageClassification(config)
        return model, copy.deepcopy(model), ["resnet.embedder", "resnet.encoder.stages.0"], images()
    model = CifarResNet(20, 3)
    return model, copy.deepcopy(model), ["conv1", "bn1", "layer1"], images()


@pytest.mark.parametrize("name", ["distilbert", "vit", "resnet", "cifar_resnet"])
def test_families_of_models(name: str, monkeypatch: pytest.MonkeyPatch):
    teacher, student, paths, batch = make(name)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
    student.load_state_dict(teacher.state_dict(), strict=False) if name.endswith("resnet") else None
    teacher.eval(), freeze(student, paths).train()
    layers, used = SharedLayers(student, teacher), []
    assert [pair[0] for pair in layers.pairs] == paths
    real = layers._copy
    monkeypatch.setattr(layers, "_copy", lambda output: (used.append(1), real(output))[1])
    found = []
    for context in (layers, Sharing(False)(None, student, student)):
        torch.manual_seed(3)
        with context:
            Live(teacher)(batch)
            logits = respond(student, batch)["logits"]
        student.zero_grad()
        logits.square().sum().backward()
        found.append((logits, [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert len(used) == len(paths)


def test_nothing_is_left_and_nothing_is_held():
    teacher = bert()
    student = student_of(teacher)
    layers, kept = SharedLayers(student, teacher), []
    for module in (teacher.bert.encoder.layer[0], student.bert.encoder.layer[0]):
        module.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))

    def fails() -> None:
        with layers:
            Live(teacher)(texts())
            respond(student, texts())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert len(kept) == 2
    assert [reference() for reference in kept] == [None, None]
    assert not any("forward" in vars(module) for module in [*teacher.modules(), *student.modules()])


def test_forwards_of_ones_own_come_back():
    teacher = bert()
    student = student_of(teacher)
    block = student.bert.encoder.layer[0]
    own = block.forward
    block.forward = own
    step(SharedLayers(student, teacher), teacher, student, texts())
    assert vars(block)["forward"] is own


# ---- in a training -------------------------------------------------------------------------------------------------


def trained(folder: Path, attentions: Counts, **changes: Any) -> tuple[torch.Tensor, int]:
    """The weights after some steps with dropout, and how many attentions were computed."""
    teacher = changes.pop("teacher", None) or bert()
    whole = teacher.model.awake() if hasattr(teacher, "model") else teacher
    objective = Objective(
        {
            "soft": Term("kl", temperature=2.0),
            "hard": Term("cross_entropy"),
            "hint": Term("mse", "hidden.2", "hidden.2"),
            "last": Term("mse", "hidden.3", "hidden.4"),
        }
    )
    options = {name: changes.pop(name) for name in ("share_layers",) if name in changes}
    trainer = DistillationTrainer(
        model=student_of(whole),
        teacher=teacher,
        objective=objective,
        train_dataset=pairs(32, length=9),
        args=arguments(folder, max_steps=4, **changes),
        **options,
    )
    attentions.taken()
    trainer.train()
    return flat(trainer.distillation_module.student), attentions.taken()


@pytest.fixture
def once() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_a_training_comes_to_the_same_bits(tmp_path: Path, attentions: Counts, changes: dict[str, Any]):
    with_, computed = trained(tmp_path / "a", attentions, **changes)
    without, all_of_them = trained(tmp_path / "b", attentions, share_layers=False, **changes)
    assert torch.equal(with_, without)
    assert not torch.equal(with_, flat(student_of(bert()))), "something was learned"
    steps = 4 * changes.get("gradient_accumulation_steps", 1)
    assert computed == steps * (4 + 1)
    assert all_of_them == steps * (4 + 3)


def test_a_teacher_that_does_not_run_beside_the_student_shares_nothing(tmp_path: Path, attentions: Counts):
    other = Live(bert(), ["hidden.2", "hidden.4"], precision="bf16")
    _, computed = trained(tmp_path / "a", attentions, teacher=other)
    assert computed == 4 * (4 + 3)
    student, sharing = student_of(bert()), Sharing()
    for source in (None, lambda batch: {}, Cached(bert(), tmp_path / "cache"), Live(bert(), compile=True)):
        assert not isinstance(sharing(source, student, student), SharedLayers)
    assert not isinstance(sharing(Live(bert()), student, torch.compile(student)), SharedLayers)
    assert isinstance(sharing(Live(bert()), student, student), SharedLayers)
