"""Classifiers of scikit-learn as teachers: ``sklearn:RandomForestClassifier`` in recipes, any fitted one in Python.

Other libraries with classifiers in its manner are named by module and class, ``sklearn:xgboost.XGBClassifier``, which
runs their code.

Nothing is unpickled: a saved one is its options, the rows that it was fitted to and its answers to them. Where it is
needed again it is fitted again, which must give the same answers.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import json
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError
from sklearn.utils.discovery import all_estimators
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from potstill.errors import ModelError, Problem, did_you_mean
from potstill.interfaces import IGNORED
from potstill.models.origins import Built, ImageProcessor, TextProcessor
from potstill.models.weights import WEIGHTS, save_modules

CARD = "sklearn.json"
"""What a person reads of a saved classifier; the rows and answers are beside it."""

_LEAST = 1e-7
"""Probabilities below are taken for this: trees give zeros, and a logit has to be finite."""

_APART = 1e-4
"""By how much the probabilities of a classifier that is fitted again may differ."""

_FITTED: OrderedDict[str, Any] = OrderedDict()
_MOST = 4


class SklearnTeacher(nn.Module):
    """A fitted classifier of scikit-learn that answers with its log-probabilities, for ``teacher=`` of a trainer.

    It has no parameters, computes on the CPU in float64, and knows nothing below a probability of 1e-7.

    Args:
        estimator: fitted, with ``predict_proba`` and ``classes_``; do not fit it again afterwards. Ensembles such as
            ``VotingClassifier`` and pipelines that begin with numbers will do.
        classes: the class of ``estimator.classes_`` behind each logit, in the order of the student's; 0, 1, … up to
            the greatest if omitted, which needs whole numbers. A class that it was not fitted to gets the least
            probability.

    Raises:
        ModelError: the estimator is not fitted, gives no probabilities, or knows a class that is not among ``classes``.

    Example:
        >>> from sklearn.ensemble import RandomForestClassifier
        >>> forest = RandomForestClassifier(10, random_state=0).fit([[0], [1], [8], [9]], [0, 0, 1, 1])
        >>> SklearnTeacher(forest)(torch.tensor([[0.5], [8.5]])).argmax(-1).tolist()
        [0, 1]
    """

    def __init__(self, estimator: Any, *, classes: Sequence[Any] | None = None) -> None:
        super().__init__()
        name = type(estimator).__name__
        if not hasattr(estimator, "predict_proba"):
            raise ModelError(f"expected a classifier with predict_proba, and {name} as it is has none")
        try:
            check_is_fitted(estimator)
            known = np.asarray(estimator.classes_)
        except (NotFittedError, AttributeError, ValueError) as error:
            raise ModelError(f"expected a fitted classifier of one label, got {name}: {error}") from error
        if classes is None and not (known.ndim == 1 and np.issubdtype(known.dtype, np.integer) and known.min() >= 0):
            raise ModelError(f"{name} knows the classes {known.tolist()}; say their order with `classes`")
        self.estimator = estimator
        self._order(range(int(known.max()) + 1) if classes is None else classes)
        self.fingerprint: str = joblib.hash(estimator)  # by which a cache of its answers knows it

    def _order(self, classes: Sequence[Any]) -> None:
        """Learn which logit each of the estimator's probabilities is."""
        listed, known = list(classes), np.asarray(self.estimator.classes_).tolist()
        unknown = [each for each in known if each not in listed]
        if unknown:
            name = type(self.estimator).__name__
            raise ModelError(f"{name} knows the class {unknown[0]!r}, which is not among {listed[:12]}")
        self.num_labels, self._places = len(listed), [listed.index(each) for each in known]

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, float32 ``[B, C]`` on the device of ``features`` ``[B, ...]``, which are flattened."""
        found = np.full((len(features), self.num_labels), _LEAST)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="X does not have valid feature names")
            found[:, self._places] = self.estimator.predict_proba(_rows(features))
        return torch.from_numpy(np.log(found.clip(_LEAST))).float().to(features.device)

    def extra_repr(self) -> str:
        """Return the classifier's class."""
        return type(self.estimator).__name__

    @property
    def size_in_bytes(self) -> int:
        """What the fitted classifier takes where scikit-learn's users keep it, in a file of joblib."""
        counter = _Counter()
        joblib.dump(self.estimator, counter)
        return counter.count


