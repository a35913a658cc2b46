"""Module replacing: mixtures of the student's and the teacher's blocks, on BERT, GPT-2, ViT and plain stacks."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn

from potstill.errors import ModelError, TrainingError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.models.student import cut
from potstill.registry import schemes
from potstill.schemes.lesson import Extension, Learner, Lesson
from potstill.teachers.live import Live
from potstill.training.module import DistillationModule

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
START = Progress(0, 10)


def bert(layers=4, **config):
    torch.manual_seed(layers)
    settings = transformers.BertConfig(num_hidden_layers=layers, vocab_size=20, **{**SIZES, **config})
    return transformers.BertForSequenceClassification(settings)


def gpt2(layers=4):
    torch.manual_seed(layers)
    sizes = {"n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 20, "pad_token_id": 0}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(n_layer=layers, **sizes))


def llama(layers=4):
    torch.manual_seed(layers)
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, vocab_size=20, num_key_value_heads=1, pad_token_id=0, **SIZES
    )
    return transformers.LlamaForSequenceClassification(config)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, hidden):
        return self.map(hidden).tanh()


class Plain(nn.Module):
    def __init__(self, layers=4, width=8):
        super().__init__()
        self.stem = nn.Embedding(20, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids):
        return self.head(self.blocks(self.stem(input_ids)).mean(1))


PATHS = {bert: "bert.encoder.layer", gpt2: "transformer.h", llama: "model.layers", Plain: "blocks"}


def batch(size=4):
    ids = torch.randint(1, 20, (size, 5), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.arange(size) % 2, "sample_id": torch.arange(size)}


def arranged(teacher, student, terms=None, seed=0, others=None, **options) -> Lesson:
    objective = Objective(terms or {"hard": Term("cross_entropy")})
    lesson = Lesson(Learner(student, objective), others or {}, {"teacher": Live(teacher)}, seed)
    return schemes.get("module_replacing")(**options).arrange(lesson)


def pair(make=bert, keep=(0, 3)):
    """A teacher in train mode whose parameters want gradients, and a student that is no copy of its blocks."""
    teacher = make()
    student = cut(teacher, list(keep), container=PATHS[make])
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return teacher, student.eval()


def logits(model, entries):
    output = model(entries["input_ids"])
    return output if isinstance(output, torch.Tensor) else output.logits


def answer(extension, student, entries, progress=START):
    with extension.around(student, entries, progress):
        return logits(student, entries)


def by_hand(teacher, student, path, drawn):
    """The mixture as a model of its own: the student with another list of blocks."""
    mixture = copy.deepcopy(student)
    own, long = list(mixture.get_submodule(path)), list(copy.deepcopy(teacher).get_submodule(path))
    blocks = []
    for place, stays in enumerate(drawn):
        blocks += [own[place]] if stays else long[2 * place : 2 * place + 2]
    parent, _, name = path.rpartition(".")
    setattr(mixture.get_submodule(parent), name, nn.ModuleList(blocks) if path != "blocks" else nn.Sequential(*blocks))
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    if hasattr(mixture, "config"):
        mixture.config.num_hidden_layers = len(blocks)
    return mixture.eval()


@pytest.mark.parametrize("make", [bert, gpt2, llama, Plain])
def test_every_mixture_is_that_made_by_hand(make):
    """GPT-2 and Llama keep a cache of keys by the number of a block, which two models' blocks must not share."""
    teacher, student = pair(make)
    extension = arranged(teacher, student, probability=0.5).student.extension
    seen = set()
    for step in range(30):
        progress = Progress(step, 10_000)
        drawn = tuple(extension.drawn(batch(), progress))
        if drawn not in seen:
            seen.add(drawn)
            expected = logits(by_hand(teacher.eval(), student, PATHS[make], drawn), batch())
            torch.testing.assert_close(answer(extension, student, batch(), progress), expected)
    assert len(seen) == 4


def test_at_1_it_is_the_student_and_at_0_the_teacher_s_blocks():
    teacher, student = pair()
    alone = arranged(teacher, student, probability=1.0).student.extension
    assert torch.equal(answer(alone, student, batch()), logits(student, batch()))
    none = arranged(teacher, student, probability=0.0).student.extension
    whole = copy.deepcopy(teacher).eval()
    theirs = dict(whole.named_parameters())
    for name, parameter in student.named_parameters():
        if "encoder.layer" not in name:
            theirs[name].data.copy_(parameter.data)
    torch.testing.assert_close(answer(none, student, batch()), logits(whole, batch()))


