"""Text classification: columns, tokens for each model, and above all a teacher that answers as it does alone."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import decoders

from potstill.errors import DataError, TaskError
from potstill.models.hugging_face import HuggingFace
from potstill.models.origins import TextProcessor
from potstill.tasks.text_classification import TextClassification
from potstill.teachers.live import Live
from tests.local_models import SENTENCES, bert, decoder_tokenizer, distilbert, roberta, roberta_tokenizer, word_pieces

NAMES = ["bad", "good"]
SECONDS = ["a mess", "great jokes and a great cast", "", "the film is flat", "funny", "dull plot", "warm", "a cast"]
AUTO = transformers.AutoModelForSequenceClassification
EVERY = list(range(len(SENTENCES)))


def table(labels=True, **columns) -> Dataset:
    made = Dataset.from_dict(
        {"sample_id": [5 + i for i in EVERY], **(columns or {"text": [text for text, _ in SENTENCES]})}
    )
    if labels:
        return made.add_column("label", [label for _, label in SENTENCES], feature=ClassLabel(names=NAMES))
    return made


def pairs() -> Dataset:
    return table(premise=[text for text, _ in SENTENCES], claim=SECONDS)


def own(tokenizer, *removed: str) -> TextProcessor:
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name not in removed]
    return TextProcessor(tokenizer)


def prepared(train: Dataset, student=None, teachers=None, **options) -> TextClassification:
    task = TextClassification(**options)
    task.fit(train)
    task.prepare(TextProcessor(word_pieces()) if student is None else student, teachers or {})
    return task


def whole(task: TextClassification, rows: Dataset, **options):
    return task.dataset(rows, **{"training": False, "seed": 0, **options}).__getitems__(EVERY[: len(rows)])


def processor(folder) -> TextProcessor:
    return HuggingFace().processor(str(folder), {}, TextClassification().facts())


# the columns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "txt"}, "there is no column 'txt'; did you mean 'text'?"),
        ({"pair": "texts"}, "there is no column 'texts'; did you mean 'text'?"),
        ({"text": "stars"}, r"column 'stars' to hold texts, got .*int64.*; columns of texts: text"),
        ({"pair": "words"}, r"column 'words' to hold texts, got .*; columns of texts: text"),
        ({"label": "stars"}, "column 'stars' to hold classes"),
    ],
)
def test_columns_that_are_wrong(options, message):
    texts = [text for text, _ in SENTENCES]
    rows = table(text=texts, stars=EVERY, words=[text.split() for text in texts])
    with pytest.raises(TaskError, match=message):
        TextClassification(**options).fit(rows)


def test_a_table_without_texts_has_none_to_propose():
    with pytest.raises(TaskError, match=r"to hold texts, got [^;]*$"):
        TextClassification(text="stars").fit(table(stars=EVERY))


def test_what_a_model_is_told():
    task = prepared(table())
    assert task.facts() == {
        "num_labels": 2,
        "label_names": NAMES,
        "auto_model": "AutoModelForSequenceClassification",
    }
    assert hasattr(transformers, task.facts()["auto_model"])


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_both_kinds_of_strings_are_texts(kind):
    rows = Dataset.from_dict({"text": ["a", "b"]}, features=Features({"text": Value(kind)}))
    TextClassification().fit(rows)


def test_a_missing_text_is_named():
    rows = table(text=["a film", None, "great", None, "", "a", "a", "a"])
    with pytest.raises(TaskError, match="'text' has no text in 2 rows, the first is row 1"):
        whole(prepared(rows), rows)


def test_a_split_that_lacks_a_column_names_it():
    task = prepared(pairs(), text="premise", pair="claim")
    with pytest.raises(TaskError, match="there is no column 'claim'"):
        whole(task, table(premise=[text for text, _ in SENTENCES]))


def test_batches_hold_labels_and_ids():
    batch = whole(prepared(table()), table())
    assert batch["labels"].tolist() == [label for _, label in SENTENCES]
    assert batch["sample_id"].tolist() == [5 + i for i in EVERY]
    assert "labels" not in whole(prepared(table(labels=False)), table(labels=False))  # a transfer set


def test_an_empty_split():
    rows = table()
    assert len(prepared(rows).dataset(rows.select([]), training=False, seed=0)) == 0


# the tokenizers


@pytest.mark.parametrize(
    ("student", "teachers", "whose"),
    [
        (None, {}, "the student"),
        (TextProcessor(word_pieces()), {"teacher/": None}, "the teacher 'teacher/'"),
    ],
)
def test_a_model_without_tokenizer(student, teachers, whose):
    task = TextClassification()
    task.fit(table())
    with pytest.raises(TaskError, match=rf"^{whose} has no tokenizer, .* `processor:`"):
        task.prepare(student, teachers)


def test_one_model_alone():
    tokenizer = word_pieces()
    batch = whole(prepared(table(), TextProcessor(tokenizer)), table())
    alone = tokenizer([text for text, _ in SENTENCES], padding=True, return_tensors="pt")
    assert set(batch) == {*alone, "labels", "sample_id"}
    assert all(torch.equal(batch[name], value) for name, value in alone.items())


def test_the_same_tokens_are_made_once():
    """A DistilBERT student takes no token types, its BERT teacher does, and both read the same entries."""
    student, teacher = own(word_pieces(), "token_type_ids"), own(word_pieces())
    rows = pairs()
    options = {"text": "premise", "pair": "claim"}
    assert "token_type_ids" not in whole(prepared(rows, student, **options), rows)
    batch = whole(prepared(rows, student, {"teacher/": teacher}, **options), rows)
    assert not any(name.startswith("teacher/") for name in batch)
    texts = [text for text, _ in SENTENCES]
    alone = teacher.tokenizer(texts, SECONDS, padding=True, return_tensors="pt")
    assert set(batch) == {*alone, "labels", "sample_id"}
    assert all(torch.equal(batch[name], value) for name, value in alone.items())
    assert batch["token_type_ids"].any()


def test_settings_of_cutting_and_decoding_make_no_other_tokens():
    student, teacher = word_pieces(), word_pieces()
    teacher(["a film", "a"], padding="max_length", truncation=True, max_length=40)  # which its backend remembers
    teacher.backend_tokenizer.decoder = decoders.WordPiece(cleanup=False)
    task = prepared(table(), TextProcessor(student), {"teacher/": TextProcessor(teacher)})
    assert set(task.tokenizers) == {""}


@pytest.mark.parametrize(
    "other",
    [
        roberta_tokenizer(),
        word_pieces(lower=False),
        word_pieces(["another", "vocabulary"]),
        pytest.param("left", id="padded on the left"),
    ],
)
def test_other_tokens_are_made_for_the_teacher_alone(other):
    if other == "left":
        other = word_pieces()
        other.padding_side = "left"
    student = word_pieces()
    task = prepared(table(), TextProcessor(student), {"teacher/": TextProcessor(other)})
    batch = whole(task, table())
    texts = [text for text, _ in SENTENCES]
    for prefix, tokenizer in {"": student, "teacher/": other}.items():
        alone = tokenizer(texts, padding=True, return_tensors="pt")
        assert all(torch.equal(batch[prefix + name], value) for name, value in alone.items())
    assert {name for name in batch if "/" in name} == {f"teacher/{name}" for name in alone}


def test_of_several_teachers_only_the_others_get_entries():
    teachers = {"teacher/bert/": own(word_pieces()), "teacher/roberta/": TextProcessor(roberta_tokenizer())}
    task = prepared(table(), own(word_pieces(), "token_type_ids"), teachers)
    assert set(whole(task, table())) == {
        *("labels", "sample_id", "input_ids", "attention_mask", "token_type_ids"),
        *("teacher/roberta/input_ids", "teacher/roberta/attention_mask"),
    }


def test_views_are_for_training_alone():
    rows = table()
    task = prepared(rows, augment=[{"mask_words": {"p": 0.5}}])
    plain, seen = whole(task, rows)["input_ids"], whole(task, rows, training=True)["input_ids"]
    assert plain.shape == seen.shape
    assert (seen != plain).any()
    assert (seen[seen != plain] == 4).all()
    assert torch.equal(whole(task, rows, training=True, seed=0)["input_ids"], seen)
    assert not torch.equal(whole(task, rows, training=True, seed=1)["input_ids"], seen)


# the length


def test_texts_are_cut_at_the_length():
    batch = whole(prepared(table(), max_length=4), table())
    assert batch["input_ids"].shape == (8, 4)
    assert (batch["input_ids"][:, 3] == 3).all()
    both = whole(prepared(pairs(), text="premise", pair="claim", max_length=6), pairs())
    assert both["input_ids"].shape == (8, 6)  # the longer of a pair is cut first


def test_each_model_has_the_default_length_or_what_it_takes():
    """The same beside another model as alone: else a student were trained on shorter texts than it is judged on."""
    long, short = word_pieces(), roberta_tokenizer()
    long.model_max_length = 512
    assert prepared(table(), TextProcessor(long)).settings()["max_length"] == 128
    assert prepared(table()).settings()["max_length"] == 64
    task = prepared(
        table(), TextProcessor(long), {"teacher/": TextProcessor(short), "same/": TextProcessor(word_pieces())}
    )
    assert task.settings()["max_length"] == 128
    assert {prefix: each.max_length for prefix, each in task.tokenizers.items()} == {
        "": 128,
        "teacher/": 60,
        "same/": 64,
    }


@pytest.mark.parametrize(("longest", "whose"), [(65, "the student"), (61, "the teacher 'teacher/'")])
def test_a_length_beyond_a_models_limit_is_refused(longest, whose):
    """Past its last position a model stops with an index error, hours later."""
    teachers = {"teacher/": TextProcessor(roberta_tokenizer())}
    with pytest.raises(TaskError, match=f"task.max_length is {longest}, and {whose} takes at most 6"):
        prepared(table(), None, teachers, max_length=longest)


def test_a_length_without_room_for_a_text_is_refused():
    """Transformers' tokenizers then do not cut at all."""
    assert whole(prepared(table(), max_length=2), table())["input_ids"].tolist() == [[2, 3]] * 8
    with pytest.raises(TaskError, match=r"task\.max_length is 2, and the student adds 3 tokens"):
        prepared(pairs(), text="premise", pair="claim", max_length=2)


