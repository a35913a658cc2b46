"""One contender of ``speed.py`` in a process of its own: it trains as many steps as it is told, and waits in between.

    python benchmarks/speed_worker.py CONTENDER PAIR --data FOLDER [--teacher FOLDER]

It prints ``{"ready": true, "start_s": …}``; to each line ``steps N`` on standard input it answers
``{"seconds": …, "samples": …, "steps": N}``, and ends with ``quit``. Any other program that speaks like this can take
part in the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from potstill.data.batching import LengthSampler, batches, length_order
from potstill.data.load import load_splits
from potstill.losses import distillation_loss
from potstill.models.plain import Mlp
from potstill.recipe import build
from potstill.recipe.load import load_recipe
from potstill.runs.plan import Plan
from potstill.runs.training import make_trainer
from potstill.teachers.cached import Cached
from potstill.teachers.live import Live

FOREVER = 10**6
SPEAK = 1
ROWS = {"liar": 48 * 32, "mnist": 200 * 128}
"""Training samples of potstill and of the hand-written loops: a turn is an epoch of them, the same for all."""
SAY = {
    "liar": ("liar-minilm", ["objective.low=", "objective.middle=", "objective.high="]),
    "mnist": ("mnist-hinton", ["objective.preset=", "objective.temperature=", "objective.weight="]),
}


class Turns:
    """Blocks the training whenever the steps that were asked for are done."""

    def __init__(self) -> None:
        self.left = self.asked = self.samples = 0
        self.begin = 0.0
        self.is_ready = False

    def step_done(self, samples: int) -> None:
        self.left, self.samples = self.left - 1, self.samples + samples
        if self.left == 0:
            say(seconds=time.perf_counter() - self.begin, samples=self.samples, steps=self.asked)
            self.wait()

    def wait(self) -> None:
        if not self.is_ready:
            self.is_ready = True
            say(ready=True, start_s=since_birth())
        line = sys.stdin.readline().split()
        if not line or line[0] == "quit":
            os._exit(0)
        self.asked = self.left = int(line[1])
        self.samples, self.begin = 0, time.perf_counter()


def say(**line: Any) -> None:
    os.write(SPEAK, (json.dumps(line) + "\n").encode())


def since_birth() -> float:
    """Seconds since this process began, the imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Clock(TrainerCallback):
    """Ends a step of a Trainer as :class:`Turns` wants it."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns.wait()

    def on_step_end(self, args: Any, *_: Any, **kwargs: Any) -> None:
        self.turns.step_done(args.per_device_train_batch_size)


# ---- potstill ------------------------------------------------------------------------------------------------------


def plan(pair: str, options: argparse.Namespace, *more: str) -> Plan:
    """The recipe of a pair with the plain objective 0.7·T²·KL + 0.3·CE, T = 4."""
    name, without = SAY[pair]
    said = [
        f"data.path={options.data}",
        f"data.limit={{train: {ROWS[pair]}}}",
        *without,
        "objective.hard={loss: cross_entropy, weight: 0.3}",
    ]
    said += ["objective.soft={loss: kl, weight: 0.7, temperature: 4.0}", "teacher.train=", f"train.epochs={FOREVER}"]
    if options.teacher:
        said.append(f"teacher.model={options.teacher}")
    quiet = ["train.eval_strategy=no", "train.save_strategy=no", "train.load_best_model_at_end=false"]
    return Plan(load_recipe(name, [*said, *quiet, *more]))


def teacher_of(made: Plan, task: Any) -> Live:
    spec = made.recipe.all_teachers["teacher"]
    model = build.make_blueprint(spec).build(made.task_of("teacher").facts(), seed=0)
    return Live(model, forward=task.forward, prefix=build.teacher_prefix(made.recipe, "teacher"))


def potstill(kind: str, pair: str, options: argparse.Namespace, turns: Turns) -> None:
    """``cached``, ``live`` or ``alone``: the recipe's own trainer."""
    made = plan(pair, options, *(["train.bf16=false"] if "fp32" in kind else []))
    folder = Path(tempfile.mkdtemp())
    objective, source = made.objective, None
    if kind.startswith("alone"):
        objective = made.objective.hard_only()
    else:
        task = build.prepared_for_distillation(made.recipe, made.task, made.processors)
        source = teacher_of(made, task)
    if kind.startswith("cached"):
        source = Cached(source, folder / "cache", identity="the teacher")
        filled(made, source)
    spec = made.recipe.train
    clock = Clock(turns)
    model = made.student()
    trainer = make_trainer(
        made, "distilled", model, spec, objective, folder=folder, seed=0, teacher=source, callbacks=[clock]
    )
    trainer.train()


def filled(made: Plan, source: Any) -> None:
    """Answer every training sample once; that belongs to the start-up and is not timed here."""
    spec = made.recipe.train
    task = build.prepared_for_distillation(made.recipe, made.task, made.processors)
    dataset = build.training_set(made.recipe, task, spec, made.splits.train, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(spec.options.get("bf16"))):
        for batch in batches(dataset, 128, length_order(dataset)):
            source(batch)


