"""Plain tables in a trainer: read into memory, and not a bit of training or evaluation is another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import DataCollatorWithPadding, TrainerCallback, default_data_collator

from potstill.data.batching import InMemory, LengthSampler
from potstill.data.budgets import TokenBudget
from potstill.errors import TrainingError
from potstill.models.plain import Mlp
from potstill.training.callbacks import Agreement
from potstill.training.trainer import DistillationTrainer
from tests.local_models import word_pieces
from tests.training.tiny import arguments, flat, pairs, student, teacher

WORDS = [f"w{number}" for number in range(50)]


def rows(count: int = 30) -> Dataset:
    """Numbers, twice as precise as a tensor, with the name of the label that Trainer renames."""
    draw = np.random.default_rng(5)
    return Dataset.from_dict({"features": draw.normal(size=(count, 6)), "label": draw.integers(0, 3, count)})


def texts(count: int = 30, *, padded: bool = False) -> Dataset:
    """Tokenised texts of 3 to 17 tokens."""
    draw = np.random.default_rng(6)
    written = [" ".join(draw.choice(WORDS, size)) for size in draw.integers(1, 16, count)]
    columns = word_pieces(WORDS)(written, padding=padded)
    return Dataset.from_dict({**columns, "label": draw.integers(0, 3, count), "text": written})


def plain(folder: Path, **changes: Any) -> DistillationTrainer:
    torch.manual_seed(6)
    models = {"teacher": Mlp(6, 3, [8]), "model": Mlp(6, 3, [4], dropout=0.3)}
    return made(folder, **{**models, "train_dataset": rows(), "remove_unused_columns": False, **changes})


def bert(folder: Path, **changes: Any) -> DistillationTrainer:
    models = {"teacher": teacher(), "model": student(dropout=0.2)}
    return made(folder, **{**models, "train_dataset": texts(), "processing_class": word_pieces(WORDS), **changes})


OWN = ("teacher", "model", "train_dataset", "eval_dataset", "processing_class", "callbacks", "data_collator")
OWN += ("compute_metrics", "group_by_length", "batch_tokens")


def made(folder: Path, *, kind: type[DistillationTrainer] = DistillationTrainer, **changes: Any) -> DistillationTrainer:
    own = {name: changes.pop(name) for name in OWN if name in changes}
    return kind(**own, args=arguments(folder, **{"max_steps": 9, **changes}))


def source(trainer: DistillationTrainer) -> Any:
    """What the batches of the training are read from."""
    return trainer.get_train_dataloader().dataset


KINDS: dict[str, tuple[Callable[..., DistillationTrainer], Callable[..., Dataset], Any]] = {
    "numbers": (plain, rows, default_data_collator),
    "texts": (bert, texts, DataCollatorWithPadding(word_pieces(WORDS))),
}


def score(prediction: Any) -> dict[str, float]:
    """A metric that knows the order of the rows."""
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right.mean()), "ordered": float((right * np.arange(len(right))).sum())}


@pytest.mark.parametrize("kind", KINDS)
class TestNothingElseChanges:
    """The same trainer twice: its tables in memory, and with the collator that Trainer would take, given by hand."""

    def both(self, kind: str, folder: Path, **changes: Any) -> Iterator[DistillationTrainer]:
        """One after the other: a trainer that is made sets the global generators."""
        build, _, collate = KINDS[kind]
        for name, given, expected in (("memory", None, InMemory), ("collated", collate, Dataset)):
            trainer = build(folder / name, data_collator=given, **changes)
            assert isinstance(source(trainer), expected)
            yield trainer

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_weights(self, tmp_path: Path, kind: str, workers: int) -> None:
        """Beyond an epoch, with dropout: the order of the samples and every later draw are the same."""
        ends = []
        for each in self.both(kind, tmp_path, dataloader_num_workers=workers):
            before = flat(each.distillation_module)
            each.train()
            ends.append(flat(each.distillation_module))
            assert not torch.equal(ends[-1], before)
        assert torch.equal(*ends)

    def test_a_resume(self, tmp_path: Path, kind: str) -> None:
        settings = {"save_strategy": "steps", "save_steps": 1}
        memory, collated = self.both(kind, tmp_path, **settings)
        collated.train()
        memory.train(resume_from_checkpoint=str(tmp_path / "collated/checkpoint-6"))
        assert torch.equal(flat(memory.distillation_module), flat(collated.distillation_module))

    def test_evaluation_and_prediction(self, tmp_path: Path, kind: str) -> None:
        table, other = KINDS[kind][1](30), KINDS[kind][1](13)
        changes = {"eval_dataset": {"a": table, "b": other}, "compute_metrics": score, "per_device_eval_batch_size": 4}
        memory, collated = self.both(kind, tmp_path, **changes)
        found, wanted = memory.evaluate(), collated.evaluate()
        names = [name for name in wanted if name.endswith(("loss", "accuracy", "ordered"))]
        assert len(names) == 6
        assert {name: found[name] for name in names} == {name: wanted[name] for name in names}
        said = [each.predict(other) for each in (memory, collated)]
        assert np.array_equal(said[0].predictions, said[1].predictions)
        assert np.array_equal(said[0].label_ids, other["label"])

    def test_agreement(self, tmp_path: Path, kind: str) -> None:
        changes = {"eval_dataset": KINDS[kind][1](13), "eval_strategy": "steps", "eval_steps": 3}
        shares = []
        for each in self.both(kind, tmp_path, **changes):
            each.add_callback(agreement := Agreement())
            agreement.bind(each)
            each.train()
            shares.append([entry["eval_agreement"] for entry in each.state.log_history if "eval_agreement" in entry])
        assert shares[0] == shares[1]
        assert len(shares[0]) == 3


class TestWhatIsRead:
    def test_a_table_is_read_once(self, tmp_path: Path) -> None:
        trainer = plain(tmp_path, eval_dataset=rows(8))
        first = source(trainer)
        trainer.train()
        assert source(trainer) is first
        assert trainer.get_eval_dataloader().dataset is trainer.get_eval_dataloader().dataset is not first
        assert isinstance(trainer.train_dataset, Dataset)  # which is not replaced

    def test_samples_have_their_ids(self, tmp_path: Path) -> None:
        trainer = plain(tmp_path, eval_dataset=rows(8), per_device_eval_batch_size=5)
        heard = [number for batch in trainer.get_train_dataloader() for number in batch["sample_id"].tolist()]
        assert sorted(heard) == list(range(30)) != heard
        assert [batch["sample_id"].tolist() for batch in trainer.get_eval_dataloader()] == [[0, 1, 2, 3, 4], [5, 6, 7]]

    def test_columns_of_texts_are_dropped_as_trainer_does(self, tmp_path: Path) -> None:
        trainer = bert(tmp_path)
        assert "text" in trainer.train_dataset.column_names
        batch = next(iter(trainer.get_train_dataloader()))
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "sample_id"}

    def test_where_all_columns_are_kept_one_of_texts_leaves_the_table_alone(self, tmp_path: Path) -> None:
        table = rows().add_column("name", ["x"] * 30)
        trainer = plain(tmp_path, train_dataset=table)
        assert isinstance(source(trainer), Dataset)
        trainer.train()
        kept, without = flat(trainer.distillation_module), plain(tmp_path)
        without.train()
        assert torch.equal(kept, flat(without.distillation_module))

    @pytest.mark.parametrize("late", [False, True])
    def test_a_transform_leaves_the_table_alone(self, tmp_path: Path, late: bool) -> None:
        """Also one that is set when the table was read already: it would never be asked."""
        table = rows().add_column("sample_id", list(range(30)))
        asked: list[int] = []

        def doubled(found: dict[str, list[Any]]) -> dict[str, Any]:
            asked.extend(found["sample_id"])
            return {**found, "features": [torch.tensor(row) * 2 for row in found["features"]]}

        if not late:
            table.set_transform(doubled)
        trainer = plain(tmp_path, train_dataset=table)
        if late:
            assert isinstance(source(trainer), InMemory)
            table.set_transform(doubled)
        assert isinstance(source(trainer), Dataset)
        trainer.train()
        assert sorted(asked[:30]) == list(range(30))

    def test_a_format_leaves_the_table_alone(self, tmp_path: Path) -> None:
        assert isinstance(source(plain(tmp_path, train_dataset=rows().with_format("torch"))), Dataset)

    def test_a_collator_that_is_set_later_is_asked(self, tmp_path: Path) -> None:
        trainer = plain(tmp_path)
        trainer.data_collator = lambda samples: default_data_collator(samples)
        assert isinstance(source(trainer), Dataset)

    def test_a_sampler_of_ones_own_sees_the_table(self, tmp_path: Path) -> None:
        seen: list[Any] = []

        class Own(DistillationTrainer):
            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                seen.append(train_dataset)
                return SequentialSampler(train_dataset)

        trainer = plain(tmp_path, kind=Own)
        heard = torch.cat([batch["sample_id"] for batch in trainer.get_train_dataloader()])
        assert heard.tolist() == list(range(30))
        assert seen[0]["label"] == rows()["label"]

    def test_trainers_own_grouping_still_works(self, tmp_path: Path) -> None:
        settings = {"train_sampling_strategy": "group_by_length", "max_steps": 2}
        found = []
        for number, collate in enumerate((None, KINDS["texts"][2])):
            trainer = bert(tmp_path / str(number), data_collator=collate, **settings)
            trainer.train()
            found.append(flat(trainer.distillation_module))
        assert torch.equal(*found)


class TestLengths:
    def test_texts_of_like_length_share_a_batch(self, tmp_path: Path) -> None:
        """And evaluation keeps the order of the rows, for those who read predictions beside the table."""
        grouped = bert(tmp_path, group_by_length=True, eval_dataset=texts(20))
        loader = grouped.get_train_dataloader()
        assert isinstance(loader.batch_sampler.sampler, LengthSampler)
        shares = [float(batch["attention_mask"].float().mean()) for batch in loader]
        alone = [float(batch["attention_mask"].float().mean()) for batch in bert(tmp_path).get_train_dataloader()]
        assert np.mean(shares) > 0.85 > np.mean(alone)
        assert np.array_equal(grouped.predict(grouped.eval_dataset).label_ids, texts(20)["label"])

    def test_each_epoch_has_another_order(self, tmp_path: Path) -> None:
        heard: list[list[int]] = []

        class Hear(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                heard.append([])

        class Own(DistillationTrainer):
            def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
                heard[-1:] = [inputs["sample_id"].tolist()]
                return super().training_step(model, inputs, *rest)

        heard.append([])
        bert(tmp_path, kind=Own, group_by_length=True, callbacks=[Hear()], max_steps=8).train()
        epochs = [list(itertools.chain(*heard[:4])), list(itertools.chain(*heard[4:8]))]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(30))
        assert epochs[0] != epochs[1]

    def test_a_budget_of_tokens(self, tmp_path: Path) -> None:
        trainer = bert(tmp_path, group_by_length=True, batch_tokens=60, max_steps=-1, num_train_epochs=2)
        loader = trainer.get_train_dataloader()
        assert isinstance(loader.batch_sampler, TokenBudget)
        sizes = [batch["input_ids"].shape for batch in loader]
        assert max(rows * length for rows, length in sizes) <= 60
        assert sum(rows for rows, _ in sizes) == 30
        trainer.train()
        assert trainer.state.global_step == 2 * len(loader)

    def test_a_budget_needs_texts_that_are_not_padded_yet(self, tmp_path: Path) -> None:
        for changes in ({"train_dataset": texts(padded=True)}, {"train_dataset": pairs(), "processing_class": None}):
            trainer = bert(tmp_path, group_by_length=True, batch_tokens=60, **changes)
            with pytest.raises(TrainingError, match="batch_tokens needs the length of every sample"):
                trainer.train()
