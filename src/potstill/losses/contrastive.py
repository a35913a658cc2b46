"""Contrastive losses: a student's vector should tell its own sample's teacher vector from those of other samples."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.interfaces import IGNORED
from potstill.losses.divergence import Temperature
from potstill.losses.numerics import applied, unit, without_autocast
from potstill.losses.relational import rows
from potstill.losses.sized import SizedLoss
from potstill.registry import losses

Count = Annotated[int, Field(ge=1)]

Form = Literal["infonce", "nce"]
"""One choice among all candidates, or one yes or no for each of them."""

_UNKNOWN = -(2**63)


@losses.register(
    "infonce",
    per="batch",
    reference="van den Oord et al. 2018, https://arxiv.org/abs/1807.03748",
    formula="CE(own sample, softmax(cos({student}, {teacher} of the batch)/{temperature}))",
    any_shape=True,
)
@without_autocast
def infonce(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    temperature: Temperature = 0.07,
) -> Tensor:
    """Cross-entropy of finding the sample's own teacher vector among those of the batch, by cosine similarity.

    The other samples of the batch that the process sees are the negatives, so it needs large batches; ``crd`` remembers
    earlier ones. The paper scores pairs by a bilinear form; the cosine over a temperature of 0.07 came later (Wu et al.
    2018, MoCo).

    Args:
        student: ``[B, …]``, flattened; of ``[B, T, H]`` the mean over the positions.
        teacher: ``[B, …]`` of the same width.
        mask: the positions that count in a signal ``[B, T, H]``; other signals do not use it.
        index: sample ids ``[B]``; a sample that is twice in the batch is no negative of itself.
        temperature: τ, positive; the same throughout.

    Returns:
        0-d, in nats; 0 for a batch of one sample, ln B for vectors that tell nothing.

    Raises:
        ObjectiveError: the widths differ, or the mask does not fit.

    Reference: van den Oord et al., *Representation Learning with Contrastive Predictive Coding*, 2018,
    https://arxiv.org/abs/1807.03748.
    """
    ours, theirs = (unit(_vectors("infonce", side, mask)) for side in (student, teacher))
    if ours.shape != theirs.shape:
        raise ObjectiveError(
            f"infonce expected vectors of one width, got student {list(ours.shape)} and teacher {list(theirs.shape)}; "
            "`project: linear` maps one to the other"
        )
    scores = ours @ theirs.T / temperature
    own = torch.arange(len(scores), device=scores.device)
    if index is not None:
        twice = (index[:, None] == index) & (own[:, None] != own)
        scores = scores.masked_fill(twice, torch.finfo(scores.dtype).min)
    return F.cross_entropy(scores, own)


@losses.register(
    "crd",
    per="batch",
    reference="Tian et al. 2020, https://arxiv.org/abs/1910.10699; He et al. 2020, https://arxiv.org/abs/1911.05722",
    formula="{form} of {student} among {size} remembered {teacher} and the reverse, of width {dim}, τ = {temperature}",
    any_shape=True,
    weight=0.8,
    example_options={"dim": 4, "size": 8},
)
class CRD(SizedLoss):
    """Contrastive representation distillation with a queue of the last samples, whatever the size of the data set.

    Two linear maps and a normalisation embed both signals; each student's embedding is compared with its own teacher's
    and with those of other samples, and each teacher's with the students'. The negatives are the other samples of the
    batch and of the queue, those of another class where there are labels, as in the experiments of the paper.

    What differs from the paper: its memory has one vector for each sample of the data set, from which it draws the
    negatives and takes the positive too; here a queue as in MoCo holds the last ``size`` samples, all of which are
    negatives, and the positive pair is that of the batch. The paper's ``nce`` asks of each candidate whether it is the
    positive one; with a queue in the place of the long memory, which is random at first, it makes all embeddings equal
    where the learning rate is high. ``infonce``, with which the paper compares it, chooses among the candidates; it has
    the same gradient for embeddings that tell nothing, does not collapse, and is therefore the default.

    Under ``nce`` the odds of a pair are e^(s·t/τ) / (N·Z), N being the number of negatives and Z the mean of e^(s·t/τ)
    over random directions. That is what the authors' code computes, which measures Z on the first batch against its
    random memory. The paper writes N/M for N·Z, M being the size of the data set, which lets opposite, constant
    embeddings of the two sides satisfy all negatives.

    The queue is in the state dict and is the same in all processes, which share what they enqueue; it changes in
    training only.

    Args:
        dim: width of the embeddings; 128 in the paper.
        temperature: τ, positive; 0.07 in the paper for CIFAR-100, 0.1 in some tools.
        size: how many samples the queue holds; 16384 negatives in the paper. Memory: 8 · ``dim`` bytes each.
        form: ``infonce`` or ``nce``.

    Reference: Tian et al., *Contrastive Representation Distillation*, 2020, https://arxiv.org/abs/1910.10699; for the
    queue He et al., *Momentum Contrast*, 2020, https://arxiv.org/abs/1911.05722.
    """

    students: Tensor
    teachers: Tensor
    ids: Tensor
    classes: Tensor
    seen: Tensor

    def __init__(
        self, *, dim: Count = 128, temperature: Temperature = 0.07, size: Count = 16384, form: Form = "infonce"
    ) -> None:
        super().__init__()
        self.dim, self.temperature, self.size, self.form = dim, temperature, size, form
        self.log_normaliser = log_mean_exp(dim, temperature)

    def build(self, student: Any, teacher: Any) -> None:
        """Make the two embeddings and the empty queue."""
        device, kind = student.device, torch.float32
        self.student = nn.Linear(_vectors("crd", student, None).shape[1], self.dim, device=device, dtype=kind)
        self.teacher = nn.Linear(_vectors("crd", teacher, None).shape[1], self.dim, device=device, dtype=kind)
        self.register_buffer("students", torch.zeros(self.size, self.dim, device=device, dtype=kind))
        self.register_buffer("teachers", torch.zeros(self.size, self.dim, device=device, dtype=kind))
        self.register_buffer("ids", torch.full((self.size,), _UNKNOWN, device=device))
        self.register_buffer("classes", torch.full((self.size,), IGNORED, device=device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long, device=device))

    @without_autocast
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch, and remember the batch while training.

        Args:
            student: ``[B, …]``, flattened; of ``[B, T, H]`` the mean over the positions.
            teacher: ``[B, …]``, likewise.
            labels: class ids ``[B]``; labels of other shapes and negative ones tell nothing.
            mask: the positions that count in a signal ``[B, T, H]``; other signals do not use it.
            index: sample ids ``[B]``; without them a sample's own earlier embedding counts as a negative.

        Returns:
            0-d, in nats; the sum of both directions.

        Raises:
            ObjectiveError: :meth:`materialize` was not called, the signals have other widths than then, or the mask
                does not fit.
        """
        if self.pending:
            raise ObjectiveError("crd has no embeddings yet; call its materialize(student, teacher) once")
        ours = _embedded(self.student, student, mask, "student")
        theirs = _embedded(self.teacher, teacher, mask, "teacher")
        ids = ours.new_full((len(ours),), _UNKNOWN, dtype=torch.long) if index is None else index.long()
        classes = ours.new_full((len(ours),), IGNORED, dtype=torch.long)
        if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
            classes = labels.long()
        negative = self._negatives(ids, classes)
        value = self._contrast(ours, torch.cat([theirs, self.teachers.to(theirs.dtype)]), negative)
        value = value + self._contrast(theirs, torch.cat([ours, self.students.to(ours.dtype)]), negative)
        if self.training:
            self._enqueue(ours.detach(), theirs.detach(), ids, classes)
        return value

    def _negatives(self, ids: Tensor, classes: Tensor) -> Tensor:
        """Return which of the batch and the queue are negatives of each sample, ``[B, B + size]``."""
        count = len(ids)
        place = torch.arange(count + self.size, device=ids.device)
        filled = place < count + self.seen
        own = place == place[:count, None]
        all_ids, all_classes = torch.cat([ids, self.ids]), torch.cat([classes, self.classes])
        same_sample = (all_ids == ids[:, None]) & (all_ids != _UNKNOWN)
        same_class = (all_classes == classes[:, None]) & (all_classes >= 0)
        return filled & ~own & ~same_sample & ~same_class

    def _contrast(self, anchors: Tensor, candidates: Tensor, negative: Tensor) -> Tensor:
        """Return the mean loss of anchors ``[B, dim]``, the first B candidates being their positives."""
        scores = anchors @ candidates.T / self.temperature
        positive = scores.diagonal()
        if self.form == "infonce":
            others = scores.masked_fill(~negative, torch.finfo(scores.dtype).min)
            return (torch.logsumexp(torch.cat([positive[:, None], others], 1), 1) - positive).mean()
        number = negative.sum(1, keepdim=True).clamp_min(1).to(scores.dtype)
        odds = scores - number.log() - self.log_normaliser
        wrong = F.softplus(odds).masked_fill(~negative, 0).sum(1)
        return (F.softplus(-odds.diagonal()) + wrong).mean()

    @torch.no_grad()
    def _enqueue(self, ours: Tensor, theirs: Tensor, ids: Tensor, classes: Tensor) -> None:
        """Write the batch of all processes over the oldest entries."""
        vectors, names = torch.cat([ours, theirs], 1), torch.stack([ids, classes], 1)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gather: Any = torch.compiler.disable(_of_all_processes)  # type: ignore[no-untyped-call]
            vectors, names = gather(vectors, names)
        count = len(vectors)
        kept = min(count, self.size)
        first = self.seen + count - kept
        place = (first + torch.arange(kept, device=first.device)) % self.size
        vectors = vectors[-kept:].to(self.students.dtype)
        self.students.index_copy_(0, place, vectors[:, : self.dim])
        self.teachers.index_copy_(0, place, vectors[:, self.dim :])
        self.ids.index_copy_(0, place, names[-kept:, 0])
        self.classes.index_copy_(0, place, names[-kept:, 1])
        self.seen += count


