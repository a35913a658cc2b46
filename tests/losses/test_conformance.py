"""Presets against the formulas of the tools whose names they bear, in extended precision and without our code.

Every row of the table of tools in ``docs/conventions.md`` is built as it stands there and compared with a formula of
this file: NumPy, written from the paper or the tool's source, with the tool's own reductions. The gradient is that of
central differences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.interfaces import Progress
from potstill.losses.objective import Objective
from potstill.losses.presets import preset
from potstill.losses.ramps import Ramp
from potstill.recipe.build import make_term
from potstill.recipe.load import load_recipe
from potstill.registry import presets

Array = np.ndarray[Any, Any]
Signals = dict[str, Array]
PAGE = Path(__file__).parent.parent.parent / "docs" / "conventions.md"
IGNORED = -100


# Arithmetic of the formulas: rows ``[N, C]`` in, a value a row out.


def log_probabilities(logits: Array, temperature: float = 1.0) -> Array:
    scaled = logits / np.longdouble(temperature)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def divergence(first: Array, second: Array) -> Array:
    """KL of two rows of log-probabilities."""
    return (np.exp(first) * (first - second)).sum(-1)


def kl_rows(z: Array, v: Array, temperature: float) -> Array:
    return divergence(log_probabilities(v, temperature), log_probabilities(z, temperature))


def soft_rows(z: Array, v: Array, temperature: float) -> Array:
    return -(np.exp(log_probabilities(v, temperature)) * log_probabilities(z, temperature)).sum(-1)


def hard(z: Array, labels: Array) -> Any:
    """The mean cross-entropy of the positions that have a label, as nn.CrossEntropyLoss has it."""
    values = [-log_probabilities(row)[label] for row, label in zip(rows(z), labels.ravel(), strict=True) if label >= 0]
    return sum(values) / len(values)


def rows(signal: Array, mask: Array | None = None) -> Array:
    flat = signal.reshape(-1, signal.shape[-1])
    return flat if mask is None else flat[mask.ravel()]


# The tools: ``(student, teacher, batch, **settings) -> number``, their defaults those that they publish.


def hinton(s: Signals, t: Signals, batch: Signals, temperature: float = 20.0, weight: float = 1.0) -> Any:
    soft = soft_rows(s["logits"], t["logits"], temperature)
    return weight * temperature**2 * soft.mean() + hard(s["logits"], batch["labels"])


def repdistiller(
    s: Signals, t: Signals, batch: Signals, temperature: float = 4.0, gamma: float = 0.1, alpha: float = 0.9
) -> Any:
    """`F.kl_div(…, size_average=False) * T² / batch size`."""
    z, v = s["logits"], t["logits"]
    soft = kl_rows(z, v, temperature).sum() * temperature**2 / len(z)
    return gamma * hard(z, batch["labels"]) + alpha * soft


def torchdistill(
    s: Signals, t: Signals, batch: Signals, temperature: float = 4.0, alpha: float = 0.9, beta: float | None = None
) -> Any:
    """`alpha * hard_loss + beta * T² * soft_loss`, the soft one `batchmean`."""
    z, v = s["logits"], t["logits"]
    beta = 1 - alpha if beta is None else beta
    soft = kl_rows(z, v, temperature).sum() / len(z)
    return alpha * hard(z, batch["labels"]) + beta * temperature**2 * soft


def weighted(
    s: Signals, t: Signals, batch: Signals, temperature: float = 1.0, soft: float = 1.0, task: float = 1.0
) -> Any:
    """CE and T²·KL of MMRazor, timm, mdistiller's ImageNet: the mean over the batch."""
    z, v = s["logits"], t["logits"]
    return task * hard(z, batch["labels"]) + soft * temperature**2 * kl_rows(z, v, temperature).sum() / len(z)


def textbrewer(
    s: Signals,
    t: Signals,
    batch: Signals,
    temperature: float = 4.0,
    kd_loss_weight: float = 1.0,
    hard_label_weight: float = 0.0,
) -> Any:
    soft = soft_rows(s["logits"], t["logits"], temperature).mean()
    return kd_loss_weight * soft + hard_label_weight * hard(s["logits"], batch["labels"])


