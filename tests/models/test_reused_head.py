"""A student that ends in the teacher's classifier."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from potstill.errors import ModelError
from potstill.knowledge.capture import capture
from potstill.losses.objective import Objective, Term
from potstill.models.cifar_resnet import CifarResNet
from potstill.models.inputs import accepted_inputs, call
from potstill.models.plain import ConvNet, Mlp
from potstill.models.reused_head import ReusedHead
from potstill.training.module import DistillationModule


def pictures(count: int = 64, size: int = 8, seed: int = 0) -> Tensor:
    """Noise over a colour of each picture's own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 1, 1, generator=generator) + torch.randn(count, 3, size, size, generator=generator) / 2


def teacher_and_student() -> tuple[nn.Module, nn.Module]:
    """A teacher that is not trained, whose classifier is moved so that its answers depend on the picture."""
    torch.manual_seed(0)
    teacher = ConvNet(3, 5, widths=[16, 24]).train()
    with torch.no_grad():
        teacher(pictures(256, seed=9))  # statistics for its batch normalisation
        teacher.head.bias -= teacher.eval()(pictures(256, seed=9)).mean(0)
    return teacher, ConvNet(3, 5, widths=[12, 16])


@torch.no_grad()
def agreement(model: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    model.eval()
    share = (model(images).argmax(-1) == teacher(images).argmax(-1)).float().mean().item()
    model.train()
    return share


@pytest.mark.parametrize(
    ("options", "signals"),
    [
        ({}, ("projector", "input:head")),
        ({"projector": "mlp"}, ("projector", "input:head")),
        ({"feature_map": "stages"}, ("projector", "stages")),
    ],
)
def test_the_squared_error_before_the_classifier_alone_brings_it_to_the_teacher(options, signals):
    teacher, student = teacher_and_student()
    model = ReusedHead(student, teacher, student_head="head", teacher_head="head", **options)
    module = DistillationModule(model, Objective({"reuse": Term("mse", *signals)}))
    images = pictures(256)
    with torch.no_grad(), capture(teacher, [signals[1]]) as taught:
        teacher(images)
    before = agreement(model, teacher, images)
    assert before < 0.5
    optimizer = torch.optim.SGD([each for each in module.parameters() if each.requires_grad], lr=0.3, momentum=0.9)
    first = last = 0.0
    for step in range(80):
        optimizer.zero_grad()
        output = module(taught, pixel_values=images)
        output.loss.backward()
        optimizer.step()
        first, last = (output.loss.item() if step == 0 else first), output.loss.item()
    assert last < first / 2
    assert agreement(model, teacher, images) > before + 0.2


def test_the_classifier_is_the_teachers_and_stays_so():
    teacher, student = teacher_and_student()
    kept = copy.deepcopy(teacher.state_dict())
    model = ReusedHead(student, teacher, student_head="head", teacher_head="head").train()
    assert model.training
    assert not model.classifier.training
    assert not any(each.requires_grad for each in model.classifier.parameters())
    model(pictures()).sum().backward()
    assert all(each.grad is not None for each in [*model.projector.parameters(), *student.stages.parameters()])
    model.classifier.weight.data.zero_()
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    names = set(model.state_dict())
    assert {"projector.weight", "classifier.weight", "classifier.bias"} <= names
    assert not any(name.startswith("backbone.head") for name in names)


def test_what_it_returns_is_the_teachers_classifier_of_the_projected_features():
    teacher, student = teacher_and_student()
    reference = copy.deepcopy(student).eval()
    model = ReusedHead(student, teacher, student_head="head", teacher_head="head").eval()
    images = pictures()
    vector = reference.stages(images).mean((2, 3))
    torch.testing.assert_close(model(images), teacher.head(model.projector(vector)))


def test_a_perfect_projection_gives_the_teachers_answers():
    teacher, _ = teacher_and_student()
    model = ReusedHead(copy.deepcopy(teacher), teacher, student_head="head", teacher_head="head").eval()
    nn.init.eye_(model.projector.weight)
    nn.init.zeros_(model.projector.bias)
    torch.testing.assert_close(model(pictures()), teacher(pictures()))


def test_a_residual_network_with_its_feature_map():
    """The paper's projector: 1×1, 3×3 and 1×1 convolutions, half as wide as the teacher's features inside."""
    torch.manual_seed(0)
    teacher, student = CifarResNet(14, 10).eval(), CifarResNet(8, 10)
    options = {"student_head": "linear", "teacher_head": "linear", "feature_map": "layer3"}
    model = ReusedHead(student, teacher, **options)
    convolutions = [each for each in model.projector if isinstance(each, nn.Conv2d)]
    assert [tuple(each.weight.shape) for each in convolutions] == [(32, 64, 1, 1), (32, 32, 3, 3), (64, 32, 1, 1)]
    images = pictures(4, size=16)
    with capture(model, ["projector", "backbone.layer3"]) as said:
        logits = model(images)
    assert said["projector"].shape == (4, 64, 4, 4)
    assert (said["projector"] >= 0).all()
    torch.testing.assert_close(logits, teacher.linear(said["projector"].mean((2, 3))))
    assert model._map is None  # no activation outlives the forward
    with capture(teacher, ["layer3"], detach=True) as taught:
        teacher(images)
    F.mse_loss(said["projector"], taught["layer3"]).backward()
    assert student.conv1.weight.grad.abs().max() > 0


def test_a_larger_map_of_the_student_is_averaged_to_the_teachers():
    torch.manual_seed(0)
    teacher, student = CifarResNet(8, 10), CifarResNet(8, 10)
    options = {"student_head": "linear", "teacher_head": "linear", "feature_map": "layer2"}
    model = ReusedHead(student, teacher, channels=32, size=(4, 9), factor=4, **options)
    with capture(model, ["input:projector", "projector", "backbone.layer2"]) as said:
        model(pictures(2, size=16))
    assert said["backbone.layer2"].shape == (2, 32, 8, 8)
    pooled = said["backbone.layer2"].reshape(2, 32, 4, 2, 8).mean(3)
    torch.testing.assert_close(said["input:projector"], pooled)  # (4, 8): nothing is enlarged
    assert said["projector"].shape == (2, 64, 4, 8)


def test_a_transformers_model_returns_its_own_kind_of_output():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    teacher = ViTForImageClassification(ViTConfig(hidden_size=16, num_labels=3, **sizes)).eval()
    student = ViTForImageClassification(ViTConfig(hidden_size=8, num_labels=3, **sizes)).eval()
    model = ReusedHead(student, teacher, student_head="classifier", teacher_head="classifier")
    assert accepted_inputs(model) == accepted_inputs(student)
    labels = torch.tensor([0, 2])
    output = call(model, {"pixel_values": pictures(2), "labels": labels, "sample_id": labels}, labels=True)
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("feature_map", [None, "stages"])
def test_a_copy_and_a_loaded_state_answer_alike_and_stand_alone(feature_map):
    options = {"student_head": "head", "teacher_head": "head", "feature_map": feature_map}
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        teacher, student = ConvNet(3, 5, widths=[16, 24]), ConvNet(3, 5, widths=[8, 12])
        models.append(ReusedHead(student, teacher, **options).eval())
    model, other = models
    images = pictures()
    expected = model(images)
    assert not torch.allclose(other(images), expected)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(images), expected)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(images), expected)
    assert not copied.train().classifier.training


