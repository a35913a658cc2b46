"""Teachers of single tasks on a batch of several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potstill.errors import ComponentError, SignalError
from potstill.registry import teacher_sources
from potstill.teachers.context import SourceContext
from potstill.teachers.per_task import PerTask, per_task, task_ranges

NAMES = ["mood/bad", "mood/good", "topic/art", "topic/law", "topic/war"]
BATCH = {
    "sample_id": torch.arange(5),
    "task": torch.tensor([1, 0, 1, 1, 0]),
    "features": torch.arange(10.0).reshape(5, 2),
    "teacher/features": torch.arange(5.0),
    "lengths": torch.tensor([1, 2, 3]),
}


class Teacher:
    """Linear in the features, with a hidden layer; remembers whom it was asked about."""

    def __init__(self, classes: int, factor: float) -> None:
        self.classes, self.factor = classes, factor
        self.asked: list[dict[str, Tensor]] = []
        self.wanted: list[object] = []

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.asked.append(batch)
        logits = self.factor * batch["features"].sum(1, keepdim=True) * torch.arange(1.0, self.classes + 1)
        return {"logits": logits.double().requires_grad_(), "hidden": batch["features"] + self.factor}

    def narrow(self, names: object) -> None:
        self.wanted.append(names)


def made(**changes: Teacher) -> PerTask:
    teachers = {"m": Teacher(2, 1.0), "t": Teacher(3, 10.0), **changes}
    return per_task(SourceContext("all", teachers, label_names=NAMES), teachers={"topic": "t", "mood": "m"})


class TestLogits:
    def test_each_teacher_answers_for_its_own_rows_in_its_own_columns(self):
        source = made()
        said = source(BATCH)["logits"]
        expected = torch.full((5, 5), -1e4)
        for row, task in enumerate([1, 0, 1, 1, 0]):
            total = sum(BATCH["features"][row].tolist())
            for place in range(3 if task else 2):
                expected[row, (2 if task else 0) + place] = total * (place + 1) * (10 if task else 1)
        assert torch.equal(said, expected)
        assert said.dtype == torch.float32
        assert not said.requires_grad

    def test_a_teacher_sees_its_rows_alone(self):
        source = made()
        source(BATCH)
        (seen,) = source.teachers["topic"].asked
        assert seen["sample_id"].tolist() == [0, 2, 3]
        assert seen["task"].tolist() == [1, 1, 1]
        assert seen["teacher/features"].tolist() == [0, 2, 3]
        assert seen["lengths"].tolist() == [1, 2, 3]  # not of samples

    def test_a_teacher_of_all_tasks_is_taken_whole(self):
        said = made(m=Teacher(5, 1.0))(BATCH)["logits"]
        assert said[1].tolist() == [5.0, 10.0, 15.0, 20.0, 25.0]
        assert said[0].tolist()[:2] == [-1e4, -1e4]

    def test_one_task_only(self):
        source = made()
        said = source({**BATCH, "task": torch.zeros(5, dtype=torch.long)})["logits"]
        assert (said[:, 2:] == -1e4).all()
        assert source.teachers["topic"].asked == []

    def test_other_classes_than_the_tasks(self):
        with pytest.raises(SignalError, match=r"expected logits \[3, 3\] of the teacher of 'topic' .*got \[3, 4\]"):
            made(t=Teacher(4, 1.0))(BATCH)

    def test_a_batch_without_tasks(self):
        with pytest.raises(SignalError, match="needs an entry `task`"):
            made()({"features": BATCH["features"]})


class TestOtherSignals:
    def test_they_go_by_the_task_and_are_zero_elsewhere(self):
        said = made()(BATCH)
        assert set(said) == {"logits", "mood/hidden", "topic/hidden"}
        expected = torch.zeros(5, 2)
        expected[[0, 2, 3]] = BATCH["features"][[0, 2, 3]] + 10
        assert torch.equal(said["topic/hidden"], expected)

    def test_narrowing(self):
        source = made()
        source.narrow(["topic/hidden"])
        said = source(BATCH)
        assert set(said) == {"topic/hidden"}
        assert source.teachers["mood"].asked == []
        assert source.teachers["topic"].wanted == [["hidden"], None]
        source.narrow(["logits"])
        assert set(source(BATCH)) == {"logits"}

    def test_without_rows_of_the_task_the_shape_is_still_right(self):
        source = made()
        source.narrow(["logits", "topic/hidden"])
        said = source({**BATCH, "task": torch.zeros(5, dtype=torch.long)})
        assert torch.equal(said["topic/hidden"], torch.zeros(5, 2))
        assert len(source.teachers["topic"].asked[0]["sample_id"]) == 1


class TestOptions:
    def test_it_is_registered(self):
        assert teacher_sources.get("per_task") is per_task
        assert teacher_sources.check("per_task", {"teachers": {"mood": "m"}}) == []

    def test_ranges(self):
        assert task_ranges(NAMES) == {"mood": (0, 2), "topic": (2, 5)}
        assert task_ranges(["b/x", "a/y/z", "a/w"]) == {"b": (0, 1), "a": (1, 3)}
        with pytest.raises(ComponentError, match="'a/z' does not stand beside the others"):
            task_ranges(["a/x", "b/y", "a/z"])
        with pytest.raises(ComponentError, match="'plain' has no task"):
            task_ranges(["plain"])
        with pytest.raises(ComponentError, match="there are none"):
            task_ranges([])

    def test_mistakes(self):
        context = SourceContext("all", {"m": Teacher(2, 1.0)}, label_names=NAMES)
        with pytest.raises(ComponentError, match=r"names the teacher 'mm' for the task 'mood'.*did you mean 'm'"):
            per_task(context, teachers={"mood": "mm"})
        with pytest.raises(ComponentError, match="no teacher for the task 'topic'"):
            per_task(context, teachers={"mood": "m"})
        with pytest.raises(ComponentError, match=r"has a teacher for 'moods'.*did you mean 'mood'"):
            per_task(context, teachers={"moods": "m", "topic": "m"})
