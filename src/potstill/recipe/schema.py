"""What a recipe may say. Data, never code: frozen, and an unknown key is a mistake.

The options of a component (a loss, task, model, optimizer, …) are checked against its signature in
``recipe/check.py``, so a new component needs no line here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

if TYPE_CHECKING:
    from potstill.runs.steps import Run

Positive = Annotated[int, Field(gt=0)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Component = str | dict[str, Any]
Layers = Annotated[dict[int | str, int | str], Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class OpenSection(Section):
    """A section that also takes the options of the component that it names."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond those of the section itself."""
        return dict(self.model_extra or {})


class TaskSpec(OpenSection):
    """What is learned: a task's name and its options."""

    name: str


class DataSpec(Section):
    """On what: where the data is and how it is split.

    ``splits`` and ``columns`` map our names to the data set's; ``limit`` draws a seeded subset of a split;
    ``validation`` and ``test`` are the shares (or rows) carved from the training split where the set has none.
    ``synthesize`` makes rows without labels from those of the training split, for the student to learn from its
    teachers on; teachers and baseline are trained on the labelled ones.
    """

    source: str
    path: str | None = None
    name: str | None = None
    revision: str | None = None
    splits: dict[str, str] = Field(default_factory=dict)
    columns: dict[str, str] = Field(default_factory=dict)
    limit: dict[str, Positive] = Field(default_factory=dict)
    labels: list[str] | None = None
    validation: float | Positive = 0.1
    test: float | Positive = 0.2
    seed: int = 42
    kwargs: dict[str, Any] = Field(default_factory=dict)
    augment: list[Component] = Field(default_factory=list)
    synthesize: Component | None = None


class TrainSpec(OpenSection):
    """How a model is trained; every other key is passed to ``transformers.TrainingArguments``.

    ``optimizer`` and ``scheduler`` are names of Trainer, of ``torch.optim`` or dotted, with options beside ``name``;
    ``group_by_length`` puts texts of like length into one batch, so that little is padded; ``batch_tokens`` lets each
    batch have as many texts, up to ``batch_size``, as fit into so many tokens with their padding; ``max_norm`` bounds
    the length of each unit's incoming weights; ``dropout`` sets every dropout layer; ``precision``
    is that of the arithmetic, ``auto`` for bf16 where the processor has it, ``medium`` for fp32 whose matrix products
    are made of bf16 ones; ``augment`` is what this model
    sees in place of ``data.augment``, nothing for an empty list; ``views`` draws so many random views of each sample,
    by ``data.seed``, and shows one an epoch, in place of a new one each time.
    """

    epochs: Above0 = 3.0
    batch_size: Positive = 32
    learning_rate: Above0 = 1e-3
    weight_decay: AtLeast0 = 0.0
    optimizer: Component = "AdamW"
    scheduler: Component = "linear"
    projector_learning_rate: Above0 | None = None
    dropout: Share | None = None
    max_norm: Above0 | None = None
    group_by_length: bool = True
    batch_tokens: Positive | None = None
    precision: Literal["fp32", "medium", "bf16", "fp16", "auto"] | None = None
    augment: list[Component] | None = None
    views: Positive | None = None
    callbacks: list[Component] = Field(default_factory=list)


class WhoSpec(Section):
    """What all models share: options, weights to load, and whose tokenizer or image processor they use.

    ``pretrained: false`` takes a named model's architecture without its trained weights; ``processor`` names the model
    whose tokenizer or image processor is used, where a model comes without its own.
    """

    kwargs: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    pretrained: bool = True
    processor: str | None = None


class ModelSpec(WhoSpec):
    """Who: a reference and how to build it."""

    model: str


class CutSpec(Section):
    """A student cut from a teacher: the blocks that stay, counted from 0.

    ``weights`` are those that the teacher began with (``pretrained``) or ended with (``finetuned``); ``container`` is
    the path of the list of blocks where there are several.
    """

    keep_blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    weights: Literal["pretrained", "finetuned"] = "pretrained"
    teacher: str | None = None
    container: str | None = None


