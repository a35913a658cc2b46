"""``potstill new``: a recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_TEMPLATE = """\
# Change what is in capitals, then: potstill check {file} && potstill distill {file}
name: {name}
task: {{name: {task}, label: label}}
data: {{source: files, path: FOLDER}}   # train.parquet (or csv, tsv, json); test and validation too if you have them
teacher:
  model: {teacher}
  train: {{epochs: 20, batch_size: 64, learning_rate: 1.0e-3}}
student:
  model: {student}
objective:
  soft: {{loss: kl, weight: 0.7, temperature: 4.0}}
  hard: {{loss: cross_entropy, weight: 0.3}}
train: {{epochs: 20, batch_size: 64, learning_rate: 1.0e-3}}
"""

_MULTI_TASK = """\
# Change what is in capitals, then: potstill check {file} && potstill distill {file}
name: {name}
task:
  name: multi-task
  tasks:
    sentiment: {{name: text-classification, text: sentence}}
    nli: {{name: text-classification, text: premise, pair: hypothesis}}
data:
  source: tasks
  kwargs:
    tasks:
      sentiment: {{source: files, path: FOLDER}}
      nli: {{source: files, path: FOLDER}}
teachers:
  sentiment-teacher: {{model: MODEL, task: sentiment, train: {{epochs: 3, learning_rate: 5.0e-5}}}}
  nli-teacher: {{model: MODEL, task: nli, train: {{epochs: 3, learning_rate: 5.0e-5}}}}
  both: {{source: {{per_task: {{teachers: {{sentiment: sentiment-teacher, nli: nli-teacher}}}}}}}}
student:
  model: MODEL
objective:
  soft: {{loss: kl, teacher: both/logits, weight: 0.7, temperature: 4.0}}
  hard: {{loss: cross_entropy, weight: 0.3}}
train: {{epochs: 3, learning_rate: 5.0e-5}}
"""

_MODELS = {
    "image": ("potstill:convnet\n  kwargs: {widths: [32, 64, 128]}", "potstill:convnet\n  kwargs: {widths: [16, 32]}"),
    "tabular": ("potstill:mlp\n  kwargs: {hidden: [128, 64]}", "potstill:mlp\n  kwargs: {hidden: [32]}"),
}


def new(
    target: Annotated[str, typer.Argument(help="The file to write.")],
    task: Annotated[str, typer.Option(help="A name of `potstill list tasks`.")] = "image-classification",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
) -> None:
    """Write a recipe to start from."""
    from potstill.cli.copy import write_new
    from potstill.errors import ComponentError, did_you_mean
    from potstill.registry import tasks

    if task not in tasks.names():
        raise ComponentError(f"there is no task '{task}'; {did_you_mean(task, tasks.names())}")
    teacher, student = _MODELS.get(str(tasks.facts(task).get("input")), _MODELS["tabular"])
    path = Path(target)
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.stem).lstrip("._-")
    template = _MULTI_TASK if task == "multi-task" else _TEMPLATE
    text = template.format(file=path, name=name or "mine", task=task, teacher=teacher, student=student)
    write_new(path, text, force=force)
