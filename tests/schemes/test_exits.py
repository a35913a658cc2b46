"""Exits: the losses of "Be Your Own Teacher" on text, images and vectors, and nothing of them in evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from potstill.errors import ObjectiveError, TrainingError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.registry import schemes
from potstill.schemes.exits import ExitHeads
from potstill.schemes.lesson import Extension, Learner, Lesson
from potstill.training.module import DistillationModule

IDS = torch.arange(4)


class Images(nn.Module):
    """Two stages, then the mean over the places and a classifier."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.layer1 = nn.Conv2d(3, 6, 3, padding=1)
        self.layer2 = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, classes)

    def forward(self, pixel_values):
        return self.fc(self.layer2(self.layer1(pixel_values).relu()).relu().mean((2, 3)))


def images():
    torch.manual_seed(0)
    return Images(), {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0]), "sample_id": IDS}


def text(kind="SequenceClassification", **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20, "num_labels": 3}
    made = transformers.BertConfig(num_hidden_layers=3, **sizes, **config)
    model = getattr(transformers, f"BertFor{kind}")(made)
    ids = torch.randint(5, 20, (4, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4, [0, 0, 1, 1, 1, 1]])
    labels = torch.tensor([0, 1, 2, 0]) if kind == "SequenceClassification" else torch.randint(0, 3, (4, 6))
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels, "sample_id": IDS}


def arranged(model, terms=None, seed=0, **options) -> Lesson:
    objective = Objective({"hard": Term("cross_entropy")} if terms is None else terms)
    return schemes.get("exits")(**options).arrange(Lesson(Learner(model, objective), seed=seed))


def ready(model, batch, terms=None, seed=0, **options) -> DistillationModule:
    learner = arranged(model, terms, seed, **options).student
    module = DistillationModule(model, learner.objective, extension=learner.extension)
    module.materialize({}, batch)
    return module.train()


def test_the_terms_that_are_added():
    objective = arranged(images()[0], at=["layer1", "layer2"]).student.objective
    names = [f"exit_{k}_{what}" for k in (1, 2) for what in ("hard", "soft", "hint")]
    assert list(objective.terms) == ["hard", *names]
    assert objective.terms["exit_1_soft"].describe() == (
        "0.3 · 1/T^2 · 3²·KL(softmax(teacher.self/logits/3) ‖ softmax(student.exit.1/3))"
    )
    assert objective.terms["exit_2_hard"].weight == 0.7
    bare = arranged(images()[0], at=["layer1"], hint=0.0).student
    assert list(bare.objective.terms) == ["hard", "exit_1_hard", "exit_1_soft"]
    assert bare.extension.taps() == ["layer1"]


def test_the_loss_is_that_of_the_paper():
    """Written out in plain torch, with no gradient of the soft term and the hint into the last layer's side."""
    model, batch = images()
    module = ready(model, batch, at=["layer1"], alpha=0.4, temperature=2.0, hint=0.5)
    output = module({}, progress=Progress(), **batch)
    output.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = model.layer1(batch["pixel_values"])
    deepest = model.layer2(hidden.relu()).relu().mean((2, 3))
    logits = model.fc(deepest)
    head = copy.deepcopy(module.extension.heads[0])
    features = head.bottleneck(hidden).mean((2, 3))
    early = head.classifier(features)
    p = F.softmax(logits.detach() / 2, 1)
    soft = (p * (p.log() - F.log_softmax(early / 2, 1))).sum(1).mean()
    expected = F.cross_entropy(logits, batch["labels"]) + 0.6 * F.cross_entropy(early, batch["labels"])
    expected = expected + 0.4 * soft + 0.5 * (features - deepest.detach()).square().mean()
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_text_is_pooled_without_padding(pool):
    """Other padding, and padding on the left, must not change what an exit says."""
    model, batch = text()
    model.eval()
    module = ready(model, batch, at=["hidden.1", "hidden.2"], pool=pool)
    signals = {name: torch.randn(4, 6, 16) for name in ("hidden.1", "hidden.2")}
    signals |= {"input:classifier": torch.randn(4, 16), "logits": torch.zeros(4, 3)}
    said = module.extension(signals, batch)
    head, mask = module.extension.heads[1], batch["attention_mask"]
    for row in range(4):
        tokens = signals["hidden.2"][row][mask[row] == 1]
        vector = tokens.mean(0) if pool == "mean" else tokens[0]
        torch.testing.assert_close(said["exit.2.features"][row], head.bottleneck(vector))
        torch.testing.assert_close(said["exit.2"][row], head.classifier(head.bottleneck(vector)))
    assert torch.equal(said["exit.features"], signals["input:classifier"])


def test_a_model_of_text_learns():
    model, batch = text()
    module = ready(model, batch, at=["hidden.1", "hidden.2"])
    output = module({}, progress=Progress(), **batch)
    assert set(output.parts) == {"hard", *(f"exit_{k}_{what}" for k in (1, 2) for what in ("hard", "soft", "hint"))}
    output.loss.backward()
    assert all(p.grad is not None for p in module.extension.parameters())
    assert module.extension.heads[0].classifier.out_features == 3


