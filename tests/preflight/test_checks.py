"""Each check by itself: what it finds beyond the ten planted faults, and what it does not take for a fault."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, load_dataset
from torch import Tensor, nn

from benchmarks.planted_faults import (
    Conv,
    Net,
    bert,
    counting,
    fitted,
    gpt2,
    pictures,
    points,
    sound,
    sound_sequences,
    trainer_of,
)
from potstill import Live, Objective, Term
from potstill.checks import data, table_rows
from potstill.checks.findings import Finding
from potstill.checks.run import run_checks
from potstill.checks.subject import Feed, Subject
from potstill.checks.table_rows import row_codes
from potstill.checks.trainers import subject_of
from potstill.models.origins import ImageProcessor, TextProcessor
from tests import local_models

CLASSES = 4


def batch(count: int = 32, seed: int = 1) -> dict[str, Tensor]:
    found: dict[str, Tensor] = points(count, seed)[:]
    return found


def subject(**changes: Any) -> Subject:
    """Points, and a teacher that knows nothing."""
    torch.manual_seed(0)
    objective = Objective({"soft": Term("kl"), "hard": Term("cross_entropy")})
    teachers = {"teacher": Live(Net())}
    return Subject(**{"student": Net(6), "objective": objective, "batch": batch(), "teachers": teachers, **changes})


def found(examined: Subject, *names: str) -> list[Finding]:
    return run_checks(examined, only=names or None)


def the(examined: Subject, name: str) -> Finding:
    (finding,) = found(examined, name)
    return finding


class TestTeachers:
    def test_an_opaque_teacher_that_drifts(self) -> None:
        """Neither a module nor hooks: only its answers can be compared."""
        seen = torch.zeros(1)

        def answer(given: dict[str, Tensor]) -> dict[str, Tensor]:
            if not torch.equal(given["features"], batch()["features"][: len(given["features"])]):
                seen.add_(1)
            return {"logits": given["features"][:, :CLASSES] + seen * given["features"][:, 1:2].relu()}

        assert the(subject(teachers={"teacher": answer}), "teacher-drift").level == "error"

    def test_a_callable_that_calls_eval_itself_is_right(self) -> None:
        model = Net().train()

        def answer(given: dict[str, Tensor]) -> dict[str, Tensor]:
            model.eval()
            with torch.no_grad():
                return {"logits": model(given["features"])}

        assert found(subject(teachers={"teacher": answer}), "teacher-mode", "teacher-drift") == []

    def test_one_that_knows_nothing_is_no_better_than_chance(self) -> None:
        judged = {"judged": batch(400, 3), "trained": frozenset(["teacher"])}
        assert the(subject(**judged), "teacher-above-chance").level == "warning"
        assert the(subject(**judged, strict=True), "teacher-above-chance").level == "error"
        few = {**judged, "judged": batch(12, 3)}
        assert found(subject(**few), "teacher-above-chance") == []
        assert found(subject(judged=batch(400, 3)), "teacher-above-chance") == []

    def test_one_that_knows_a_rare_class_is_no_guess(self) -> None:
        """With four of five rows in one class, always guessing it is hard to beat in accuracy alone."""
        draw = np.random.default_rng(0)
        labels = torch.tensor((draw.random(4000) < 0.2).astype(int))
        alarm = torch.tensor(draw.random(4000)) < torch.where(labels == 1, 0.9, 0.25)
        judged = {**batch(4000, 3), "labels": labels}
        judged["features"] = torch.stack([(~alarm).float(), alarm.float(), *[-torch.ones(4000)] * 2], 1)

        def first(given: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"logits": given["features"][:, :CLASSES]}

        def constant(given: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"logits": torch.eye(CLASSES)[torch.zeros(len(given["features"]), dtype=torch.int64)]}

        trained = frozenset(["teacher"])
        accuracy = float((alarm.long() == labels).float().mean())
        assert accuracy < float((labels == 0).float().mean())
        asked = {"judged": judged, "trained": trained}
        assert found(subject(teachers={"teacher": first}, **asked), "teacher-above-chance") == []
        assert the(subject(teachers={"teacher": constant}, **asked), "teacher-above-chance").level == "warning"

    def test_one_that_is_read_for_its_hidden_features_alone(self) -> None:
        """It may have been trained for anything: pictures of other classes, or fewer of them."""
        terms = {"hint": Term("mse", "body.2", "body.2", project="linear"), "hard": Term("cross_entropy")}
        judged = {"judged": batch(400, 3), "trained": frozenset(["teacher"])}
        assert found(subject(objective=Objective(terms), **judged), "teacher-above-chance", "label-map") == []
        terms["soft"] = Term("kl")
        assert the(subject(objective=Objective(terms), **judged), "teacher-above-chance").level == "warning"

    def ordinal(self, **changes: Any) -> Subject:
        """K − 1 thresholds for K ordered classes, and a teacher that is always right."""
        names = ["none", "some", "many", "all"]
        given = batch(400, 3)
        given["features"][:, 0] = 3 * (given["labels"].float() - 1.5) + 0.1

        def answer(asked: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"logits": asked["features"][:, :1] - torch.tensor([-3.0, 0.0, 3.0])}

        def likely(student: Tensor, teacher: Tensor) -> Tensor:
            return (student.sigmoid() - teacher.sigmoid()).square().mean(-1)

        table = Dataset.from_dict({"label": [0, 1, 2, 3] * 20})
        setup = {"student": nn.Linear(8, 3), "batch": given, "judged": given, "label_names": names}
        setup |= {"teachers": {"teacher": answer}, "trained": frozenset(["teacher"]), "label": "label"}
        setup |= {"objective": Objective({"soft": Term(likely)}), "tables": {"test": table}}
        return subject(**{**setup, "answers": lambda logits: (logits > 0).sum(-1), **changes})

    def test_ordered_classes_are_answered_as_the_task_answers(self) -> None:
        checks = ("teacher-above-chance", "label-map", "label-range", "shift", "normalisation")
        assert found(self.ordinal(), *checks) == []
        wrong = self.ordinal(answers=lambda logits: np.zeros(len(logits), dtype=np.int64))
        assert [each.check for each in found(wrong, *checks)] == ["teacher-above-chance"]
        beyond = Dataset.from_dict({"label": [0, 1, 2, 3, 4] * 20})
        assert "the classes 0 to 3" in the(self.ordinal(tables={"test": beyond}), "label-range").message

    def test_an_argmax_of_the_task_changes_nothing(self) -> None:
        wide = subject(label_names=["a", "b", "c", "d", "e"], answers=lambda logits: logits.argmax(-1))
        assert [each.check for each in found(wide, "label-map")] == ["label-map"] * 2

    def test_other_numbers_of_classes(self) -> None:
        examined = subject(label_names=["a", "b", "c", "d", "e"])
        assert [each.check for each in found(examined, "label-map")] == ["label-map"] * 2

    def test_a_student_that_is_the_teacher(self) -> None:
        model = Net()
        examined = subject(student=model, teachers={"teacher": Live(model)})
        assert "share" in the(examined, "gradients").message


class TestInputs:
    def test_statistics_that_are_known_to_differ(self) -> None:
        own, other = ImageProcessor(mean=(0.5,), std=(0.5,)), ImageProcessor(mean=(0.1307,), std=(0.3081,))
        assert the(subject(feeds={"teacher": Feed(other, own)}), "normalisation").level == "error"
        assert the(subject(feeds={"student": Feed(other, own, learns=True)}), "normalisation").level == "note"
        same = ImageProcessor(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        assert found(subject(feeds={"teacher": Feed(same, own)}), "normalisation") == []

    def test_few_pictures_are_asked_again(self) -> None:
        """Few say which ways are worth asking about all, and an accurate teacher is not asked at all."""
        torch.manual_seed(0)
        model = fitted(Conv(), pictures(256, 1))
        for mean, std, most, level in ((0.5, 0.5, 0, []), (0.0, 1.0, 64 * 30 + 2 * 448, ["error"])):
            given: dict[str, Tensor] = pictures(512, 2, mean, std)[:]
            asked: list[int] = []

            def answer(batch: dict[str, Tensor], asked: list[int] = asked) -> dict[str, Tensor]:
                asked.append(len(batch["pixel_values"]))
                with torch.no_grad():
                    return {"logits": model(batch["pixel_values"])}

            setup = {"student": Conv(), "batch": given, "judged": given, "teachers": {"teacher": answer}}
            examined = subject(**setup, trained=frozenset(["teacher"]))
            assert [each.level for each in found(examined, "normalisation")] == level
            assert sum(asked) <= 512 + 100 + most  # the judged ones, once, and a few

    def test_a_student_that_is_given_tokens_it_does_not_have(self) -> None:
        """On a GPU the look-up would end the process, so it must not come to that."""
        for student in (bert(30, 8), bert(60, 8)):
            ids = torch.full((8, 5), 50)
            ids[1:] = 3
            given = {"input_ids": ids, "labels": torch.arange(8) % CLASSES}
            examined = subject(student=student, batch=given, teachers={"teacher": Live(bert(60, 16))})
            whose = [each.message[:11] for each in found(examined) if each.level == "error"]
            assert whose == (["the student"] if student.config.vocab_size == 30 else [])
        examined = subject(student=bert(30, 8), batch=given, teachers={"teacher": Live(bert(60, 16))})
        assert "the token id 50, and its table has 30" in the(examined, "tokenizer").message

    def test_a_tokenizer_with_other_ids_of_the_same_size(self) -> None:
        own = TextProcessor(local_models.word_pieces())
        fed = TextProcessor(local_models.word_pieces(local_models.WORDS[::-1]))
        examined = subject(feeds={"teacher": Feed(fed, own)}, texts=[text for text, _ in local_models.SENTENCES])
        assert the(examined, "tokenizer").level == "error"
        same = Feed(TextProcessor(local_models.word_pieces()), own)
        assert found(subject(feeds={"teacher": same}, texts=["a warm film"]), "tokenizer") == []

    def test_the_tokenizer_of_a_trainer_beside_the_teachers_own(self, tmp_path: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        teacher = AutoModelForSequenceClassification.from_pretrained(
            local_models.bert(tmp_path / "bert", head=["a", "b"])
        )
        student = AutoModelForSequenceClassification.from_pretrained(
            local_models.distilbert(tmp_path / "distilbert", head=["a", "b"])
        )
        texts, labels = zip(*local_models.SENTENCES, strict=True)
        for words, level in ((local_models.WORDS, []), (local_models.WORDS[::-1], ["error", "warning"])):
            tokenizer = local_models.word_pieces(words)
            table = Dataset.from_dict({**tokenizer(list(texts), padding=True), "labels": list(labels)})
            setup = {"model": student, "teacher": teacher, "processing_class": tokenizer}
            trainer = trainer_of({**setup, "train_dataset": table.with_format("torch")}, tmp_path)
            assert [each.level for each in found(subject_of(trainer), "tokenizer")] == level

    def test_labels_that_are_not_shifted(self, tmp_path: Path) -> None:
        setup = {**sound_sequences(), "eval_dataset": counting(96, 136, 0)}
        assert "not shifted" in the(subject_of(trainer_of(setup, tmp_path)), "shift").message


class Odd(nn.Module):
    """A body, a module that is fed with what is cut from the graph, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.never = nn.Linear(8, 6), nn.Linear(6, CLASSES), nn.Linear(8, 2)
        self.side = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.body(features)
        self.side(hidden.detach())
        out: Tensor = self.head(hidden)
        return out