@pytest.mark.parametrize("feature_map", [None, "stages"])
def test_it_compiles_without_a_break(feature_map):
    teacher, student = teacher_and_student()
    model = ReusedHead(student, teacher, student_head="head", teacher_head="head", feature_map=feature_map).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pictures()), model(pictures()))


def test_a_projector_of_ones_own_and_the_type_of_the_student():
    teacher, student = teacher_and_student()
    own = nn.Linear(16, 24, bias=False)
    model = ReusedHead(student.double(), teacher, student_head="head", teacher_head="head", projector=own)
    assert model.projector is own
    assert model(pictures().double()).dtype == torch.float64
    assert teacher.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_head": "haed"}, "the student ConvNet has no module 'haed'; did you mean 'head'"),
        ({"teacher_head": ""}, "the teacher ConvNet has no module ''"),
        ({"teacher_head": "stages"}, "'stages' to be a linear layer, got Sequential"),
        ({"feature_map": "stage"}, "no module 'stage'; did you mean 'stages'"),
        ({"projector": "mpl"}, "no projector 'mpl'; did you mean 'mlp'"),
    ],
)
def test_mistakes_are_named(change, message):
    teacher, student = teacher_and_student()
    with pytest.raises(ModelError, match=message):
        ReusedHead(student, teacher, **{"student_head": "head", "teacher_head": "head", **change})
    assert isinstance(student.head, nn.Linear)  # nothing is changed by a call that fails


def test_a_head_of_several_layers_other_classes_and_no_map_are_named():
    teacher, student = teacher_and_student()
    teacher.head = nn.Sequential(nn.Dropout(), nn.Linear(24, 5))
    options = {"student_head": "head", "teacher_head": "head"}
    with pytest.raises(ModelError, match=r"name the linear layer in it: head\.1"):
        ReusedHead(student, teacher, **options)
    with pytest.raises(ModelError, match="got 5 of the student and 4 of the teacher"):
        ReusedHead(student, ConvNet(3, 4), **options)
    plain = ReusedHead(Mlp(4, 3, [6]), Mlp(4, 3, [8]), feature_map="body", **options)
    with pytest.raises(ModelError, match=r"expected a feature map \[B, C, H, W\] of Sequential, got \[2, 6\]"):
        plain(torch.zeros(2, 4))
