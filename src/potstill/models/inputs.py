"""How a model is called: each gets only the inputs that its forward accepts, and its answer becomes signals."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.interfaces import VIEW, Batch, Signals
from potstill.models.frozen import Frozen

TEACHER_PREFIX = "teacher/"
"""Batch entries that begin so are the teacher's own view, e.g. ``teacher/input_ids`` from its own tokenizer."""

MAIN_INPUTS = ("pixel_values", "features", "input_values", "input_features", "input_ids")
"""Names of a task's main input, passed by position to a plain module whose forward names none of them."""

_OF_TASK = "task"
"""What entries begin with that say of which task each sample is, whatever model sees it."""

_ACCEPTED: dict[type[nn.Module], frozenset[str] | None] = {}
_BESIDE = frozenset({"labels", "sample_id", VIEW})


def accepted_inputs(model: nn.Module) -> frozenset[str] | None:
    """Return the names that the model's forward accepts, or ``None`` if it takes any keyword only as ``**kwargs``."""
    model_class = type(_base(model))
    if model_class not in _ACCEPTED:
        _ACCEPTED[model_class] = _accepted(model_class)
    return _ACCEPTED[model_class]


def call(model: nn.Module, batch: Mapping[str, Tensor], *, labels: bool = False) -> Any:
    """Call the model with the entries of the batch that it accepts and return whatever it returns.

    Args:
        model: a transformers model (entries by name) or a plain module (its main input by position).
        batch: samples first; ``teacher/…``, ``sample_id`` and unknown entries are left out.
        labels: whether to pass the labels too.

    Raises:
        ModelError: the batch holds nothing that the model takes.
    """
    accepted = accepted_inputs(model)
    skip = _BESIDE if not labels else _BESIDE - {"labels"}
    offered = {k: v for k, v in batch.items() if k not in skip and not k.startswith(TEACHER_PREFIX)}
    inputs = {name: value for name, value in offered.items() if accepted is not None and name in accepted}
    if any(name in inputs for name in offered if name != "labels"):
        return model(**inputs)
    main = next((offered[name] for name in MAIN_INPUTS if name in offered), None)
    if main is None:
        raise ModelError(
            f"{type(model).__name__} takes {sorted(accepted or ())} and the batch has {sorted(offered)}; "
            "name the inputs as the model does"
        )
    return model(main)


def responses(output: Any) -> Signals:
    """Return the response signals of a model's output: ``logits`` of a tensor, every tensor of a mapping by name.

    Raises:
        ModelError: the output holds no tensor.
    """
    if isinstance(output, Tensor):
        return {"logits": output}
    if isinstance(output, Mapping):
        signals = {str(name): value for name, value in output.items() if isinstance(value, Tensor) and name != "loss"}
        if signals:
            return signals
    elif isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return {"logits": output[0]}
    raise ModelError(f"expected a model that returns a tensor or a mapping of tensors, got {type(output).__name__}")


def respond(model: nn.Module, batch: Mapping[str, Tensor]) -> Signals:
    """Return the response signals of a model on a batch: what a task without a forward of its own uses."""
    return responses(call(model, batch))


def teacher_view(batch: Batch, prefix: str = TEACHER_PREFIX) -> Batch:
    """Return the batch as a teacher sees it: its own entries (``teacher/…``, ``teacher/NAME/…``) over the shared ones.

    A teacher with a main input of its own shares none of the student's inputs: a mask or token types of other tokens
    would be wrong.
    """
    own = {name.removeprefix(prefix): v for name, v in batch.items() if name.startswith(prefix)}
    if not own:
        return batch
    alone = any(name in MAIN_INPUTS for name in own)
    shared = {name: v for name, v in batch.items() if not name.startswith(TEACHER_PREFIX)}
    if alone:
        shared = {name: value for name, value in shared.items() if name in _BESIDE or name.startswith(_OF_TASK)}
    return {**shared, **own}


def _base(model: nn.Module) -> nn.Module:
    model = model.awake() if isinstance(model, Frozen) else model
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    base = getattr(model, "get_base_model", None)
    found = base() if callable(base) else model
    return found if isinstance(found, nn.Module) else model


def _accepted(model_class: type[nn.Module]) -> frozenset[str] | None:
    parameters = inspect.signature(model_class.forward).parameters
    names = frozenset(
        name for name, p in parameters.items() if name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    )
    return names or None