def textbrewer_mse(s: Signals, t: Signals, batch: Signals, temperature: float = 4.0) -> Any:
    return ((s["logits"] / temperature - t["logits"] / temperature) ** 2).mean()


def neural_compressor(
    s: Signals,
    t: Signals,
    batch: Signals,
    temperature: float = 1.0,
    targets_weight: float = 0.5,
    teacher_weight: float = 0.5,
    loss_type: str = "KL",
) -> Any:
    """`F.kl_div` without a reduction is the mean over all elements; "CE" is the mean over the batch."""
    z, v = s["logits"], t["logits"]
    soft = soft_rows(z, v, temperature).mean()
    if loss_type == "KL":
        soft = kl_rows(z, v, temperature).sum() / z.size
    return targets_weight * hard(z, batch["labels"]) + teacher_weight * temperature**2 * soft


def vanilla_kd(s: Signals, t: Signals, batch: Signals, temperature: float = 20.0, weight: float = 0.5) -> Any:
    p, q = (np.exp(log_probabilities(side["logits"], temperature)) for side in (t, s))
    return (1 - weight) * hard(s["logits"], batch["labels"]) + weight * temperature**2 * ((p - q) ** 2).mean()


def distilbert(
    s: Signals,
    t: Signals,
    batch: Signals,
    temperature: float = 2.0,
    alpha_ce: float = 5.0,
    alpha_mlm: float = 2.0,
    alpha_cos: float = 1.0,
    student: str = "hidden.6",
    teacher: str = "hidden.12",
    restrict: bool = False,
) -> Any:
    tokens = batch["attention_mask"] != 0
    taught = batch["labels"] > -1 if restrict else tokens
    soft = kl_rows(rows(s["logits"], taught), rows(t["logits"], taught), temperature).mean() * temperature**2
    angles = [
        1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        for a, b in zip(rows(s[student], tokens), rows(t[teacher], tokens), strict=True)
    ]
    return alpha_ce * soft + alpha_mlm * hard(s["logits"], batch["labels"]) + alpha_cos * sum(angles) / len(angles)


def restricted(s: Signals, t: Signals, batch: Signals) -> Any:
    return distilbert(s, t, batch, restrict=True)


def distilbart(s: Signals, t: Signals, batch: Signals) -> Any:
    inputs = batch["decoder_attention_mask"] != 0
    soft = kl_rows(rows(s["logits"], inputs), rows(t["logits"], inputs), 2.0).mean() * 4
    return 0.8 * soft + 0.2 * hard(s["logits"], batch["labels"])


def labelled(batch: Signals, *signals: Signals) -> list[Array]:
    return [rows(signal["logits"], batch["labels"] != IGNORED) for signal in signals]


def whisper(s: Signals, t: Signals, batch: Signals) -> Any:
    soft = kl_rows(*labelled(batch, s, t), 2.0).sum() * 4 / (batch["labels"] >= 0).sum()
    return 0.8 * hard(s["logits"], batch["labels"]) + soft


def trl_gkd(s: Signals, t: Signals, batch: Signals, temperature: float = 1.0, beta: float = 0.5) -> Any:
    """Eq. 1 of GKD: beta·KL(p ‖ m) + (1 − beta)·KL(q ‖ m), m = beta·p + (1 − beta)·q; KL at the ends. No T²."""
    q, p = (log_probabilities(each, temperature) for each in labelled(batch, s, t))
    if beta in (0, 1):
        return (divergence(p, q) if beta == 0 else divergence(q, p)).mean()
    m = np.log(beta * np.exp(p) + (1 - beta) * np.exp(q))
    return (beta * divergence(p, m) + (1 - beta) * divergence(q, m)).mean()


def liger(s: Signals, t: Signals, batch: Signals) -> Any:
    return 0.5 * hard(s["logits"], batch["labels"]) + 0.5 * trl_gkd(s, t, batch)