# tokenised tables


def tokenised(mask: bool = True, pad: bool = False, left: bool = False, tokenizer=None) -> Dataset:
    made = word_pieces() if tokenizer is None else tokenizer
    made.padding_side = "left" if left else "right"
    texts = [text for text, _ in SENTENCES]
    found = made(texts, padding="max_length" if pad else False, max_length=20)
    return table(**{name: found[name] for name in ("input_ids", *(["attention_mask"] if mask else []))})


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_tokens_that_the_table_holds(mask, pad, left):
    """Stored padding must neither be read as words nor cost time, whether or not a mask tells it."""
    rows = tokenised(mask, pad, left)
    task = prepared(rows)
    assert task.label_names == NAMES
    batch, wanted = whole(task, rows), whole(prepared(table()), table())
    assert set(batch) == set(wanted) - {"token_type_ids"}
    assert all(torch.equal(batch[name], wanted[name]) for name in batch)
    data = task.dataset(rows, training=True, seed=0)
    assert data.lengths.tolist() == wanted["attention_mask"].sum(1).tolist()


def test_a_stored_end_that_also_pads_is_kept():
    """A decoder's table may end its texts with the token that also pads: without a mask nobody can tell them apart."""
    rows = table(input_ids=[[4, 5, 1]] * 8)
    task = prepared(rows, TextProcessor(decoder_tokenizer("<end>")))
    assert whole(task, rows)["attention_mask"].tolist() == [[1, 1, 1]] * 8
    rows = table(input_ids=[[4, 5, 1, 1]] * 8, attention_mask=[[1, 1, 1, 0]] * 8)
    assert whole(task, rows)["input_ids"].tolist() == [[4, 5, 1]] * 8


