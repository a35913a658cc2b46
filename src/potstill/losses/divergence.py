"""Losses between two distributions over classes, from their logits.

Shapes: ``[..., V]`` in, ``[...]`` out; ``V`` classes or tokens. All compute in at least fp32, also under autocast, and
all carry the factor T² that keeps the size of the gradient independent of the temperature (Hinton et al., 2015).

In the formulas p is the teacher's softened distribution and q the student's. Classes at −inf in both are impossible
and add nothing. Where only one of two compared distributions excludes a class, a divergence that is infinite there is
a huge, finite number; mixtures (:func:`jsd`, :func:`skewed_kl`, :func:`skewed_reverse_kl`) and :func:`total_variation`
stay bounded.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from potstill.interfaces import Progress
from potstill.losses.numerics import log_softmax
from potstill.registry import losses

Temperature = Annotated[float, Field(gt=0)]
"""Divides the logits before the softmax; above 1 it softens both distributions. No unit."""

Share = Annotated[float, Field(ge=0, le=1)]
"""Part of one distribution in a mixture of two. No unit."""

Order = Annotated[float, Field(ge=0)]
"""Exponent of a probability. No unit."""

_HINTON = "Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531"
_GKD = "Agarwal et al. 2023, https://arxiv.org/abs/2306.13649"
_DISTILLM = "Ko et al. 2024, https://arxiv.org/abs/2402.03898"
_WITH = "p = softmax({teacher}/{temperature}), q = softmax({student}/{temperature})"


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) ``[...]`` in nats of finite log-probabilities ``[..., V]``.

    The sum of p − q, which is 0, takes up what rounding leaves of log-probabilities that should add up to 1: at T = 20
    the value in fp32 is wrong by 10⁻⁶ of itself in place of 5·10⁻⁵.
    """
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - log_q) - (p - q)).sum(-1)