class StudentSpec(WhoSpec):
    """The student: a model by reference, or cut from a teacher.

    ``freeze`` lists the paths of modules that are not trained, neither here nor in the baseline, and stay in eval mode.
    """

    model: str | None = None
    from_teacher: CutSpec | None = None
    freeze: list[str] = Field(default_factory=list)


class CacheSpec(Section):
    """How a teacher's answers are kept on disk.

    ``precision`` is that in which they are stored, the teacher's own if omitted; ``top_k`` keeps the most likely
    classes of the logits and the total probability of the others.
    """

    precision: Literal["fp32", "fp16", "bf16"] | None = None
    top_k: Positive | None = None


class TermSpec(OpenSection):
    """One term of the objective; the other keys are options of the loss, and numbers may be ramps.

    ``weight`` is the one published with the loss if omitted; ``scale`` is a factor such as ``1/T^2`` or ``1/C`` by
    which another tool's convention differs. ``layers`` makes a term for each pair of layers, the student's to the
    teacher's: numbers after ``student`` and ``teacher`` (``hidden`` if omitted) or module paths, or how they are found:
    by a rule such as ``ratio`` or ``last``, or ``auto`` for those that say the most alike on a few samples (by CKA).
    """

    loss: str
    student: str | list[str] = "logits"
    teacher: str | list[str] = "logits"
    weight: float | dict[str, Any] | None = None
    mask: str | None = None
    project: Literal["auto", "linear", "mlp", "conv", "attention", "stretch", "heads"] | None = None
    scale: float | str = 1.0
    layers: Literal["ratio", "last", "first", "skip", "pkd_last", "auto"] | Layers | None = None


class JointSpec(Section):
    """How a teacher is trained at the same time as the student: by the steps of ``train``, where nothing else is said.

    It minimises the hard terms of the objective, or those of its own, in a parameter group of its own, and its gradient
    is clipped by itself.
    """

    learning_rate: Above0 | None = None
    weight_decay: AtLeast0 | None = None


class TeacherSpec(WhoSpec):
    """A teacher: a model by reference or cut from another teacher, or a ``source`` of another kind.

    ``train`` says how a model is trained first, where it is not trained already; ``train: jointly`` trains it at the
    same time as the student, and ``joint`` says with what other settings. An ``objective`` of its own lets it learn
    from other teachers: from those named before it, where it is trained first (an assistant), from all and the
    ``student``, where it is trained jointly (a peer).
    ``source`` is a registered teacher source with its options, such as ``{ensemble: {of: [one, other]}}``.
    ``seed`` is that of its training, the recipe's if omitted: a fixed one is trained once for runs with several seeds.
    ``task`` names the task of a multi-task recipe that it knows and is trained on.
    ``labels: dataset`` says that its outputs are the data set's classes in their order, whatever names it has for them.
    ``cache`` keeps its answers on disk, so that it is asked once for each sample: ``true``, ``false``, settings, or
    ``auto`` for where the training sees each view of a sample more than once. ``precision`` is that in which it
    teaches, the student's if omitted, ``auto`` for the fastest that says the same; ``compile`` compiles its forward.
    Neither changes how it is trained.
    """

    model: str = ""
    from_teacher: CutSpec | None = None
    source: Component | None = None
    train: TrainSpec | None = None
    joint: JointSpec | None = None
    objective: dict[str, TermSpec] | None = None
    task: str | None = None
    seed: int | None = None
    labels: Literal["dataset"] | None = None
    cache: bool | Literal["auto"] | CacheSpec = "auto"
    precision: Literal["fp32", "bf16", "fp16", "int8", "auto"] | None = None
    compile: bool = False

    @model_validator(mode="before")
    @classmethod
    def _jointly(cls, given: Any) -> Any:
        """Read ``train: jointly``."""
        if isinstance(given, dict) and given.get("train") == "jointly":
            return {**given, "train": None, "joint": given.get("joint") or {}}
        return given

    @property
    def learns_here(self) -> bool:
        """Whether it is trained first in the run, or, as a classifier of scikit-learn, fitted to the training split."""
        return self.train is not None or self.model.startswith("sklearn:")