def test_stored_token_types_are_kept():
    tokenizer = word_pieces()
    found = tokenizer([text for text, _ in SENTENCES], SECONDS, padding=True)
    rows = table(**found)
    batch = whole(prepared(rows), rows)
    for name, value in found.items():
        assert batch[name].tolist() == value


def test_tokens_of_one_tokenizer_for_two():
    rows = tokenised()
    task = prepared(rows, None, {"teacher/": TextProcessor(roberta_tokenizer())})
    with pytest.raises(TaskError, match="tokenised already, and teacher and student have different tokenizers"):
        whole(task, rows)
    assert "input_ids" in whole(prepared(rows, None, {"teacher/": TextProcessor(word_pieces())}), rows)


def test_stored_tokens_beyond_a_models_limit():
    rows = table(input_ids=[[5] * 50] + [[5]] * 7)
    assert whole(prepared(rows), rows)["input_ids"].shape == (8, 50)
    short = word_pieces()
    short.model_max_length = 49
    message = "texts of 50 tokens, and the models take at most 49"
    with pytest.raises(TaskError, match=message):
        whole(prepared(rows, TextProcessor(short)), rows)
    with pytest.raises(TaskError, match=message):
        whole(prepared(rows, None, {"teacher/": TextProcessor(short)}), rows)


