"""Separate heads: what teachers say moves the output layer, and the encoder learns from the other terms alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments

from potstill.errors import ModelError, TrainingError
from potstill.interfaces import FOREIGN, Progress
from potstill.losses.objective import Objective, Term
from potstill.registry import schemes
from potstill.schemes.lesson import Extension, Learner, Lesson
from potstill.schemes.separate_heads import SeparateHeads
from potstill.training.module import DistillationModule
from potstill.training.trainer import DistillationTrainer, ready_batch

OWNER = torch.tensor([0, 1, 0, 1])
COLUMNS = torch.tensor([0, 0, 1, 1, 1])
"""Two tasks: two classes and three."""


def hard() -> Term:
    return Term("cross_entropy", weight=0.3)


def soft(weight: float = 0.7) -> Term:
    return Term("kl", "head.logits", weight=weight, temperature=4.0)


def student(kind: str = "bert", **config):
    """A classifier of five classes with dropout everywhere."""
    torch.manual_seed(0)
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
        made = transformers.BertConfig(vocab_size=20, num_labels=5, hidden_dropout_prob=0.3, **sizes, **config)
        return transformers.BertForSequenceClassification(made)
    made = transformers.DistilBertConfig(
        vocab_size=20, num_labels=5, dim=16, n_heads=2, hidden_dim=8, n_layers=2, seq_classif_dropout=0.3
    )
    return transformers.DistilBertForSequenceClassification(made)


def batch():
    ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 1, 4])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "task": OWNER,
        "sample_id": torch.arange(4),
    }


def of_its_task(model: nn.Module, inputs) -> dict[str, torch.Tensor]:
    """As the task of several tasks: the classes of others are impossible."""
    said = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return {"logits": said.masked_fill(inputs["task"][:, None] != COLUMNS, FOREIGN)}


def taught() -> dict[str, torch.Tensor]:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)) * 3
    return {"logits": logits.masked_fill(OWNER[:, None] != COLUMNS, FOREIGN)}


def module_of(model: nn.Module, terms: dict[str, Term], **options) -> DistillationModule:
    lesson = SeparateHeads(**options).arrange(Lesson(Learner(model, Objective(terms))))
    own = lesson.student
    module = DistillationModule(model, own.objective, forward=of_its_task, extension=own.extension)
    module.materialize(taught(), batch())
    return module.train()


def gradients(model: nn.Module, terms: dict[str, Term], *, separate: bool = True) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    plain = DistillationModule(model, Objective(terms), forward=of_its_task).train()
    module = module_of(model, terms) if separate else plain
    torch.manual_seed(7)  # one dropout for all
    module(taught(), progress=Progress(), **batch()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_encoder_learns_from_the_labels_alone(kind):
    """To the bit that of the hard term; the output layer's is that of both terms, as without the scheme."""
    model = student(kind)
    alone = gradients(model, {"hard": hard()}, separate=False)
    whole = gradients(model, {"hard": hard(), "soft": Term("kl", weight=0.7, temperature=4.0)}, separate=False)
    found = gradients(model, {"hard": hard(), "soft": soft()})
    below = [name for name in found if not name.startswith("classifier.")]
    last = "bert.pooler.dense.weight" if kind == "bert" else "pre_classifier.weight"
    for name in below:
        assert torch.equal(found[name], alone[name]), name
    assert not torch.allclose(whole[last], alone[last])
    for name in ("classifier.weight", "classifier.bias"):
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(found[name], alone[name])


def test_the_soft_loss_is_that_of_the_logits_with_their_dropout():
    """Written out in plain torch: another dropout, or classes of other tasks, would change it."""
    model = student()
    module = module_of(model, {"hard": hard(), "soft": soft()})
    torch.manual_seed(7)
    parts = module(taught(), progress=Progress(), **batch()).parts
    torch.manual_seed(7)
    raw = model(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits
    total = 0.0
    for row, (start, stop) in enumerate([(0, 2), (2, 5), (0, 2), (2, 5)]):
        p = F.softmax(taught()["logits"][row, start:stop] / 4, -1)
        total += 16 * (p * (p.log() - F.log_softmax(raw[row, start:stop] / 4, -1))).sum()
    assert parts["soft"].item() == pytest.approx(float(total.detach()) / 4, rel=1e-5)


def test_half_precision_excludes_the_same_classes():
    """bf16 rounds −10000 to −9984, which must still be told from an answer."""
    module = module_of(student(), {"hard": hard(), "soft": soft()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = module.signals(batch())
    assert said["logits"].dtype == said["head.logits"].dtype == torch.bfloat16
    assert torch.equal(said["head.logits"], said["logits"])
    assert (said["head.logits"] < -9000).sum() == 2 * 3 + 2 * 2


def test_another_layer_must_give_the_logits():
    with pytest.raises(ModelError, match=r"expected the layer 'bert\.pooler\.dense' to give the student's logits"):
        module_of(student(), {"soft": soft()}, layer="bert.pooler.dense")
    with pytest.raises(ModelError, match="no module 'clasifier'; did you mean 'classifier'"):
        module_of(student(), {"soft": soft()}, layer="clasifier")
    with pytest.raises(ModelError, match="no linear layer in Identity"):
        module_of(nn.Identity(), {"soft": soft()})


def test_what_it_needs():
    with pytest.raises(TrainingError, match=r"reads 'head\.logits', got logits"):
        SeparateHeads().arrange(Lesson(Learner(student(), Objective({"soft": Term("kl")}))))
    taken = Learner(student(), Objective({"soft": soft()}), extension=Extension())
    with pytest.raises(TrainingError, match="got one with Extension"):
        SeparateHeads().arrange(Lesson(taken))


def test_it_is_registered():
    assert schemes.get("separate_heads") is SeparateHeads
    assert schemes.facts("separate_heads")["makes"] == ("head.",)
    assert schemes.check("separate_heads", {"layer": "classifier"}) == []


def test_the_trained_student_is_the_plain_model(tmp_path):
    """Nothing of the extension is saved with it, and its output layer is there once."""
    model, rows = student(), batch()
    rows = [{name: value[place] for name, value in rows.items()} for place in range(4)]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitems__(self, places):
            return {name: torch.stack([rows[place][name] for place in places]) for name in rows[0]}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    trainer = DistillationTrainer(
        model=model,
        teacher=lambda given: taught(),
        objective={"soft": soft()},
        scheme=SeparateHeads(),
        forward=of_its_task,
        args=arguments,
        train_dataset=Rows(),
        data_collator=ready_batch,
    )
    trainer.train()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    held = [name for name, _ in trainer.distillation_module.named_parameters()]
    assert len(held) == len(before) == len(list(trainer.distillation_module.state_dict()))
