"""What `DistillationConfig` and its parts mean: the layers of `output_hidden_states`, the total, what is refused."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset

from potstill import (
    AttentionDistillation,
    DistillationConfig,
    Distiller,
    FeatureDistillation,
    ProgressiveDistillation,
    StudentConfig,
    StudentModel,
    TeacherConfig,
    TeacherModel,
)
from potstill.distiller_models import layer_terms
from potstill.errors import ComponentError, PotstillError, SignalError, TrainingError
from potstill.interfaces import Progress
from potstill.models.cifar_resnet import CifarResNet
from potstill.registry import schemes
from potstill.runs.preflight import before_training
from potstill.runs.steps import Run
from potstill.schemes.lesson import Learner, Lesson
from potstill.training.module import DistillationModule
from tests import local_models
from tests.local_models import SENTENCES

NAMES = ["negative", "positive"]
DOCS = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def large(folder: Path) -> str:
    """A BERT of 24 blocks with a head."""
    return str(local_models.bert(folder / "large", layers=24, head=NAMES))


@pytest.fixture(scope="module")
def base(folder: Path) -> str:
    """One of 12 blocks."""
    return str(local_models.bert(folder / "base", layers=12, head=NAMES, seed=5))


@pytest.fixture(scope="module")
def wide(folder: Path) -> str:
    """One of 4 wider blocks with more heads."""
    return str(local_models.bert(folder / "wide", layers=4, head=NAMES, hidden_size=24, num_attention_heads=3))


@pytest.fixture(scope="module")
def distilbert(folder: Path) -> str:
    """A DistilBERT of 6 blocks."""
    return str(local_models.distilbert(folder / "distilbert", layers=6))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def table() -> Dataset:
    rows = {"sentence": [text for text, _ in SENTENCES] * 2, "label": [grade for _, grade in SENTENCES] * 2}
    return Dataset.from_dict(rows).cast_column("label", ClassLabel(names=NAMES))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Returns the run that a distillation would be, without training."""
    monkeypatch.setattr(Run, "execute", lambda run: None)

    def made(teacher: str, student: str | StudentConfig, **config: Any) -> Run:
        who = student if isinstance(student, StudentConfig) else StudentConfig(student)
        distiller = Distiller(TeacherModel(TeacherConfig(teacher)), StudentModel(who), DistillationConfig(**config))
        return distiller.distill(table(), table()).run

    return made


# the terms


def combined() -> dict[str, Any]:
    return {
        "distillation_type": "combined",
        "feature_distillation": FeatureDistillation(
            teacher_layers=[6, 12, 18, 24], student_layers=[3, 6, 9, 12], feature_loss_weight=0.5
        ),
        "attention_distillation": AttentionDistillation(
            attention_loss_weight=0.3, layer_mapping={0: 0, 6: 3, 12: 6, 18: 9, 24: 12}
        ),
        "progressive_distillation": ProgressiveDistillation(
            teacher_layers=24, student_layers=12, distillation_schedule="linear"
        ),
        "temperature": 4.0,
        "alpha": 0.7,
        "beta": 0.3,
    }


