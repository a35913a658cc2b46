"""What a person reads: the report of a run, and its plots for notebooks. Reads files, loads no model code."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.report.html import write_report as write_report
    from potstill.report.run import load_run as load_run
    from potstill.report.run import load_seeds as load_seeds

_PUBLIC = {"load_run": "run", "load_seeds": "run", "write_report": "html"}


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module("potstill.report.plots")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'potstill.report' has no attribute '{name}'")
    return getattr(import_module(f"potstill.report.{_PUBLIC[name]}"), name)