class TestSignals:
    def hint(self, tap: str, **changes: Any) -> Subject:
        terms = {"soft": Term("kl"), "hint": Term("mse", tap, "body.2", project="linear")}
        return subject(student=Odd(), objective=Objective(terms), **changes)

    def test_one_that_is_cut_from_the_graph(self) -> None:
        examined = self.hint("side", teachers={"teacher": Live(Net(), ["body.2"])})
        assert the(examined, "dead-tap").level == "error"

    def test_one_that_never_fires(self) -> None:
        examined = self.hint("never", teachers={"teacher": Live(Net(), ["body.2"])})
        assert "no forward reached 'never'" in the(examined, "signals").message

    def test_a_teachers_that_is_always_the_same(self) -> None:
        terms = {"hint": Term("mse", "body", "idle", project="linear")}
        examined = subject(student=Odd(), objective=Objective(terms), teachers={"teacher": Live(Net(), ["idle"])})
        assert found(examined, "dead-tap") == []  # it may be trained from there, as a head of zeros is
        examined.trained = frozenset(["teacher"])
        assert "the same for every sample" in the(examined, "dead-tap").message

    def test_one_of_several_teachers_that_is_always_the_same(self) -> None:
        terms = {n: Term("mse", "body", f"{n}/idle", project="linear") for n in ("known", "new")}
        teachers = {name: Live(Net(), ["idle"]) for name in terms}
        examined = subject(student=Odd(), objective=Objective(terms), teachers=teachers, trained=frozenset(["known"]))
        assert "'known/idle'" in the(examined, "dead-tap").message

    def test_a_living_one(self) -> None:
        assert found(self.hint("body", teachers={"teacher": Live(Net(), ["body.2"])}), "dead-tap", "signals") == []

    def test_a_model_that_breaks_is_one_finding(self) -> None:
        def broken(given: dict[str, Tensor]) -> dict[str, Tensor]:
            raise RuntimeError("no answer today")

        assert [each.check for each in found(subject(teachers={"teacher": broken}))] == ["signals"]

    def test_shapes_and_masks(self) -> None:
        wide = Live(nn.Linear(8, 5))
        assert "one shape" in the(subject(teachers={"teacher": wide}), "shapes").message
        nothing = {**batch(), "valid": torch.zeros(32)}
        masked = Objective({"soft": Term("kl", mask="valid")})
        assert "leaves nothing" in the(subject(batch=nothing, objective=masked), "shapes").message

    def test_labels_of_a_whole_table(self) -> None:
        table = Dataset.from_dict({"label": [0, 1, 2, 3, -1] * 20 + [4]})
        given = {"tables": {"test": table}, "label": "label"}
        assert "'test'" in the(subject(**given, unlabelled=-1), "label-range").message
        assert (
            found(subject(tables={"test": table.select(range(100))}, label="label", unlabelled=-1), "label-range") == []
        )


