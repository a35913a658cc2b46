"""How models are called: by name, by position, and with nothing that they do not take."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from transformers.utils.generic import ModelOutput

from potstill.errors import ModelError
from potstill.models.frozen import Frozen
from potstill.models.inputs import accepted_inputs, call, respond, responses, teacher_view


class Named(nn.Module):
    """Takes some entries by name and returns which came."""

    def forward(self, features, attention_mask=None, labels=None):
        return features, attention_mask, labels


class Other(nn.Module):
    """Calls its input as nobody else does."""

    def forward(self, x):
        return x * 2


class Wrapper(nn.Module):
    """Hands on whatever it gets."""

    def forward(self, *args, **kwargs):
        return args, kwargs


def batch(**entries):
    return {"sample_id": torch.arange(2), "labels": torch.tensor([0, 1]), **entries}


def tiny(kind):
    torch.manual_seed(0)
    if kind is BertForSequenceClassification:
        return kind(
            BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ).eval()
    return kind(DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=8)).eval()


def test_what_models_accept():
    assert accepted_inputs(Named()) == {"features", "attention_mask", "labels"}
    assert accepted_inputs(nn.Linear(2, 2)) == {"input"}
    assert accepted_inputs(Wrapper()) is None
    assert "token_type_ids" in accepted_inputs(tiny(BertForSequenceClassification))
    assert "token_type_ids" not in accepted_inputs(tiny(DistilBertForSequenceClassification))


@pytest.mark.parametrize(
    "wrap", [Frozen, lambda model: torch.compile(model, backend="eager")], ids=["frozen", "compiled"]
)
def test_wrappers_accept_what_their_model_accepts(wrap):
    """Called by position, a wrapped text model would silently run without its attention mask."""
    assert accepted_inputs(wrap(Named())) == accepted_inputs(Named())


def test_adapters_accept_what_their_model_accepts():
    class Adapted(nn.Module):
        def get_base_model(self):
            return Named()

        def forward(self, *args, **kwargs):
            raise AssertionError

    assert accepted_inputs(Adapted()) == accepted_inputs(Named())


def test_entries_go_by_name():
    mask = torch.ones(2, 3)
    found = call(Named(), batch(attention_mask=mask, features=torch.zeros(2, 3), pixel_values=torch.zeros(2)))
    assert found[0].shape == (2, 3)
    assert found[1] is mask
    assert found[2] is None


def test_labels_only_where_asked_for():
    """A model that gets labels computes its own loss too, on labels that it may not even share."""
    entries = batch(features=torch.zeros(2, 3))
    assert call(Named(), entries)[2] is None
    assert call(Named(), entries, labels=True)[2] is entries["labels"]


def test_a_plain_module_gets_its_main_input_by_position():
    pixels = torch.ones(2, 3)
    assert torch.equal(call(Other(), batch(pixel_values=pixels)), pixels * 2)
    assert torch.equal(call(Other(), batch(attention_mask=torch.zeros(2, 9), features=pixels)), pixels * 2)
    linear = nn.Linear(3, 4)
    assert torch.equal(call(linear, batch(features=pixels)), linear(pixels))


def test_ids_and_the_teachers_view_never_reach_a_model():
    args, kwargs = call(Wrapper(), batch(**{"features": torch.ones(2, 3), "teacher/features": torch.zeros(2, 3)}))
    assert len(args) == 1
    assert torch.equal(args[0], torch.ones(2, 3))
    assert kwargs == {}


@pytest.mark.parametrize("kind", [BertForSequenceClassification, DistilBertForSequenceClassification])
def test_transformers_models_get_each_their_own(kind):
    """BERT without its token types answers differently and says nothing; DistilBERT with them fails."""
    model = tiny(kind)
    entries = batch(
        input_ids=torch.tensor([[1, 2, 3], [4, 5, 0]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        token_type_ids=torch.tensor([[0, 1, 1], [0, 1, 1]]),
    )
    own = {name: entries[name] for name in entries if name in ("input_ids", "attention_mask")}
    if kind is BertForSequenceClassification:
        own["token_type_ids"] = entries["token_type_ids"]
    with torch.no_grad():
        expected = model(**own).logits
        assert torch.equal(call(model, entries).logits, expected)
        assert torch.equal(call(Frozen(model), entries).logits, expected)
        without = model(input_ids=entries["input_ids"]).logits
    assert not torch.allclose(without, expected)


def test_a_batch_with_nothing_for_the_model_names_both():
    with pytest.raises(
        ModelError, match=r"Named takes \['attention_mask', 'features', 'labels'\] and the batch has \['words'\]"
    ):
        call(Named(), batch(words=torch.zeros(2)))


def test_responses_of_a_tensor_a_tuple_and_a_mapping():
    logits, hidden = torch.zeros(2, 3), torch.ones(2, 4)
    assert responses(logits)["logits"] is logits
    assert responses((logits, hidden)) == {"logits": logits}
    assert responses([logits])["logits"] is logits
    found = responses(ModelOutput(loss=torch.tensor(1.0), logits=logits, other=hidden, cache=None))
    assert list(found) == ["logits", "other"]
    assert found["other"] is hidden


@pytest.mark.parametrize("output", ["text", 3, (), {"loss": torch.tensor(1.0)}, ("a",)])
def test_an_output_without_a_tensor_is_refused(output):
    with pytest.raises(ModelError, match="expected a model that returns a tensor"):
        responses(output)


def test_respond_is_both():
    pixels = torch.ones(2, 3)
    assert torch.equal(respond(Other(), batch(pixel_values=pixels))["logits"], pixels * 2)


def test_the_teachers_view_wins_over_the_shared_entries():
    """A teacher with a tokenizer of its own must not read the student's ids."""
    entries = batch(
        **{"input_ids": torch.zeros(2), "attention_mask": torch.ones(2), "teacher/input_ids": torch.full((2,), 7)}
    )
    seen = teacher_view(entries)
    assert seen["input_ids"].tolist() == [7, 7]
    assert "attention_mask" not in seen  # that of the student's tokens
    assert seen["labels"] is entries["labels"]
    assert not any(name.startswith("teacher/") for name in seen)
    assert set(entries) >= {"teacher/input_ids", "input_ids"}  # the student still has its own
    plain = batch(features=torch.zeros(2))
    assert teacher_view(plain) == plain
