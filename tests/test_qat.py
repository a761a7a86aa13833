"""Quantization-aware training: what is trained is what is stored afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weft import PrecisionPlan, optimize, plan_precision, undo
from weft.kernels.fake_quantize import OUTLIER, fake_quantize, fake_quantize_rows
from weft.passes.fake_quantize import FakeQuantize
from weft.qat import convert, qat_passes
from weft.quant.formats import FORMATS, dequantize, quantize
from weft.rewrite.errors import PrecisionError


def llama(**options: Any) -> LlamaForCausalLM:
    """A small Llama with weights as large as trained ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"vocab_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2, **sizes, **options}
    return LlamaForCausalLM(LlamaConfig(**settings)).train()


def gpt2() -> GPT2LMHeadModel:
    """A small GPT-2, whose linears lie by columns; without dropout."""
    torch.manual_seed(0)
    drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=1, **drop)
    return GPT2LMHeadModel(config).train()


def batch() -> dict[str, Tensor]:
    """Random tokens, to be predicted."""
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "nf4-searched"])
def test_a_weight_as_it_will_be_stored_and_its_gradient(name: str) -> None:
    weight = torch.randn(8, 64, requires_grad=True)
    seen = fake_quantize(weight, FORMATS[name])
    assert torch.equal(seen, dequantize(quantize(weight.detach(), FORMATS[name])))
    seeds = torch.randn(8, 64)
    assert torch.equal(torch.autograd.grad(seen, weight, seeds)[0], seeds)


def test_activations_row_by_row() -> None:
    x = torch.randn(3, 5, 32).clamp(-5, 5).requires_grad_()
    y = fake_quantize_rows(x)
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    assert ((y - x).abs() <= step * 0.5001).all() and not torch.equal(y, x)
    with torch.no_grad():
        x[1, 2, 7] = 2 * OUTLIER
    assert torch.equal(fake_quantize_rows(x)[..., 7], x[..., 7])
    seeds = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(fake_quantize_rows(x), x, seeds)[0], seeds)
    assert torch.equal(fake_quantize_rows(torch.zeros(2, 4)), torch.zeros(2, 4))


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """Losses of some steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def assert_stored_as_trained(model: nn.Module, plan: PrecisionPlan) -> None:
    """Converting changes no prediction."""
    model.eval()
    with torch.no_grad():
        seen = model(**batch()).logits
    convert(model, plan, mode="inference", example_inputs=batch())
    with torch.no_grad():
        stored = model(**batch()).logits
    # bitsandbytes' CPU product may run in bfloat16
    torch.testing.assert_close(stored, seen, rtol=2e-2, atol=2e-2 * float(seen.abs().max()))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_trained_fully_and_converted(make: Any) -> None:
    model = make()
    plan = plan_precision(model, [batch()], formats=("nf4", "16-bit"), measurements=4)
    plan = plan.at(memory=(plan.smallest_bytes + plan.curve[-1].bytes) // 2)
    assert {"nf4", "16-bit"} <= set(plan.formats)
    plain = float(model(**batch()).loss)
    optimize(model, mode="train", passes=qat_passes(model, plan), example_inputs=batch())
    assert any(r.rule == "fake_quantize" for r in model.rewrite_report.rewrites)
    losses = train(model)
    assert losses[0] != pytest.approx(plain, abs=1e-6) and losses[-1] < losses[0]
    assert_stored_as_trained(model, plan)


def test_the_gradient_is_that_of_the_weight_as_it_is_stored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.SiLU(), nn.Linear(64, 64, bias=False))
    x = torch.randn(3, 64)
    formats = {id(model[0].weight): FORMATS["nf4"]}
    stored = [fake_quantize(model[0].weight, FORMATS["nf4"]).detach().requires_grad_(), model[2].weight]
    expected = (torch.nn.functional.silu(x @ stored[0].t()) @ stored[1].t()).square().sum()
    wanted = torch.autograd.grad(expected, stored)
    optimize(model, mode="train", passes=[FakeQuantize(formats)], example_inputs={"input": x})
    loss = model(x).square().sum()
    torch.testing.assert_close(loss, expected)
    for found, want in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_with_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    base = llama(num_hidden_layers=1)
    plan = plan_precision(base, [batch()], formats=("nf4-feedback", "16-bit"), measurements=1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora)
    optimize(model, mode="train", passes=qat_passes(model, plan), example_inputs=batch())
    rules = {r.rule for r in model.rewrite_report.rewrites}
    assert {"fake_quantize", "lora_linear"} <= rules
    losses = train(model)
    assert losses[-1] < losses[0]
    assert_stored_as_trained(model, plan)


def test_int8_with_activations() -> None:
    model = llama(num_hidden_layers=1)
    plan = plan_precision(model, [batch()], formats=("int8", "16-bit"), measurements=1)
    assert "int8" in plan.formats
    optimize(model, mode="train", passes=qat_passes(model, plan, activations=True), example_inputs=batch())
    train(model, 1)
    model.eval()
    with torch.no_grad():
        seen = model(**batch()).logits
    undo(model)
    with torch.no_grad():
        plain = model(**batch()).logits
    convert(model, plan, mode="inference", example_inputs=batch())
    with torch.no_grad():
        stored = model(**batch()).logits
    assert (stored - seen).norm() < (stored - plain).norm()


def test_a_plan_for_another_model() -> None:
    plan = plan_precision(llama(), [batch()], formats=("nf4", "16-bit"), measurements=1)
    with pytest.raises(PrecisionError, match="another model"):
        qat_passes(gpt2(), plan)
