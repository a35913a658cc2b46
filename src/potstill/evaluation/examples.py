"""The samples on which a student and its teacher differ most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from potstill.evaluation.fidelity import divergence
from potstill.evaluation.predict import Predictions
from potstill.interfaces import IGNORED


def most_different(teacher: Predictions, student: Predictions, *, count: int = 12) -> NDArray[np.int64]:
    """Return the rows ``[count]`` with the largest KL(teacher ‖ student), the largest first; equal ones by their place.

    Args:
        teacher: its answers, logits ``[N, C]``.
        student: its answers on the same samples.
        count: how many; all where there are fewer.
    """
    order = np.argsort(-divergence(teacher.logits, student.logits), kind="stable")
    return np.asarray(order[:count], dtype=np.int64)


def examples(
    rows: NDArray[np.int64], answers: Mapping[str, Predictions], teacher: str, student: str
) -> list[dict[str, Any]]:
    """Return what every model answered on some samples, as plain data.

    Args:
        rows: places of the samples in the split.
        answers: by model, logits ``[N, C]``.
        teacher: the model of which ``divergence`` is measured.
        student: the model whose divergence it is.

    Returns:
        For each row ``sample_id``, ``label`` (``None`` where unknown), ``divergence`` in nats, and for each model in
        ``answers`` its ``answer`` and its ``confidence`` in it.
    """
    first, labels = answers[student], answers[student].labels
    apart = divergence(answers[teacher].logits[rows], first.logits[rows])
    found = []
    for place, row in enumerate(rows.tolist()):
        label = None if labels is None or labels[row] == IGNORED else int(labels[row])
        given = {name: _answer(predictions.logits[row]) for name, predictions in answers.items()}
        about = {"sample_id": int(first.sample_id[row]), "label": label, "divergence": float(apart[place])}
        found.append({**about, "answers": given})
    return found


def _answer(logits: NDArray[np.float32]) -> dict[str, Any]:
    probabilities = softmax(logits.astype(np.float64))
    answer = int(probabilities.argmax())
    return {"answer": answer, "confidence": float(probabilities[answer])}
