"""Training under a budget of tokens a batch: steps, epochs and counts are right, and a resume is exact."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill.data.batching import InMemory, LengthSampler
from potstill.data.budgets import TokenBudget
from potstill.errors import RecipeError, TrainingError
from potstill.recipe.arguments import make_training
from potstill.recipe.check import check_components
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import TrainSpec
from potstill.training.checkpoints import latest_checkpoint
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.training import budgeted
from tests.training.budgeted import SGD, Epochs, texts, trainer
from tests.training.tiny import flat, relative, student, teacher

ROOT = Path(__file__).parent.parent.parent


def batches_of(made: Any) -> int:
    return len(made.get_train_dataloader())


class TestSteps:
    def test_every_sample_once_an_epoch_within_the_budget(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, max_steps=-1, num_train_epochs=3)
        count = batches_of(made)
        made.train()
        met: Any = made.teacher
        assert len(met.met) == 3 * count
        for epoch in range(3):
            heard = torch.cat(met.met[epoch * count : (epoch + 1) * count])
            assert sorted(heard.tolist()) == list(range(60))
        assert max(met.tokens) <= 96
        assert {len(batch) for batch in met.met} > {4, 12}
        assert [batch.tolist() for batch in met.met[:count]] != [batch.tolist() for batch in met.met[count : 2 * count]]

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_steps_and_epochs_are_counted_right(self, tmp_path: Path, accumulation: int) -> None:
        """The epoch after the last step is whole: nothing is left of it, and nothing was taken twice."""
        stands = Epochs()
        settings = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": accumulation}
        made = trainer(tmp_path, callbacks=[stands], **settings)
        count = batches_of(made)
        assert count % 3 != 0  # the last step of an epoch has fewer batches
        each = -(-count // accumulation)
        made.train()
        wanted = [min(count, accumulation * step) / count for step in range(1, each + 1)]
        assert stands.seen == pytest.approx([*wanted, *(1 + share for share in wanted)])
        assert made.state.global_step == made.state.max_steps == 2 * each

    def test_a_window_of_unequal_batches_is_one_mean(self, tmp_path: Path) -> None:
        """Each term divided by its own count over the window: a mean of the batches' means would be wrong."""
        whole, parts = (trainer(tmp_path / str(number), **options) for number, options in enumerate(self.windows()))
        assert batches_of(whole) == 1
        for made in (whole, parts):
            made.train()
        start = flat(student())
        moves = [flat(made.distillation_module.student) - start for made in (whole, parts)]
        assert relative(moves[1], moves[0]) < 1e-5

    def windows(self) -> list[dict[str, Any]]:
        data = texts(unlabelled=7)
        accumulation = len(TokenBudget(data, 96, 12, seed=42))
        shared: dict[str, Any] = {**SGD, "learning_rate": 1.0, "max_steps": 1, "train_dataset": data}
        one = {"batch_tokens": 60 * 24, "per_device_train_batch_size": 60}
        return [{**shared, **one}, {**shared, "gradient_accumulation_steps": accumulation}]


