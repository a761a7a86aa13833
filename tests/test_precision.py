"""Precision, measured: plans, what they put into force, what they refuse."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weft import PrecisionBudget, PrecisionPlan, optimize, plan_precision, undo
from weft.quant.formats import FORMATS
from weft.rewrite.errors import CalibrationError, OptionError, PrecisionError, UndoError

BNB: Any = bnb.nn


def llama(**options: Any) -> LlamaForCausalLM:
    """A small Llama with weights as large as trained ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"vocab_size": 64, "num_hidden_layers": 1, "initializer_range": 0.2, **sizes, **options}
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def gpt2() -> GPT2LMHeadModel:
    """A small GPT-2, whose linears lie by columns."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=1)
    ).eval()


def batches(count: int = 1) -> list[dict[str, Tensor]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 64, (2, 24), generator=generator)} for _ in range(count)]


def logits(model: nn.Module) -> Tensor:
    """Of the first batch."""
    with torch.no_grad():
        return model(**batches()[0]).logits


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that planning must not change."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state | {f"training {n}": m.training for n, m in model.named_modules()}


def assert_as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
    """Bit for bit, and no forward or hook left behind."""
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value, name
    assert not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_plan_knows_every_linear_and_leaves_the_model_as_it_was(make: Any) -> None:
    model = make().train()
    before = snapshot(model)
    plan = plan_precision(model, batches(), measurements=6)
    assert_as_it_was(model, before)
    linears = {n for n, p in model.named_parameters() if p.dim() == 2 and "wpe" not in n and "embed" not in n}
    assert {layer.path for layer in plan.layers} == {n.removesuffix(".weight") for n in linears}
    free = [layer for layer in plan.layers if not layer.pinned]
    assert len(free) == len(plan.layers) - 1  # the head, or the embedding that is one
    for layer in free:
        sensitivity = {o.format: o.sensitivity for o in layer.options}
        assert sensitivity["16-bit"] == 0 < sensitivity["nf4"]
        assert sensitivity["int8"] < sensitivity["nf4"]
    assert plan.curve[0].bytes < plan.curve[-1].bytes and plan.curve[0].kl > plan.curve[-1].kl
    assert "were given" in plan.notes[0]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_budget_is_kept_and_what_is_measured_is_what_runs(make: Any) -> None:
    model = make()
    original = logits(model)
    probabilities = original.log_softmax(-1)
    plan = plan_precision(model, batches(), measurements=1)
    room = (plan.smallest_bytes + plan.curve[-1].bytes) // 2
    budget = PrecisionBudget(memory=room, formats=("nf4", "nf4-feedback", "16-bit"))
    optimize(model, precision=budget, calibration=batches(), keep_weights=True)
    chosen = model.rewrite_report.precision
    assert chosen.total_bytes <= room and chosen.kl is not None
    held = {t.data_ptr(): t.nbytes for t in _tensors(model)}
    assert sum(held.values()) == chosen.total_bytes
    after = logits(model).log_softmax(-1)
    kl = float((probabilities.exp() * (probabilities - after)).sum(-1).mean())
    assert kl == pytest.approx(chosen.kl, rel=5e-2, abs=1e-6)  # bitsandbytes' CPU product may run in bfloat16
    for choice in chosen.choices:
        module = model.get_submodule(choice.module_path)
        assert isinstance(module, BNB.Linear4bit) == FORMATS[choice.format].is_4bit
    undo(model)
    assert torch.equal(logits(model), original)


def _tensors(model: nn.Module) -> list[Tensor]:
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            nested = state.state2
            found += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
    return [t for t in found if t.numel()]


def test_uniform_nf4_is_never_better() -> None:
    model = llama(num_hidden_layers=2)
    plan = plan_precision(model, batches(), formats=("nf4", "16-bit"), measurements=8)
    room = (plan.smallest_bytes + plan.curve[-1].bytes) // 2
    chosen = plan_precision(model, batches(), budget=PrecisionBudget(room, formats=("nf4", "16-bit")), measurements=8)
    uniform = tuple(layer.smallest.format for layer in chosen.layers)
    measured = {m.formats: m.kl for m in chosen.measured}
    assert chosen.kl is not None and chosen.kl <= measured[uniform]
    assert chosen.kl == min(kl for f, kl in measured.items() if chosen._bytes(f) + chosen.fixed_bytes <= room)


def test_the_same_twice() -> None:
    first, second = (plan_precision(llama(), batches(), measurements=4) for _ in range(2))
    assert first == second


def test_a_limit_on_the_divergence() -> None:
    model = llama()
    plan = plan_precision(model, batches(), measurements=4)
    limit = (plan.curve[0].kl + plan.curve[-1].kl) / 3
    found = plan_precision(model, batches(), budget=PrecisionBudget(max_kl=limit), measurements=8)
    assert found.kl is not None and found.kl <= limit
    assert found.total_bytes < plan.curve[-1].bytes


def test_a_plan_is_put_into_force_on_another_copy(tmp_path: Any) -> None:
    model, other = llama(), llama()
    room = PrecisionBudget("100 KB", formats=("nf4", "nf4-feedback", "16-bit"))
    plan = plan_precision(model, batches(), budget=PrecisionBudget(10**9, formats=room.formats), measurements=3)
    plan = plan.at(memory=(plan.smallest_bytes + plan.curve[-1].bytes) // 2)
    plan.to_json(tmp_path / "plan.json")
    again = PrecisionPlan.from_json(tmp_path / "plan.json")
    optimize(model, precision=plan, calibration=batches())
    optimize(other, precision=again, calibration=batches())
    assert torch.equal(logits(model), logits(other))


def test_without_keeping_the_weights_undo_says_so() -> None:
    model = optimize(llama(), precision=PrecisionBudget(10**9, formats=("nf4", "16-bit")), calibration=batches())
    undo_able = not any(f != "16-bit" for f in model.rewrite_report.precision.formats)
    if not undo_able:
        with pytest.raises(UndoError, match="keep_weights"):
            undo(model)
    with pytest.raises(OptionError, match="optimized already"):
        optimize(model, precision=PrecisionBudget(10**9))


def test_calibration_of_its_own_is_said() -> None:
    plan = plan_precision(llama(), measurements=1)
    assert "random tokens" in plan.notes[0]


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ([], CalibrationError, "empty"),
    "no mapping": ([torch.ones(2)], CalibrationError, "not a mapping"),
    "one mapping": (batches()[0], CalibrationError, "one mapping a batch"),
    "an empty tensor": ([{"input_ids": torch.zeros(0, 3, dtype=torch.long)}], CalibrationError, "empty"),
    "NaN": ([{"inputs_embeds": torch.full((1, 3, 64), torch.nan)}], CalibrationError, "NaN"),
    "another width": ([{"inputs_embeds": torch.zeros(1, 3, 65)}], CalibrationError, "calibration batch"),
    "all padding": (
        [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.zeros(1, 3, dtype=torch.long)}],
        CalibrationError,
        "keeps no token",
    ),
    "unknown tokens": ([{"input_ids": torch.full((1, 3), 1000)}], CalibrationError, "calibration batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration(name: str) -> None:
    given, kind, words = BAD[name]
    model = llama()
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        optimize(model, precision=PrecisionBudget("1GB"), calibration=given)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_with_nan_or_infinity_is_named(bad: float) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = bad
    before = {k: v.nan_to_num() for k, v in snapshot(model).items() if isinstance(v, Tensor)}
    with pytest.raises(PrecisionError, match=r"layers\.0\.mlp\.up_proj"):
        optimize(model, precision=PrecisionBudget("1GB"), calibration=batches())
    assert all(torch.equal(model.state_dict()[k].nan_to_num(), v) for k, v in before.items())


def test_a_budget_too_small_names_the_smallest() -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(PrecisionError, match="smallest that can be met"):
        optimize(model, precision=PrecisionBudget("10 KB"), calibration=batches())
    assert_as_it_was(model, before)


def test_a_plan_for_other_shapes_and_a_model_quantized_already() -> None:
    plan = plan_precision(llama(), batches(), formats=("nf4", "16-bit"), measurements=1)
    other = llama(intermediate_size=192)
    before = snapshot(other)
    with pytest.raises(PrecisionError, match="in this model"):
        optimize(other, precision=plan)
    assert_as_it_was(other, before)
    model = optimize(llama(), precision=plan)
    with pytest.raises(PrecisionError, match="quantized already"):
        plan_precision(model, batches())
    with pytest.raises(OptionError, match="PrecisionBudget"):
        optimize(llama(), precision="4bit")


def test_feedback_without_calibration_is_refused() -> None:
    model = llama()
    plan = plan_precision(model, batches(), formats=("nf4-feedback", "16-bit"), measurements=1)
    with pytest.raises(PrecisionError, match="calibration"):
        optimize(model, precision=plan)


def test_trained_weights_and_small_ones_stay_as_they_are() -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    plan = plan_precision(model, batches(), formats=("nf4", "16-bit"), measurements=1)
    pinned = {layer.path.rpartition(".")[2]: layer.pinned for layer in plan.layers if layer.pinned}
    assert "trained" in pinned["down_proj"] and set(pinned) == {"down_proj", "lm_head"}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plan = plan_precision(model, batches(), formats=("nf4", "16-bit"), measurements=1)
    pinned = {layer.path.rpartition(".")[2]: layer.pinned for layer in plan.layers if layer.pinned}
    assert "fits no other format" in pinned["down_proj"] and set(pinned) == {"down_proj", "lm_head"}


def test_training_goes_on_after_a_plan() -> None:
    from peft import LoraConfig, get_peft_model

    model = llama()
    plan = plan_precision(model, batches(), formats=("nf4", "16-bit"), measurements=1)
    tuned = get_peft_model(optimize(model, precision=plan), LoraConfig(target_modules="all-linear", r=4))
    undo_needed = getattr(tuned, "rewrite_report", None)
    loss = tuned.train()(**batches()[0], labels=batches()[0]["input_ids"]).loss
    loss.backward()
    assert undo_needed is not None and any(p.grad is not None for p in tuned.parameters())


def plain(classes: int = 8) -> nn.Module:
    """No model of any library."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)).eval()