class TestObjective:
    def test_every_loss_of_potstill_is_finite_when_models_are_sure(self) -> None:
        terms = {name: Term(name) for name in ("kl", "soft_cross_entropy", "mse", "cosine", "cross_entropy")}
        terms["hot"] = Term("kl", temperature=4.0)
        assert found(subject(objective=Objective(terms)), "saturation", "loss", "shapes", "gradients") == []

    def test_a_loss_that_is_not_finite(self) -> None:
        def late(student: Tensor, teacher: Tensor) -> Tensor:
            return (student - teacher).sum(-1) / 0

        assert the(subject(objective=Objective({"late": Term(late)})), "loss").level == "error"

    def test_a_term_without_gradient(self) -> None:
        def cut(student: Tensor, teacher: Tensor) -> Tensor:
            return (student.detach() - teacher).square().sum(-1)

        assert the(subject(objective=Objective({"cut": Term(cut), "soft": Term("kl")})), "gradients").level == "error"

    def test_a_parameter_that_nothing_reaches_is_a_note(self) -> None:
        assert the(subject(student=Odd()), "gradients").level == "note"

    def test_a_student_that_is_left_out_of_the_optimizer(self) -> None:
        student = Net(6)
        examined = subject(student=student, optimizer=lambda: torch.optim.SGD(student.head.parameters(), 0.1))
        assert the(examined, "projectors").level == "warning"


