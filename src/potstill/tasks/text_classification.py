"""Text classification: one class for a text or for a pair of texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from datasets import Dataset, Value
from pydantic import Field

from potstill.data.texts import Texts, Tokenizer, Tokens
from potstill.errors import TaskError
from potstill.interfaces import Batch
from potstill.models.origins import TextProcessor
from potstill.registry import tasks
from potstill.tasks.classification import Classification

_LENGTH = 128


@tasks.register("text-classification", input="text")
class TextClassification(Classification):
    """One class for a text, or for a pair of texts such as premise and hypothesis.

    Each model gets the tokens of its own tokenizer. Where two tokenizers give the same tokens they are made once.

    Args:
        text: the column of the text.
        pair: the column of the second text.
        label: the column of the class.
        max_length: tokens at which a text, or both of a pair together, are cut; 128 if omitted, or what a model takes
            at most if that is less.
        augment: entries of ``data.augment``, applied to the words before they are tokenised.

    A table without the column ``text`` but with ``input_ids`` is taken as it is: tokenised already.
    """

    name = "text-classification"
    input_key = "input_ids"

    def __init__(
        self,
        *,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        max_length: Annotated[int, Field(gt=1)] | None = None,
        augment: Sequence[Any] = (),
    ) -> None:
        super().__init__(label=label)
        self.text, self.pair, self.max_length = text, pair, max_length
        self.augment = list(augment)
        self.tokenizers: dict[str, Tokenizer] = {}
        self._limit = _LENGTH

    def fit(self, train: Dataset) -> None:
        """Learn the classes from the training split.

        Raises:
            TaskError: there is no such column, or it holds no texts.
        """
        super().fit(train)
        if self._is_tokenised(train):
            return
        for column in self._columns:
            self.require_column(train, column)
            feature = train.features[column]
            if not (isinstance(feature, Value) and "string" in feature.dtype):
                texts = [name for name, each in train.features.items() if "string" in str(getattr(each, "dtype", ""))]
                hint = f"; columns of texts: {', '.join(texts)}" if texts else ""
                raise TaskError(f"expected the column '{column}' to hold texts, got {feature}{hint}")

    def prepare(self, student: TextProcessor | None, teachers: Mapping[str, TextProcessor | None]) -> None:
        """Take the tokenizers.

        Args:
            student: of the student, or of the one model that is asked.
            teachers: of the teachers, by the prefix of their batch entries; entries are made only where a tokenizer
                gives other tokens than the student's.

        Raises:
            TaskError: a model has no tokenizer.
        """
        everyone = {"the student": student, **{f"the teacher '{key}'": value for key, value in teachers.items()}}
        for whose, processor in everyone.items():
            if not isinstance(processor, TextProcessor):
                raise TaskError(
                    f"{whose} has no tokenizer, which text classification needs; name a model of transformers, or say "
                    "`processor:` with the model whose tokenizer it shares"
                )
        self._check_length({whose: each.tokenizer for whose, each in everyone.items() if each is not None})
        own = {"": student, **teachers}
        made = {prefix: self._tokenizer(each.tokenizer) for prefix, each in own.items() if each is not None}
        identity = {prefix: _identity(each.tokenizer) for prefix, each in made.items()}
        self._one_tokenizer = len(set(identity.values())) == 1
        shared = identity[""], made[""].max_length
        self.tokenizers = {k: v for k, v in made.items() if not k or (identity[k], v.max_length) != shared}
        self._add_inputs([v.tokenizer for k, v in made.items() if k not in self.tokenizers])

    def dataset(self, table: Dataset, *, training: bool, seed: int) -> Texts:
        """Return batches with the tokenizer's inputs, int64 ``[B, T]``; padded to the longest text of a batch.

        Raises:
            TaskError: a missing column or text, or tokens of one tokenizer for models with several.
        """
        columns, steps = self.base_columns(table), self.augment if training else ()
        if self._is_tokenised(table):
            return Texts(columns, tokens={"": self._given_tokens(table)}, steps=steps, seed=seed)
        texts = [self._texts(table, column) for column in self._columns]
        return Texts(columns, texts, self.tokenizers, steps=steps, seed=seed)

    def facts(self) -> dict[str, Any]:
        """Return ``num_labels``, ``label_names`` and transformers' auto class."""
        return {
            **super().facts(),
            "label_names": self.label_names,
            "auto_model": "AutoModelForSequenceClassification",
        }

    def settings(self) -> dict[str, Any]:
        """Return labels, columns and length as plain JSON."""
        length = self.tokenizers[""].max_length if self.tokenizers else self.max_length
        return {**super().settings(), "text": self.text, "pair": self.pair, "max_length": length}

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take back what :meth:`settings` returned."""
        super().restore(settings)
        self.text, self.pair = str(settings["text"]), settings["pair"]
        self.max_length = settings["max_length"]

    def show(self, table: Dataset, rows: list[int]) -> list[list[dict[str, str]]]:
        """Return the texts of each row; of data that are tokenised already, the tokens as text."""
        chosen = table.select(rows)
        if self._is_tokenised(table):
            texts = {
                "text": self.tokenizers[""].tokenizer.batch_decode(chosen["input_ids"][:], skip_special_tokens=True)
            }
        else:
            texts = {column: chosen[column][:] for column in self._columns}
        parts = [
            [{"name": name, "kind": "text", "value": str(each)} for each in column] for name, column in texts.items()
        ]
        return [list(row) for row in zip(*parts, strict=True)]

    def example_inputs(self, batch_size: int) -> Batch:
        """Return texts of ``max_length`` tokens."""
        own = self.tokenizers[""]
        word = own.tokenizer.convert_ids_to_tokens(len(own.tokenizer) // 2)
        return own([" ".join([word] * own.max_length)] * batch_size).batch(torch.arange(batch_size))

    @property
    def _columns(self) -> list[str]:
        return [self.text] if self.pair is None else [self.text, self.pair]

    def _is_tokenised(self, table: Dataset) -> bool:
        return self.text not in table.column_names and "input_ids" in table.column_names

    def _texts(self, table: Dataset, column: str) -> list[str]:
        self.require_column(table, column)
        texts: list[str] = table[column][:]
        missing = [place for place, text in enumerate(texts) if text is None]
        if missing:
            raise TaskError(f"the column '{column}' has no text in {len(missing)} rows, the first is row {missing[0]}")
        return texts

    def _given_tokens(self, table: Dataset) -> Tokens:
        """Return the tokens that the table holds, without their padding."""
        if not self._one_tokenizer:
            raise TaskError(
                "the data are tokenised already, and teacher and student have different tokenizers; give the texts, "
                "so that each model gets its own tokens"
            )
        tokenizer = self.tokenizers[""]
        names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in table.column_names]
        columns = {name: table[name][:] for name in names}
        masks = columns.setdefault("attention_mask", self._masks(columns["input_ids"]))
        kept = [_extent(mask) for mask in masks]
        cut = {name: [row[a:b] for row, (a, b) in zip(rows, kept, strict=True)] for name, rows in columns.items()}
        longest = max((b - a for a, b in kept), default=0)
        if longest > self._limit:
            raise TaskError(f"the data hold texts of {longest} tokens, and the models take at most {self._limit}")
        return Tokens(cut, padding=tokenizer.padding(), left=tokenizer.tokenizer.padding_side == "left")

    def _masks(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return what is no padding; where a text's end serves as padding too, nothing is taken for it."""
        tokenizer = self.tokenizers[""].tokenizer
        pad = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
        return [[int(number != pad) for number in row] for row in rows]

    def _tokenizer(self, tokenizer: Any) -> Tokenizer:
        return Tokenizer(tokenizer, self.max_length or min(_LENGTH, tokenizer.model_max_length))

    def _check_length(self, tokenizers: Mapping[str, Any]) -> None:
        self._limit = min(tokenizer.model_max_length for tokenizer in tokenizers.values())
        if self.max_length is None:
            return
        for whose, tokenizer in tokenizers.items():
            limit, special = tokenizer.model_max_length, tokenizer.num_special_tokens_to_add(self.pair is not None)
            if self.max_length > limit:
                raise TaskError(f"task.max_length is {self.max_length}, and {whose} takes at most {limit} tokens")
            if self.max_length < special:  # which tokenizers take for no limit at all
                raise TaskError(f"task.max_length is {self.max_length}, and {whose} adds {special} tokens to a text")

    def _add_inputs(self, others: list[Any]) -> None:
        """Let the student's tokenizer also make what a teacher with the same tokens takes, such as token types."""
        own = self.tokenizers[""].tokenizer
        more = [name for other in others for name in other.model_input_names if name not in own.model_input_names]
        if more:
            self.tokenizers[""] = self._tokenizer(next(o for o in others if more[0] in o.model_input_names))


def _identity(tokenizer: Any) -> str:
    """Return what decides a tokenizer's tokens; settings of cutting and decoding are none of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    sides = f"{tokenizer.padding_side} {tokenizer.truncation_side} {tokenizer.pad_token_id}"
    if backend is None:
        return f"{type(tokenizer).__name__} {sides} {sorted(tokenizer.get_vocab().items())}"
    about = json.loads(backend.to_str())
    for other in ("padding", "truncation", "decoder"):
        about.pop(other, None)
    return f"{sides} {json.dumps(about, sort_keys=True)}"


def _extent(mask: Sequence[int]) -> tuple[int, int]:
    """Return where a text begins and ends among its padding."""
    on = [place for place, value in enumerate(mask) if value]
    return (on[0], on[-1] + 1) if on else (0, 0)