def test_without_calibration_example_inputs_serve_where_none_can_be_made() -> None:
    budget = PrecisionBudget(10**6, formats=("nf4", "16-bit"))
    examples = {"input": torch.randn(5, 64)}
    plan = optimize(plain(), example_inputs=examples, precision=budget).rewrite_report.precision
    assert plan.notes[0].startswith("measured on the example inputs") and plan.kl is not None
    with pytest.raises(CalibrationError, match="calibration="):
        plan_precision(plain())


def test_one_number_is_no_prediction() -> None:
    with pytest.raises(CalibrationError, match="one number"):
        plan_precision(plain(classes=1), [{"input": torch.randn(5, 64)}], formats=("nf4", "16-bit"))


@pytest.mark.parametrize("formats", ["nf4", ("int3",), (), ("nf4", "nf4")])
def test_formats_that_are_none(formats: Any) -> None:
    with pytest.raises(OptionError, match="format"):
        plan_precision(plain(), [{"input": torch.randn(5, 64)}], formats=formats)


def test_a_linear_whose_input_is_zero_takes_no_feedback() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    plan = plan_precision(model, batches(), measurements=1)
    layer = next(layer for layer in plan.layers if layer.path.endswith("o_proj"))
    assert [o.format for o in layer.options] == ["16-bit", "nf4", "int8"]
    assert layer.smallest.sensitivity == 0 == layer.smallest.error
