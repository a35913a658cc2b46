"""A teacher in another precision or compiled: the same signals, faster, or a word why not."""

from __future__ import annotations

import json
import logging
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from potstill.errors import ComponentError, SignalError, TrainingError
from potstill.interfaces import Batch
from potstill.models.plain import ConvNet, Mlp
from potstill.teachers import forms, live, precision
from potstill.teachers.compiled import Compiled
from potstill.teachers.forms import Faithfulness, faithfulness, fastest, has_native_bf16
from potstill.teachers.live import Live
from potstill.teachers.precision import tried_precision
from potstill.training.precision import matrix_products
from tests.training import tiny

TAPS = ["hidden.1", "attention.2", "query.1", "bert.encoder.layer.0.output", "clone:bert.embeddings"]


def texts(count: int, length: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (count, length), generator=draw)
    mask = torch.arange(length)[None] < torch.randint(3, length + 1, (count, 1), generator=draw)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "sample_id": torch.arange(count)}


def rows(count: int = 6) -> Batch:
    return {"features": torch.randn(count, 4, generator=torch.Generator().manual_seed(0))}


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def untranslated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces as always, and runs what was traced as it is: a compiler that takes no time."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(live, "Compiled", partial(Compiled, backend="eager"))


class Broken(nn.Module):
    """A model that cannot be one graph: the way depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.first(x)
        return self.last(inner * 2 if inner.sum().item() > 0 else inner)


# ---- precision -----------------------------------------------------------------------------------------------------


def test_by_default_it_answers_in_the_precision_of_its_caller():
    teacher = Live(tiny.teacher())
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(texts(4, 8))["logits"].dtype == torch.bfloat16
    assert teacher(texts(4, 8))["logits"].dtype == torch.float32


def test_a_precision_of_its_own_holds_whatever_that_of_the_caller_is():
    model, batch = tiny.teacher(), texts(4, 8)
    plain = Live(model, TAPS)
    exact = plain(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = plain(batch)
    assert not torch.equal(half["logits"].float(), exact["logits"])
    for caller in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=caller):
            assert equal(Live(model, TAPS, precision="fp32")(batch), exact)
            assert equal(Live(model, TAPS, precision="bf16")(batch), half)


@pytest.mark.parametrize(("own", "inside"), [(None, "medium"), ("fp32", "highest"), ("bf16", "medium")])
def test_fp32_is_not_made_of_bf16_products(own: Any, inside: str):
    seen = []

    def forward(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        return {"logits": model(batch["features"])}

    with matrix_products("medium"):
        Live(Mlp(4, 3, [8]), forward=forward, precision=own)(rows())
        assert torch.get_float32_matmul_precision() == "medium"
    assert seen == [inside]


def test_fp16_is_refused_on_a_cpu_where_it_is_slow():
    teacher = Live(tiny.teacher(), precision="fp16")  # it may be moved yet
    for ask in (lambda: teacher(texts(2, 6)), lambda: teacher.to("cpu")):
        with pytest.raises(TrainingError, match=r"fp16 is three to four times slower .* use bf16"):
            ask()


def test_a_precision_that_there_is_not():
    with pytest.raises(TrainingError, match="no precision 'bf17'; did you mean 'bf16'"):
        Live(tiny.teacher(), precision="bf17")  # type: ignore[arg-type]


def test_int8_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(ComponentError, match=r"needs torchao: pip install 'potstill\[int8\]'"):
        Live(tiny.teacher(), precision="int8")
    with pytest.raises(ComponentError, match=r"potstill\[int8\]"):
        tried_precision("int8")


def test_before_the_training_a_teacher_is_tried_in_its_precision_uncompiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "find_spec", lambda name: object())
    assert [tried_precision(each) for each in (None, "fp32", "bf16", "fp16")] == [None, "fp32", "bf16", "fp16"]
    assert [tried_precision(each) for each in ("auto", "int8")] == [None, None]
    assert Live(tiny.teacher(), precision="int8").compile, "without which int8 gains nothing"


@pytest.mark.slow
def test_int8_multiplies_in_a_copy_and_is_compiled():
    pytest.importorskip("torchao")
    model, batch = tiny.teacher(), texts(8, 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher, exact = Live(model, ["hidden.1"], precision="int8"), Live(model, ["hidden.1"])(batch)
    found = teacher(batch)
    assert teacher.is_compiled
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.classifier.weight) is nn.Parameter
    for name in ("logits", "hidden.1"):
        apart = float((found[name] - exact[name]).norm() / exact[name].norm())
        assert 1e-5 < apart < 0.1


@pytest.mark.parametrize(
    ("known", "native"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False)],
)
def test_bf16_of_the_cpu_itself(monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], native: bool):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert has_native_bf16("cpu") is native


def test_bf16_that_a_gpu_emulates_does_not_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert has_native_bf16(torch.device("cuda", 0)) is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert has_native_bf16("cuda") is True
    assert has_native_bf16("meta") is False


# ---- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untranslated")
def test_taps_of_a_compiled_teacher_say_the_same_for_texts_of_any_length():
    model = tiny.teacher()
    compiled, plain = Live(model, TAPS, compile=True), Live(model, TAPS)
    for length in (10, 12, 7, 9, 11, 5, 17):
        batch = texts(8, length, seed=length)
        assert equal(compiled(batch), plain(batch))
    assert compiled.is_compiled
    assert counters["stats"]["unique_graphs"] <= 2, "compiled again for a length"


@pytest.mark.usefixtures("untranslated")
def test_many_compiled_teachers_in_one_process_are_all_compiled():
    """The tracer counts how often a code object was compiled, and stops at eight: models of one class share theirs."""
    for seed in range(10):
        torch.manual_seed(seed)
        model = Mlp(4, 3, [8])
        teacher = Live(model, compile=True)
        assert equal(teacher(rows()), Live(model)(rows()))
        assert teacher.is_compiled
        assert counters["stats"]["unique_graphs"] == seed + 1


@pytest.mark.usefixtures("untranslated")
def test_a_mistake_is_told_as_without_compilation():
    with pytest.raises(SignalError, match="did you mean 'stages"):
        Live(ConvNet(1, 3, [4]), ["stage.0"], compile=True)({"pixel_values": torch.randn(2, 1, 8, 8)})
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Live(Mlp(4, 3, [8]), compile=True)({"features": torch.randn(2, 5)})


@pytest.mark.usefixtures("untranslated")
@pytest.mark.parametrize("taps", [[], ["first"]])
def test_what_is_no_single_graph_answers_right(taps: list[str], caplog: pytest.LogCaptureFixture):
    model = Broken()
    teacher = Live(model, taps, compile=True)
    with caplog.at_level(logging.WARNING, "potstill"):
        for count in (6, 7, 6):
            assert equal(teacher(rows(count)), Live(model, taps)(rows(count)))
    assert not teacher.is_compiled
    assert len([line for line in caplog.messages if "answers uncompiled" in line]) == 1


def test_compiled_code_and_weights_that_change():
    """In bf16 the weights are constants of the compiled code: a teacher that changed must not answer as it was."""
    torch._dynamo.reset()
    model = Mlp(4, 3, [8])
    teacher, plain = (Live(model, precision="bf16", compile=compiled) for compiled in (True, False))
    for _ in range(2):
        torch.testing.assert_close(teacher(rows())["logits"], plain(rows())["logits"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    assert teacher.is_compiled


def test_without_a_compiler_it_answers_uncompiled_after_one_warning(caplog: pytest.LogCaptureFixture):
    torch._dynamo.reset()
    model = Mlp(4, 3, [8])
    teacher = Live(model, compile=True)
    nowhere = {"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}
    with torch._inductor.config.patch(nowhere), caplog.at_level(logging.WARNING, "potstill"):
        for _ in range(3):
            assert equal(teacher(rows()), Live(model)(rows()))
    told = [record.getMessage() for record in caplog.records if record.name == "potstill"]
    assert len(told) == 1
    assert "cannot be compiled, so it answers uncompiled" in told[0]
    assert "C++ compiler" in told[0]
    assert not teacher.is_compiled


# ---- faithfulness --------------------------------------------------------------------------------------------------


def says(*logits: Any) -> Any:
    """A source that says one thing after the other."""
    answers = iter(logits)
    return lambda batch: {"logits": torch.as_tensor(next(answers))}


def test_how_like_two_sources_answer():
    exact = says([[2.0, 0.0], [0.0, 1.0]], [[3.0, 0.0]])
    fast = says([[1.0, 0.0], [1.0, 0.5]], [[3.0, 0.0]])
    found = faithfulness(fast, exact, [{}, {}])

    def kl(wanted: float, own: float) -> float:
        """Of two classes, from the differences of their logits."""
        p, q = (1 / (1 + math.exp(-each)) for each in (wanted, own))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    assert found.samples == 3
    assert found.agreement == pytest.approx(2 / 3)
    assert found.largest == 1.0
    assert found.divergence == pytest.approx((kl(2, 1) + kl(-1, 0.5)) / 3)


def test_a_single_logit_is_that_of_two_classes():
    found = faithfulness(says([[1.0], [-1.0]]), says([[1.0], [1.0]]), [{}])
    assert found.agreement == 0.5
    assert found.divergence == pytest.approx(math.tanh(0.5) / 2)


def test_padded_positions_are_left_out():
    exact, fast = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)
    exact[0, :, 0] = 1.0
    fast[0, :2, 0], fast[0, 2, 1] = 1.0, 9.0
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert faithfulness(says(fast), says(exact), [batch]) == Faithfulness(1.0, 0.0, 0.0, 2)
    assert faithfulness(says(fast), says(exact), [{}]).agreement == pytest.approx(2 / 3)


def test_impossible_classes_are_like_each_other_and_nan_is_like_nothing():
    impossible = [[0.0, -math.inf]]
    assert faithfulness(says(impossible), says(impossible), [{}]) == Faithfulness(1.0, 0.0, 0.0, 1)
    found = faithfulness(says([[math.nan, 0.0]]), says([[1.0, 0.0]]), [{}])
    assert math.isnan(found.divergence)
    assert math.isnan(found.largest)


def test_nothing_to_compare():
    with pytest.raises(TrainingError, match="got none"):
        faithfulness(says(), says(), [])
    with pytest.raises(TrainingError, match="by their logits, and it gives hidden"):
        faithfulness(lambda batch: {"hidden": torch.ones(1)}, lambda batch: {"hidden": torch.ones(1)}, [{}])


# ---- the fastest form ----------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Times by the book in place of a clock: bf16 takes half of what fp32 takes, and compiled forms a tenth of it."""
    turns: list[str] = []

    def seconds(source: Live, batches: Any, device: torch.device) -> float:
        turns.append(f"{source.precision}{'+' * source.compile}")
        return {"fp32": 2.0, "bf16": 1.0, "int8": 1.0}[str(source.precision)] / (10 if source.compile else 1)

    monkeypatch.setattr(forms, "_seconds", seconds)
    monkeypatch.setattr(forms, "has_native_bf16", lambda device: True)
    monkeypatch.setattr(forms, "find_spec", lambda name: None)
    return turns