@losses.register(
    "kl",
    per="position",
    reference=_HINTON,
    formula="{temperature}²·KL(softmax({teacher}/{temperature}) ‖ softmax({student}/{temperature}))",
    zero_at_equality=True,
)
def kl(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened distribution to the student's, times T².

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``; classes at −inf count as impossible and add nothing.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015,
    https://arxiv.org/abs/1503.02531.
    """
    log_student = log_softmax(student, temperature)
    log_teacher = log_softmax(teacher, temperature)
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


@losses.register(
    "soft_cross_entropy",
    per="position",
    reference=_HINTON,
    formula="{temperature}²·CE(softmax({teacher}/{temperature}), softmax({student}/{temperature}))",
)
def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Cross-entropy of the student's softened distribution under the teacher's, times T².

    It has the gradient of :func:`kl` and differs from it by the teacher's entropy, so it is not 0 at equality. This is
    the form of the paper.

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``; classes at −inf count as impossible and add nothing.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T².

    Reference: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531.
    """
    log_student = log_softmax(student, temperature)
    return -(temperature**2) * (log_softmax(teacher, temperature).exp() * log_student).sum(-1)


@losses.register(
    "reverse_kl",
    per="position",
    reference="Gu et al. 2023, https://arxiv.org/abs/2306.08543",
    formula="{temperature}²·KL(softmax({student}/{temperature}) ‖ softmax({teacher}/{temperature}))",
    zero_at_equality=True,
)
def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the student's softened distribution to the teacher's, times T².

    It makes the student settle on some of what the teacher finds likely, where :func:`kl` makes it cover all of that.
    MiniLLM minimises it over texts that the student wrote, by policy gradient; this is the exact value at each position
    of the given text.

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``; a class that the teacher alone has at −inf costs a huge number.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: MiniLLM, Gu et al. 2023, https://arxiv.org/abs/2306.08543.
    """
    return temperature**2 * relative_entropy(log_softmax(student, temperature), log_softmax(teacher, temperature))


@losses.register(
    "symmetric_kl",
    per="position",
    reference="Jeffreys 1946, https://doi.org/10.1098/rspa.1946.0056",
    formula="{temperature}²·½·[KL(p ‖ q) + KL(q ‖ p)], " + _WITH,
    zero_at_equality=True,
)
def symmetric_kl(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Mean of the Kullback-Leibler divergences in both directions, times T²: half of Jeffreys' divergence.

    Jeffreys' own is the sum of the directions; the mean keeps the size of :func:`kl`.

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``; a class that one of them alone has at −inf costs a huge number.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: Jeffreys, *An invariant form for the prior probability in estimation problems*, 1946,
    https://doi.org/10.1098/rspa.1946.0056.
    """
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return temperature**2 / 2 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


@losses.register(
    "jsd",
    per="position",
    reference=_GKD,
    formula="{temperature}²·[{beta}·KL(p ‖ m) + (1 − {beta})·KL(q ‖ m)], m = {beta}·p + (1 − {beta})·q "
    "(KL(p ‖ q) for 0, KL(q ‖ p) for 1), " + _WITH,
    zero_at_equality=True,
)
def jsd(student: Tensor, teacher: Tensor, *, beta: Share = 0.5, temperature: Temperature = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence, times T²: β·KL(p ‖ m) + (1 − β)·KL(q ‖ m) with m = β·p + (1 − β)·q.

    β is the weight of the teacher in the mixture m, as in GKD and TRL; DistiLLM's ``lam`` is 1 − β. The formula is 0 at
    both ends, so GKD defines β = 0 as the forward and β = 1 as the reverse divergence: those are what the formula
    divided by β, or by 1 − β, tends to. The value therefore jumps there, and near an end the gradient is about β, or
    1 − β, times as large as at it; a ramp of β should not reach 0 or 1.

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``.
        beta: weight of the teacher in the mixture, in [0, 1]; 0 is :func:`kl`, 1 is :func:`reverse_kl`. 0.5 is the
            symmetric divergence, at most ln 2.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: GKD, Agarwal et al. 2023, https://arxiv.org/abs/2306.13649.
    """
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    if beta == 0:
        return temperature**2 * relative_entropy(log_p, log_q)
    if beta == 1:
        return temperature**2 * relative_entropy(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    of_teacher, of_student = log_p.exp() * (log_p - log_m), log_q.exp() * (log_q - log_m)
    return temperature**2 * (beta * of_teacher + (1 - beta) * of_student).sum(-1)


@losses.register(
    "skewed_kl",
    per="position",
    reference=_DISTILLM,
    formula="{temperature}²·KL(p ‖ {alpha}·p + (1 − {alpha})·q), " + _WITH,
    zero_at_equality=True,
)
def skewed_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence from the teacher to a mixture of both, times T²: KL(p ‖ α·p + (1 − α)·q).

    The teacher's share in the mixture bounds it by −ln α, before T².

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``.
        alpha: share of the teacher in the mixture, in [0, 1); 0 is :func:`kl`. The paper takes 0.1.
        temperature: T, positive; the paper has none.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: DistiLLM, Ko et al. 2024, https://arxiv.org/abs/2402.03898.
    """
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return temperature**2 * relative_entropy(log_p, _log_mixture(log_p, log_q, alpha))


@losses.register(
    "skewed_reverse_kl",
    per="position",
    reference=_DISTILLM,
    formula="{temperature}²·KL(q ‖ (1 − {alpha})·p + {alpha}·q), " + _WITH,
    zero_at_equality=True,
)
def skewed_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence from the student to a mixture of both, times T²: KL(q ‖ (1 − α)·p + α·q).

    The student's share in the mixture bounds it by −ln α, before T².

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``.
        alpha: share of the student in the mixture, in [0, 1); 0 is :func:`reverse_kl`. The paper takes 0.1.
        temperature: T, positive; the paper has none.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: DistiLLM, Ko et al. 2024, https://arxiv.org/abs/2402.03898.
    """
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return temperature**2 * relative_entropy(log_q, _log_mixture(log_q, log_p, alpha))


@losses.register(
    "total_variation",
    per="position",
    reference="Wen et al. 2023, https://arxiv.org/abs/2307.15190",
    formula="{temperature}²·½·Σ|p − q|, " + _WITH,
    zero_at_equality=True,
)
def total_variation(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Half of the summed absolute difference of the probabilities, times T².

    It is of first order in the difference of the logits, so that with T² its gradient grows with T, where that of the
    other divergences keeps its size. The papers have no temperature.

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``.
        temperature: T, positive.

    Returns:
        ``[...]`` in [0, T²]; 0 where both agree.

    Reference: f-distillation, Wen et al. 2023, https://arxiv.org/abs/2307.15190.
    """
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return temperature**2 / 2 * (log_p.exp() - log_q.exp()).abs().sum(-1)


@losses.register(
    "alpha_beta",
    per="position",
    reference="Wang et al. 2025, https://arxiv.org/abs/2505.04560",
    formula="{temperature}²·D(p ‖ q) of order ({alpha}, {beta}), " + _WITH,
    zero_at_equality=True,
)
def alpha_beta(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: Order = 0.2,
    beta: Order = 0.7,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Alpha-beta divergence of ABKD, times T²: −Σ[p^α·q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)] / (α·β).

    Where α, β or both are 0 it is the limit of the formula, and where one of them is small nothing cancels. Of order
    (1, 0) it is :func:`kl`, of (0, 1) :func:`reverse_kl`, of (½, ½) four times the squared Hellinger distance, of
    (1, 1) half of the squared difference. For α = 0 and β = 0 the released code has the factors 1/β and 1/α where the
    limits have 1/β² and 1/α².

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``.
        alpha: exponent of the teacher's probabilities, at least 0. The released scripts take 0.2 for GPT-2, 0.1 for
            OpenLLaMA and 0.8 for CLIP.
        beta: exponent of the student's, at least 0; in those scripts 0.7, 0.8 and 0.3. The divergence is defined for
            negative orders too, but infinite where a probability is 0, so they are refused.
        temperature: T, positive.

    Returns:
        ``[...]``, times T²; 0 where both agree.

    Reference: ABKD, Wang et al. 2025, https://arxiv.org/abs/2505.04560.
    """
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    if alpha == 0 and beta == 0:
        return temperature**2 / 2 * (log_p - log_q).square().sum(-1)
    above = (alpha * log_p).exp() * (_power_log(log_p, beta) - _power_log(log_q, beta))
    below = (beta * log_q).exp() * (_power_log(log_p, alpha) - _power_log(log_q, alpha))
    return temperature**2 / (alpha + beta) * (above - below).sum(-1)


@losses.register(
    "taid",
    per="position",
    reference="Shing et al. 2025, https://arxiv.org/abs/2501.16937",
    formula="{temperature}²·KL(softmax([(1 − t)·{student} + t·{teacher}]/{temperature}) ‖ "
    "softmax({student}/{temperature})), t from {t_start} to {t_end}, the student on the left held constant",
    zero_at_equality=True,
    stops_gradient=True,
)
def taid(
    student: Tensor,
    teacher: Tensor,
    *,
    progress: Progress | None = None,
    t_start: Annotated[float, Field(ge=0, lt=1)] = 0.4,
    t_end: Annotated[float, Field(gt=0, le=1)] = 1.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Divergence from a teacher that begins near the student and becomes the teacher, times T².

    The target interpolates the logits, (1 − t)·student + t·teacher, with the student's held constant. Here t grows
    linearly over the training. The paper also pushes t ahead of that line, by at most 5·10⁻⁴ a step, the more the
    faster the loss falls; its authors can switch that off, and here it is left out.

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``.
        progress: where the training stands; its start if omitted.
        t_start: share of the teacher at the start, in [0, 1). The released code takes 0.4, two of its scripts 0.2.
        t_end: share of the teacher at the end, in (0, 1].
        temperature: T, positive; the paper has none.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: TAID, Shing et al. 2025, https://arxiv.org/abs/2501.16937.
    """
    share = t_start + (t_end - t_start) * (progress or Progress()).fraction
    log_q = log_softmax(student, temperature)
    target = log_softmax((1 - share) * log_q.detach() + share * log_softmax(teacher, temperature))
    return temperature**2 * relative_entropy(target, log_q)


def _log_mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    """The logarithm of ``share·first + (1 − share)·second``, finite also where both probabilities underflow to 0."""
    if share == 0:
        return log_second
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))


def _power_log(log_probability: Tensor, order: float) -> Tensor:
    """(x^order − 1) / order, which tends to log x, from log x."""
    return log_probability if order == 0 else torch.expm1(order * log_probability) / order
