"""A fixed teacher that answers from disk what it was asked before.

An answer is found by sample and view, and used only for the very inputs to which it was given, so it is right under
shuffling, other batches, other padding and random augmentation: replayed views are found, others are refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from potstill.errors import CacheError
from potstill.interfaces import VIEW, Batch, Signals, TeacherSource
from potstill.models.inputs import MAIN_INPUTS, TEACHER_PREFIX, accepted_inputs, respond, teacher_view
from potstill.teachers.encoding import Encoding
from potstill.teachers.live import Live, Several
from potstill.teachers.store import SLOT_BYTES, Store, about_store
from potstill.teachers.tags import tags, token_mask

logger = logging.getLogger("potstill")

_BESIDE = frozenset({"labels", "sample_id", VIEW})


@dataclass
class Counts:
    """What became of the samples that were asked for.

    Attributes:
        found: answered from the cache.
        made: answered by the teacher and kept.
        kept_nothing: answered by the teacher, and there was no room to keep it.
        damaged: of those that were made, records whose bytes had changed.
    """

    found: int = 0
    made: int = 0
    kept_nothing: int = 0
    damaged: int = 0


class Cached:
    """A teacher whose answers are kept on disk. See :class:`potstill.interfaces.TeacherSource`.

    A batch of which any sample is not there yet is answered by the teacher as a whole, and what was missing is kept.

    Args:
        teacher: a trained module, or a source that always answers alike; a :class:`potstill.teachers.live.Deferred`
            is made only if something is missing.
        folder: where the answers are kept; a folder in it for each teacher and kind of answer.
        identity: what decides the answers beside the inputs, as plain JSON; the weights and settings of ``teacher`` if
            omitted, which needs a module or a :class:`potstill.teachers.live.Live` without a ``forward`` of its own.
        precision: in which floating-point signals are stored: ``fp32``, ``fp16`` or ``bf16``; the teacher's own, which
            loses nothing, if omitted.
        top_k: of ``logits``, how many classes are kept; the total probability of the others is kept too and spread
            evenly over them. All if omitted.
        strict: whether a full disk is an error; otherwise the teacher answers what cannot be kept.
        unmasked: signals that are compared at padded places too, where a record holds nothing: if they have any, the
            teacher answers each time.
        room: as ``(answers to come, bytes that they may take)``; where they would take more, nothing is kept.

    Raises:
        CacheError: the source says nothing of its weights, and no identity was given; and when called: a batch without
            ``sample_id``, or with inputs that differ from those that were answered under the same sample and view.

    Reference for replayed views: Beyer et al. 2022, *Knowledge distillation: A good teacher is patient and consistent*,
    https://arxiv.org/abs/2106.05237.
    """

    def __init__(
        self,
        teacher: nn.Module | TeacherSource,
        folder: Path | str,
        *,
        identity: Any = None,
        precision: Literal["fp32", "fp16", "bf16"] | None = None,
        top_k: int | None = None,
        strict: bool = False,
        unmasked: Collection[str] = (),
        room: tuple[int, int] | None = None,
    ) -> None:
        self.live: Any = Live(teacher) if isinstance(teacher, nn.Module) else teacher
        self.prefix: str = getattr(self.live, "prefix", TEACHER_PREFIX)
        self.folder = Path(folder).expanduser()
        self.identity = _identity(self.live) if identity is None else identity
        self.precision, self.top_k, self.strict = precision, top_k, strict
        self.unmasked, self.room = frozenset(unmasked), room
        self.counts = Counts()
        self._opened: dict[str, tuple[Store, Encoding, list[str]]] = {}
        self._is_full = self._is_off = False
        self._warned: set[str] = set()

    def __call__(self, batch: Batch) -> Signals:
        """Return the teacher's signals for a batch, detached, on its device."""
        ids = batch.get("sample_id")
        if ids is None:
            raise CacheError("a cached teacher finds its answers by `sample_id`, and the batch has none")
        if self._is_off:
            self.counts.kept_nothing += len(ids)
            return self.live(batch)  # type: ignore[no-any-return]
        asked = teacher_view(batch, self.prefix)
        known = self._known(ids.device)
        if known is None:
            return self._first(batch, asked)
        return self._answered(batch, asked, *known)

    def to(self, device: torch.device | str) -> Cached:
        """Move the teacher to a device and return this."""
        move: Any = getattr(self.live, "to", None)
        if move is not None:
            move(device)
        return self

    @property
    def model(self) -> Any:
        """The teacher's model, where it has one."""
        return getattr(self.live, "model", None)

    @property
    def folders(self) -> list[Path]:
        """The folders of the answers that were asked for so far."""
        return [store.folder for store, _, _ in self._opened.values()]

    @property
    def bytes_per_sample(self) -> float:
        """Bytes that an answer kept here takes, its place in the index included, in the mean; 0 before the first."""
        return max((store.bytes_per_record for store, _, _ in self._opened.values()), default=0.0)

    def close(self) -> None:
        """Give back files and unused space; the next call opens them again."""
        for store, _, _ in self._opened.values():
            store.close()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _answered(self, batch: Batch, asked: Batch, store: Store, encoding: Encoding, names: list[str]) -> Signals:
        ids = batch["sample_id"].cpu().numpy()
        questions = tags(asked, names)
        view = _view(batch)
        inside = token_mask(asked)
        found = store.read(view, ids, questions)
        if found.foreign.any():
            self._refuse(ids, found.foreign, view, store)
        device = batch["sample_id"].device
        if found.whole.all():
            self.counts.found += len(ids)
            return _moved(encoding.decode(found.words, found.lengths, inside), device)
        if found.damaged.any():
            self._warn_of_damage(found.files, ids[found.damaged], view, store)
            self.counts.damaged += int(found.damaged.sum())
        answer = self.live(batch)
        words, counts, lengths = encoding.encode(answer, inside)
        new = ~found.whole
        kept = self._write(store, view, ids, questions, (words, counts, lengths), new)
        self.counts.found += int(found.whole.sum())
        if kept:
            self.counts.made += int(new.sum())
        else:
            self.counts.kept_nothing += int(new.sum())
        if encoding.is_exact and new.all():
            return answer  # type: ignore[no-any-return]
        merged = words.copy()
        merged[np.repeat(found.whole, counts)] = found.words
        return _moved(encoding.decode(merged, lengths, inside), device)

    def _write(
        self, store: Store, view: int, ids: Any, questions: Any, records: tuple[Any, Any, Any], new: Any
    ) -> bool:
        if self._is_full:
            return False
        words, counts, lengths = records
        if not new.all():
            words = words[np.repeat(new, counts)]
        try:
            store.write(view, ids[new], questions[new], words, counts[new], lengths[new])
        except OSError as error:
            self._is_full = True
            message = f"no more of the teacher's answers can be kept in {store.folder}: {error}"
            if self.strict:
                raise CacheError(f"{message}; what is there stays, and the same command goes on with it") from error
            logger.warning("%s; what is there is used, and the teacher answers the rest each time", message)
            return False
        return True

    def _first(self, batch: Batch, asked: Batch) -> Signals:
        """Let the teacher answer, and learn from it what an answer looks like."""
        answer = self.live(batch)
        axes = _token_axes(self.live, batch, asked, answer)
        encoding = Encoding.of(answer, axes, precision=self.precision, top_k=self.top_k)
        problem = self._problem(encoding, answer, asked)
        if problem is not None:
            if self.strict:
                raise CacheError(problem)
            logger.warning("%s; the teacher answers each time", problem)
            self._is_off = True
            self.counts.kept_nothing += len(batch["sample_id"])
            return answer  # type: ignore[no-any-return]
        names = _inputs_of(self.live, asked)
        self._open(batch["sample_id"].device, encoding, names)
        return self._answered_first(batch, asked, answer)

    def _problem(self, encoding: Encoding, answer: Signals, asked: Batch) -> str | None:
        """Return why these answers cannot be kept, or ``None``."""
        padded = sorted({part.signal for part in encoding.parts if part.token_axes} & self.unmasked)
        if padded:
            return f"'{padded[0]}' is compared at padded places too, which no cache holds (say `mask: attention_mask`)"
        if self.room is None:
            return None
        _, counts, _ = encoding.encode(answer, token_mask(asked))
        wanted, limit = (SLOT_BYTES + 8 * float(counts.mean())) * self.room[0], self.room[1]
        if wanted <= limit:
            return None
        return (
            f"the teacher's answers would take {wanted / 2**30:.1f} GiB, and the cache may have {limit / 2**30:.1f} "
            "(POTSTILL_CACHE_LIMIT); `precision: fp16` and `top_k` make them smaller"
        )

    def _answered_first(self, batch: Batch, asked: Batch, answer: Signals) -> Signals:
        live, self.live = self.live, lambda _: answer
        try:
            store, encoding, names = self._opened[_ambient(batch["sample_id"].device)]
            return self._answered(batch, asked, store, encoding, names)
        finally:
            self.live = live

    def _known(self, device: torch.device) -> tuple[Store, Encoding, list[str]] | None:
        ambient = _ambient(device)
        if ambient not in self._opened:
            about = about_store(self._folder(ambient))
            if about is None:
                return None
            self._open(device, Encoding.from_plain(about["parts"]), about["inputs"])
        return self._opened[ambient]

    def _open(self, device: torch.device, encoding: Encoding, names: list[str]) -> None:
        ambient = _ambient(device)
        about = {"identity": self._about(ambient), "parts": encoding.plain(), "inputs": names}
        self._opened[ambient] = Store(self._folder(ambient), about), encoding, names

    def _about(self, ambient: str) -> dict[str, Any]:
        stored = {"precision": self.precision, "top_k": self.top_k}
        return {"teacher": self.identity, "computed": ambient, "torch": torch.__version__, **stored}

    def _folder(self, ambient: str) -> Path:
        text = json.dumps(self._about(ambient), sort_keys=True)
        return self.folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _refuse(self, ids: Any, foreign: Any, view: int, store: Store) -> None:
        raise CacheError(
            f"{int(foreign.sum())} of {len(ids)} samples, {int(ids[foreign][0])} the first, have other inputs than "
            f"those to which the teacher's cached answers (view {view}, in {store.folder}) were given. Random views "
            "must be replayed: say how many there are (`train.views`), or do without the cache (`cache: false`). "
            "Where the data have changed, choose another folder"
        )

    def _warn_of_damage(self, files: list[str], ids: Any, view: int, store: Store) -> None:
        for name in set(files) - self._warned:
            self._warned.add(name)
            logger.warning(
                "%s is damaged (sample %d in view %d, and maybe more): these answers are made again",
                store.folder / name,
                int(ids[0]),
                view,
            )


