"""A fixed teacher that answers from disk what it was asked before.

An answer is found by sample and view, and used only for the very inputs to which it was given, so it is right under
shuffling, other batches, other padding and random augmentation: replayed views are found, others are refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from potstill.errors import CacheError
from potstill.interfaces import VIEW, Batch, Signals, TeacherSource
from potstill.models.inputs import MAIN_INPUTS, TEACHER_PREFIX, accepted_inputs, respond, teacher_view
from potstill.teachers.encoding import Encoding
from potstill.teachers.live import Live, leaves
from potstill.teachers.store import MOST_IDS, SLOT_BYTES, Store, about_store
from potstill.teachers.tags import tags, token_mask

logger = logging.getLogger("potstill")

_BESIDE = frozenset({"labels", "sample_id", VIEW})
_PLAIN = (bool, int, float, str, type(None))

Known: TypeAlias = tuple[Store, Encoding, list[str]]
"""Where answers are, what they look like, and the names of the inputs that they were given to."""


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
        unmasked: signals that are compared at padded places too, where a record holds nothing: if they have any,
            they cannot be kept.
        signals: those that are kept and returned; all if omitted.
        required: whether what cannot be kept, and inputs that change, are errors; otherwise there is one warning, and
            the teacher answers each time.
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
        signals: Collection[str] | None = None,
        required: bool = True,
        room: tuple[int, int] | None = None,
    ) -> None:
        self.live: Any = Live(teacher) if isinstance(teacher, nn.Module) else teacher
        self.prefix: str = getattr(self.live, "prefix", TEACHER_PREFIX)
        self.folder = Path(folder).expanduser()
        self.identity = _identity(self.live) if identity is None else identity
        self.precision, self.top_k, self.strict = precision, top_k, strict
        self.unmasked, self.room, self.required = frozenset(unmasked), room, required or strict
        self.signals = None if signals is None else frozenset(signals)
        self.counts = Counts()
        self._opened: dict[str, Known] = {}
        self._is_full = self._is_off = False
        self._warned: set[str] = set()

    def __call__(self, batch: Batch) -> Signals:
        """Return the teacher's signals for a batch, detached, on its device."""
        ids = batch.get("sample_id")
        if ids is None:
            raise CacheError("a cached teacher finds its answers by `sample_id`, and the batch has none")
        if not self._is_off:
            asked = teacher_view(batch, self.prefix)
            try:
                _check_ids(ids)
                _check_padding(asked)
                known = self._known(ids.device)
                if known is None:
                    return self._first(batch, asked)
                return self._answered(batch, asked, known)
            except (CacheError, OSError) as error:
                if self.required:
                    raise
                logger.warning("%s; the teacher answers each time", error)
                self._is_off = True
        self.counts.kept_nothing += len(ids)
        return self._asked(batch)

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

    def _asked(self, batch: Batch) -> Signals:
        """Return what the live teacher says of what is kept."""
        said: Signals = self.live(batch)
        return said if self.signals is None else {name: said[name] for name in said if name in self.signals}

    def _answered(self, batch: Batch, asked: Batch, known: Known, answer: Signals | None = None) -> Signals:
        """Return what is kept for a batch, or ``answer``, the teacher's if omitted, and keep that."""
        store, encoding, names = known
        ids = batch["sample_id"].cpu().numpy()
        self._check_inputs(asked, names, store)
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
        answer = self._asked(batch) if answer is None else answer
        words, counts, lengths = encoding.encode(answer, inside)
        new = ~found.whole
        kept = self._write(store, view, ids, questions, (words, counts, lengths), new)
        self.counts.found += int(found.whole.sum())
        if kept:
            self.counts.made += int(new.sum())
        else:
            self.counts.kept_nothing += int(new.sum())
        if encoding.is_exact and new.all():
            return answer
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
        answer = self._asked(batch)
        if not answer:
            raise CacheError(f"the teacher gave none of {sorted(self.signals or ())}, so there is nothing to keep")
        try:
            axes = _token_axes(self._asked, batch, asked, answer)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise CacheError(
                f"the teacher cannot be asked of one sample alone, which a cache must try: {error}"
            ) from error
        encoding = Encoding.of(answer, axes, precision=self.precision, top_k=self.top_k)
        self._check_room(encoding, answer, asked, batch["sample_id"])
        accepted = _accepted(self.live)
        known = self._open(batch["sample_id"].device, encoding, accepted, _inputs_of(accepted, asked))
        return self._answered(batch, asked, known, answer)

    def _check_room(self, encoding: Encoding, answer: Signals, asked: Batch, ids: Tensor) -> None:
        if self.room is None:
            return
        _, counts, _ = encoding.encode(answer, token_mask(asked))
        wanted = (SLOT_BYTES + 8 * float(counts.mean())) * self.room[0] + SLOT_BYTES * (int(ids.max()) + 1)
        if wanted > self.room[1] + SLOT_BYTES * self.room[0]:
            raise CacheError(
                f"the teacher's answers would take {wanted / 2**30:.1f} GiB, and the cache may have "
                f"{self.room[1] / 2**30:.1f} (POTSTILL_CACHE_LIMIT); `precision: fp16` and `top_k` make them smaller"
            )

    def _check_inputs(self, asked: Batch, names: list[str], store: Store) -> None:
        accepted = store.about["accepted"]
        given = _inputs_of(accepted, asked)
        if given != names:
            raise CacheError(
                f"the cached answers in {store.folder} were given to {', '.join(names)}, and the teacher is asked with "
                f"{', '.join(given)}; choose another folder"
            )
        mask = asked.get("attention_mask")
        if mask is not None and "attention_mask" not in names and bool((mask == 0).any()):
            raise CacheError("the teacher reads no attention_mask: its answers depend on padding and cannot be cached")

    def _known(self, device: torch.device) -> Known | None:
        ambient = _ambient(device)
        if ambient in self._opened:
            return self._opened[ambient]
        about = about_store(self._folder(ambient))
        if about is None:
            return None
        return self._open(device, Encoding.from_plain(about["parts"]), about["accepted"], about["inputs"])

    def _open(self, device: torch.device, encoding: Encoding, accepted: list[str] | None, names: list[str]) -> Known:
        padded = sorted({part.signal for part in encoding.parts if part.token_axes} & self.unmasked)
        if padded:
            raise CacheError(
                f"'{padded[0]}' is compared at padded places too, which no cache holds; say `mask: attention_mask`"
            )
        ambient = _ambient(device)
        about = {"identity": self._about(ambient), "parts": encoding.plain(), "accepted": accepted, "inputs": names}
        self._opened[ambient] = Store(self._folder(ambient), about), encoding, names
        return self._opened[ambient]

    def _about(self, ambient: str) -> dict[str, Any]:
        stored: dict[str, Any] = {"precision": self.precision, "top_k": self.top_k}
        if self.signals is not None:
            stored["signals"] = sorted(self.signals)
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
    members = getattr(source, "teachers", None)
    if not isinstance(members, Mapping):
        return source
    own = copy.copy(source)
    own.teachers = {name: uncached(each) for name, each in members.items()}
    own.narrow(None)
    return own


