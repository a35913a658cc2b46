"""A run's folder: atomic files, one process at a time, and a line for everything that happened."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from potstill._version import __version__
from potstill.errors import RunError

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "scikit-learn", "torchvision", "timm")

_NO_IDENTITY = ("preflight",)
"""Sections of a recipe that change nothing in what a run does."""


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as ``1e5``, which are texts in the YAML 1.1 of PyYAML and numbers in that of recipes."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if data[:1] in tuple("+-.0123456789") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the lock of a dead process is taken over.

        Raises:
            RunError: another process holds it; says which, since when and on which machine.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        holder = self / "lock.json"
        lock = FileLock(str(self / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"{self.path} is in use by {_describe(holder)}; wait for it or choose --output") from error
        try:
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now(), "command": " ".join(sys.argv)}
            write_json(holder, about)
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def claim(self, recipe: dict[str, Any]) -> None:
        """Write the resolved recipe, or check that the folder belongs to the same one, what it ignores apart.

        Raises:
            RunError: the folder belongs to another recipe; names the keys that differ.
        """
        path = self / "recipe.resolved.yaml"
        if path.exists():
            known = yaml.safe_load(path.read_text(encoding="utf-8"))
            keys = [key for key in _differences(known, recipe) if key.split(".")[0] not in _NO_IDENTITY]
            if known != recipe and not keys:
                write_text(path, to_yaml(recipe))
            if keys:
                shown = ", ".join(keys[:5])
                raise RunError(f"{self.path} belongs to another recipe (they differ in {shown}); choose --output")
            return
        write_json(self / "environment.json", environment())
        write_text(path, to_yaml(recipe))  # last: it is what makes the folder claimed

    def disclaim(self) -> None:
        """Take back :meth:`claim`, so that a changed recipe can have the folder; nothing where a step is done."""
        if not any((self / "steps").glob("*.json")):
            for name in ("recipe.resolved.yaml", "layers.json"):
                (self / name).unlink(missing_ok=True)

    def event(self, event: str, **about: Any) -> None:
        """Append one line to ``events.jsonl``; a line that a kill cut off before it is closed first."""
        line = json.dumps({"time": _now(), "event": event, **about}, ensure_ascii=False) + "\n"
        with (self / "events.jsonl").open("ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut = file.read() not in (b"", b"\n")
            file.write(("\n" + line if cut else line).encode())

    def events(self) -> list[dict[str, Any]]:
        """Return every event; a line cut off by a kill is left out."""
        path = self / "events.jsonl"
        found = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def is_done(self, step: str) -> bool:
        """Return whether a step is finished."""
        return (self / f"steps/{step}.json").is_file()

    def mark_done(self, step: str, **about: Any) -> None:
        """Mark a step as finished; call it after everything that the step writes."""
        write_json(self / f"steps/{step}.json", {"finished": _now(), **about})

    def clear(self, name: str) -> None:
        """Delete a file or folder of the run."""
        target = self / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def to_yaml(tree: Any) -> str:
    """Return plain data as YAML that a recipe's loader reads back as it was."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + f".{os.getpid()}.tmp")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """Return what a figure may depend on: versions, processor, threads, accelerator, command."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "potstill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": versions,
        "command": " ".join(sys.argv),
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _describe(holder: Path) -> str:
    try:
        about = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']} since {about['since']} ({about['command']})"
    except (OSError, ValueError, KeyError):
        return "another process"


def _differences(first: Any, second: Any, path: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        found = []
        for key in [*first, *(key for key in second if key not in first)]:
            found += _differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if first == second else [path or "the whole recipe"]