def torchtune(s: Signals, t: Signals, batch: Signals) -> Any:
    return 0.5 * hard(s["logits"], batch["labels"]) + 0.5 * soft_rows(*labelled(batch, s, t), 1.0).mean()


def distillkit(s: Signals, t: Signals, batch: Signals) -> Any:
    return 0.5 * hard(s["logits"], batch["labels"]) + 0.5 * kl_rows(*labelled(batch, s, t), 1.0).mean()


def distillm(s: Signals, t: Signals, batch: Signals) -> Any:
    q, p = (log_probabilities(each) for each in labelled(batch, s, t))
    return divergence(q, np.log(0.9 * np.exp(p) + 0.1 * np.exp(q))).mean()


TOOLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Hinton et al. 2015, MNIST": (hinton, {}),
    "RepDistiller, KD": (repdistiller, {}),
    "mdistiller, KD on CIFAR-100": (weighted, {"temperature": 4.0, "soft": 0.9, "task": 0.1}),
    "mdistiller, KD on ImageNet": (weighted, {"soft": 0.5, "task": 0.5}),
    "torchdistill, CIFAR": (torchdistill, {}),
    "torchdistill, ImageNet": (torchdistill, {"temperature": 1.0, "alpha": 0.5}),
    "MMRazor, KD": (weighted, {"soft": 3.0}),
    "timm": (weighted, {}),
    "TextBrewer": (textbrewer, {}),
    "TextBrewer, MSE": (textbrewer_mse, {}),
    "Neural Compressor, KL": (neural_compressor, {}),
    "Neural Compressor, CE": (neural_compressor, {"loss_type": "CE"}),
    "NVIDIA Model Optimizer": (neural_compressor, {}),
    "KD_Lib, VanillaKD": (vanilla_kd, {}),
    "PaddleSlim, soft_label": (textbrewer, {"temperature": 1.0}),
    "DistilBERT": (distilbert, {}),
    "DistilBERT, `--restrict_ce_to_mask`": (restricted, {}),
    "DistilBART": (distilbart, {}),
    "Distil-Whisper": (whisper, {}),
    "TRL, GKDTrainer": (trl_gkd, {}),
    "TRL, DistillationTrainer": (trl_gkd, {"beta": 1.0}),
    "ms-swift, GKD": (trl_gkd, {"temperature": 0.9}),
    "Liger, fused linear JSD": (liger, {}),
    "torchtune": (torchtune, {}),
    "DistillKit": (distillkit, {}),
    "DistiLLM, `srkl`": (distillm, {}),
}
ON_TOKENS = {distilbert, restricted, distilbart, whisper, trl_gkd, liger, torchtune, distillkit, distillm}

SETTINGS: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("hinton", hinton, {"temperature": 3.0, "weight": 0.7}),
    ("repdistiller", repdistiller, {"temperature": 1.0, "gamma": 1.0, "alpha": 0.3}),
    ("repdistiller", repdistiller, {"temperature": 12.0, "gamma": 0.0, "alpha": 1.0}),
    ("torchdistill", torchdistill, {"temperature": 7.0, "alpha": 0.25}),
    ("torchdistill", torchdistill, {"temperature": 2.0, "alpha": 0.5, "beta": 9.0}),
    ("torchdistill", torchdistill, {"temperature": 4.0, "alpha": 0.0}),
    ("distilbert", distilbert, {"temperature": 1.0, "alpha_ce": 0.5, "alpha_mlm": 0.3, "alpha_cos": 4.0}),
    ("distilbert", distilbert, {"temperature": 5.0, "student": "last", "teacher": "encoder.out"}),
    ("trl-gkd", trl_gkd, {"beta": 0.0}),
    ("trl-gkd", trl_gkd, {"beta": 0.1, "temperature": 0.9}),
    ("trl-gkd", trl_gkd, {"beta": 0.8, "temperature": 2.0}),
    ("trl-gkd", trl_gkd, {"beta": 1.0, "temperature": 3.0}),
    ("textbrewer", textbrewer, {"temperature": 8.0, "kd_loss_weight": 11.2, "hard_label_weight": 0.3}),
    ("textbrewer", textbrewer, {"temperature": 1.0, "kd_loss_weight": 0.5, "hard_label_weight": 1.0}),
    ("neural-compressor", neural_compressor, {"temperature": 4.0, "targets_weight": 0.2, "teacher_weight": 0.8}),
    ("neural-compressor", neural_compressor, {"temperature": 4.0, "teacher_weight": 0.3, "loss_type": "CE"}),
]


