"""A student that ends in the teacher's classifier: only what feeds it is learned (SimKD)."""

from __future__ import annotations

import copy
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import ModelError, did_you_mean
from potstill.models.freezing import freeze


class ReusedHead(nn.Module):
    """A student whose classifier is replaced by a projector and the teacher's classifier, which stays as it is.

    The projector brings the student's last features to the teacher's width; ``projector`` is the module path at which
    they are tapped. Trained to equal what enters the teacher's classifier, the student answers as the teacher does, and
    no other loss is needed.

    Args:
        student: taken over and changed: its classifier is gone.
        teacher: left as it is; its classifier is copied.
        student_head: path of the student's classifier, a linear layer, such as ``fc`` or ``classifier.1``.
        teacher_head: path of the teacher's.
        feature_map: path of the student's module whose output ``[B, C, H, W]`` is projected, by the paper's three
            convolutions, and then averaged over its positions; without it, the vector that enters the classifier is
            projected.
        projector: for a vector, ``linear`` or ``mlp`` (two linear layers with ReLU between them); or a module of one's
            own.
        factor: the convolutions inside are this much narrower than the teacher's features; 2 in the paper.
        channels: channels of the student's feature map, where they are not the width of its classifier.
        size: height and width of the teacher's feature map; a larger one of the student is averaged to it first.

    Raises:
        ModelError: a path names no module, a classifier is no linear layer, or the classes differ.

    Example:
        >>> student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> teacher = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> model = ReusedHead(student, teacher, student_head="2", teacher_head="2")
        >>> from potstill.losses.objective import Term
        >>> term = Term("mse", student="projector", teacher="input:2")

    Reference: Chen et al. 2022, https://arxiv.org/abs/2203.14001.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_head: str,
        teacher_head: str,
        feature_map: str | None = None,
        projector: Literal["linear", "mlp"] | nn.Module = "linear",
        factor: int = 2,
        channels: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        own, taught = _linear(student, student_head, "student"), _linear(teacher, teacher_head, "teacher")
        if own.out_features != taught.out_features:
            raise ModelError(
                f"expected as many classes, got {own.out_features} of the student and {taught.out_features} of the "
                "teacher, whose classifier is to be reused"
            )
        self.backbone = student
        if isinstance(projector, nn.Module):
            self.projector = projector
        elif feature_map is None:
            self.projector = _perceptron(own.in_features, taught.in_features, projector)
        else:
            self.projector = _bottleneck(channels or own.in_features, taught.in_features, factor)
        self.projector.to(own.weight)
        self.classifier = copy.deepcopy(taught).to(own.weight)
        freeze(self, ["classifier"])
        self._size = size
        self._map: Tensor | None = None
        if feature_map is not None:
            _module(student, feature_map, "student").register_forward_hook(self._remember)
        parent, _, name = student_head.rpartition(".")
        setattr(student.get_submodule(parent), name, _Reuse(self))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the student would return, with the logits of the reused classifier."""
        return self.backbone(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """Return the student, whose inputs are those of this model."""
        return self.backbone

    def classify(self, features: Tensor) -> Tensor:
        """Return logits ``[..., C]`` of what entered the student's classifier, or of the feature map seen before it."""
        seen, self._map = self._map, None
        if seen is None:
            logits: Tensor = self.classifier(self.projector(features))
            return logits
        height, width = self._size or seen.shape[2:]
        seen = F.adaptive_avg_pool2d(seen, (min(height, seen.shape[2]), min(width, seen.shape[3])))
        logits = self.classifier(self.projector(seen).mean((2, 3)))
        return logits

    def _remember(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ModelError(f"expected a feature map [B, C, H, W] of {type(module).__name__}, got {got}")
        self._map = output


class _Reuse(nn.Module):
    """Stands where the student's classifier was."""

    owner: ReusedHead

    def __init__(self, owner: ReusedHead) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)  # past nn.Module: it would be a child of its own child

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of the teacher's classifier."""
        return self.owner.classify(features)


def _module(model: nn.Module, path: str, side: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if not path or path not in modules:
        raise ModelError(f"the {side} {type(model).__name__} has no module '{path}'; {did_you_mean(path, modules)}")
    return modules[path]


def _linear(model: nn.Module, path: str, side: str) -> nn.Linear:
    head = _module(model, path, side)
    if not isinstance(head, nn.Linear):
        inner = [f"{path}.{name}" for name, module in head.named_modules() if isinstance(module, nn.Linear)]
        hint = f"; name the linear layer in it: {', '.join(inner)}" if inner else ""
        raise ModelError(
            f"expected the {side}'s classifier '{path}' to be a linear layer, got {type(head).__name__}{hint}"
        )
    return head


def _perceptron(width: int, target: int, kind: str) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, target)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, target), nn.ReLU(), nn.Linear(target, target))
    raise ModelError(f"there is no projector '{kind}'; {did_you_mean(kind, ['linear', 'mlp'])}")


def _bottleneck(channels: int, target: int, factor: int) -> nn.Module:
    """Return convolutions of 1×1, 3×3 and 1×1, each followed by batch normalisation and ReLU."""
    inner = max(1, target // factor)
    layers: list[nn.Module] = []
    for before, after, kernel in ((channels, inner, 1), (inner, inner, 3), (inner, target, 1)):
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)
