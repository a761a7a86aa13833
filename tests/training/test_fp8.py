"""Training with products of frozen weights in FP8: the losses of training without, and nothing of the model is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.kernels import fp8_kept
from weft.passes.defaults import Products, default_passes

from ..models import batch, in_four_bits, llama, outcome, quickly, twin, with_lora
from .runs import assert_same_losses, loop

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
BATCHES = [batch(3, 14, seed=i) for i in range(5)]
NOTE = "products of frozen weights run in FP8, as asked"


def adapted(kind: str) -> Any:
    """A Llama with LoRA over weights of that kind."""
    model: Any = llama(**SIZES)
    return with_lora(in_four_bits(model) if kind == "nf4" else model.to(getattr(torch, kind)))


def in_fp8(model: Any, products: Products = "fp8", **options: Any) -> Any:
    """``model``, optimized so."""
    return quickly(model, mode="train", passes=default_passes("train", products=products), **options)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is saved, 4-bit weights with their scales."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("products", ["fp8", "fp8_kept"])
@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_losses_are_those_of_stored_products(kind: str, products: Products) -> None:
    model = adapted(kind)
    plain, kept = twin(model), state(model)
    in_fp8(model, products, verify=kind == "bfloat16")
    assert sum(r.rule == "fp8_products" for r in model.rewrite_report.rewrites) == 2 * 4
    assert sum(NOTE in line for line in str(model.rewrite_report).splitlines()) == 1
    before = state(model)
    assert before.keys() == kept.keys() and all(torch.equal(before[n], t) for n, t in kept.items())
    assert_same_losses(loop(model, BATCHES), loop(plain, BATCHES), "bfloat16")
    after = state(model)
    assert all(torch.equal(after[n], t) == ("lora_" not in n) for n, t in kept.items())


def test_weights_that_are_kept_in_fp8_follow_changes_and_go_with_undo() -> None:
    """Of a state that is loaded."""
    model, other = adapted("bfloat16"), in_fp8(adapted("bfloat16"), "fp8_kept", verify=False)
    inputs, state = batch(3, 14), {n: 2 * t if "proj.base" in n else t for n, t in model.state_dict().items()}
    before, taken = outcome(other, inputs), fp8_kept.kept_bytes()
    for each in (model, other):
        each.load_state_dict(state)
    in_fp8(model, "fp8", verify=False)
    found, wanted = outcome(other, inputs), outcome(model, inputs)
    assert all(torch.equal(found[n], v) for n, v in wanted.items()) and not torch.equal(before["loss"], found["loss"])
    weft.undo(other)
    frozen = sum(p.numel() for n, p in other.named_parameters() if "proj.base" in n)
    assert taken - fp8_kept.kept_bytes() > 1.5 * frozen, "the first block computes no gradient of what it reads"


@pytest.mark.parametrize("memory", [None, "min"])
def test_every_gradient_is_near_and_undo_is_exact(memory: str | None) -> None:
    """As captured, and with blocks whose forward and backward are traced together."""
    model = adapted("float32")
    plain, inputs = twin(model), batch(3, 14)
    wanted = outcome(plain, inputs)
    in_fp8(model, memory=memory)
    found = outcome(model, inputs)
    for name, value in wanted.items():
        assert 1e-4 < float((found[name] - value).norm() / value.norm()) < 0.1 or name == "loss", name
    weft.undo(model)
    again = outcome(model, inputs)
    assert all(torch.equal(again[n], v) for n, v in wanted.items()) and not hasattr(model, "rewrite_report")


def test_an_adapter_on_some_linears_leaves_none_of_the_blocks_out() -> None:
    """The plain linears beside it run in FP8 as well, here inside of checkpoints; the head does not."""
    base: Any = llama(**SIZES)
    model: Any = with_lora(base.to(torch.bfloat16), target_modules=["q_proj", "v_proj"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    in_fp8(model)
    done = {r.module_path.rpartition(".")[2] for r in model.rewrite_report.rewrites if r.rule == "fp8_products"}
    assert done >= {"o_proj", "gate_proj", "up_proj", "down_proj"} and len(done) == 5
    assert [r.module_path for r in model.rewrite_report.refusals if r.rule == "fp8_products"] == [
        "base_model.model.lm_head"
    ]


def test_weights_that_are_trained_stay() -> None:
    model = in_fp8(llama(**SIZES).train())
    assert not any(r.rule == "fp8_products" for r in model.rewrite_report.rewrites)
    reasons = {r.reason for r in model.rewrite_report.refusals if r.rule == "fp8_products"}
    assert reasons == {"the weight is trained"} and NOTE not in str(model.rewrite_report)
