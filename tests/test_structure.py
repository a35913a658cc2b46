"""The shape of the code: where imports may point, how large things may be, that all is annotated and documented."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "potstill"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

CORE = {"interfaces", "errors", "registry", "_version"}
SEES_EVERYTHING = {
    "recipe/build.py",
    "runs/caching.py",
    "runs/filling.py",
    "runs/forecast.py",
    "runs/distilling.py",
    "runs/judging.py",
    "runs/layers.py",
    "runs/lessons.py",
    "runs/plan.py",
    "runs/preflight.py",
    "runs/stages.py",
    "runs/steps.py",
    "runs/training.py",
    "runs/teachers.py",
    "runs/teaching.py",
    "distillation.py",
    "distiller.py",
    "distiller_data.py",
    "distiller_models.py",
    "multi_task.py",
    "__init__.py",
    "__main__.py",
}

ALLOWED = {
    # `losses` and `knowledge` stand alone; the order of the rest is that of the data flow
    "losses": CORE,
    "knowledge": CORE,
    "data": CORE,
    "models": CORE,
    "tasks": CORE | {"data", "models"},
    "teachers": CORE | {"models", "knowledge"},
    "schemes": CORE | {"data", "teachers", "models", "losses", "knowledge"},
    "training": CORE | {"data", "models", "knowledge", "teachers", "losses", "schemes"},
    "evaluation": CORE | {"data"},
    "checks": CORE | {"data", "models", "knowledge", "teachers", "losses", "training", "evaluation"},
    "compression": CORE | {"models", "evaluation"},
    # runs: only for `Recipe.build`; checks: only for their names
    "recipe": CORE | {"data", "losses", "models", "schemes", "training", "runs", "checks"},
    "runs": CORE | {"evaluation"},
    "experiments": CORE | {"evaluation", "runs"},
    "report": CORE | {"evaluation", "runs", "experiments"},
    "recipes": set(),
}


def imported(tree: ast.Module) -> set[str]:
    """Names below potstill that a module imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "potstill":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found |= set(names)
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("potstill.")}
    return found


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_with_the_flow(path: Path) -> None:
    name = relative(path)
    folder = name.split("/")[0] if "/" in name else None
    if name in SEES_EVERYTHING or folder == "cli":
        return
    allowed = CORE if folder is None else ALLOWED[folder] | {folder}
    wrong = imported(TREES[path]) - allowed
    assert not wrong, f"{name} may not import {sorted(wrong)}"


def test_training_names_no_loss() -> None:
    """The engine must not know the losses: it imports the objective and the label that does not count, no family."""
    for path in (SOURCE / "training").glob("*.py"):
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("potstill.losses"):
                assert node.module == "potstill.losses.objective", f"{path.name} imports {node.module}"


def test_experiments_and_report_load_no_model_code() -> None:
    modules = "potstill.experiments.seeds, potstill.report.html, potstill.report.plots"
    code = f"import sys, {modules}; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_files_are_small() -> None:
    lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    counted = [size for name, size in lines.items() if not name.endswith("__init__.py")]
    assert max(lines.values()) <= 500, max(lines, key=lines.__getitem__)
    assert statistics.median(counted) <= 150


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code, without the docstring."""
    end = node.end_lineno or node.lineno
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return end - node.lineno + 1 - docstring


def test_functions_are_small() -> None:
    sizes = {
        f"{relative(path)}:{node.name}": body_lines(node) for path, tree in TREES.items() for node in functions(tree)
    }
    assert max(sizes.values()) <= 80, max(sizes, key=sizes.__getitem__)
    assert statistics.median(sizes.values()) <= 15


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_few_public_names_a_module(path: Path) -> None:
    name = relative(path)
    if name in ("errors.py", "interfaces.py", "registry.py") or name.startswith(("losses/", "recipe/schema")):
        return
    defined = [
        node.name
        for node in TREES[path].body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]
    if name.startswith(("training/callbacks", "runs/metrics", "recipe/build", "data/augment_", "distiller")):
        return  # families: callbacks, the classes of one schema, one maker a section, augmentations, the Python door
    assert len(defined) <= 5, defined


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_assert_in_shipped_code(path: Path) -> None:
    asserts = [node.lineno for node in ast.walk(TREES[path]) if isinstance(node, ast.Assert)]
    assert not asserts, f"{relative(path)} asserts in lines {asserts}; raise a PotstillError"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_unpickled(path: Path) -> None:
    """A pickle from outside runs code: weights are safetensors, and nothing else is loaded."""
    text = path.read_text(encoding="utf-8")
    loads = [
        node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    for call in loads:
        safe = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert safe.get("weights_only") == "True", f"line {call.lineno}"
    assert "import pickle" not in text
    assert "yaml.load(" not in text