def test_stored_tokens_cannot_be_augmented():
    """Silently without views, a recipe would be compared that nobody ran."""
    rows = tokenised()
    task = prepared(rows, augment=["swap_words"])
    with pytest.raises(DataError, match="hold only token ids; give the texts as well"):
        whole(task, rows, training=True)
    assert "input_ids" in whole(task, rows)


def test_stored_columns_that_do_not_fit_one_another():
    rows = table(input_ids=[[5, 6]] * 8, token_type_ids=[[0]] * 8)
    with pytest.raises(DataError, match="'token_type_ids' to have as many numbers"):
        whole(prepared(rows), rows)


def test_texts_win_over_stored_tokens():
    rows = tokenised().add_column("text", ["great"] * 8)
    assert whole(prepared(rows), rows)["input_ids"].tolist() == [[2, 14, 3]] * 8


def test_a_column_of_lists_is_not_a_text():
    rows = Dataset.from_dict({"text": [["a"]]}, features=Features({"text": List(Value("string"))}))
    with pytest.raises(TaskError, match="to hold texts"):
        TextClassification().fit(rows)


# what is saved


def test_settings_go_through_json():
    task = prepared(pairs(), text="premise", pair="claim", max_length=9)
    again = TextClassification()
    again.restore(json.loads(json.dumps(task.settings())))
    assert again.settings() == task.settings()
    assert again.facts() == task.facts()
    again.prepare(TextProcessor(word_pieces()), {})
    batch, wanted = whole(again, pairs()), whole(task, pairs())
    assert batch.keys() == wanted.keys()
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_a_default_length_stays_the_one_that_was_trained():
    task = prepared(table())
    again = TextClassification()
    again.restore(json.loads(json.dumps(task.settings())))
    long = word_pieces()
    long.model_max_length = 512
    again.prepare(TextProcessor(long), {})
    assert again.settings() == task.settings()
    assert again.settings()["max_length"] == 64


@pytest.mark.parametrize("tokenizer", [word_pieces(), roberta_tokenizer(), decoder_tokenizer("<end>")])
def test_example_inputs_are_full(tokenizer):
    """Speed is measured on them, and exports are traced with them."""
    task = prepared(table(), TextProcessor(tokenizer), max_length=17)
    example = task.example_inputs(3)
    assert set(example) == set(tokenizer.model_input_names)
    assert all(value.shape == (3, 17) and value.dtype == torch.int64 for value in example.values())
    assert example["attention_mask"].all()
    assert torch.equal(example["input_ids"], task.example_inputs(3)["input_ids"])


# the teacher