def unmask(source: Any, signals: Collection[str]) -> None:
    """Tell every cache of a source which signals are compared at padded places too."""
    for each in leaves(source).values():
        if isinstance(each, Cached):
            each.unmasked |= set(signals)


def weights_hash(model: nn.Module) -> str:
    """Return a hash of a model's class, configuration, weights, buffers and plain attributes: 32 hexadecimal digits."""
    digest = hashlib.blake2b(f"{type(model).__qualname__} {getattr(model, 'config', model)}".encode(), digest_size=16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        raw: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(raw)
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if key != "training" and _is_plain(key, value)}
        digest.update(f"{name} {type(module).__qualname__} {sorted(plain.items())}".encode())
    return digest.hexdigest()


def _is_plain(key: str, value: Any) -> bool:
    """Whether an attribute of a module is a setting, which reads the same in every process."""
    each = value if isinstance(value, tuple) else (value,)
    return not key.startswith("_") and all(isinstance(item, _PLAIN) for item in each)


def _identity(source: Any) -> Any:
    if not isinstance(source, Live) or source.respond is not respond:
        what = type(source).__name__ if not isinstance(source, Live) else "one with a `forward` of its own"
        raise CacheError(
            f"expected a module or a Live teacher, whose weights say which answers are its own, got {what}; give "
            "`identity`: plain data that changes whenever its answers do"
        )
    form = {name: str(value) for name in ("precision", "compile") if (value := getattr(source, name, None))}
    return {"weights": weights_hash(source.model.awake()), "taps": source.taps, **form}