class TestResume:
    @pytest.mark.parametrize(("accumulation", "step"), [(1, 2), (1, -3), (3, -2)])
    def test_to_the_bit_within_an_epoch(self, tmp_path: Path, accumulation: int, step: int) -> None:
        settings: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": accumulation}
        settings |= {"save_strategy": "steps", "save_steps": 1}
        whole = trainer(tmp_path, model=student(dropout=0.2), **settings)
        whole.train()
        last = whole.state.global_step
        place = step % last
        assert place % (last // 3) != 0  # within an epoch
        again = trainer(tmp_path, model=student(dropout=0.2), **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{place}"))
        assert again.state.global_step == last
        assert torch.equal(flat(again.distillation_module), flat(whole.distillation_module))
        met, heard = (made.teacher.met for made in (whole, again))  # type: ignore[union-attr]
        assert [batch.tolist() for batch in heard] == [batch.tolist() for batch in met[len(met) - len(heard) :]]
        assert latest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{last}"

    def test_workers_of_the_loader_change_nothing(self, tmp_path: Path) -> None:
        found = []
        for workers in (0, 2):
            settings = {
                "max_steps": 15,
                "dataloader_num_workers": workers,
                "dataloader_persistent_workers": workers > 0,
            }
            made = trainer(tmp_path / str(workers), **settings)
            made.train()
            found.append(flat(made.distillation_module))
        assert torch.equal(*found)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Other batches on each rank, equally many, and a step over both is one of a process that accumulates both."""
    (tmp_path / "one").mkdir()
    budgeted.main(tmp_path / "one", 2)
    one = load_file(tmp_path / "one/rank0.st")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "tests.training.budgeted", str(tmp_path), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{rank}.st") for rank in (0, 1)]
    assert len(ranks[0]["sizes"]) == len(ranks[1]["sizes"]) == int(ranks[0]["steps"])
    assert sorted(torch.cat([rank["met"] for rank in ranks]).tolist()) == sorted([*range(60), *range(60)])
    assert torch.equal(ranks[0]["student"], ranks[1]["student"])
    halves = [list(rank["met"].split(rank["sizes"].tolist())) for rank in ranks]
    dealt = [batch.tolist() for pair in zip(*halves, strict=True) for batch in pair]
    alone = list(one["met"].split(one["sizes"].tolist()))
    assert dealt == [batch.tolist() for batch in alone]  # as many batches there are even without a second process
    start = flat(student())
    assert relative(ranks[0]["student"] - start, one["student"] - start) < 1e-5


class TestRefused:
    def test_without_grouping(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="group_by_length is false"):
            trainer(tmp_path, group_by_length=False)

    @pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
    def test_one_batch_dealt_out_to_all_processes(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(TrainingError, match=f"leave out accelerator_config.{name}"):
            trainer(tmp_path, accelerator_config={name: True})

    def test_no_budget(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="expected batch_tokens above 0, got 0"):
            trainer(tmp_path, batch_tokens=0)

    def test_data_without_lengths(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="batch_tokens needs the length of every sample"):
            trainer(tmp_path, train_dataset=InMemory(texts().columns)).train()

    def test_a_text_above_the_budget(self, tmp_path: Path) -> None:
        longest = int(texts().lengths.max())
        with pytest.raises(TrainingError, match=f"a sample has {longest} tokens, and a batch may have 20"):
            trainer(tmp_path, batch_tokens=20).train()


class TestRecipes:
    def loader(self, folder: Path, spec: TrainSpec) -> Any:
        setup = make_training(spec, folder=folder, seed=3, bars=False, evaluates=False)
        made = DistillationTrainer(
            model=student(),
            teacher=teacher(),
            train_dataset=texts(),
            data_collator=ready_batch,
            args=setup.arguments,
            **setup.keywords,
        )
        return made.get_train_dataloader()

    def test_the_key_reaches_the_trainer(self, tmp_path: Path) -> None:
        found = self.loader(tmp_path, TrainSpec(batch_tokens=96, batch_size=12)).batch_sampler
        assert isinstance(found, TokenBudget)
        assert (found.budget, found.most, found.seed) == (96, 12, 3)

    def test_without_it_batches_have_equally_many_samples(self, tmp_path: Path) -> None:
        assert isinstance(self.loader(tmp_path, TrainSpec()).batch_sampler.sampler, LengthSampler)

    @pytest.mark.parametrize(("task", "wrong"), [("image-classification", 1), ("text-classification", 0)])
    def test_it_is_for_texts(self, task: str, wrong: int) -> None:
        tree = {
            "name": "a",
            "task": {"name": task},
            "data": {"source": "files", "path": "x"},
            "teacher": {"model": "potstill:mlp"},
            "student": {"model": "potstill:mlp"},
            "objective": {"soft": {"loss": "kl"}},
            "train": {"batch_tokens": 512},
        }
        found = [problem for problem in check_components(tree, allow_code=False) if "batch_tokens" in problem.path]
        assert len(found) == wrong
        if not wrong:
            with pytest.raises(RecipeError, match=r"train\.batch_tokens: expected a number greater than 0, got 0"):
                recipe_from({**tree, "train": {"batch_tokens": 0}})
