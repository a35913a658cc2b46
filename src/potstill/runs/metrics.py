"""The schema of ``metrics.json``: what a run measured. Version 1; documented in ``docs/metrics.md``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer

SCHEMA_VERSION = 1


def _none_to_nan(value: Any) -> Any:
    return math.nan if value is None else value


Figure = Annotated[float, BeforeValidator(_none_to_nan)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Estimate(_Strict):
    """A figure with its 95 % interval; what is unknown is NaN, written as null."""

    value: Figure
    low: Figure = math.nan
    high: Figure = math.nan

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in dict(self).items()}


class Gain(Estimate):
    """How much better the student is than its baseline, in units of the primary metric.

    Attributes:
        p: two-sided p-value of a paired test over the test samples.
        only_first: samples that the first of the two models alone has right; none where answers are not right or wrong.
        only_second: samples that the other alone has right.
        mcnemar: two-sided p-value of McNemar's exact test on these two counts.
    """

    p: Figure = math.nan
    only_first: int | None = None
    only_second: int | None = None
    mcnemar: float | None = None


class Calibration(_Strict):
    """How far a model's probabilities can be believed.

    Attributes:
        ece: expected calibration error in [0, 1], over 15 bins of equal width, with a bootstrap interval.
        nll: mean negative log-likelihood of the labels in nats.
        temperature: the temperature that makes the NLL least, fitted on these samples: above 1, it is too sure.
    """

    ece: Estimate
    nll: float
    temperature: float


class ModelMetrics(_Strict):
    """One model of a run.

    Attributes:
        role: what it is to the run.
        metrics: the task's metrics on the test split, each with a bootstrap interval over the samples.
        parameters: number of parameters; 0 of a teacher that is no model of the run, such as a server or an ensemble.
        bytes: size of the weight files; of a classifier of scikit-learn, which has no parameters, of itself as joblib
            keeps it.
        latency_ms: median time of a forward in milliseconds, by batch size (``"1"``, ``"32"``).
        throughput: samples a second, at the batch size where they are most; none where latency is not measured.
        agreement: share of test samples answered as by the first teacher; none for that teacher.
        divergence: mean of KL(first teacher ‖ model) over the samples in nats, at temperature 1; none for that teacher.
        calibration: how far probabilities can be believed; none where the task has none, or no labels.
    """

    role: Literal["teacher", "baseline", "student", "variant"]
    metrics: dict[str, Estimate] = Field(default_factory=dict)
    parameters: int
    bytes: int
    latency_ms: dict[str, float] = Field(default_factory=dict)
    throughput: float | None = None
    agreement: float | None = None
    divergence: float | None = None
    calibration: Calibration | None = None


class RunMetrics(_Strict):
    """Everything that a run measured.

    Attributes:
        schema_version: 1.
        recipe: the recipe's name.
        seed: the recipe's seed.
        primary: name of the metric by which models are compared.
        split: the split of the figures, with its number of samples in ``samples``.
        device: where the models answered and latency was measured, such as ``cpu`` or ``cuda``.
        chance: primary metric of the best constant guess.
        models: by name: ``teacher`` (or the teachers' own names), ``baseline``, ``distilled``.
        retention: student / teacher in the primary metric.
        retention_above_chance: (student − chance) / (teacher − chance).
        gain: student − baseline in the primary metric; none without a baseline.
        to_teacher: student − first teacher in the primary metric; none without a teacher.
        label_names: the classes in the order of their ids, where the task has classes.
        notes: what a reader should know: splits that were carved, steps that were left out and why.
    """

    schema_version: Literal[1] = 1
    recipe: str
    seed: int
    primary: str
    split: str = "test"
    samples: int
    device: str = "cpu"
    chance: float | None = None
    models: dict[str, ModelMetrics]
    retention: float | None = None
    retention_above_chance: float | None = None
    gain: Gain | None = None
    to_teacher: Gain | None = None
    label_names: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