BATCHES = [texts(8, 10, seed=1), texts(8, 7, seed=2)]


def test_the_fastest_of_the_faithful_forms(timed: list[str]):
    model = tiny.teacher()
    choice = fastest(model, BATCHES, taps=["hidden.1"], repeats=3)
    assert str(choice.form) == "bf16"
    assert [str(form) for form in choice.forms] == ["fp32", "bf16"]
    assert equal(choice.live(BATCHES[0]), Live(model, ["hidden.1"], precision="bf16")(BATCHES[0]))
    assert timed == ["fp32", "bf16", "bf16", "fp32", "fp32", "bf16"], "timed in turns"
    exact, half = choice.forms
    assert (exact.seconds, half.seconds) == (2.0, 1.0)
    assert exact.faithfulness == Faithfulness(1.0, 0.0, 0.0, 16)
    assert 0 < half.faithfulness.divergence < 1e-3


@pytest.mark.parametrize("limits", [{"divergence": 1e-12}, {"agreement": 1.1}])
def test_a_form_that_says_something_else_is_not_taken(timed: list[str], limits: dict[str, float]):
    choice = fastest(tiny.teacher(), BATCHES, **limits)
    assert str(choice.form) == "fp32"
    assert [form.is_faithful for form in choice.forms] == [True, False]