def uncached(source: Any) -> Any:
    """Return the live teacher behind a source: for samples that are not those of the training."""
    if isinstance(source, Cached):
        return source.live
    if isinstance(source, Several):
        return Several({name: uncached(each) for name, each in source.teachers.items()})
    return source


def weights_hash(model: nn.Module) -> str:
    """Return a hash of a model's class, configuration, parameters and buffers: 32 hexadecimal digits."""
    digest = hashlib.blake2b(f"{type(model).__qualname__} {getattr(model, 'config', model)}".encode(), digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _identity(source: Any) -> Any:
    if not isinstance(source, Live) or source.respond is not respond:
        what = type(source).__name__ if not isinstance(source, Live) else "one with a `forward` of its own"
        raise CacheError(
            f"expected a module or a Live teacher, whose weights say which answers are its own, got {what}; give "
            "`identity`: plain data that changes whenever its answers do"
        )
    form = {name: str(value) for name in ("precision",) if (value := getattr(source, name, None)) is not None}
    return {"weights": weights_hash(source.model.awake()), "taps": source.taps, **form}


def _ambient(device: torch.device) -> str:
    """Return in which precision a model computes here and now."""
    kind = device.type
    return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "as it is"


def _view(batch: Batch) -> int:
    view = batch.get(VIEW)
    if view is None or not len(view):
        return 0
    if int(view.min()) != int(view.max()):
        raise CacheError(f"expected a batch of one view, got views {int(view.min())} to {int(view.max())}")
    return int(view[0])


def _inputs_of(source: Any, asked: Batch) -> list[str]:
    """Return the entries that decide an answer: those that the model's forward names, else its main input, else all."""
    own = [name for name in asked if name not in _BESIDE and "/" not in name]
    model = getattr(source, "model", None)
    accepted = accepted_inputs(model) if isinstance(model, nn.Module) else None
    named = [name for name in own if accepted and name in accepted]
    main = [name for name in MAIN_INPUTS if name in own][:1]
    return sorted(named or (main if isinstance(model, nn.Module) else own) or own)


def _token_axes(source: Any, batch: Batch, asked: Batch, answer: Signals) -> dict[str, tuple[int, ...]]:
    """Return which axes of each signal are those of the tokens: those whose length changes with the text's."""
    mask = token_mask(asked)
    if mask is None:
        return {}
    length = mask.shape[1]
    other = {
        name: _other_length(value, length) for name, value in batch.items() if isinstance(value, Tensor) and value.ndim
    }
    found = {}
    for name, value in source(other).items():
        whole = answer[name]
        if isinstance(value, Tensor) and isinstance(whole, Tensor) and value.ndim == whole.ndim:
            changed = (i for i in range(1, value.ndim) if value.shape[i] != whole.shape[i])
            found[name] = tuple(changed)
    return found


def _other_length(value: Tensor, length: int) -> Tensor:
    """Return the first sample with a token less, its ends kept, or with one more where it has but one or two."""
    if value.ndim != 2 or value.shape[1] != length:
        return value[:1]
    return torch.cat([value[:1, :1], value[:1, 2:]] if length > 2 else [value[:1, :1], value[:1]], dim=1)


def _moved(signals: Signals, device: torch.device) -> Signals:
    return {name: value.to(device) for name, value in signals.items()}
