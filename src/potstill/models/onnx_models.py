"""Graphs of ONNX as teachers: ``onnx:FILE``, answered by ONNX Runtime.

A graph has no gradient, so it can teach and cannot learn. Saved, its files are bytes in ``model.safetensors``: the
graph and, where it has any, its external data. Nothing of it runs but the operators of ONNX Runtime.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from potstill.errors import ComponentError, ModelError, Problem, did_you_mean
from potstill.models.origins import Built, ImageProcessor, TextProcessor
from potstill.models.weights import WEIGHTS, save_modules
from potstill.registry import check_options

_GRAPH, _DATA = "graph", "data/"
_LEAST = 1e-7
_LABELS = ("id2label", "label_names", "labels", "names", "classes")
_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class OnnxModel(nn.Module):
    """A graph that answers as a module without parameters; its forward takes what the graph's inputs are called.

    Args:
        output: name of the output with the logits; ``logits`` if there is one, else the first of floating-point
            numbers, if omitted.
        probabilities: whether that output is probabilities, whose logarithms are then the logits (at least 1e-7 is
            taken); whether its name begins so, if omitted.
        providers: of ONNX Runtime, such as ``CUDAExecutionProvider``; its own on the CPU if omitted.

    Attributes:
        fingerprint: of its files; empty before it has any.
        labels: names of the classes that the file holds.

    Raises:
        ComponentError: onnx or onnxruntime is not installed.
    """

    _inputs: ClassVar[tuple[str, ...] | None] = None

    def __init__(
        self, output: str | None = None, probabilities: bool | None = None, providers: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        _require()
        self.output, self.probabilities = output, probabilities
        self.providers = tuple(providers or ("CPUExecutionProvider",))
        self.fingerprint = ""
        self.labels: list[str] = []
        self._files: dict[str, Tensor] = {}
        self._session: Any = None

    def read(self, path: Path) -> OnnxModel:
        """Take the graph in a file, with its external data, and return the model.

        Raises:
            ModelError: there is no such file, or it is none that ONNX Runtime can run.
        """
        self._take(_files_of(path), str(path))
        return self

    def forward(self, *main: Tensor, **inputs: Tensor | None) -> dict[str, Tensor]:
        """Return every output of floating-point numbers by its name; that of the answer is ``logits``, float32.

        Args:
            main: the input of a graph that has but one, whatever it is called.
            inputs: those of the graph by name; integers are cast to the type that it wants.

        Raises:
            ModelError: inputs are missing, of another kind, or of shapes that the graph does not take.
        """
        session = self._opened()
        given = {name: value for name, value in inputs.items() if value is not None}
        wanted = {each.name: each for each in session.get_inputs()}
        if main and len(wanted) == 1:
            given = {next(iter(wanted)): main[0]}
        missing = sorted(set(wanted) - set(given))
        if missing:
            raise ModelError(
                f"the graph takes {', '.join(wanted)}, and the batch has no '{missing[0]}'; export it with inputs that "
                "are called as the entries of the batch"
            )
        fed = {name: _fed(name, given[name], each.type) for name, each in wanted.items()}
        names = [each.name for each in session.get_outputs() if each.type in _FLOATS]
        try:
            found = session.run(names, fed)
        except Exception as error:  # of onnxruntime, which has a class for each of its codes
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in fed.items())
            raise ModelError(
                f"the graph cannot be run with {shapes} ({_said(error)}); are its axes dynamic?"
            ) from error
        device = next(iter(given.values()), torch.empty(0)).device
        said = {name: torch.from_numpy(np.asarray(value)).to(device) for name, value in zip(names, found, strict=True)}
        logits = said.pop(self._answers()).float()
        said.pop("logits", None)
        return {"logits": logits.clamp_min(_LEAST).log() if self._gives_probabilities else logits, **said}

    def extra_repr(self) -> str:
        """Return the names of inputs and outputs."""
        if not self._files:
            return ""
        session = self._opened()
        sides = (session.get_inputs(), session.get_outputs())
        return " -> ".join(", ".join(each.name for each in side) for side in sides)

    @property
    def size_in_bytes(self) -> int:
        """What its files take."""
        return sum(value.numel() for value in self._files.values())

    @property
    def num_labels(self) -> int | None:
        """The number of classes, where the graph says it."""
        outputs = {each.name: each for each in self._opened().get_outputs()}
        last = outputs[self._answers()].shape[-1:]
        return last[0] if last and isinstance(last[0], int) else None

    @property
    def _gives_probabilities(self) -> bool:
        if self.probabilities is not None:
            return self.probabilities
        return self._answers().lower().removeprefix("output_").startswith("prob")

    def _answers(self) -> str:
        """Return which output the logits are.

        Raises:
            ModelError: there is none.
        """
        names = [each.name for each in self._opened().get_outputs() if each.type in _FLOATS]
        if self.output is not None and self.output not in names:
            raise ModelError(f"the graph has no output '{self.output}' of floats; {did_you_mean(self.output, names)}")
        if not names:
            raise ModelError("expected a graph with an output of floating-point numbers, and it has none")
        return self.output or ("logits" if "logits" in names else names[0])

    def _opened(self) -> Any:
        if self._session is None:
            if not self._files:
                raise ModelError("there is no graph: `pretrained: false` and `weights` mean nothing to a file of ONNX")
            self._session = _session(self._files, self.providers)
        return self._session

    def _take(self, files: dict[str, Tensor], name: str) -> None:
        """Become the graph in these files."""
        digest = hashlib.blake2b(digest_size=16)
        for key, value in sorted(files.items()):
            digest.update(f"{key} {len(value)} ".encode())
            digest.update(value.numpy().data)
        self._files, self._session = files, None
        try:
            session = self._opened()
        except ModelError as error:
            self._files = {}
            raise ModelError(f"{name}: {error}") from error
        self.fingerprint = digest.hexdigest()
        self.__class__ = _taking(tuple(each.name for each in session.get_inputs()))
        labels = _metadata_labels(session.get_modelmeta().custom_metadata_map)
        self.labels = labels if self.num_labels in (None, len(labels)) else []

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how a copy is made, whose class has the same inputs."""
        return _blank, (type(self)._inputs,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: it opens the graph for itself."""
        return {**self.__dict__, "_session": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: value for name, value in self._files.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        unexpected_keys += [prefix + key for key in found if key != _GRAPH and not key.startswith(_DATA)]
        if _GRAPH not in found:
            missing_keys.append(prefix + _GRAPH)
            return
        self._take({key: value.cpu() for key, value in found.items()}, "the saved graph")


class Onnx:
    """Graphs by the path of their file. See :class:`potstill.models.origins.Origin`.

    Options are ``output``, ``probabilities`` and ``providers`` of :class:`OnnxModel`. A tokenizer or image processor
    of transformers that lies beside the file, as exported by Optimum, is the model's.
    """

    def build(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any], *, pretrained: bool) -> Built:
        """Return the graph; empty without ``pretrained``, for a state to be loaded.

        Raises:
            ModelError: there is no such file, it cannot be run, or has another number of classes than the task.
            ComponentError: onnx or onnxruntime is not installed.
        """
        model = OnnxModel(**kwargs)
        if not pretrained:
            return Built(model)
        path = Path(name).expanduser()
        model.read(path)
        wanted, found = facts.get("num_labels"), model.num_labels
        if wanted and found and int(wanted) != found:
            raise ModelError(f"the task has {wanted} classes, and {path} answers with {found}")
        return Built(model, labels=model.labels or _config_labels(path.parent))

    def complete(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options: all else is in the graph."""
        return dict(kwargs)

    def processor(
        self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> ImageProcessor | TextProcessor | None:
        """Return the tokenizer or image processor beside the file; ``None`` where the task's own inputs will do.

        Raises:
            ModelError: the task is one of texts, and there is no tokenizer.
        """
        from potstill.models.hugging_face import HuggingFace

        folder = Path(name).expanduser().parent
        takes_images = "in_channels" in facts
        beside = "preprocessor_config.json" if takes_images else "tokenizer_config.json"
        if "auto_model" not in facts:
            return None
        if (folder / beside).is_file():
            return HuggingFace().processor(str(folder), {}, facts)
        if takes_images:
            return None
        raise ModelError(f"there is no tokenizer beside {name}; name a model that has the right one with `processor:`")

    def check(self, name: str, kwargs: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
        """Return a file that is missing, wrong options, a missing library, and a graph that is to learn."""
        if path[:1] == ("student",):
            return [Problem((*path, "model"), "a graph of ONNX can teach, and cannot be a student: it has no gradient")]
        problems = check_options(OnnxModel, kwargs, label=f"model 'onnx:{name}'", path=(*path, "kwargs"))
        if not Path(name).expanduser().is_file():
            problems.append(Problem((*path, "model"), f"expected a file of ONNX, and there is no file '{name}'"))
        try:
            _require()
        except ComponentError as error:
            problems.append(Problem((*path, "model"), str(error)))
        return problems

    def save(self, model: nn.Module, folder: Path, *, name: str, labels: list[str], processor: Any) -> None:
        """Write the files of the graph as ``model.safetensors``.

        Raises:
            ModelError: the model is no graph of ONNX.
        """
        if not isinstance(model, OnnxModel) or not model.fingerprint:
            raise ModelError(f"expected a graph of ONNX, got {type(model).__name__}")
        folder.mkdir(parents=True, exist_ok=True)
        save_modules(model, folder / WEIGHTS)


_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")


def _require() -> None:
    """Raise a ComponentError if a library is missing."""
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ComponentError(f"models of ONNX need {' and '.join(missing)}: pip install 'potstill[export]'")


def _taking(names: tuple[str, ...]) -> type[OnnxModel]:
    """Return the class of graphs with these inputs: its forward names them, as callers look up what a model takes."""

    def forward(self: OnnxModel, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return OnnxModel.forward(self, *args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, default=None) for name in names if name.isidentifier()]
    signature = inspect.Signature([inspect.Parameter("self", kind), *named])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return type("OnnxModel", (OnnxModel,), {"forward": forward, "_inputs": names, "__module__": __name__})


def _blank(inputs: tuple[str, ...] | None) -> OnnxModel:
    """Return a model of a graph with these inputs, for a state to be put into it."""
    kind = OnnxModel if inputs is None else _taking(inputs)
    return kind.__new__(kind)


def _files_of(path: Path) -> dict[str, Tensor]:
    """Return the bytes of a graph and of its external data, by the name under which they are saved.

    Raises:
        ModelError: a file is missing, is no graph, or lies outside the graph's folder.
    """
    if not path.is_file():
        raise ModelError(f"expected a file of ONNX, and there is no file '{path}'")
    import onnx  # type: ignore[import-not-found, unused-ignore]
    from onnx.external_data_helper import (  # type: ignore[import-not-found, unused-ignore]
        ExternalDataInfo,
        _get_all_tensors,
        uses_external_data,
    )

    try:
        graph = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # of protobuf, whose classes differ by its version
        raise ModelError(f"{path} is no graph of ONNX ({_said(error)})") from error
    beside = {ExternalDataInfo(tensor).location for tensor in _get_all_tensors(graph) if uses_external_data(tensor)}
    files = {_GRAPH: path}
    for name in sorted(beside):
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not (path.parent / place).is_file():
            raise ModelError(f"{path} keeps weights in '{name}', and there is no such file in its folder")
        files[_DATA + name] = path.parent / place
    return {name: torch.from_numpy(np.fromfile(file, dtype=np.uint8)) for name, file in files.items()}


def _session(files: Mapping[str, Tensor], providers: Sequence[str]) -> Any:
    """Return what runs a graph, by as many threads as torch has.

    Raises:
        ModelError: a provider is not there, a file lies outside the graph's folder, or ONNX Runtime cannot run the
            graph.
    """
    for name in files:
        place = PurePosixPath(name.removeprefix(_DATA))
        if place.is_absolute() or ".." in place.parts:
            raise ModelError(f"the saved graph keeps weights in '{place}', outside its folder")
    import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]

    known = onnxruntime.get_available_providers()
    for provider in providers:
        if provider not in known:
            raise ModelError(f"ONNX Runtime has no provider '{provider}' here; {did_you_mean(provider, known)}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the student computes meanwhile
    try:
        if set(files) == {_GRAPH}:
            return onnxruntime.InferenceSession(files[_GRAPH].numpy().tobytes(), options, list(providers))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for name, value in files.items():
                file = Path(folder) / name.removeprefix(_DATA)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(value.numpy().data)
            return onnxruntime.InferenceSession(str(Path(folder) / _GRAPH), options, list(providers))
    except Exception as error:  # of onnxruntime, which has a class for each of its codes
        version = onnxruntime.__version__
        raise ModelError(f"ONNX Runtime {version} cannot run the graph: {_said(error)}") from error


def _fed(name: str, value: Tensor, wanted: str) -> Any:
    """Return an input as the graph wants it.

    Raises:
        ModelError: it is of another kind, or of one that NumPy lacks.
    """
    target = _TYPES.get(wanted)
    if target is None:
        raise ModelError(f"the graph's input '{name}' is a {wanted}, which cannot be given")
    kind = np.dtype(target)
    if (kind.kind == "f") != value.is_floating_point():
        got = str(value.dtype).removeprefix("torch.")
        raise ModelError(f"the graph's input '{name}' is a {wanted}, and the batch has {got} for it")
    value = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
    return np.ascontiguousarray(value.cpu().numpy().astype(kind, copy=False))


def _metadata_labels(metadata: Mapping[str, str]) -> list[str]:
    """Return the names of the classes among what a graph says of itself; none where it lists none."""
    text = next((metadata[key] for key in _LABELS if key in metadata), "[]")
    try:
        found = ast.literal_eval(text)
        if isinstance(found, Mapping):
            numbers = all(isinstance(each, int) for each in found.values())
            named = {place: name for name, place in found.items()} if numbers else found
            found = [named[place] for place in sorted(named, key=int)]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(label) for label in found] if isinstance(found, list | tuple) else []


def _config_labels(folder: Path) -> list[str]:
    """Return the names of the classes in a ``config.json`` of transformers, unless they are but numbers."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
        found = [str(named[key]) for key in sorted(named, key=int)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [] if all(label == f"LABEL_{place}" for place, label in enumerate(found)) else found


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
