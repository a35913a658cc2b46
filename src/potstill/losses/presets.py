"""Objectives as papers and other tools have them, by name: their terms as a recipe would write them.

In a recipe ``objective: {preset: hinton, temperature: 20.0}`` stands for the terms; keys that hold a term of their own
are added to them, or replace the one of that name. In Python see :func:`preset`. The options of a tool's preset have
the names of the tool; whatever its convention is, the value and the gradient are those of its own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Annotated, Any, Literal

from pydantic import Field

from potstill.errors import ObjectiveError
from potstill.losses.divergence import Share, Temperature
from potstill.losses.objective import Objective, Term
from potstill.losses.ramps import Ramp, as_number
from potstill.registry import presets

Weight = Annotated[float, Field(ge=0)]
Terms = dict[str, dict[str, Any]]

_WITHOUT_T2 = "1/T^2"


@presets.register("hinton", reference="https://arxiv.org/abs/1503.02531")
def hinton(*, temperature: Temperature = 20.0, weight: Weight = 1.0) -> Terms:
    """Soft cross-entropy times T², and the cross-entropy of the labels with weight 1 (Hinton, Vinyals, Dean 2015).

    Args:
        temperature: T of both models in the soft term; 20 on MNIST in the paper.
        weight: of the soft term. The paper gives the labels "a considerably lower weight" and no number.
    """
    return {
        "soft": {"loss": "soft_cross_entropy", "weight": weight, "temperature": temperature},
        "hard": {"loss": "cross_entropy", "weight": 1.0},
    }


@presets.register("repdistiller", reference="https://github.com/HobbitLong/RepDistiller")
def repdistiller(*, temperature: Temperature = 4.0, gamma: Weight = 0.1, alpha: Weight = 0.9) -> Terms:
    """``gamma · CE + alpha · T² · KL`` as RepDistiller's script for KD has it; the same numbers as mdistiller's KD.

    Args:
        temperature: ``kd_T``.
        gamma: weight of the labels; 1 in its scripts of all other methods.
        alpha: weight of the soft term; 0 in its scripts of all other methods but CRD+KD.
    """
    return {
        "soft": {"loss": "kl", "weight": alpha, "temperature": temperature},
        "hard": {"loss": "cross_entropy", "weight": gamma},
    }


@presets.register("torchdistill", reference="https://github.com/yoshitomo-matsubara/torchdistill")
def torchdistill(*, temperature: Temperature = 4.0, alpha: Share = 0.9, beta: Weight | None = None) -> Terms:
    """``alpha · CE + beta · T² · KL``, the ``KDLoss`` of torchdistill: alpha is the weight of the labels.

    Its class has no defaults; these are those of its CIFAR configurations (1 and 0.5 in those of ImageNet). With alpha
    0 it forgets T² also in the soft term; here T² stays.

    Args:
        temperature: T of both models in the soft term.
        alpha: weight of the labels.
        beta: weight of the soft term; 1 − alpha if omitted.

    Raises:
        ObjectiveError: beta is omitted and alpha changes in a way that 1 − alpha cannot follow.
    """
    return {
        "soft": {"loss": "kl", "weight": _rest(alpha) if beta is None else beta, "temperature": temperature},
        "hard": {"loss": "cross_entropy", "weight": alpha},
    }


@presets.register("distilbert", reference="https://arxiv.org/abs/1910.01108")
def distilbert(
    *,
    temperature: Temperature = 2.0,
    alpha_ce: Weight = 5.0,
    alpha_mlm: Weight = 2.0,
    alpha_cos: Weight = 1.0,
    student: str = "hidden.6",
    teacher: str = "hidden.12",
) -> Terms:
    """KL times T² and the angle of the last hidden states over all real tokens, and the labels of the masked ones.

    The numbers are those of the command with which DistilBERT was trained, in Hugging Face's research projects; the
    paper gives none. ``soft: {mask: null}`` beside the preset is its flag ``--restrict_ce_to_mask``.

    Args:
        temperature: T of both models in the soft term.
        alpha_ce: weight of the soft term.
        alpha_mlm: weight of the cross-entropy of the masked tokens.
        alpha_cos: weight of 1 − cosine of the hidden states.
        student: the student's last hidden state.
        teacher: the teacher's last hidden state, of the same size.
    """
    cosine = {"loss": "cosine", "student": student, "teacher": teacher, "weight": alpha_cos, "mask": "attention_mask"}
    return {
        "soft": {"loss": "kl", "weight": alpha_ce, "temperature": temperature, "mask": "attention_mask"},
        "hard": {"loss": "cross_entropy", "weight": alpha_mlm},
        "hidden": cosine,
    }


@presets.register("trl-gkd", reference="https://arxiv.org/abs/2306.13649")
def trl_gkd(*, temperature: Temperature = 1.0, beta: Share = 0.5) -> Terms:
    """The generalised Jensen-Shannon divergence of TRL's ``GKDTrainer`` and ``DistillationTrainer``, without T².

    Args:
        temperature: T of both models in the loss. In GKD it is always 1: ``GKDConfig.temperature`` (0.9) is that of
            the sampling alone.
        beta: 0 for KL(teacher ‖ student), 1 for KL(student ‖ teacher), as ``DistillationTrainer`` has by default.
    """
    return {"soft": {"loss": "jsd", "beta": beta, "temperature": temperature, "scale": _WITHOUT_T2}}


@presets.register("textbrewer", reference="https://github.com/airaria/TextBrewer")
def textbrewer(
    *, temperature: Temperature = 4.0, kd_loss_weight: Weight = 1.0, hard_label_weight: Weight = 0.0
) -> Terms:
    """Soft cross-entropy without T², and the labels: the ``DistillationConfig`` of TextBrewer.

    Without T² the gradient of the soft term falls with 1 / T², so that the temperature is a part of its weight.

    Args:
        temperature: T of both models in the soft term; 8 in its examples.
        kd_loss_weight: weight of the soft term.
        hard_label_weight: weight of the labels.
    """
    return {
        "soft": {
            "loss": "soft_cross_entropy",
            "weight": kd_loss_weight,
            "temperature": temperature,
            "scale": _WITHOUT_T2,
        },
        "hard": {"loss": "cross_entropy", "weight": hard_label_weight},
    }


@presets.register("neural-compressor", reference="https://github.com/intel/neural-compressor")
def neural_compressor(
    *,
    temperature: Temperature = 1.0,
    targets_weight: Weight = 0.5,
    teacher_weight: Weight = 0.5,
    loss_type: Literal["CE", "KL"] = "KL",
) -> Terms:
    """The ``KnowledgeDistillationLoss`` of Intel Neural Compressor up to 3.7, whose KL is a mean over the classes too.

    Args:
        temperature: T of both models in the soft term.
        targets_weight: weight of the labels, the first of ``loss_weights``, which must sum to 1 there.
        teacher_weight: weight of the soft term, the second of them.
        loss_type: the second of ``loss_types``: ``"KL"``, which its examples take, is divided by the number of
            classes, ``"CE"``, its default, is not.
    """
    soft: dict[str, Any] = {"loss": "kl", "scale": "1/C"} if loss_type == "KL" else {"loss": "soft_cross_entropy"}
    return {
        "soft": {**soft, "weight": teacher_weight, "temperature": temperature},
        "hard": {"loss": "cross_entropy", "weight": targets_weight},
    }


def preset(name: str, **options: Any) -> Objective:
    """Return the objective of a preset.

    Args:
        name: one of ``potstill list presets``.
        options: of the preset, such as ``temperature``.

    Raises:
        ComponentError: there is no such preset.
        TypeError: it has no such option.

    Example:
        >>> print(preset("hinton", temperature=4.0).describe())  # doctest: +ELLIPSIS
        total = ...
    """
    return Objective({term: Term(**spec) for term, spec in presets.get(name)(**options).items()})


def _rest(alpha: Any) -> Any:
    """1 − alpha, of a number or of a ramp; what is no right ramp comes back, so that its own term says so."""
    if isinstance(alpha, Real):
        return round(1 - float(alpha), 12)
    ramp = None
    if isinstance(alpha, Ramp) or (isinstance(alpha, Mapping) and "schedule" not in alpha):
        try:
            ramp = as_number(alpha)
        except ObjectiveError:
            return alpha
    if not isinstance(ramp, Ramp) or ramp.shape == "exponential":
        raise ObjectiveError("1 − alpha is a ramp where alpha is a linear, cosine or step one; say `beta` too")
    ends = {"from": round(1 - ramp.start, 12), "to": round(1 - ramp.stop, 12)}
    return {**ends, "shape": ramp.shape, "begin": ramp.begin, "end": ramp.end}