def test_the_total_is_that_of_the_layers_that_transformers_numbers(
    plan: Callable[..., Run], large: str, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    """alpha·T²·KL + beta·CE + Σ weight·term, each layer that of `output_hidden_states` and of the eager attention."""
    run = plan(large, base, **combined())
    assert "the embeddings have no attention maps" in caplog.text
    model, taught = (
        transformers.AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
        for path in (base, large)
    )
    batch = run.task_of("student").dataset(run.splits.train, training=False, seed=0).__getitems__(list(range(6)))
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        one, two = (each(**inputs, output_hidden_states=True, output_attentions=True) for each in (model, taught))
    signals = {"logits": two.logits}
    signals |= {f"hidden.{n}": value for n, value in enumerate(two.hidden_states)}
    signals |= {f"attention.{n}": value for n, value in enumerate(two.attentions, 1)}
    student = run.student().eval()
    module = DistillationModule(student, run.objective, forward=run.task.forward).eval()
    module.materialize(signals, batch)
    found = module(signals, progress=Progress(), **batch)

    def states(own: int, other: int) -> float:
        return float((one.hidden_states[own] - two.hidden_states[other])[mask].square().mean())

    def maps(own: int, other: int) -> float:
        total = 0.0
        for row in range(6):  # queries and keys that are no padding, and the mean over heads and queries
            length = int(mask[row].sum())
            gap = one.attentions[own - 1][row] - two.attentions[other - 1][row]
            total += float(gap[:, :length, :length].square().sum(-1).mean()) / length
        return total / 6

    p, q = (two.logits / 4).softmax(-1), (one.logits / 4).softmax(-1)
    expected = 0.7 * 16 * float((p * (p / q).log()).sum(-1).mean())
    expected += 0.3 * float(torch.nn.functional.cross_entropy(one.logits, batch["labels"]))
    expected += 0.5 * sum(states(n, 2 * n) for n in (3, 6, 9, 12))
    expected += 0.3 * (sum(maps(n, 2 * n) for n in (3, 6, 9, 12)) + states(0, 0))
    expected += sum(states(n, 2 * n) for n in range(1, 13))
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert run.recipe.scheme.name == "progressive"


def test_the_blocks_begin_one_after_another(plan: Callable[..., Run], large: str, base: str) -> None:
    """With twelve phases of one length; features and attention of block 6 wait for it, the answers for the last."""
    run = plan(large, base, **combined())
    scheme = schemes.get("progressive")(**run.recipe.scheme.options)
    student = Learner(run.student(), run.objective)
    terms = dict(scheme.arrange(Lesson(student)).student.objective.named_terms())

    def begin(name: str) -> int:
        return next(step for step in range(120) if terms[name].weight_at(Progress(step, 120)))

    assert begin("progressive_1_2") == begin("attention_embeddings_0_0") == 0
    assert begin("progressive_6_12") == begin("feature_6_12") == begin("attention_6_12") == 50
    assert begin("progressive_12_24") == begin("soft") == begin("hard") == 110


def test_other_schedules(plan: Callable[..., Run], large: str, base: str) -> None:
    part = ProgressiveDistillation(24, 12, "exponential", ratio=3, response="throughout", progressive_loss_weight=2.0)
    run = plan(large, base, distillation_type="progressive", progressive_distillation=part)
    options = {"schedule": "exponential", "ratio": 3, "response": "throughout", "hard": "last"}
    assert run.recipe.scheme.options == options
    term = run.recipe.objective["progressive"]
    assert (term.weight, term.layers) == (2.0, {n: 2 * n for n in range(1, 13)})
    custom = ProgressiveDistillation(4, 2, "custom", shares=lambda count: [0.25, 0.75][:count])
    assert custom.scheme()["shares"] == [0.25, 0.75]
    uneven = ProgressiveDistillation(6, 4)
    assert uneven.terms()["progressive"]["layers"] == {1: 2, 2: 3, 3: 5, 4: 6}
    deeper = ProgressiveDistillation(2, 6)
    assert deeper.terms()["progressive"]["layers"][6] == 2
    assert 0 not in deeper.terms()["progressive"]["layers"].values()


def test_models_that_differ_in_width_and_heads_run(wide: str, distilbert: str, caplog: Any, tmp_path: Path) -> None:
    """A linear layer brings widths together and is not saved; heads are averaged where their numbers differ."""
    config = DistillationConfig(
        distillation_type="combined",
        feature_distillation=FeatureDistillation([2, 4], [3, 6], loss="cosine"),
        attention_distillation=AttentionDistillation({0: 0, 2: 3, 4: 6}),
        progressive_distillation=ProgressiveDistillation(4, 6),
        baseline=False,
    )
    distiller = Distiller(TeacherModel(TeacherConfig(wide)), StudentModel(StudentConfig(distilbert)), config)
    with caplog.at_level(logging.WARNING):
        done = distiller.distill(table(), table(), args={"max_steps": 6, "batch_size": 8}, output=tmp_path / "run")
    assert "the teacher has 3 attention heads and the student 2" in caplog.text
    assert done.run.recipe.objective["attention"].options["heads"] == "mean"
    assert [key for key in done.student.state_dict() if "project" in key] == []
    assert done.metrics.models["distilled"].metrics["accuracy"].value >= 0
    history = (done.folder / "history/distilled.json").read_text(encoding="utf-8")
    assert "loss/progressive_6_4" in history
    assert "NaN" not in history


def test_heads_and_losses_that_are_said_stay(wide: str, distilbert: str) -> None:
    part = AttentionDistillation({4: 6}, loss="attention_kl", heads="each")
    assert part.terms(2, 3) == {
        "attention": {
            "loss": "attention_kl",
            "student": "attention",
            "teacher": "attention",
            "weight": 1.0,
            "heads": "each",
            "layers": {6: 4},
        }
    }
    assert part.terms(2, 2)["attention"]["heads"] == "each"


def test_layers_by_their_paths(plan: Callable[..., Run], wide: str, distilbert: str) -> None:
    taught, own = ["bert.encoder.layer.3"], ["distilbert.transformer.layer.5"]
    part = FeatureDistillation(taught, own, mask="attention_mask")
    run = plan(wide, distilbert, distillation_type="feature", feature_distillation=part)
    (term,) = [term for name, term in run.objective.named_terms() if name.startswith("feature")]
    assert term.student == ("distilbert.transformer.layer.5",)
    assert term.teacher == ("bert.encoder.layer.3",)
    assert [str(each) for each in before_training(run) if each.level == "error"] == []
    config = DistillationConfig("feature", feature_distillation=FeatureDistillation([1], [1]))
    resnet = CifarResNet(depth=8, num_labels=10)
    with pytest.raises(SignalError, match=r"layers of the student \(CifarResNet\) have no numbers; name them"):
        layer_terms(config, resnet, resnet)


def test_the_old_words_still_hold(plan: Callable[..., Run], wide: str, distilbert: str) -> None:
    run = plan(wide, distilbert, distillation_type="feature", features={"hidden.3": "hidden.2"}, feature_weight=0.5)
    term = run.recipe.objective["feature_0"]
    assert (term.student, term.teacher, term.weight, term.project) == ("hidden.3", "hidden.2", 0.5, "linear")


# what is refused


def test_a_layer_that_a_model_lacks(plan: Callable[..., Run], base: str, distilbert: str) -> None:
    """The range is named, and what is proposed is taken."""
    part = FeatureDistillation(teacher_layers=[3, 6, 9, 12], student_layers=[3, 6, 9, 12])
    with pytest.raises(TrainingError, match=r"student has 6 blocks, so its layers are 0 to 6 .*, got 9, 12") as caught:
        plan(base, distilbert, distillation_type="feature", feature_distillation=part)
    right = re.search(r"teacher_layers=\[2, 4, 6, 8, 10, 12\], student_layers=\[1, 2, 3, 4, 5, 6\]", str(caught.value))
    assert right is not None
    proposed = eval(f"FeatureDistillation({right[0]})")
    run = plan(base, distilbert, distillation_type="feature", feature_distillation=proposed)
    assert run.recipe.objective["feature"].layers == {n: 2 * n for n in range(1, 7)}

    attention = AttentionDistillation(layer_mapping={0: 0, 6: 3, 12: 6, 18: 9, 24: 12})
    with pytest.raises(TrainingError, match=r"the teacher has 12 blocks, so its layers are 0 to 12") as caught:
        plan(base, distilbert, distillation_type="attention", attention_distillation=attention)
    assert "layer_mapping={0: 0, 2: 1, 4: 2, 6: 3, 8: 4, 10: 5, 12: 6}" in str(caught.value)


def test_counts_that_are_not_those_of_the_models(plan: Callable[..., Run], base: str, distilbert: str) -> None:
    part = ProgressiveDistillation(teacher_layers=24, student_layers=12)
    with pytest.raises(
        TrainingError, match=r"teacher of 24 blocks and a student of 12, got 12 blocks of the teacher and 6 of"
    ):
        plan(base, distilbert, distillation_type="progressive", progressive_distillation=part)


def test_blocks_that_are_kept_count_from_0_and_layers_after_them(plan: Callable[..., Run], base: str) -> None:
    """A student of the blocks 1, 3 and 11 has the layers 0 to 3, and 3 is what its last block gives."""
    student = StudentConfig(keep_blocks=[1, 3, 11])
    run = plan(base, student, distillation_type="feature", feature_distillation=FeatureDistillation([2, 12], [1, 3]))
    assert [str(each) for each in before_training(run) if each.level == "error"] == []
    with pytest.raises(TrainingError, match=r"the student has 3 blocks, so its layers are 0 to 3"):
        plan(base, student, distillation_type="feature", feature_distillation=FeatureDistillation([12], [4]))


FEATURE = FeatureDistillation([1], [1])
PROGRESSIVE = ProgressiveDistillation(24, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureDistillation([6, 12], [3]), r"one length.*got 2 and 1; say teacher_layers=\[6\], student_laye"),
        (lambda: FeatureDistillation([], []), "at least one pair of layers, got none"),
        (lambda: FeatureDistillation([6, 12], [3, 3]), "each layer of the student once, got 3 again"),
        (lambda: FeatureDistillation([-1], [3]), "number layers from 0, the embeddings, on, got -1"),
        (lambda: FeatureDistillation([1.5], [3]), r"got 1\.5"),  # type: ignore[list-item]
        (lambda: FeatureDistillation([6, "a"], [3, 4]), "numbers alone or by paths alone"),
        (lambda: FeatureDistillation([6], [3], feature_loss_weight=-1), "feature_loss_weight of 0 or more"),
        (lambda: FeatureDistillation([6], [3], loss="cross_entropy"), "compares with the teacher"),
        (lambda: AttentionDistillation({0: 3}), "got 0: 3: 0 is the embeddings, which have no attention"),
        (lambda: AttentionDistillation({0: 0}), "got no pair of blocks"),
        (lambda: AttentionDistillation({}), "at least one pair"),
        (lambda: AttentionDistillation({1: 2, 3: 2}), "each layer of the student once, got 2 again"),
        (lambda: AttentionDistillation({1: 2}, loss="attention_ms"), "did you mean 'attention_mse'"),
        (lambda: AttentionDistillation({1: 2}, loss="mse"), "known: attention_cosine, attention_kl, attention_mse"),
        (lambda: ProgressiveDistillation([2, 4], 3), "how many blocks there are.*did you mean 2"),  # type: ignore[arg-type]
        (lambda: ProgressiveDistillation(12, 1), "student_layers.*at least 2, got 1"),
        (lambda: ProgressiveDistillation(24, 12, "exponental"), "did you mean 'exponential'"),  # type: ignore[arg-type]
        (lambda: ProgressiveDistillation(24, 12, "custom"), "takes `shares` with `schedule: custom`"),
        (lambda: ProgressiveDistillation(24, 3, "custom", shares=[0.5, 0.5]), "expected 3 shares above 0"),
        (lambda: ProgressiveDistillation(24, 12, ratio=-1, distillation_schedule="exponential"), "ratio above 0"),
        (lambda: ProgressiveDistillation(24, 12, hard="never"), "'last' or 'throughout', got 'never'"),  # type: ignore[arg-type]
        (lambda: DistillationConfig("feture"), "got 'feture'; did you mean 'feature'"),  # type: ignore[arg-type]
        (lambda: DistillationConfig("attention"), r"needs attention_distillation=AttentionDistillation\("),
        (lambda: DistillationConfig("combined"), "needs a part, such as feature_distillation"),
        (lambda: DistillationConfig(feature_distillation=FEATURE), "no use of feature.*distillation_type='feature'"),
        (
            lambda: DistillationConfig("feature", feature_distillation=FEATURE, progressive_distillation=PROGRESSIVE),
            "no use of progressive_distillation; say distillation_type='combined'",
        ),
        (lambda: DistillationConfig(features={"hidden.1": "hidden.1"}), "say distillation_type='feature'"),
        (lambda: DistillationConfig(temperature=0.0), "temperature above 0"),
        (lambda: DistillationConfig(temperature=math.inf), "temperature to be a finite number, got inf"),
        (lambda: DistillationConfig(temperature=math.nan), "temperature to be a finite number, got nan"),
        (lambda: DistillationConfig(alpha=2.0), "alpha=2.0 leaves beta = 1 − alpha below 0; give beta"),
        (lambda: DistillationConfig(alpha=math.nan), "alpha to be a finite number"),
        (lambda: DistillationConfig(beta="0.3"), "beta to be a finite number, got '0.3'"),  # type: ignore[arg-type]
        (lambda: FeatureDistillation(6, 3), r"teacher_layers as a list of layers, got 6.*\[6\]"),  # type: ignore[arg-type]
        (lambda: FeatureDistillation("layer2", "layer2"), r"as a list of layers, got 'layer2'"),
        (lambda: FeatureDistillation([6], [3], feature_loss_weight=math.inf), "finite number, got inf"),
        (lambda: AttentionDistillation([(6, 3)]), r"layer_mapping as \{.*got \[\(6, 3\)\]"),  # type: ignore[arg-type]
        (lambda: AttentionDistillation({6: 3}, attention_loss_weight="0.3"), "got '0.3'"),  # type: ignore[arg-type]
        (lambda: ProgressiveDistillation(24, 12, ratio=3.0), "'linear' makes no use of ratio=3.0"),
        (lambda: ProgressiveDistillation(4, 2, "custom", shares=["a", "b"]), "as 2 numbers that sum to 1"),  # type: ignore[list-item]
        (lambda: ProgressiveDistillation(4, 2, "custom", shares="os.path:basename"), "as 2 numbers that sum to 1"),
        (
            lambda: DistillationConfig("feature", feature_distillation=AttentionDistillation({6: 3})),  # type: ignore[arg-type]
            r"expected feature_distillation=FeatureDistillation\(…\), got AttentionDistillation",
        ),
        (lambda: DistillationConfig(alpha=-0.1), "alpha of 0 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make()


def test_alpha_above_1_with_its_beta() -> None:
    terms = DistillationConfig(alpha=2.0, beta=0.5).answers(labelled=True)
    assert (terms["soft"]["weight"], terms["hard"]["weight"]) == (2.0, 0.5)


def halved(phases: int) -> list[float]:
    """Each phase lasts as long as all after it."""
    return [*(0.5**place for place in range(1, phases)), 0.5 ** (phases - 1)]


def test_shares_by_a_dotted_path() -> None:
    part = ProgressiveDistillation(8, 4, "custom", shares=f"{__name__}:halved")
    options = {key: value for key, value in part.scheme().items() if key != "name"}
    assert [float(begin) for begin in schemes.get("progressive")(**options)._begins(4)] == [0, 0.5, 0.75, 0.875]
    with pytest.raises(ComponentError, match="has no attribute 'halves'"):
        ProgressiveDistillation(8, 4, "custom", shares=f"{__name__}:halves")


def test_losses_that_there_are_not() -> None:
    with pytest.raises(ComponentError, match="did you mean 'mse'"):
        FeatureDistillation([6], [3], loss="mes")
    assert issubclass(ComponentError, PotstillError)


# the page


def test_the_python_of_the_page_runs(large: str, base: str, distilbert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the training, with small models in place of those that it names; the other blocks compile."""
    monkeypatch.setattr(Run, "execute", lambda run: None)
    monkeypatch.setattr(Run, "metrics", lambda run: MagicMock())
    page = DOCS.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        compile(block, DOCS.name, "exec")
    models = {"bert-large-uncased": large, "bert-base-uncased": base, "distilbert-base-uncased": distilbert}
    pairs = table().rename_column("sentence", "premise").add_column("hypothesis", table()["sentence"][:])
    names: dict[str, Any] = {"train_dataset": table(), "eval_dataset": table()}
    names |= {"reviews": table(), "reviews_to_judge_on": table()}
    names |= {"sentence_pairs": pairs, "pairs_to_judge_on": pairs}
    sections = re.findall(r"^## (Layers and attention|Several tasks)\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
    blocks = [
        each for _, own in sections for each in re.findall(r"^```python\n(.*?)^```", own, re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) == 3
    for block in blocks:
        for name, path in models.items():
            block = block.replace(f'"{name}"', repr(path))
        exec(compile(block, DOCS.name, "exec"), names)
    assert names["done"].run.recipe.task.name == "multi-task"