def _ambient(device: torch.device) -> str:
    """Return where, and in which precision, a model computes here and now."""
    kind = device.type
    half = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "as it is"
    return f"{kind}, {half}, {torch.get_float32_matmul_precision()}"


def _view(batch: Batch) -> int:
    view = batch.get(VIEW)
    if view is None or not len(view):
        return 0
    if int(view.min()) != int(view.max()):
        raise CacheError(f"expected a batch of one view, got views {int(view.min())} to {int(view.max())}")
    return int(view[0])


def _accepted(source: Any) -> list[str] | None:
    """Return what decides an answer beside the main input: what the model's forward names; ``None``: all there is.

    A function that is not of potstill may read any entry.
    """
    live = getattr(source, "live", source)
    model, function = getattr(live, "model", None), getattr(live, "respond", None)
    ours = str(getattr(function, "__module__", "")).startswith("potstill.")
    if not isinstance(model, nn.Module) or not ours:
        return None
    return sorted(accepted_inputs(model) or ())


def _inputs_of(accepted: list[str] | None, asked: Batch) -> list[str]:
    """Return the entries that decide an answer."""
    own = [name for name in asked if name not in _BESIDE and "/" not in name]
    if accepted is None:
        return sorted(own)
    named = [name for name in own if name in accepted]
    return sorted(named or [name for name in MAIN_INPUTS if name in own][:1] or own)


def _check_ids(ids: Tensor) -> None:
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= MOST_IDS):
        raise CacheError(f"expected sample_id to be row numbers from 0, got {int(ids.min())} to {int(ids.max())}")


def _check_padding(asked: Batch) -> None:
    """Raise where an answer depends on the padding of the batch that it came in."""
    mask = asked.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return
    if "position_ids" not in asked and bool((mask[:, 0] == 0).any()):
        raise CacheError(
            "texts are padded on the left without position_ids, so what a teacher says of one depends on the others in "
            "its batch, and cannot be cached"
        )


def _token_axes(ask: Any, batch: Batch, asked: Batch, answer: Signals) -> dict[str, tuple[int, ...]]:
    """Return which axes of each signal are those of the tokens: those that are as long as the text.

    Raises:
        CacheError: a signal depends on what else is in the batch.
    """
    mask = token_mask(asked)
    length = 0 if mask is None else mask.shape[1]
    shapes = [value.shape for value in answer.values() if isinstance(value, Tensor)]
    if mask is None and not any(shape[0] in shape[1:] for shape in shapes):
        return {}
    other = {name: _other_length(v, length) for name, v in batch.items() if isinstance(v, Tensor) and v.ndim}
    now = length - 1 if length > 2 else length + 1
    found = {}
    for name, value in ask(other).items():
        whole = answer.get(name)
        if not isinstance(value, Tensor) or not isinstance(whole, Tensor) or value.ndim != whole.ndim:
            continue
        changed = tuple(i for i in range(1, value.ndim) if value.shape[i] != whole.shape[i])
        if any((whole.shape[i], value.shape[i]) != (length, now) for i in changed):
            raise CacheError(f"the teacher's '{name}' {list(whole.shape)} depends on the batch that a sample is in")
        found[name] = changed
    return found


def _other_length(value: Tensor, length: int) -> Tensor:
    """Return the first sample with a token less, its ends kept, or with one more where it has but one or two."""
    if value.ndim < 2 or value.shape[1] != length:
        return value[:1]
    return torch.cat([value[:1, :1], value[:1, 2:]] if length > 2 else [value[:1, :1], value[:1]], dim=1)


def _moved(signals: Signals, device: torch.device) -> Signals:
    return {name: value.to(device) for name, value in signals.items()}