def images(count: int, pixels: int = 300, seed: int = 0) -> Dataset:
    """Encoded pictures as a reader of files leaves them: bytes."""
    from datasets import Features, Image

    draw = np.random.default_rng(seed)
    blobs = [{"bytes": draw.bytes(pixels), "path": None} for _ in range(count)]
    return Dataset.from_dict({"image": blobs}, features=Features({"image": Image()}))


class TestData:
    def leaky(self, train: Dataset, test: Dataset, *inputs: str, strict: bool = True) -> list[Finding]:
        return found(subject(tables={"train": train, "test": test}, inputs=inputs, strict=strict), "duplicates")

    @pytest.mark.parametrize(
        "values",
        [
            [f"text {i}" for i in range(200)],
            [[i, i + 1] for i in range(200)],
            [[[float(i)] * 3] * 2 for i in range(200)],
            [[i] * (i % 3 + 1) for i in range(200)],
            list(range(200)),
        ],
        ids=["texts", "lists", "arrays", "ragged", "numbers"],
    )
    def test_rows_in_two_splits(self, values: list[Any]) -> None:
        tables = [Dataset.from_dict({"x": values[start:stop]}) for start, stop in ((0, 110), (100, 200), (110, 200))]
        (finding,) = self.leaky(tables[0], tables[1], "x")
        assert finding.level == "warning"
        assert "10 of 100 rows" in finding.message
        assert "0 (train 100)" in finding.message
        assert self.leaky(tables[0], tables[2], "x") == []
        (finding,) = self.leaky(tables[0], tables[0].select(range(100)), "x")
        assert finding.level == "error"
        (finding,) = self.leaky(tables[0], tables[0].select(range(100)), "x", strict=False)
        assert finding.level == "warning"

    def test_both_of_a_pair_must_agree(self) -> None:
        train = Dataset.from_dict({"a": ["x", "y"], "b": ["1", "2"]})
        assert self.leaky(train, Dataset.from_dict({"a": ["x", "y"], "b": ["2", "1"]}), "a", "b") == []

    def test_pictures_by_their_bytes_and_fast(self) -> None:
        train, test = images(60_000), images(1_000, seed=1)
        began = time.process_time()
        codes = np.concatenate([row_codes(table, ["image"]) for table in (train, test)])
        assert time.process_time() - began < 10
        assert row_codes(train.select([7]), ["image"]) == codes[7]
        assert len(np.unique(codes)) == 61_000

    @pytest.mark.parametrize(
        "values",
        [
            [[i] * (i % 3) for i in range(50)],
            [[[float(i)] * (i % 3 + 1)] * 2 for i in range(50)],
            [[None if i == 0 else i, 1] for i in range(50)],
            [[f"{i}"] * (i % 2 + 1) for i in range(50)],
            [None if i == 9 else [i] for i in range(50)],
        ],
        ids=["ragged", "nested", "missing numbers", "texts", "missing lists"],
    )
    def test_a_row_has_one_code_whatever_is_beside_it(self, values: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        table = Dataset.from_dict({"x": values})
        whole = row_codes(table, ["x"])
        assert len(np.unique(whole)) == len({str(value) for value in values})
        monkeypatch.setattr(table_rows, "SLICE", 7)
        assert np.array_equal(row_codes(table, ["x"]), whole)
        assert np.array_equal(row_codes(table.select([30]), ["x"]), whole[30:31])

    def test_lists_of_the_same_numbers_are_not_the_same(self) -> None:
        table = Dataset.from_dict({"x": [[[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2, 3], []]]})
        assert len(np.unique(row_codes(table, ["x"]))) == 4

    def test_the_training_split_is_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[int] = []

        def counted(table: Dataset, columns: list[str]) -> Any:
            read.append(len(table))
            return row_codes(table, columns)

        monkeypatch.setattr(data, "row_codes", counted)
        tables = {name: images(count, 8, count) for name, count in (("train", 30), ("validation", 20), ("test", 10))}
        assert found(subject(tables=tables, inputs=["image"]), "duplicates") == []
        assert sorted(read) == [10, 20, 30]

    def test_of_a_very_large_table_the_first_rows_are_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(table_rows, "SLICE", 10)
        monkeypatch.setattr(table_rows, "MOST_BYTES", 250 * 300)
        (finding,) = self.leaky(images(1000), images(50, seed=1), "image")
        assert finding.level == "note"
        assert "only the first 250 of 1000 rows of the split 'train'" in finding.message
        monkeypatch.setattr(table_rows, "MOST_ROWS", 95)
        assert "only the first 95 of 1000" in self.leaky(images(1000), images(50, seed=1), "image")[0].message

    def telling(self, inputs: tuple[str, ...], *, strict: bool = True, **columns: Any) -> list[Finding]:
        names = ["good", "very bad"]
        table = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=names))
        examined = subject(tables={"train": table}, label="label", label_names=names, inputs=inputs, strict=strict)
        return found(examined, "telling-columns")

    @pytest.mark.parametrize(("rows", "each"), [(150, 1), (190, 1), (600, 4)])
    def test_the_order_of_the_rows_tells_nothing(self, rows: int, each: int) -> None:
        """Data that are sorted by class, and texts of which none says anything of another."""
        half = rows // 2
        texts = [f"statement number {i * 7919 % 1009}" for i in range(rows // each) for _ in range(each)]
        assert self.telling(("text",), label=[0] * half + [1] * half, text=texts[: 2 * half]) == []

    def test_a_measurement_may_separate_the_classes(self) -> None:
        """As the length of a petal does; a category that does is more likely a copy of the label."""
        from sklearn.datasets import load_iris

        features, labels = load_iris(return_X_y=True)
        two = labels < 2
        columns = {"label": labels[two].tolist(), "petal_length": features[two, 2].tolist()}
        assert [each.level for each in self.telling(("petal_length",), **columns)] == ["warning"]
        columns |= {"code": [2 + label for label in columns["label"]]}
        columns |= {"word": [f"kind {label}" for label in columns["label"]]}
        copies = [self.telling(("code", "word"), strict=strict, **columns) for strict in (True, False)]
        levels = [[each.level for each in each_of if "is not an input" not in each.message] for each_of in copies]
        assert levels == [["error", "error"], ["warning", "warning"]]

    def test_a_category_that_hardly_occurs_is_the_most_frequent_class(self) -> None:
        labels = np.random.default_rng(0).integers(0, 2, 400)
        codes = np.where(labels == 1, "x", "y").tolist()
        codes[7] = "rare"
        (finding,) = self.telling(("code",), label=labels.tolist(), code=codes)
        assert finding.level == "error"

    def test_columns_that_know_the_label(self) -> None:
        draw = np.random.default_rng(0)
        labels = draw.integers(0, 2, 600)
        columns = {
            "label": labels.tolist(),
            "code": np.where(labels == 1, "x", "y").tolist(),
            "very_bad_counts": (labels + draw.normal(0, 1, 600)).tolist(),
            "useful": (labels + draw.normal(0, 1, 600)).tolist(),
            "good_looks": draw.normal(0, 1, 600).tolist(),
        }
        every = ("code", "very_bad_counts", "useful", "good_looks")
        assert [each.level for each in self.telling(every, **columns)] == ["error", "warning"]
        assert [each.level for each in self.telling(("useful",), **columns)] == ["note", "note"]

    def test_the_counts_of_liar(self, real_data: Path) -> None:
        """They count a speaker's earlier statements, the one at hand among them."""
        if not (real_data / "liar/train.parquet").is_file():
            pytest.skip(f"LIAR is not at {real_data}")
        (table,) = load_dataset("parquet", data_files=str(real_data / "liar/train.parquet"), split=["train"])
        names = ["false", "half-true", "mostly-true", "true", "barely-true", "pants-fire"]
        counts = [name for name in table.column_names if name.endswith("_counts")]
        examined = subject(tables={"train": table}, label="label", label_names=names, inputs=counts)
        told = [each.message.split("'")[1] for each in found(examined, "telling-columns")]
        assert sorted(told) == sorted(counts)
        assert len(counts) == 5


def test_notes_alone_on_a_model_that_was_trained(tmp_path: Path) -> None:
    """No false alarm with a copy for a student, as in distilling a model into itself."""
    setup = sound()
    model = copy.deepcopy(setup["teacher"])
    trainer = trainer_of({**setup, "model": model, "objective": Objective({"soft": Term("kl")})}, tmp_path)
    assert [each for each in run_checks(subject_of(trainer)) if each.level != "note"] == []


def test_a_decoder_without_faults_under_a_table_of_tokens(tmp_path: Path) -> None:
    setup = {**sound_sequences(), "teacher": fitted(gpt2(), counting(0, 96), 60)}
    assert [each for each in run_checks(subject_of(trainer_of(setup, tmp_path))) if each.level == "error"] == []