def loop(kind: str, pair: str, options: argparse.Namespace, turns: Turns) -> None:
    """A hand-written loop that does the same arithmetic on the same batches; ``cached`` has all logits in a tensor."""
    made = plan(pair, options)
    spec = made.recipe.train
    task = build.prepared_for_distillation(made.recipe, made.task, made.processors)
    dataset: Any = build.training_set(made.recipe, task, spec, made.splits.train, 0)
    teacher, student = teacher_of(made, task), made.student()
    half = torch.autocast("cpu", torch.bfloat16)
    logits = torch.zeros(int(dataset.columns["sample_id"].max()) + 1, len(made.task.label_names))
    if kind == "cached":
        with torch.no_grad(), half:
            for batch in batches(dataset, 128, length_order(dataset)):
                logits[batch["sample_id"]] = teacher(batch)["logits"].float()
    optimizer = torch.optim.AdamW(student.parameters(), lr=spec.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / FOREVER)
    student.train()
    turns.wait()
    while True:
        for places in orders(dataset, spec.batch_size, pair):
            batch = dataset.__getitems__(places)
            with half:
                if kind == "cached":
                    taught = logits[batch["sample_id"]]
                else:
                    with torch.no_grad():
                        taught = teacher(batch)["logits"]
                said = made.task.forward(student, batch)["logits"]
            loss = distillation_loss(said, taught, batch["labels"], alpha=0.7, temperature=4.0)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            turns.step_done(len(places))


def orders(dataset: Any, size: int, pair: str) -> Iterator[list[int]]:
    order = list(LengthSampler(dataset, size, seed=0)) if pair == "liar" else torch.randperm(len(dataset)).tolist()
    yield from (order[start : start + size] for start in range(0, len(order), size))


# ---- what people write ---------------------------------------------------------------------------------------------


class UsualTrainer(Trainer):  # type: ignore[misc]
    """The subclass of nearly every tutorial: a live teacher in ``compute_loss``."""

    teacher: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        output = model(**inputs)
        with torch.no_grad():
            taught = self.teacher(**inputs).logits
        soft = F.kl_div(
            F.log_softmax(output.logits / 4.0, dim=-1), F.softmax(taught / 4.0, dim=-1), reduction="batchmean"
        )
        loss = 0.7 * 16.0 * soft + 0.3 * output.loss
        return (loss, output) if return_outputs else loss


def usual(kind: str, pair: str, options: argparse.Namespace, turns: Turns) -> None:
    """A Trainer subclass in fp32, texts padded to 128 tokens or to the longest of the batch."""
    trainer = usual_trainer(kind, options, TrainingArguments(tempfile.mkdtemp(), max_steps=FOREVER, **USUAL))
    trainer.add_callback(Clock(turns))
    trainer.train()


USUAL: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-4,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


def usual_trainer(kind: str, options: argparse.Namespace, arguments: TrainingArguments) -> UsualTrainer:
    splits = load_splits("files", options.data, label="label")
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)

    def tokens(rows: Any) -> Any:
        padding = "max_length" if kind == "to-128" else False
        return tokenizer(rows["statement"], truncation=True, max_length=128, padding=padding)

    train = splits.train.map(tokens, batched=True, remove_columns=["statement"])
    classes = len(splits.train.features["label"].names)
    teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher, num_labels=classes).eval()
    student = cut(options.teacher, classes)
    made = UsualTrainer(model=student, args=arguments, train_dataset=train, processing_class=tokenizer)
    made.teacher = teacher
    return made


def cut(folder: str, classes: int) -> Any:
    """Blocks 0, 2 and 4 of a BERT."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    blocks = model.base_model.encoder.layer
    model.base_model.encoder.layer = torch.nn.ModuleList([blocks[place] for place in (0, 2, 4)])
    model.config.num_hidden_layers = 3
    return model


def tutorial(kind: str, pair: str, options: argparse.Namespace, turns: Turns) -> None:
    """The loop of nearly every tutorial: samples one by one through a DataLoader, a live teacher, fp32."""
    splits = load_splits("files", options.data, label="label")
    pixels = torch.stack([torch.tensor(bytearray(image.tobytes())) for image in splits.train["image"][:]])
    samples = torch.utils.data.TensorDataset(
        pixels.view(-1, 1, 28, 28).float() / 255, torch.tensor(splits.train["label"][:])
    )
    teacher, student = Mlp(784, 10, [1200, 1200]).eval(), Mlp(784, 10, [800, 800])
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    turns.wait()
    while True:
        for images, labels in torch.utils.data.DataLoader(samples, 128, shuffle=True):
            with torch.no_grad():
                taught = teacher(images)
            loss = distillation_loss(student(images), taught, labels, alpha=0.7, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            turns.step_done(len(labels))


CONTENDERS: dict[str, Callable[..., None]] = {
    "potstill": potstill,
    "loop": loop,
    "usual": usual,
    "tutorial": tutorial,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("contender", help="FAMILY or FAMILY:KIND, such as potstill:cached")
    parser.add_argument("pair", choices=sorted(SAY))
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher")
    options = parser.parse_args()
    global SPEAK
    SPEAK = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to standard error
    torch.set_num_threads(2)
    family, _, kind = options.contender.partition(":")
    CONTENDERS[family](kind, options.pair, options, Turns())


if __name__ == "__main__":
    main()