def test_where_bf16_is_emulated_there_is_nothing_to_choose(timed: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forms, "has_native_bf16", lambda device: False)
    assert [str(form) for form in fastest(tiny.teacher(), BATCHES).forms] == ["fp32"]


@pytest.mark.usefixtures("untranslated")
def test_compiled_forms_where_they_are_allowed(timed: list[str]):
    choice = fastest(tiny.teacher(), BATCHES, compile=True)
    assert [str(form) for form in choice.forms] == ["fp32", "bf16", "fp32, compiled", "bf16, compiled"]
    assert str(choice.form) == "bf16, compiled"
    assert choice.live.is_compiled


@pytest.mark.usefixtures("untranslated")
def test_a_form_that_cannot_be_compiled_is_no_form(timed: list[str], caplog: pytest.LogCaptureFixture):
    choice = fastest(Broken(), [rows()], taps=["first"], compile=True)
    assert [str(form) for form in choice.forms] == ["fp32", "bf16"]


def test_all_that_was_measured_is_plain_json(timed: list[str]):
    choice = fastest(tiny.teacher(), BATCHES)
    plain = json.loads(json.dumps(choice.plain(), allow_nan=False))
    assert (plain["precision"], plain["compile"]) == ("bf16", False)
    assert [form["precision"] for form in plain["forms"]] == ["fp32", "bf16"]
    assert plain["forms"][1]["faithfulness"]["samples"] == 16
    wrong = forms.Form("bf16", False, 1.0, Faithfulness(0.0, math.nan, math.inf, 1), False)
    assert forms.Choice(choice.live, wrong, (wrong,)).plain()["forms"][0]["faithfulness"]["divergence"] is None


def test_a_clock_tells_the_time():
    choice = fastest(Mlp(4, 3, [8]), [rows()], repeats=1)
    assert all(form.seconds > 0 for form in choice.forms)
