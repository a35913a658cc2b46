"""How to distil, from Python: thin names over the terms and schemes of a recipe.

Layers have the numbers of ``output_hidden_states`` everywhere: 0 is the embeddings, n what comes out after block n, and
``attention.n`` the attention of block n. (The ``keep_blocks`` of a student that is cut from its teacher count blocks
from 0.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from potstill.errors import TrainingError, did_you_mean
from potstill.knowledge.layers import layer_map
from potstill.losses.term import compares
from potstill.registry import losses, schemes

logger = logging.getLogger(__name__)

Kind = Literal["logit", "feature", "attention", "progressive", "combined"]
When = Literal["last", "throughout"]
_SCHEDULES = ("linear", "exponential", "custom")
_EXAMPLES = {
    "FeatureDistillation": "FeatureDistillation(teacher_layers=[2, 4, 6], student_layers=[1, 2, 3])",
    "AttentionDistillation": "AttentionDistillation(layer_mapping={2: 1, 4: 2, 6: 3})",
    "ProgressiveDistillation": "ProgressiveDistillation(teacher_layers=12, student_layers=6)",
}
_PARTS = ("feature", "attention", "progressive")
_RATIO = 2.0


@dataclass(frozen=True)
class FeatureDistillation:
    """Hidden states of the student learn to be those of the teacher: a term for each pair of layers.

    Each term is ``feature_loss_weight`` times the mean over tokens that are no padding of the squared difference,
    averaged over the width. A student's states of another width go through a linear layer that is trained with it and
    left behind afterwards, as in FitNets.

    Attributes:
        teacher_layers: the teacher's layers; numbers (0 the embeddings, n after block n), or paths of modules.
        student_layers: the student's, element by element.
        feature_loss_weight: weight of each pair.
        loss: a loss of ``potstill list losses`` that compares vectors, such as ``mse`` or ``cosine``.
        project: how a state of another shape is brought to the teacher's: a kind of projector, ``auto`` for a linear
            layer where only the width differs and for nothing where nothing does.
        mask: the entry of a batch that says which positions count; the tokens that are no padding where layers have
            numbers. Paths of modules that give a vector per token need ``attention_mask``.

    Raises:
        TrainingError: lists that are empty, differ in length or name a layer of the student twice, or a weight below 0.
        ComponentError: there is no such loss.

    Example:
        >>> FeatureDistillation(teacher_layers=[6, 12], student_layers=[3, 6], feature_loss_weight=0.5).pairs
        [(6, 3), (12, 6)]

    Reference: Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550; Sun et al. 2019 (Patient KD),
    https://arxiv.org/abs/1908.09355.
    """

    teacher_layers: Sequence[int | str]
    student_layers: Sequence[int | str]
    feature_loss_weight: float = 1.0
    loss: str = "mse"
    project: str = "auto"
    mask: str | None = None

    def __post_init__(self) -> None:
        for name in ("teacher_layers", "student_layers"):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise TrainingError(f"expected {name} as a list of layers, got {given!r}; did you mean [{given!r}]?")
        teacher, student = list(self.teacher_layers), list(self.student_layers)
        if len(teacher) != len(student):
            shorter = min(len(teacher), len(student))
            raise TrainingError(
                f"expected teacher_layers and student_layers of one length, as they pair element by element, got "
                f"{len(teacher)} and {len(student)}; say teacher_layers={teacher[:shorter]}, "
                f"student_layers={student[:shorter]}, or name the others"
            )
        _check_pairs("FeatureDistillation", self.pairs)
        _check_weight("feature_loss_weight", self.feature_loss_weight)
        _check_soft(self.loss)

    @property
    def pairs(self) -> list[tuple[int | str, int | str]]:
        """Each of the teacher's layers with the student's."""
        return list(zip(self.teacher_layers, self.student_layers, strict=True))

    def terms(self, student_heads: int | None = None, teacher_heads: int | None = None) -> dict[str, dict[str, Any]]:
        """Return the terms as a recipe writes them."""
        spec = _hidden(self.loss, self.feature_loss_weight, self.project, self.pairs)
        return {"feature": spec if self.mask is None else {**spec, "mask": self.mask}}

    def check(self, student: int, teacher: int, whose: str = "teacher") -> None:
        """Raise if a model of so many blocks lacks a layer.

        Raises:
            TrainingError: names what there is, and a map in proportion.
        """
        found = _ratio(student, teacher)
        right = f"teacher_layers={[one for one, _ in found]}, student_layers={[other for _, other in found]}"
        taught, own = list(self.teacher_layers), list(self.student_layers)
        _check_depth(f"teacher_layers={taught}", whose, taught, teacher, right)
        _check_depth(f"student_layers={own}", "student", own, student, right)


@dataclass(frozen=True)
class AttentionDistillation:
    """Blocks of the student learn to attend as blocks of the teacher do: a term for each pair.

    Each term is ``attention_loss_weight`` times the mean squared difference of the probabilities over keys, heads and
    queries that are no padding. The embeddings have no attention: the pair ``0: 0`` compares them as hidden states, by
    ``mse``, with the same weight; a line of the log says so.

    Attributes:
        layer_mapping: the teacher's block to the student's, from 1 on; ``0: 0`` for the embeddings.
        attention_loss_weight: weight of each pair.
        loss: ``attention_mse``, ``attention_kl`` or ``attention_cosine``.
        heads: ``each`` compares head with head, for which both models need as many; ``mean`` the averages over the
            heads; ``auto`` is ``each`` where both have as many, else ``mean``.

    Raises:
        TrainingError: no pair of blocks, one with 0, a block of the student twice, or a weight below 0.
        ComponentError: there is no such loss.

    Example:
        >>> AttentionDistillation(attention_loss_weight=0.3, layer_mapping={0: 0, 6: 3, 12: 6}).pairs
        [(6, 3), (12, 6)]

    Reference: Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351.
    """

    layer_mapping: Mapping[int, int]
    attention_loss_weight: float = 1.0
    loss: str = "attention_mse"
    heads: Literal["auto", "each", "mean"] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.layer_mapping, Mapping):
            raise TrainingError(
                f"expected layer_mapping as {{the teacher's block: the student's}}, got {self.layer_mapping!r}; for "
                f"example {_EXAMPLES['AttentionDistillation']}"
            )
        _check_pairs("AttentionDistillation", list(self.layer_mapping.items()))
        _check_weight("attention_loss_weight", self.attention_loss_weight)
        half = next((pair for pair in self.pairs if 0 in pair), None)
        layers: list[Any] = [layer for pair in self.pairs for layer in pair]
        named = next((layer for layer in layers if isinstance(layer, str)), None)
        if named is not None:
            raise TrainingError(f"expected numbers of blocks in layer_mapping, got '{named}'")
        if half is not None or not self.pairs:
            got = "no pair of blocks" if half is None else f"{half[0]}: {half[1]}"
            raise TrainingError(
                f"expected pairs of blocks from 1 on in layer_mapping, got {got}: 0 is the embeddings, which have no "
                "attention; 0: 0 beside other pairs compares them with each other"
            )
        known = [name for name in losses.names() if "heads" in losses.options(losses.get(name))]
        if self.loss not in known:
            raise TrainingError(f"'{self.loss}' is no loss between attention maps; {did_you_mean(self.loss, known)}")
        if self.heads not in ("auto", "each", "mean"):
            raise TrainingError(f"expected heads 'auto', 'each' or 'mean', got '{self.heads}'")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Each of the teacher's blocks with the student's, without the embeddings."""
        return [pair for pair in self.layer_mapping.items() if pair != (0, 0)]

    def terms(self, student_heads: int | None = None, teacher_heads: int | None = None) -> dict[str, dict[str, Any]]:
        """Return the terms as a recipe writes them, for models with so many heads where that is known."""
        alike = student_heads is None or teacher_heads is None or student_heads == teacher_heads
        heads = ("each" if alike else "mean") if self.heads == "auto" else self.heads
        if self.heads == "auto" and not alike:
            logger.warning(
                "the teacher has %s attention heads and the student %s: the averages over the heads are compared",
                teacher_heads,
                student_heads,
            )
        weight = self.attention_loss_weight
        spec = {"loss": self.loss, "student": "attention", "teacher": "attention", "weight": weight, "heads": heads}
        found = {"attention": {**spec, "layers": {student: teacher for teacher, student in self.pairs}}}
        if (0, 0) in self.layer_mapping.items():
            logger.warning("the embeddings have no attention maps: 0: 0 compares them as hidden states, by mse")
            found["attention_embeddings"] = _hidden("mse", weight, "auto", [(0, 0)])
        return found

    def check(self, student: int, teacher: int, whose: str = "teacher") -> None:
        """Raise if a model of so many blocks lacks a layer.

        Raises:
            TrainingError: names what there is, and a map in proportion.
        """
        embeddings = [(0, 0)] if (0, 0) in self.layer_mapping.items() else []
        right = f"layer_mapping={dict([*embeddings, *_ratio(student, teacher)])}"
        given = dict(self.layer_mapping)
        _check_depth(f"layer_mapping={given}", whose, given.keys(), teacher, right)
        _check_depth(f"layer_mapping={given}", "student", given.values(), student, right)