def table() -> dict[str, str]:
    """The last cell of each row of the table of tools, by the first."""
    found = re.search(r"^\| tool \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    cells = [line.strip("|").split(" | ") for line in found[1].splitlines()]
    return {row[0].strip(): re.findall(r"`([^`]+)`", row[-1])[0] for row in cells}


def written(text: str) -> Objective:
    """The objective that a recipe with these words has."""
    specs = load_recipe("digits", [f"objective={text}"]).objective
    return Objective({name: make_term(spec) for name, spec in specs.items()})


def example(tokens: bool) -> tuple[Signals, Signals, Signals]:
    """Signals of a student and a teacher, and a batch in which labels are missing and tokens are padding."""
    random = np.random.default_rng(7)
    shape: tuple[int, ...] = (3, 4, 5) if tokens else (6, 5)
    sides = [{"logits": random.normal(0, 3, shape)} for _ in range(2)]
    batch = {"labels": random.integers(0, 5, shape[:-1]), "sample_id": np.arange(shape[0])}
    if tokens:
        for side, names in zip(sides, (("hidden.6", "last"), ("hidden.12", "encoder.out")), strict=True):
            side.update({name: random.normal(0, 1, (3, 4, 3)) for name in names})
        batch["attention_mask"] = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
        batch["decoder_attention_mask"] = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
        batch["labels"][[0, 1, 1, 2], [0, 2, 3, 3]] = IGNORED
    else:
        batch["labels"][[1, 4]] = IGNORED
    return sides[0], sides[1], batch


def ours(objective: Objective, s: Signals, t: Signals, batch: Signals, progress: Progress | None = None) -> Any:
    """The value and its gradient with respect to each signal of the student."""
    student = {name: torch.from_numpy(value).requires_grad_() for name, value in s.items()}
    teacher = {name: torch.from_numpy(value) for name, value in t.items()}
    total = objective(student, teacher, {k: torch.from_numpy(v) for k, v in batch.items()}, progress).total
    total.backward()
    gradients = {name: value.grad for name, value in student.items() if value.grad is not None}
    return total.item(), {name: gradient.numpy() for name, gradient in gradients.items()}


def slope(value: Callable[[Signals], Any], signals: Signals, name: str, step: float = 1e-6) -> Array:
    """The gradient of a number with respect to one of the signals, by central differences."""
    gradient = np.zeros_like(signals[name])
    for place in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = signals[name].astype(np.longdouble)
            moved[place] += sign * step
            ends.append(value({**signals, name: moved}))
        gradient[place] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def assert_conforms(objective: Objective, formula: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    s, t, batch = example(formula in ON_TOKENS)
    wide = [{name: value.astype(np.longdouble) for name, value in side.items()} for side in (s, t)]
    value, gradients = ours(objective, s, t, batch)
    assert value == pytest.approx(float(formula(*wide, batch, **settings)), rel=1e-9)
    assert "logits" in gradients
    for name in s:
        expected = slope(lambda signals: formula(signals, wide[1], batch, **settings), wide[0], name)
        found = gradients.get(name, np.zeros_like(s[name]))
        np.testing.assert_allclose(found, expected.astype(float), rtol=1e-7, atol=1e-8 * float(np.abs(expected).max()))


@pytest.mark.parametrize("tool", TOOLS)
def test_the_table_of_the_documentation(tool):
    formula, settings = TOOLS[tool]
    assert_conforms(written(table()[tool]), formula, settings)


def test_every_row_of_the_table_is_tested():
    assert list(table()) == list(TOOLS)


@pytest.mark.parametrize(
    ("name", "formula", "settings"), [pytest.param(*each, id=f"{each[0]}-{i}") for i, each in enumerate(SETTINGS)]
)
def test_a_preset_with_other_settings(name, formula, settings):
    assert_conforms(preset(name, **settings), formula, settings)


def test_every_preset_is_tested():
    assert {name for name, _, _ in SETTINGS} == set(presets.names())
    assert set(presets.names()) <= set(re.findall(r"preset: ([\w-]+)", " ".join(table().values())))


def test_the_gradient_in_closed_form():
    """gamma·(softmax(z) − y) / labelled + alpha·T·(q − p) / all, which is what central differences are of."""
    s, t, batch = example(tokens=False)
    z, v, y = s["logits"], t["logits"], batch["labels"]
    p, q, one = (np.exp(log_probabilities(x, T)) for x, T in ((v, 4.0), (z, 4.0), (z, 1.0)))
    certain = np.where((y != IGNORED)[:, None], one - np.eye(z.shape[1])[y.clip(0)], 0.0)
    expected = 0.1 * certain / (y != IGNORED).sum() + 0.9 * 4.0 * (q - p) / len(z)
    _, gradients = ours(preset("repdistiller"), s, t, batch)
    np.testing.assert_allclose(gradients["logits"], expected.astype(float), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "options", "factor"),
    [
        ("hinton", {}, 1.0),
        ("repdistiller", {"alpha": 1.0}, 1.0),
        ("torchdistill", {"alpha": 0.0}, 1.0),
        ("distilbert", {"alpha_ce": 1.0}, 1.0),
        ("trl-gkd", {"beta": 0.0}, 1e-6),
        ("trl-gkd", {"beta": 1.0}, 1e-6),
        ("neural-compressor", {"teacher_weight": 1.0}, 1 / 9),
        ("textbrewer", {}, 1e-6),
    ],
)
def test_at_a_high_temperature_soft_targets_are_half_the_mean_squared_difference_of_centred_logits(
    name, options, factor
):
    """T²·KL → (1 / 2C)·Σ(centred difference)², Hinton et al. 2015, section 2.1, and the tools' share of it."""
    random = np.random.default_rng(3)
    z, v = random.normal(0, 1, (8, 9)), random.normal(0, 1, (8, 9))
    difference = (z - z.mean(-1, keepdims=True)) - (v - v.mean(-1, keepdims=True))
    half = (difference**2).mean(-1).mean() / 2
    slope_of_half = difference / 9 / len(z)
    term = preset(name, temperature=1000.0, **options).terms["soft"]
    batch = {"labels": np.zeros(8, dtype=int), "sample_id": np.arange(8), "attention_mask": np.ones(8)}
    value, gradients = ours(Objective({"soft": term}), {"logits": z}, {"logits": v}, batch)
    if term.loss_name == "soft_cross_entropy":  # KL and the teacher's entropy
        value -= float(soft_rows(v, v, 1000.0).mean() * 1e6 * factor)
    assert value == pytest.approx(factor * half, rel=1e-2)
    gap = np.linalg.norm(gradients["logits"] / factor - slope_of_half)
    assert gap <= 1e-2 * np.linalg.norm(slope_of_half)


@pytest.mark.parametrize("shape", ["linear", "cosine", "step"])
@pytest.mark.parametrize("as_mapping", [True, False])
def test_alpha_of_torchdistill_may_be_a_ramp(shape, as_mapping):
    ramp: Any = {"from": 0.9, "to": 0.2, "shape": shape} if as_mapping else Ramp(0.9, 0.2, shape)
    objective = preset("torchdistill", alpha=ramp)
    s, t, batch = example(tokens=False)
    for step in (0, 3, 10):
        progress = Progress(step=step, total_steps=10)
        value, _ = ours(objective, s, t, batch, progress)
        alpha = Ramp(0.9, 0.2, shape)(progress)
        assert value == pytest.approx(float(torchdistill(s, t, batch, alpha=alpha)), rel=1e-9)