def read(folder) -> torch.nn.Module:
    """The model, in numbers so fine that rounding hides no difference."""
    return AUTO.from_pretrained(folder, dtype=torch.float64).eval()


def answers(folder, tokenizer, *texts, without: str = "") -> torch.Tensor:
    """The model's logits, one text at a time, as a person runs it with transformers alone."""
    model = read(folder)
    found = []
    for sample in zip(*texts, strict=True):
        inputs = tokenizer(*([text] for text in sample), return_tensors="pt")
        inputs.pop(without, None)
        with torch.no_grad():
            found.append(model(**inputs).logits)
    return torch.cat(found)


def loud(folder):
    """Enlarge the weights, which start so small that every text gets nearly the same logits."""
    model = AUTO.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)
    return folder


def test_a_bert_teacher_beside_a_distilbert_student_answers_as_alone(tmp_path):
    """The Trainer's own column rule drops token types for a DistilBERT, and the teacher is silently wrong."""
    teacher, student = loud(bert(tmp_path / "t", head=NAMES)), distilbert(tmp_path / "s")
    rows = pairs()
    task = prepared(
        rows, processor(student), {"teacher/": processor(teacher)}, text="premise", pair="claim", max_length=32
    )
    source = Live(read(teacher), forward=task.forward, prefix="teacher/")
    data = task.dataset(rows, training=True, seed=0)
    found = torch.cat([source(data.__getitems__(EVERY[start : start + 3]))["logits"] for start in (0, 3, 6)])
    texts = [text for text, _ in SENTENCES]
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    alone = answers(teacher, tokenizer, texts, SECONDS)
    assert (found - alone).abs().max() < 1e-9
    blind = answers(teacher, tokenizer, texts, SECONDS, without="token_type_ids")
    assert (blind - alone).abs().max() > 0.1
    assert alone.std(0).min() > 0.05
    model = AUTO.from_pretrained(student, num_labels=2)
    assert task.forward(model, data.__getitems__(EVERY))["logits"].shape == (8, 2)


def test_a_roberta_teacher_beside_a_bert_student_answers_as_alone(tmp_path):
    teacher, student = loud(roberta(tmp_path / "t", head=NAMES)), loud(bert(tmp_path / "s", head=NAMES))
    rows = pairs()
    task = prepared(
        rows, processor(student), {"teacher/": processor(teacher)}, text="premise", pair="claim", max_length=60
    )
    source = Live(read(teacher), forward=task.forward, prefix="teacher/")
    data = task.dataset(rows, training=True, seed=0)
    found = torch.cat([source(data.__getitems__(EVERY[start : start + 3]))["logits"] for start in (0, 3, 6)])
    texts = [text for text, _ in SENTENCES]
    alone = answers(teacher, transformers.AutoTokenizer.from_pretrained(teacher), texts, SECONDS)
    assert (found - alone).abs().max() < 1e-9
    wrong = Live(read(teacher), forward=task.forward, prefix="nobody/")
    assert (wrong(data.__getitems__(EVERY))["logits"] - alone).abs().max() > 0.1
    mine = task.forward(read(student), data.__getitems__(EVERY))["logits"]
    alone = answers(student, transformers.AutoTokenizer.from_pretrained(student), texts, SECONDS)
    assert (mine - alone).abs().max() < 1e-9


def test_what_a_person_sees_of_a_row():
    rows = pairs()
    seen = prepared(rows, text="premise", pair="claim").show(rows, [4, 1])
    assert seen == [
        [
            {"name": "premise", "kind": "text", "value": SENTENCES[place][0]},
            {"name": "claim", "kind": "text", "value": SECONDS[place]},
        ]
        for place in (4, 1)
    ]


def test_tokens_are_shown_as_text():
    rows = table()
    tokens = word_pieces()([text for text, _ in SENTENCES])["input_ids"]
    given = table(input_ids=tokens)
    seen = prepared(rows).show(given, [0])
    assert seen[0][0]["value"] == word_pieces().decode(tokens[0], skip_special_tokens=True)