def log_mean_exp(dim: int, temperature: float) -> float:
    """Return the logarithm of the mean of e^(u·v/τ) over directions u on the unit sphere of ``dim`` dimensions.

    It is that of the hypergeometric function ₀F₁(dim/2; 1/(4τ²)), 0.79 for 128 dimensions and τ = 0.07.
    """
    argument = math.log(1 / (4 * temperature**2))
    start = math.lgamma(dim / 2)
    terms = [
        power * argument - math.lgamma(power + 1) - math.lgamma(dim / 2 + power) + start
        for power in range(int(1 / temperature) + 50)
    ]
    largest = max(terms)
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))


def _vectors(name: str, signal: Tensor, mask: Tensor | None) -> Tensor:
    """Return one vector a sample ``[B, D]``, of a signal with positions the mean over those that count."""
    if mask is None and signal.ndim == 3:
        mask = torch.ones(signal.shape[:2], dtype=torch.bool, device=signal.device)
    return rows(name, signal, mask)


def _embedded(layer: nn.Linear, signal: Tensor, mask: Tensor | None, side: str) -> Tensor:
    vectors = _vectors("crd", signal, mask)
    if vectors.shape[1] != layer.in_features:
        raise ObjectiveError(
            f"crd was made for a {side}'s signal of width {layer.in_features}, got {vectors.shape[1]} of "
            f"{list(signal.shape)}; pick a signal whose size does not depend on the batch, such as a pooled one"
        )
    return unit(applied(layer, vectors))


def _of_all_processes(*tensors: Tensor) -> list[Tensor]:
    """Return the rows of all processes, in the same order everywhere; each may have another number of them."""
    own = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    gathered = []
    for tensor in tensors:
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return gathered