class BalanceSpec(Section):
    """Terms whose gradients are brought to one length, so that weights say how much of the gradient is whose.

    ``every`` so many optimizer steps, and in the first three of each term, the lengths are measured, which costs a
    backward a term; ones that fall are smoothed by ``decay``. ``reference`` names the term to whose length the others
    are brought, their mean if omitted.
    """

    every: Positive = 20
    decay: Share = 0.9
    reference: str | None = None


class SchemeSpec(OpenSection):
    """Who teaches whom: a scheme's name and its options."""

    name: str = "offline"


class StageSpec(Section):
    """One stage of a training in several: what differs from the recipe.

    The student goes on with the weights of the stage before; the optimizer, the learning rate and the projectors begin
    anew. ``objective``, ``balance``, ``scheme`` and ``freeze`` stand in place of the recipe's; ``train`` changes
    what it names.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    objective: dict[str, TermSpec] | None = None
    balance: BalanceSpec | None = None
    scheme: SchemeSpec | None = None
    train: TrainSpec | None = None
    freeze: list[str] | None = None

    @field_serializer("train")
    def _changes(self, train: TrainSpec | None) -> dict[str, Any] | None:
        return None if train is None else train.model_dump(mode="json", exclude_unset=True)


class BaselineSpec(Section):
    """The same student without a teacher, on the same budget.

    ``train`` is what differs from the recipe's ``train``: the settings that suit the baseline best, found with as many
    trials as the student's.
    """

    enabled: bool = True
    train: TrainSpec | None = None

    @field_serializer("train")
    def _changes(self, train: TrainSpec | None) -> dict[str, Any] | None:
        return None if train is None else train.model_dump(mode="json", exclude_unset=True)


class EvaluateSpec(Section):
    """How models are judged."""

    batch_size: Positive = 256
    resamples: Annotated[int, Field(ge=100)] = 1000
    latency: bool = True


class PreflightSpec(Section):
    """What is looked at before the training: ``ignore`` names checks whose findings are notes and stop nothing."""

    ignore: list[str] = Field(default_factory=list)


class Recipe(Section):
    """Everything that one run is asked to do."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    seed: int = 0
    task: TaskSpec
    data: DataSpec
    teacher: TeacherSpec | None = None
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], TeacherSpec] = Field(
        default_factory=dict
    )
    student: StudentSpec
    objective: dict[str, TermSpec]
    balance: BalanceSpec | None = None
    scheme: SchemeSpec = SchemeSpec()
    train: TrainSpec = TrainSpec()
    stages: list[StageSpec] = Field(default_factory=list)
    baseline: BaselineSpec = BaselineSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    preflight: PreflightSpec = PreflightSpec()

    @property
    def all_teachers(self) -> dict[str, TeacherSpec]:
        """Every teacher by name; the one under ``teacher:`` is called ``teacher``."""
        return {"teacher": self.teacher} if self.teacher is not None else dict(self.teachers)

    @property
    def model_teachers(self) -> dict[str, TeacherSpec]:
        """The teachers that are models of this run, by name; not the sources of other kinds."""
        return {name: spec for name, spec in self.all_teachers.items() if spec.source is None}

    @property
    def joint_teachers(self) -> dict[str, TeacherSpec]:
        """The teachers that are trained at the same time as the student, by name."""
        return {name: spec for name, spec in self.all_teachers.items() if spec.joint is not None}

    @property
    def baseline_train(self) -> TrainSpec:
        """How the baseline is trained: ``train`` with the changes of ``baseline.train``."""
        return changed_train(self.train, self.baseline.train)

    def build(self, output: Path | str | None = None, **options: Any) -> Run:
        """Return the run of this recipe; see :class:`potstill.runs.steps.Run` for the options."""
        from potstill.runs.steps import Run

        return Run(self, output, **options)


def changed_train(usual: TrainSpec, own: TrainSpec | None) -> TrainSpec:
    """Return the settings of a training with the changes that another section makes."""
    return usual if own is None else TrainSpec(**{**dict(usual), **own.model_dump(exclude_unset=True)})
