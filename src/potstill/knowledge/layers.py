"""Which layer of the student learns from which of the teacher: by a rule, by name, or by what the layers compute."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError, SignalError, did_you_mean
from potstill.knowledge.layouts import layout_of, resized
from potstill.knowledge.stages import stages
from potstill.knowledge.taps import available

Pairs = Mapping[int, int] | Mapping[str, str] | Sequence[tuple[int, int]] | Sequence[tuple[str, str]]
_HIDDEN = re.compile(r"(?:(?P<tower>.+)\.)?hidden\.(?P<layer>\d+)")


def layer_map(spec: str | Pairs, student_depth: int, teacher_depth: int) -> dict[Any, Any]:
    """Return which layer of the teacher each layer of the student learns from.

    Layers count as in ``hidden.n``: 0 is the embeddings, 1 the first block, the depth the last one.

    Args:
        spec: a mapping ``{student: teacher}`` or a list of pairs, in any order, of numbers or of names (taps and module
            paths, which are returned as they are); or a rule:

            ``ratio``: every layer i of the student with i·N/M of the teacher, M and N the depths, halves upwards,
            embeddings with embeddings and last with last (TinyBERT's uniform map).

            ``last``: the last with the last alone.

            ``first``: each block with the teacher's block of the same number.

            ``skip``: block i with the teacher's i·k, k = ⌊N/M⌋, without the last (PKD-Skip).

            ``pkd_last``: the blocks before the last with as many of the teacher's before its last (PKD-Last).
        student_depth: number of the student's blocks, at least 1.
        teacher_depth: number of the teacher's.

    Returns:
        ``{student: teacher}``, numbers or names; to some layers nothing may be mapped.

    Raises:
        ObjectiveError: no such rule, a layer that does not exist, a student's layer named twice, or a rule that needs
            a deeper model.

    Reference: Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351; Sun et al. 2019 (Patient KD),
    https://arxiv.org/abs/1908.09355.
    """
    if isinstance(spec, str):
        return _by_rule(spec, student_depth, teacher_depth)
    pairs: list[tuple[Any, Any]] = list(spec.items()) if isinstance(spec, Mapping) else [_pair(each) for each in spec]
    if not pairs:
        raise ObjectiveError("a layer map expected at least one pair, got none")
    twice = sorted({str(one) for place, (one, _) in enumerate(pairs) if one in [other for other, _ in pairs[:place]]})
    if twice:
        raise ObjectiveError(f"a layer map expected each layer of the student once, got {', '.join(twice)} again")
    for whose, place, depth in (("student", 0, student_depth), ("teacher", 1, teacher_depth)):
        for pair in pairs:
            _check_layer(pair[place], whose, depth)
    if len({isinstance(end, str) for pair in pairs for end in pair}) > 1:
        raise ObjectiveError("a layer map expected numbers alone or names alone, got both")
    return dict(pairs)


@dataclass(frozen=True, eq=False)
class LayerMatch:
    """Which layers compute alike.

    Attributes:
        pairs: each of the student's layers with the teacher's it was matched to.
        similarity: the CKA of that pair by the student's layer, from 0 to 1.
        student: names of the student's layers, the rows of the matrix.
        teacher: names of the teacher's layers, its columns.
        matrix: the CKA of every pair ``[student, teacher]``.
        rows: number of vectors a layer that were compared; with fewer than the width of a layer, CKA is biased upwards.
    """

    pairs: dict[str, str]
    similarity: dict[str, float]
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    matrix: Tensor
    rows: int

    def __str__(self) -> str:
        first = max(len(name) for name in (*self.student, ""))
        widths = [max(len(name), 6) for name in self.teacher]
        lines = [
            " ".join([" " * first, *(f"{name:>{width}}" for name, width in zip(self.teacher, widths, strict=True))])
        ]
        for name, row in zip(self.student, self.matrix.tolist(), strict=True):
            marks = ["*" if other == self.pairs[name] else "" for other in self.teacher]
            cells = [f"{mark}{value:.3f}" for mark, value in zip(marks, row, strict=True)]
            lines.append(" ".join([f"{name:<{first}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))]))
        return "\n".join(lines)


@torch.no_grad()
def match_by_cka(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None = None, *, rows: int = 4096
) -> LayerMatch:
    """Match each layer of the student to the teacher's whose features are most alike, deeper ones to deeper ones.

    Of all matches that keep the order it is the one with the greatest sum of linear CKA. Two layers of the student
    share one of the teacher only where the teacher has fewer: else the shallow ones, which are alike in any two models
    that read the same embeddings, would attract all of them.

    What is compared are tokens where all signals have the same tokens; places of the smallest grid among them for maps
    and patches; else the means over the places of each sample.

    Args:
        student: signals of one batch by name, shallow ones first: ``[B, T, H]``, ``[B, C, H, W]`` or ``[B, H]``.
        teacher: the teacher's on the same batch.
        mask: tokens that count, ``[B, T]``; all of them if omitted.
        rows: vectors a layer that are compared at most; more are thinned out, always to the same ones.

    Raises:
        ObjectiveError: no signals, fewer than two vectors to compare, signals of other batches, or a mask of another
            length than the tokens.

    Reference: Kornblith et al. 2019 (CKA), https://arxiv.org/abs/1905.00414.
    """
    if not student or not teacher:
        raise ObjectiveError("matching layers expected at least one signal of each model, got none")
    features = _features([*student.values(), *teacher.values()], mask)
    count = len(features[0])
    if count < 2:
        raise ObjectiveError(f"matching layers expected at least 2 samples or tokens, got {count}")
    if count > rows:
        kept = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:rows].sort().values
        features = [each[kept.to(each.device)] for each in features]
    scaled = [_scaled(each) for each in features]
    table = [[float(_overlap(one, other)) for other in scaled[len(student) :]] for one in scaled[: len(student)]]
    chosen = _monotone(table)
    said, taught = tuple(student), tuple(teacher)
    return LayerMatch(
        pairs={name: taught[place] for name, place in zip(said, chosen, strict=True)},
        similarity={name: row[place] for name, row, place in zip(said, table, chosen, strict=True)},
        student=said,
        teacher=taught,
        matrix=torch.tensor(table),
        rows=min(count, rows),
    )


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the linear centred kernel alignment of two sets of features of the same samples.

    Args:
        student: ``[N, H]``, a row a sample.
        teacher: ``[N, H']``.

    Returns:
        ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) of the centred features, a 0-d tensor in [0, 1]; 0 where one of them is constant. Shifts,
        rotations and one scale of the features change nothing.

    Raises:
        ObjectiveError: they are no matrices with as many rows.

    Reference: Kornblith et al. 2019, https://arxiv.org/abs/1905.00414.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ObjectiveError(
            f"CKA expected features [N, H] of the same samples, got {list(student.shape)} and {list(teacher.shape)}"
        )
    return _overlap(_scaled(student), _scaled(teacher))


def candidate_taps(model: nn.Module, run: Callable[[nn.Module], object] | None = None) -> list[str]:
    """Return the taps of ``model`` between which layers are matched, shallow ones first.

    Args:
        model: a transformers model with one tower gives ``hidden.1`` to its last; any other the module paths of its
            stages, such as ``layer1`` to ``layer4`` of a ResNet and ``blocks.0``, … of a vision transformer.
        run: calls the model once on some batch; stages that are then not called exactly once, or give no tensor of at
            least 2 axes, are left out.

    Raises:
        SignalError: the model has several towers, or no stages are found; name the layers then.
    """
    modules = {path for path, _ in model.named_modules()}
    matches = [_HIDDEN.fullmatch(name) for name in available(model) if name not in modules]
    hidden = [match for match in matches if match is not None and int(match["layer"]) > 0]
    towers = list(dict.fromkeys(match["tower"] or "" for match in hidden))
    if len(towers) > 1:
        raise SignalError(
            f"{type(model).__name__} has several towers ({', '.join(towers)}); name the layers of one, such as "
            f"'{towers[0]}.hidden.1'"
        )
    found = [match.string for match in hidden] or _seen(model, stages(model), run)
    if not found:
        raise SignalError(f"no stages are found in {type(model).__name__}; name its layers by their module paths")
    return found


def _by_rule(rule: str, student: int, teacher: int) -> dict[int, int]:
    rules: dict[str, Callable[[], dict[int, int]]] = {
        "ratio": lambda: {layer: (2 * layer * teacher + student) // (2 * student) for layer in range(student + 1)},
        "last": lambda: {student: teacher},
        "first": lambda: {layer: layer for layer in range(1, student + 1)},
        "skip": lambda: {layer: layer * (teacher // student) for layer in range(1, student)},
        "pkd_last": lambda: {layer: teacher - student + layer for layer in range(1, student)},
    }
    if rule not in rules:
        raise ObjectiveError(f"there is no layer map '{rule}'; {did_you_mean(rule, rules)}")
    if min(student, teacher) < 1:
        raise ObjectiveError(f"a layer map expected at least one block of each model, got {student} and {teacher}")
    if rule in ("first", "skip", "pkd_last") and student > teacher:
        raise ObjectiveError(
            f"the layer map '{rule}' expected a teacher of at least {student} blocks, got {teacher}; say 'ratio'"
        )
    if not (found := rules[rule]()):
        raise ObjectiveError(f"the layer map '{rule}' leaves out the last block and there is no other; say 'last'")
    return found


def _pair(each: Any) -> tuple[Any, Any]:
    if isinstance(each, str) or not isinstance(each, Sequence) or len(each) != 2:
        raise ObjectiveError(f"a layer map expected pairs of a student's and a teacher's layer, got {each!r}")
    return each[0], each[1]


def _check_layer(layer: Any, whose: str, depth: int) -> None:
    if isinstance(layer, str):
        return
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ObjectiveError(f"a layer map expected numbers or names of layers, got {layer!r} for the {whose}")
    if not 0 <= layer <= depth:
        raise ObjectiveError(f"the {whose} has layers 0 (the embeddings) to {depth}, got {layer} in the layer map")


def _features(signals: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Return each signal as ``[N, width]`` with the same N for all."""
    batch = len(signals[0])
    if any(len(signal) != batch for signal in signals):
        raise ObjectiveError(f"matching layers expected signals of one batch, got {_sizes(signals)} samples")
    layouts = [layout_of(signal) for signal in signals]
    tokens = {layout.space for layout in layouts if layout.kind == "tokens"}
    if mask is not None and tokens and tokens != {tuple(mask.shape[1:])}:
        raise ObjectiveError(
            f"matching layers expected a mask as long as the tokens, got {list(mask.shape)} for "
            f"{sorted(length for (length,) in tokens)} tokens; other tokenizers' positions do not correspond"
        )
    if len(tokens) == 1 and all(layout.kind == "tokens" for layout in layouts):
        valid = torch.ones(signals[0].shape[:2], dtype=torch.bool) if mask is None else mask != 0
        return [signal[valid.to(signal.device)] for signal in signals]
    aspect = next((layout.space for layout in layouts if layout.kind == "map"), None)
    folded = [layout.folded(aspect) for layout in layouts] if mask is None else layouts
    bodies = [layout.split(signal)[0] for layout, signal in zip(folded, signals, strict=True)]
    if all(len(layout.space) == 2 for layout in folded):
        smallest = [min(sides) for sides in zip(*(layout.space for layout in folded), strict=True)]
        return [resized(body, smallest).flatten(2).transpose(1, 2).flatten(0, 1) for body in bodies]
    return [_mean(body, mask if layout.kind == "tokens" else None) for body, layout in zip(bodies, folded, strict=True)]


def _mean(body: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return resized(body, ())
    weights = (mask != 0).to(body)[:, None]
    return (body * weights).sum(-1) / weights.sum(-1).clamp_min(1)


def _sizes(signals: Sequence[Tensor]) -> str:
    return ", ".join(map(str, sorted({len(signal) for signal in signals})))


def _scaled(features: Tensor) -> Tensor:
    """Return centred features X with ‖XᵀX‖ = 1, or zeros where they are constant."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    centred = wide - wide.mean(0)
    size = centred.norm()
    centred = torch.where(size > 1e-6 * wide.norm(), centred / size.clamp_min(torch.finfo(wide.dtype).tiny), 0)
    norm = _overlap(centred, centred).sqrt().sqrt()
    return centred / torch.where(norm > 0, norm, 1)


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return ‖YᵀX‖²."""
    other = other.to(one)
    with torch.autocast(one.device.type, enabled=False):
        return (other.T @ one).square().sum()


def _monotone(table: Sequence[Sequence[float]]) -> list[int]:
    """Return the column of each row with the greatest sum; the leftmost where several have it.

    The columns increase, or, where there are fewer of them than rows, do not decrease.
    """
    step = 1 if len(table) <= len(table[0]) else 0
    best = [0.0] * (len(table[0]) + step)  # up to that column, of the rows so far
    took: list[list[int]] = []
    for row in table:
        sums = [value + before for value, before in zip(row, best, strict=False)]
        best = [-math.inf] * step
        last: list[int] = []
        for column, value in enumerate(sums):
            better = not last or value > best[-1]
            best.append(value if better else best[-1])
            last.append(column if better else last[-1])
        took.append(last)
    chosen: list[int] = []
    for last in reversed(took):
        chosen.append(last[chosen[-1] - step if chosen else -1])
    return chosen[::-1]


def _seen(model: nn.Module, paths: list[str], run: Callable[[nn.Module], object] | None) -> list[str]:
    """Return the paths of the modules that a run calls once and that give a tensor."""
    if run is None:
        return paths
    given: dict[str, list[bool]] = {path: [] for path in paths}

    def follow(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: given[path].append(isinstance(output, Tensor) and output.ndim > 1)

    handles = [model.get_submodule(path).register_forward_hook(follow(path)) for path in paths]
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path, seen in given.items() if seen == [True]]