@dataclass(frozen=True)
class ProgressiveDistillation:
    """The blocks of the student begin to learn one after another, each from its proportional block of the teacher.

    Every block of the student has a term: ``progressive_loss_weight`` times the mean squared difference of its hidden
    states and those of the teacher's block i·N/M, for block i of M and a teacher of N. The scheme ``progressive`` lets
    them begin one after another, from the first block on.

    Attributes:
        teacher_layers: how many blocks the teacher has.
        student_layers: how many the student has, at least 2.
        distillation_schedule: how long the phases last: ``linear``, all as long; ``exponential``, each ``ratio`` times
            as long as the one before; ``custom``, as ``shares`` says.
        progressive_loss_weight: weight of each block's term.
        ratio: of an exponential schedule, above 0.
        shares: of a custom schedule: the share of the training that each phase lasts, one a block, which sum to 1; or a
            function, or its dotted path ``package.module:function``, that is given the number of blocks and returns
            them.
        response: when the terms on the answers begin: with the ``last`` block, or ``throughout`` the training.
        hard: when the loss on the labels begins, likewise.
        loss: a loss that compares vectors.

    Raises:
        TrainingError: numbers out of range, or shares that do not fit.
        ComponentError: there is no such loss.

    Reference: Sun et al. 2020 (MobileBERT), https://arxiv.org/abs/2004.02984.
    """

    teacher_layers: int
    student_layers: int
    distillation_schedule: Literal["linear", "exponential", "custom"] = "linear"
    progressive_loss_weight: float = 1.0
    ratio: float = _RATIO
    shares: Sequence[float] | str | Callable[[int], Sequence[float]] | None = None
    response: When = "last"
    hard: When = "last"
    loss: str = "mse"

    def __post_init__(self) -> None:
        for name, least in (("teacher_layers", 1), ("student_layers", 2)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                hint = f"; did you mean {len(count)}?" if isinstance(count, list | tuple) else ""
                raise TrainingError(
                    f"expected {name} of ProgressiveDistillation to be how many blocks there are, at least {least}, "
                    f"got {count!r}{hint}"
                )
        if self.distillation_schedule not in _SCHEDULES:
            raise TrainingError(
                "expected distillation_schedule 'linear', 'exponential' or 'custom', got "
                f"'{self.distillation_schedule}'; {did_you_mean(self.distillation_schedule, _SCHEDULES)}"
            )
        _check_weight("progressive_loss_weight", self.progressive_loss_weight)
        _check_number("ratio", self.ratio)
        if self.distillation_schedule != "exponential" and self.ratio != _RATIO:
            raise TrainingError(
                f"distillation_schedule='{self.distillation_schedule}' makes no use of ratio={self.ratio}; say "
                "distillation_schedule='exponential'"
            )
        _check_soft(self.loss)
        self._check_scheme()

    def _check_scheme(self) -> None:
        try:
            name, options = "progressive", {key: value for key, value in self.scheme().items() if key != "name"}
            problems = schemes.check(name, options)
            if problems:
                raise TrainingError("; ".join(str(problem) for problem in problems))
            schemes.get(name)(**options)._begins(self.student_layers)
        except (TypeError, ValueError) as error:
            raise TrainingError(
                f"expected shares of ProgressiveDistillation as {self.student_layers} numbers that sum to 1, or what "
                f"returns them for the number of blocks, got {self.shares!r}: {error}"
            ) from error

    def scheme(self) -> dict[str, Any]:
        """Return the scheme as a recipe writes it."""
        given = self.shares(self.student_layers) if callable(self.shares) else self.shares
        found: dict[str, Any] = {"name": "progressive", "schedule": self.distillation_schedule}
        if self.distillation_schedule == "exponential":
            found["ratio"] = self.ratio
        if given is not None:
            found["shares"] = given if isinstance(given, str) else [float(share) for share in given]
        return {**found, "response": self.response, "hard": self.hard}

    def terms(self, student_heads: int | None = None, teacher_heads: int | None = None) -> dict[str, dict[str, Any]]:
        """Return the terms as a recipe writes them."""
        pairs = _ratio(self.student_layers, self.teacher_layers)
        return {"progressive": _hidden(self.loss, self.progressive_loss_weight, "auto", pairs)}

    def check(self, student: int, teacher: int, whose: str = "teacher") -> None:
        """Raise if the models have other numbers of blocks.

        Raises:
            TrainingError: names both.
        """
        if (student, teacher) != (self.student_layers, self.teacher_layers):
            raise TrainingError(
                f"ProgressiveDistillation expected a teacher of {self.teacher_layers} blocks and a student of "
                f"{self.student_layers}, got {teacher} blocks of the {whose} and {student} of the student; say "
                f"teacher_layers={teacher}, student_layers={student}"
            )


Part = FeatureDistillation | AttentionDistillation | ProgressiveDistillation


@dataclass(frozen=True)
class DistillationConfig:
    """How to distil: α·T²·KL of the softened answers + β·cross-entropy on the labels + Σ weight·term of the parts.

    Attributes:
        distillation_type: ``"logit"`` for the two terms above; ``"feature"``, ``"attention"`` and ``"progressive"`` add
            the part of that name, ``"combined"`` all parts that are given.
        temperature: T of the softened answers.
        alpha: weight of the soft loss.
        beta: weight of the loss on the labels; 1 − alpha if omitted, for which alpha is 1 at most. Given ones are taken
            as they are.
        features: for ``"feature"``, as another way to say it: the student's signal to the teacher's, such as
            ``{"hidden.3": "hidden.6"}``, compared by ``mse`` behind a linear layer.
        feature_weight: weight of each of these terms.
        text: the column of the texts, or two for pairs; found by itself where there is no doubt.
        image: the column of the images.
        label: the column of the classes; ``label`` or ``labels`` if omitted.
        label_names: names of the classes, where the data have only numbers.
        max_length: tokens at which texts are cut; 128 if omitted, or what the models take at most.
        baseline: whether to train the student without its teacher too, for comparison.
        seed: of everything.
        feature_distillation: hidden states, see :class:`FeatureDistillation`.
        attention_distillation: attention maps, see :class:`AttentionDistillation`.
        progressive_distillation: blocks one after another, see :class:`ProgressiveDistillation`; terms of the other
            parts then begin with the block that they read.

    Raises:
        TrainingError: an unknown type, a part that the type needs and that is missing, one that it does not use, or a
            number out of range.
    """

    distillation_type: Kind = "logit"
    temperature: float = 4.0
    alpha: float = 0.7
    beta: float | None = None
    features: Mapping[str, str] = field(default_factory=dict)
    feature_weight: float = 1.0
    text: str | tuple[str, str] | None = None
    image: str | None = None
    label: str | None = None
    label_names: Sequence[str] | None = None
    max_length: int | None = None
    baseline: bool = True
    seed: int = 0
    feature_distillation: FeatureDistillation | None = None
    attention_distillation: AttentionDistillation | None = None
    progressive_distillation: ProgressiveDistillation | None = None

    def __post_init__(self) -> None:
        for name, needed in zip(
            _PARTS, (FeatureDistillation, AttentionDistillation, ProgressiveDistillation), strict=True
        ):
            part = getattr(self, f"{name}_distillation")
            if part is not None and not isinstance(part, needed):
                raise TrainingError(f"expected {name}_distillation={needed.__name__}(…), got {part!r}")
        kind, given = self.distillation_type, [name for name in _PARTS if self._given(name)]
        known = ("logit", *_PARTS, "combined")
        if kind not in known:
            raise TrainingError(
                f"expected distillation_type {', '.join(map(repr, known))}, got '{kind}'; {did_you_mean(kind, known)}"
            )
        unused = [] if kind == "combined" else [name for name in given if name != kind]
        if unused:
            right = "combined" if len(given) > 1 or kind != "logit" else unused[0]
            raise TrainingError(
                f"distillation_type='{kind}' makes no use of {unused[0]}_distillation; say distillation_type='{right}'"
            )
        if kind != "logit" and not given:
            name = "feature" if kind == "combined" else kind
            raise TrainingError(
                f"distillation_type='{kind}' needs {'a part, such as ' if kind == 'combined' else ''}"
                f"{name}_distillation={_EXAMPLES[f'{name.title()}Distillation']}"
            )
        _check_number("temperature", self.temperature)
        if self.temperature <= 0:
            raise TrainingError(f"expected a temperature above 0, got {self.temperature}; 1 leaves answers as they are")
        for name in ("alpha", "beta", "feature_weight"):
            _check_weight(name, getattr(self, name))
        if self.beta is None and self.alpha > 1:
            raise TrainingError(f"alpha={self.alpha} leaves beta = 1 − alpha below 0; give beta")

    @property
    def parts(self) -> list[Part]:
        """The parts that are given."""
        each = (self.feature_distillation, self.attention_distillation, self.progressive_distillation)
        return [part for part in each if part is not None]

    def answers(self, *, labelled: bool) -> dict[str, dict[str, Any]]:
        """Return the terms on the answers as a recipe writes them, ``soft`` and, where there are labels, ``hard``."""
        terms: dict[str, dict[str, Any]] = {
            "soft": {"loss": "kl", "weight": self.alpha, "temperature": self.temperature}
        }
        beta = 1 - self.alpha if self.beta is None else self.beta
        if labelled or self.beta is not None:
            terms["hard"] = {"loss": "cross_entropy", "weight": beta}
        else:
            logger.warning("the training data have no labels: the student learns from the teacher alone")
        for place, (own, taught) in enumerate(self.features.items() if self._given("feature") else ()):
            hint = {"loss": "mse", "student": own, "teacher": taught, "project": "linear"}
            terms[f"feature_{place}"] = {**hint, "weight": self.feature_weight}
        return terms

    def layers(self, student_heads: int | None = None, teacher_heads: int | None = None) -> dict[str, dict[str, Any]]:
        """Return the terms of the parts as a recipe writes them, for models with so many attention heads."""
        return {name: term for part in self.parts for name, term in part.terms(student_heads, teacher_heads).items()}

    @property
    def scheme(self) -> dict[str, Any]:
        """The scheme as a recipe writes it."""
        progressive = self.progressive_distillation
        return {"name": "offline"} if progressive is None else progressive.scheme()

    def check(self, student: int, teacher: int, whose: str = "teacher") -> None:
        """Raise if a part does not fit models with so many blocks.

        Raises:
            TrainingError: says what there is and what would fit.
        """
        for part in self.parts:
            part.check(student, teacher, whose)

    def _given(self, name: str) -> bool:
        return getattr(self, f"{name}_distillation") is not None or (name == "feature" and bool(self.features))


def _hidden(loss: str, weight: float, project: str, pairs: Sequence[tuple[int | str, int | str]]) -> dict[str, Any]:
    """Return a term on hidden states, for pairs of the teacher's layer and the student's."""
    layers = {student: teacher for teacher, student in pairs}
    ends = {"student": "hidden", "teacher": "hidden"}
    return {"loss": loss, **ends, "weight": weight, "project": project, "layers": layers}


def _ratio(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return the teacher's block and the student's in proportion, for each block of the student that has one."""
    found = layer_map("ratio", student, teacher)
    return [(taught, own) for own, taught in found.items() if own and taught]


def _check_pairs(what: str, pairs: Sequence[tuple[Any, Any]]) -> None:
    if not pairs:
        raise TrainingError(
            f"expected {what} to name at least one pair of layers, got none; for example {_EXAMPLES[what]}"
        )
    layers = [layer for pair in pairs for layer in pair]
    wrong = [each for each in layers if isinstance(each, bool) or not isinstance(each, int | str)]
    wrong += [each for each in layers if isinstance(each, int) and each < 0]
    if wrong:
        raise TrainingError(
            f"expected {what} to number layers from 0, the embeddings, on, got {wrong[0]!r}; the last one of a model "
            "has the number of its blocks"
        )
    if len({isinstance(layer, str) for layer in layers}) > 1:
        raise TrainingError(f"expected {what} to name layers by numbers alone or by paths alone, got both: {layers}")
    own = [student for _, student in pairs]
    twice = [layer for place, layer in enumerate(own) if layer in own[:place]]
    if twice:
        raise TrainingError(f"expected {what} to name each layer of the student once, got {twice[0]!r} again")


def _check_depth(where: str, whose: str, layers: Iterable[int | str], depth: int, right: str) -> None:
    wrong = [str(layer) for layer in layers if isinstance(layer, int) and layer > depth]
    if wrong:
        raise TrainingError(
            f"{where}: the {whose} has {depth} blocks, so its layers are 0 to {depth} (0 is the embeddings), got "
            f"{', '.join(wrong)}; in proportion it is {right}"
        )


def _check_number(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise TrainingError(f"expected {name} to be a finite number, got {number!r}")


def _check_weight(name: str, weight: float | None) -> None:
    if weight is None:
        return
    _check_number(name, weight)
    if weight < 0:
        raise TrainingError(f"expected {name} of 0 or more, got {weight}")


def _check_soft(loss: str) -> None:
    if not compares(loss):
        raise TrainingError(f"expected a loss that compares with the teacher, such as mse or cosine, got '{loss}'")