def test_a_model_of_tokens_has_exits_for_each_token():
    model, batch = text("TokenClassification")
    module = ready(model, batch, at=["hidden.1"])
    said = module.signals(batch)
    assert said["exit.1"].shape == (4, 6, 3)
    assert said["exit.features"].shape == said["exit.1.features"].shape == (4, 6, 16)
    assert module({}, progress=Progress(), **batch).loss.isfinite()
    with pytest.raises(ObjectiveError, match=r"expected tokens at 'bert\.pooler'"):
        ExitHeads(["bert.pooler"], deepest=None).materialize(
            {"bert.pooler": torch.zeros(4, 16), "logits": torch.zeros(4, 6, 3)}
        )


def test_in_evaluation_the_student_is_the_plain_network():
    model, batch = images()
    names = set(model.state_dict())
    module = ready(model, batch, at=["layer1"])
    assert set(model.state_dict()) == names
    assert not model.layer1._forward_hooks
    expected = copy.deepcopy(model).eval()(batch["pixel_values"])
    assert torch.equal(module.eval()(**batch), expected)
    assert len(module.extension.state_dict()) > 0, "checkpoints keep the exits"


def test_weights_depend_on_the_seed_alone():
    model, batch = images()
    state = torch.get_rng_state()
    first = ready(model, batch, at=["layer1", "layer2"], seed=5).extension.state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers go on as without exits"
    torch.randn(3)
    again = ready(model, batch, at=["layer1", "layer2"], seed=5).extension.state_dict()
    other = ready(model, batch, at=["layer1", "layer2"], seed=6).extension.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["heads.0.classifier.weight"], other["heads.0.classifier.weight"])
    assert not torch.equal(first["heads.0.classifier.weight"], first["heads.1.classifier.weight"])


def test_terms_of_ones_own_stay_and_other_teachers_may_teach():
    model, batch = images()
    terms = {"hard": Term("cross_entropy"), "early": Term("kl", "exit.2", "large/logits")}
    module = ready(model, batch, terms, at=["layer1", "layer2"])
    assert list(module.objective.terms) == ["hard", "early"]
    assert module.taps == ["layer1", "layer2"]
    large = torch.randn(4, 3)
    parts = module({"large/logits": large}, progress=Progress(), **batch).parts
    early = module.signals(batch)["exit.2"]
    expected = F.kl_div(F.log_softmax(early, 1), F.log_softmax(large, 1), log_target=True, reduction="batchmean")
    assert parts["early"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_of_another_layer_and_width():
    model, batch = images()
    module = ready(model, batch, at=["layer1"], features="layer2", width=5)
    said = module.signals(batch)
    torch.testing.assert_close(said["exit.features"], said["layer2"].mean((2, 3)))
    assert module.extension.heads[0].bottleneck[0].out_channels == 5


class Backwards(nn.Module):
    """Registers its classifier first."""

    def __init__(self):
        super().__init__()
        self.head, self.one, self.two = nn.Linear(6, 3), nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, features):
        return self.head(self.two(self.one(features).relu()).relu())


def test_the_last_linear_layer_must_give_the_logits():
    batch = {"features": torch.randn(4, 5), "labels": torch.tensor([0, 1, 2, 0]), "sample_id": IDS}
    with pytest.raises(ObjectiveError, match=r"exits took 'two'.*`scheme: \{features: 'input:head'\}`"):
        ready(Backwards(), batch, at=["one"])
    assert "exit.features" in ready(Backwards(), batch, at=["one"], features="input:head").signals(batch)


def test_a_classifier_of_which_one_token_counts_is_right():
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, num_labels=3, pad_token_id=0)
    config.bos_token_id = config.eos_token_id = None
    ids = torch.randint(5, 20, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}
    module = ready(transformers.GPT2ForSequenceClassification(config), batch | {"sample_id": IDS}, at=["hidden.1"])
    assert module.signals(batch)["exit.features"].shape == (4, 8)


def test_maps_with_channels_last():
    extension = ExitHeads(["stage"], deepest=None)
    stage = torch.randn(2, 4, 4, 7)
    extension.materialize({"stage": stage, "logits": torch.zeros(2, 3)})
    extension.eval()
    said = extension({"stage": stage, "logits": torch.zeros(2, 3)}, {})
    moved = extension.heads[0].bottleneck(stage.permute(0, 3, 1, 2)).mean((2, 3))
    torch.testing.assert_close(said["exit.1.features"], moved)


def test_signals_that_it_makes():
    extension = ExitHeads(["a", "b"], deepest="input:fc")
    assert all(extension.makes(name) for name in ("exit.1", "exit.2", "exit.2.features", "exit.features"))
    assert not any(extension.makes(name) for name in ("exit.3", "exit.0", "logits", "exit", "exit.1.logits"))
    assert not ExitHeads(["a"], deepest=None).makes("exit.features")


def test_what_cannot_be_arranged():
    with pytest.raises(TrainingError, match="each once, got \\['a', 'a'\\]"):
        schemes.get("exits")(at=["a", "a"])
    with pytest.raises(TrainingError, match="alpha from 0 to 1"):
        schemes.get("exits")(at=["a"], alpha=1.5)
    with pytest.raises(TrainingError, match="got one with Extension"):
        schemes.get("exits")(at=["a"]).arrange(Lesson(Learner(images()[0], extension=Extension())))
    with pytest.raises(TrainingError, match="no linear layer that classifies in Conv2d"):
        arranged(nn.Conv2d(3, 3, 1), at=["0"])
    with pytest.raises(TrainingError, match=r"learns its labels by cross_entropy, got .*distance"):
        arranged(images()[0], {"hard": Term(distance)}, at=["layer1"])


def distance(student, *, labels):
    return (student - labels).abs().mean(-1)