def test_gradients_reach_the_drawn_blocks_alone():
    teacher, student = pair()
    extension = arranged(teacher, student).student.extension
    step = next(s for s in range(99) if extension.drawn(batch(), Progress(s, 1000)) == [True, False])
    answer(extension, student, batch(), Progress(step, 1000)).sum().backward()
    first, second = student.bert.encoder.layer
    assert all(p.grad is not None for p in first.parameters()), "through the teacher's blocks above it"
    assert all(p.grad is None for p in second.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert student.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert all(p.requires_grad for p in teacher.parameters()), "left as it was found"


def test_nothing_of_the_teacher_is_registered_and_all_is_put_back():
    teacher, student = pair()
    extension = arranged(teacher, student, probability=0.0).student.extension
    blocks, state = list(student.bert.encoder.layer), {k: v.clone() for k, v in student.state_dict().items()}
    assert list(extension.state_dict()) == []
    assert list(extension.parameters()) == []
    theirs, held = {id(p) for p in teacher.parameters()}, []

    def fail():
        held.extend(id(p) for p in student.parameters())
        raise RuntimeError

    with pytest.raises(RuntimeError), extension.around(student, batch(), START):
        fail()
    assert held
    assert not theirs & set(held)
    assert all(one is other for one, other in zip(student.bert.encoder.layer, blocks, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    decoder, small = pair(gpt2)
    extension = arranged(decoder, small, probability=0.0).student.extension
    answer(extension, small, batch())
    assert small.config.use_cache is True


def test_teacher_s_blocks_have_no_dropout():
    teacher, student = pair()
    extension = arranged(teacher, student, probability=0.0).student.extension
    teacher.train()
    assert torch.equal(answer(extension, student, batch()), answer(extension, student, batch()))


def test_the_schedules():
    def values(total, **options):
        scheme = schemes.get("module_replacing")(**options)
        return [scheme.probability_at(Progress(step, total)) for step in range(total + 1)]

    assert values(10, probability=0.2, end=0.5, schedule="linear") == pytest.approx(
        [0.2, 0.36, 0.52, 0.68, 0.84, 1, 1, 1, 1, 1, 1]
    )
    assert values(10, probability=0.3, end=0.3, schedule="constant") == [0.3] * 3 + [1.0] * 8
    assert values(4, probability=0.3, end=1.0, schedule="constant") == [0.3] * 5
    assert values(4, probability=0.0, end=1.0, schedule="linear") == [0, 0.25, 0.5, 0.75, 1]


def test_draws_are_a_function_of_seed_step_and_samples():
    teacher, student = pair()
    one, other, seeded = (arranged(teacher, student, seed=seed).student.extension for seed in (0, 0, 1))
    steps = [Progress(step, 10_000) for step in range(200)]
    drawn = [one.drawn(batch(), each) for each in steps]
    torch.manual_seed(123)  # after a resume the global generator is anywhere
    assert [other.drawn(batch(), each) for each in steps] == drawn
    assert [seeded.drawn(batch(), each) for each in steps] != drawn
    later = {**batch(), "sample_id": torch.arange(4) + 4}
    assert [one.drawn(later, each) for each in steps] != drawn
    counts = Counter(tuple(each) for each in drawn)
    assert len(counts) == 4
    assert all(30 <= count <= 70 for count in counts.values()), "p = 0.5 for each block by itself"


def test_the_teacher_s_blocks_are_split_evenly():
    teacher = bert(7)
    student = cut(teacher, [0, 2, 5])
    extension = arranged(teacher, student).student.extension
    numbers = {id(block): number for number, block in enumerate(teacher.bert.encoder.layer)}
    assert [[numbers[id(block)] for block in group] for group in extension._groups] == [[0, 1], [2, 3], [4, 5, 6]]


def test_embeddings_and_head_can_be_frozen():
    teacher = bert()
    student = cut(teacher, [0, 3])
    extension = arranged(teacher, student, probability=0.0, freeze=True).student.extension
    answer(extension, student, batch(), Progress(1, 1000)).sum().backward()
    with_gradient = {name.split(".")[3] for name, p in student.named_parameters() if p.grad is not None}
    assert with_gradient == {"1"}, "one block learns in any case: the one of step 1"
    assert all(p.requires_grad for p in student.parameters())
    student.zero_grad()
    answer(extension, student, batch(), Progress(500, 1000)).sum().backward()
    assert all(p.grad is not None for p in student.classifier.parameters())
    with torch.no_grad():
        student.classifier.bias.add_(1.0)
    with pytest.raises(TrainingError, match=r"'classifier\.bias' is not; cut it with"):
        arranged(teacher, student, freeze=True)


def test_a_student_whose_rest_is_frozen_learns_in_every_batch():
    """Else a batch without a drawn block has a loss without a gradient, and backward fails."""
    teacher, student = pair()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("encoder.layer" in name)
    extension = arranged(teacher, student, probability=0.0).student.extension
    answer(extension, student, batch()).sum().backward()
    assert sum(p.grad is not None for p in student.parameters()) > 0


def test_in_training_and_in_evaluation():
    teacher, student = pair()
    learner = arranged(teacher, student, probability=0.0).student
    module = DistillationModule(student, learner.objective, extension=learner.extension)
    expected = logits(student, batch())
    assert torch.equal(module.eval()(**batch()).logits, expected)
    said = []

    @contextmanager
    def seen(model, entries, progress):
        with Extension.around(learner.extension, model, entries, progress):
            said.append(progress)
            yield

    module.train()
    output = module({}, progress=START, **batch())
    assert not torch.allclose(output.logits, expected, atol=1e-3)
    learner.extension.around = seen
    module({}, progress=Progress(3, 10), **batch())
    assert said == [Progress(3, 10)]


def test_what_cannot_be_arranged():
    teacher, student = pair()
    with pytest.raises(TrainingError, match=r"of one width, .* got 8 of the student and 16 of the teacher"):
        arranged(bert(hidden_size=16), student)
    with pytest.raises(TrainingError, match="got 4 of Block for 2 of BertLayer"):
        arranged(Plain(), student)
    with pytest.raises(ModelError, match=r"got 'bert\.layers'; did you mean 'bert\.encoder\.layer'"):
        arranged(teacher, student, container="bert.layers")
    with pytest.raises(TrainingError, match="got 2 of BertLayer for 4 of BertLayer"):
        arranged(student, teacher)
    with pytest.raises(TrainingError, match="of one dtype"):
        arranged(bert().to(torch.bfloat16), student)
    lesson = Lesson(Learner(student, extension=Extension()), {}, {"teacher": Live(teacher)})
    with pytest.raises(TrainingError, match="got one with Extension"):
        schemes.get("module_replacing")().arrange(lesson)
    with pytest.raises(TrainingError, match="expected a probability from 0 to 1"):
        schemes.get("module_replacing")(probability=1.5)


def test_which_teacher():
    teacher, student = pair()
    learner, scheme = Learner(student), schemes.get("module_replacing")
    with pytest.raises(TrainingError, match="expected one trained teacher, got none"):
        scheme().arrange(Lesson(learner))
    both = {"large": Live(teacher), "cached": lambda entries: {}}
    with pytest.raises(TrainingError, match="got large, cached; say which"):
        scheme().arrange(Lesson(learner, {}, both))
    with pytest.raises(TrainingError, match="did you mean 'large'"):
        scheme(teacher="larg").arrange(Lesson(learner, {}, both))
    with pytest.raises(TrainingError, match="expected a teacher that is a model, got function"):
        scheme(teacher="cached").arrange(Lesson(learner, {}, both))
    assert scheme(teacher="large").arrange(Lesson(learner, {}, both)).student.extension is not None


@pytest.mark.parametrize("signal", ["hidden.1", "attention.2", "bert.encoder.layer.0.output", "bert.encoder"])
def test_terms_on_blocks_are_refused(signal):
    teacher, student = pair()
    with pytest.raises(TrainingError, match=f"the term 'hint' reads '{signal}' of the student"):
        arranged(teacher, student, {"hint": Term("mse", student=signal, teacher="hidden.1")})


def test_terms_of_others_on_blocks_are_refused_too():
    teacher, student = pair()
    peer = Learner(bert(), Objective({"hint": Term("mse", student="hidden.1", teacher="student/hidden.2")}))
    with pytest.raises(TrainingError, match=r"reads 'hidden.2' of the student"):
        arranged(teacher, student, others={"peer": peer})
    arranged(teacher, student, {"soft": Term("kl"), "end": Term("mse", student="bert.pooler", teacher="bert.pooler")})
