"""Break each line of the engine contract in a copy of the source, and see that its test fails.

    python benchmarks/contract_mutations.py

For each mutation the source is copied, one passage is replaced, and the tests of that line are run against the copy.
A mutation that no test notices is a hole in the contract. Prints a line a mutation; the exit status is the number of
holes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = "tests/contracts/test_engine.py"


@dataclass(frozen=True)
class Mutation:
    """One passage of a file broken."""

    line: int
    what: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        *(1, "attributes are not the student's", "training/module.py"),
        'return getattr(super().__getattr__("student"), name)',
        "raise",
    ),
    Mutation(
        *(2, "counts of the micro-batch alone", "training/trainer.py"),
        "return batches, self._window_counts(batches, device) if batches else None",
        "return batches, None",
    ),
    Mutation(
        *(3, "a subclass's own mean is taken as scaled", "training/trainer.py"),
        "return type(self).compute_loss is DistillationTrainer.compute_loss",
        "return True",
    ),
    Mutation(
        *(4, "only the student's columns are kept", "training/trainer.py"),
        "if isinstance(teacher, nn.Module):\n                wanted",
        "if False:\n                wanted",
    ),
    Mutation(
        *(5, "prediction goes through the objective", "training/trainer.py"),
        "    def prediction_step(",
        "    def not_prediction_step(",
    ),
    Mutation(
        *(6, "the objective is not in the checkpoint", "training/trainer.py"),
        "save_modules(module.objective, folder / OBJECTIVE_FILE)",
        "pass",
    ),
    Mutation(
        *(6, "loading is not strict", "training/trainer.py"),
        "load_modules(module.objective, folder / OBJECTIVE_FILE)",
        "pass",
    ),
    Mutation(
        *(7, "views come from the global generator", "data/draws.py"),
        "return self._tensor(steps + low)",
        "return torch.randint(low, high, tuple(steps.shape))",
    ),
    Mutation(
        *(7, "the data never hear of the epoch", "data/batching.py"),
        "self._epoch.fill_(epoch)",
        "pass",
    ),
    Mutation(
        *(8, "label smoothing in the arguments is let through", "training/arguments.py"),
        'if getattr(args, "label_smoothing_factor", 0):',
        "if False:",
    ),
    Mutation(
        *(8, "re-entrant checkpointing is let through", "training/arguments.py"),
        'if options.get("use_reentrant"):',
        "if False:",
    ),
    Mutation(
        *(8, "several GPUs are let through", "training/arguments.py"),
        'if getattr(args, "n_gpu", 1) > 1:',
        "if False:",
    ),
    Mutation(
        *(9, "the teacher runs in inference mode", "teachers/live.py"),
        "with torch.no_grad(), self._context(model):",
        "with torch.inference_mode(), self._context(model):",
    ),
    Mutation(
        *(9, "hooks outlive the block", "knowledge/capture.py"),
        "for action in reversed(undo):\n            action()",
        "pass",
    ),
    Mutation(
        *(9, "a handle of torch's own is used while tracing", "knowledge/capture.py"),
        "if not torch.compiler.is_compiling():\n        return module.register_forward_hook",
        "if True:\n        return module.register_forward_hook",
    ),
    Mutation(
        *(10, "hidden states are one off", "knowledge/capture.py"),
        "return states[index]",
        "return states[index - 1]",
    ),
    Mutation(
        *(11, "attention maps of the wrong scale", "knowledge/capture.py"),
        "(self.query @ key.transpose(-1, -2)) * self.scale",
        "(self.query @ key.transpose(-1, -2))",
    ),
    Mutation(
        *(11, "the model's attention is not put back", "knowledge/capture.py"),
        "return lambda: setattr(config, field, old)",
        "return lambda: None",
    ),
    Mutation(
        *(12, "each arm starts from weights of its own", "runs/steps.py"),
        "model = self._student.build(facts, seed=self.recipe.seed,",
        "model = self._student.build(facts, seed=len(self.folder.events()),",
    ),
    Mutation(
        *(13, "values lose their line", "recipe/document.py"),
        "{path: Place(file, line) for path, line in parsed.lines.items()}",
        "{path: Place(file, line + 1) for path, line in parsed.lines.items()}",
    ),
    Mutation(
        *(13, "the word no is false, as in YAML 1.1", "recipe/yaml_core.py"),
        'dict.fromkeys(("false", "False", "FALSE"), False)',
        'dict.fromkeys(("false", "no", "FALSE"), False)',
    ),
    Mutation(
        *(13, "only the first mistake is shown", "recipe/load.py"),
        "raise RecipeError(tidy(problems))",
        "raise RecipeError(tidy(problems)[:1])",
    ),
    Mutation(
        *(13, "a key written twice is let through", "recipe/yaml_core.py"),
        """self._report(second, path, f"the key '{key}' is written twice, {lines}")""",
        "pass",
    ),
    Mutation(
        *(14, "help imports torch", "cli/__init__.py"),
        "import typer\n",
        "import torch  # noqa\nimport typer\n",
    ),
    Mutation(
        *(14, "check imports Trainer", "runs/preflight.py"),
        "import torch\n",
        "import torch\nimport transformers.trainer  # noqa\n",
    ),
]


def noticed(mutation: Mutation) -> bool:
    """Whether the tests of the line fail on a copy with this passage broken."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "src"
        shutil.copytree(ROOT / "src", source)
        path = source / "potstill" / mutation.file
        text = path.read_text(encoding="utf-8")
        if mutation.old not in text:
            raise SystemExit(f"line {mutation.line}: {mutation.file} no longer holds {mutation.old!r}")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", TESTS]
        done = subprocess.run(
            [*command, "-k", f"TestLine{mutation.line}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 1


def main() -> None:
    holes = 0
    for mutation in MUTATIONS:
        found = noticed(mutation)
        holes += not found
        print(f"line {mutation.line:2}: {mutation.what}: {'noticed' if found else 'NOT NOTICED'}", flush=True)
    print(f"{len(MUTATIONS) - holes} of {len(MUTATIONS)} mutations noticed")
    sys.exit(holes)


if __name__ == "__main__":
    main()