class SklearnModel(SklearnTeacher):
    """A classifier that a recipe names: fitted in the run, to the task's own inputs and labels.

    Before that every class is as likely to it, as to a network that is not trained. Its state is the rows that it was
    fitted to; loading it fits it again.

    Args:
        estimator: not fitted.
        num_labels: classes; the state's if omitted.
    """

    def __init__(self, estimator: Any, num_labels: int = 0) -> None:
        nn.Module.__init__(self)
        self.estimator, self.num_labels = estimator, num_labels
        self.options: dict[str, Any] = estimator.get_params(deep=False)
        self._state: dict[str, Tensor] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether it knows anything."""
        return bool(self._state)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, float32 ``[B, C]``; zeros before it is fitted."""
        return super().forward(features) if self.is_fitted else features.new_zeros(len(features), self.num_labels)

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Fit the classifier.

        Args:
            inputs: ``[N, ...]``, flattened.
            labels: int64 ``[N]``; rows of −100 are left out.

        Raises:
            ModelError: scikit-learn refuses the options or the rows, or there would be no probabilities.
        """
        known = labels != IGNORED
        inputs, labels = inputs[known].flatten(1).float().contiguous(), labels[known].contiguous()
        self._fit(inputs, labels)
        self._keep({"inputs": inputs, "labels": labels, "answers": super().forward(inputs).exp()})

    def about(self) -> dict[str, Any]:
        """Return what was fitted, and to what, as plain JSON."""
        return {
            "class": type(self.estimator).__name__,
            "parameters": {key: _plain(value) for key, value in sorted(self.options.items())},
            "random_state": _plain(self.options.get("random_state")),
            "scikit-learn": sklearn.__version__,
            **({} if self._library[0] == "scikit-learn" else dict([self._library])),
            "rows": len(self._state["labels"]),
            "fingerprint": self.fingerprint,
        }

    @property
    def _library(self) -> tuple[str, str]:
        """The library that the classifier is of, and its version."""
        root = type(self.estimator).__module__.partition(".")[0]
        if root == "sklearn":
            return "scikit-learn", sklearn.__version__
        return root, str(getattr(importlib.import_module(root), "__version__", "of no version"))

    def _fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Fit, or take what was fitted to the same with the same options in this process."""
        kind, rows, classes = type(self.estimator), _rows(inputs), labels.numpy()
        name = f"{self._library[0]}'s {kind.__name__}"
        if not hasattr(self.estimator, "predict_proba"):
            raise ModelError(f"{name} has no predict_proba with these options, so it cannot teach")
        key = joblib.hash([kind.__module__, kind.__name__, sorted(self.options.items()), rows, classes])
        if key not in _FITTED:
            try:
                _FITTED[key] = self.estimator.fit(rows, classes)
            except Exception as error:  # libraries have classes of their own
                if isinstance(error, ValueError | TypeError) or self._library[0] != "scikit-learn":
                    raise ModelError(f"{name} cannot be fitted: {error}") from error
                raise
            if "n_jobs" in self.options:  # sums of several threads come to other bits each time
                _FITTED[key].set_params(n_jobs=1)
            while len(_FITTED) > _MOST:
                _FITTED.popitem(last=False)
        self.estimator = _FITTED[key]
        self._order(range(self.num_labels))

    def _keep(self, state: dict[str, Tensor]) -> None:
        seed, answers = self.options.get("random_state"), state["answers"].numpy()
        self._state = state if seed is None else {**state, "random_state": torch.tensor(int(seed))}
        self.fingerprint = hashlib.blake2b(answers.tobytes(), digest_size=16).hexdigest()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: value for name, value in self._state.items()})

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
        """Fit again to the rows of a state, and compare the answers.

        Raises:
            ModelError: the answers are others.
        """
        found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        missing = [prefix + key for key in ("inputs", "labels", "answers") if key not in found]
        unexpected_keys += [prefix + key for key in found if key not in ("inputs", "labels", "answers", "random_state")]
        missing_keys += missing
        if missing:
            return
        if "random_state" in found:
            self.options["random_state"] = int(found.pop("random_state"))
            self.estimator.set_params(random_state=self.options["random_state"])
        self.num_labels = found["answers"].shape[1]
        self._fit(found["inputs"], found["labels"])
        apart = float((super().forward(found["inputs"]).exp() - found["answers"]).abs().max())
        if not apart <= _APART:
            raise ModelError(
                f"{type(self.estimator).__name__}, fitted again to the same rows, answers otherwise than it did (by up "
                f"to {apart:.2g}): {' is '.join(self._library)} here, and {CARD} says what it was"
            )
        self._keep(found)


class Sklearn:
    """Classifiers by the name of their class. See :class:`potstill.models.origins.Origin`.

    Options are those of the class. One that needs other estimators (``VotingClassifier``, ``StackingClassifier``, …)
    cannot be said in a recipe; in Python :class:`SklearnTeacher` takes any. A class of another library, such as
    ``lightgbm.LGBMClassifier``, has ``fit``, ``predict_proba``, ``classes_``, ``get_params`` and ``set_params``; fitted
    twice to the same rows with the same options it must give the same answers. Its code runs when it is looked up.
    """

    def build(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any], *, pretrained: bool) -> Built:
        """Return the classifier, not fitted; without a ``random_state`` its own is drawn from torch's generator.

        Raises:
            ModelError: no such classifier, or no such option.
        """
        problems = self.check(name, kwargs, ())
        if problems:
            raise ModelError("; ".join(str(problem) for problem in problems))
        options = dict(kwargs)
        kind = _class(name)
        if "random_state" in _parameters(kind) and options.get("random_state") is None:
            options["random_state"] = int(torch.randint(2**31 - 1, ()))
        return Built(SklearnModel(kind(**options), int(facts.get("num_labels", 0))))

    def complete(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options: what the facts tell, and the seed, is in the saved state."""
        return dict(kwargs)

    def processor(
        self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> ImageProcessor | TextProcessor | None:
        """Return ``None``: it takes numbers as the task has them.

        Raises:
            ModelError: the task is one of texts.
        """
        if "auto_model" in facts and "in_channels" not in facts:
            raise ModelError(f"scikit-learn's {name} takes numbers, and this task gives texts")
        return None

    def check(self, name: str, kwargs: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
        """Return an unknown name, unknown options and values that scikit-learn refuses."""
        try:
            kind = _class(name)
        except ModelError as error:
            return [Problem((*path, "model"), str(error))]
        known = _parameters(kind)
        if "." in name and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind).parameters.values()):
            known |= dict(kwargs)  # such as aliases
        unknown = [
            Problem((*path, "kwargs", key), f"model 'sklearn:{name}' has no option '{key}'", did_you_mean(key, known))
            for key in kwargs
            if key not in known
        ]
        if unknown:
            return unknown
        try:
            made = kind(**kwargs)
            if hasattr(made, "_parameter_constraints"):
                made._validate_params()
        except Exception as error:  # libraries have classes of their own
            if not isinstance(error, ValueError | TypeError) and "." not in name:
                raise
            wrong = next((key for key in kwargs if f"'{key}'" in str(error)), None)
            return [Problem((*path, "kwargs", *([] if wrong is None else [wrong])), str(error))]
        return []

    def save(self, model: nn.Module, folder: Path, *, name: str, labels: list[str], processor: Any) -> None:
        """Write the rows and answers as ``model.safetensors``, and what they are as ``sklearn.json``.

        Raises:
            ModelError: the model is none of a recipe's, or not fitted.
        """
        if not isinstance(model, SklearnModel) or not model.is_fitted:
            raise ModelError(f"expected a classifier of scikit-learn that was fitted in a run, got {model}")
        folder.mkdir(parents=True, exist_ok=True)
        save_modules(model, folder / WEIGHTS)
        (folder / CARD).write_text(json.dumps(model.about(), indent=2, ensure_ascii=False), encoding="utf-8")


class _Counter(io.RawIOBase):
    """A file that keeps nothing but its size."""

    count = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.count

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size


@cache
def _classifiers() -> dict[str, Any]:
    """Return the classifiers with probabilities that need no other estimator, by name."""
    found = {}
    for name, kind in all_estimators(type_filter="classifier"):
        needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        if not needed and hasattr(kind, "predict_proba"):
            with suppress(ValueError, TypeError):
                kind()._validate_params()
                found[name] = kind
    return found


def _class(name: str) -> Any:
    """Return a classifier's class: scikit-learn's by its name, any other by module and name.

    Raises:
        ModelError: there is none, or it is no classifier with probabilities.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        kind = _classifiers().get(name)
        if kind is None:
            raise ModelError(
                f"scikit-learn has no classifier '{name}' that gives probabilities and can be said in a recipe; "
                f"{did_you_mean(name, _classifiers())}"
            )
        return kind
    try:
        kind = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # of the module's own code
        raise ModelError(f"'sklearn:{name}': the module {module} cannot be imported: {error}") from error
    lacking = [each for each in ("fit", "predict_proba", "get_params", "set_params") if not hasattr(kind, each)]
    if not inspect.isclass(kind) or lacking:
        lacks = (
            "there is no such class"
            if kind is None
            else f"it has no {', '.join(lacking)}"
            if lacking
            else "it is no class"
        )
        raise ModelError(f"expected a classifier in the manner of scikit-learn, got 'sklearn:{name}': {lacks}")
    return kind


def _parameters(kind: Any) -> dict[str, Any]:
    """Return what a classifier can be given, by name."""
    found = {name: p for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD}
    if len(found) == len(inspect.signature(kind).parameters):
        return found
    with suppress(Exception):  # those that are made of keywords say the rest themselves
        found |= kind().get_params(deep=False)
    return found


def _rows(features: Tensor) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = features.detach().flatten(1).cpu().double().numpy()
    return rows


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else repr(value)
