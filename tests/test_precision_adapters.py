"""A plan fits the model that it was made for with adapters around it and without them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weft import PrecisionPlan, load_planned, optimize, plan_precision
from weft.applying import apply_plan
from weft.precision import store_as_planned
from weft.rewrite.errors import PrecisionError
from weft.wrappers import plan_for

from .planned import batch, gpt2, llama, logits


def adapted(base: nn.Module, **options: Any) -> Any:
    """LoRA around every linear, whose second factor is zero: predictions are those of ``base``."""
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, **options)).eval()  # pyright: ignore


def as_planned(model: nn.Module, plan: PrecisionPlan) -> torch.Tensor:
    """Predictions of ``model``, stored so."""
    apply_plan(model, plan, store_as_planned(model, plan, [batch()]))
    return logits(model)


def planned(model: nn.Module, *formats: str) -> PrecisionPlan:
    """The smallest."""
    return plan_precision(model, [batch()], formats=formats, measurements=2)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("formats", [("nf4", "16-bit"), ("nf4-feedback", "16-bit")], ids="-".join)
def test_there_and_back(make: Any, formats: tuple[str, ...]) -> None:
    with_adapters, without = planned(adapted(make()), *formats), planned(make(), *formats)
    assert len(with_adapters.layers) > len(without.layers)  # factors of adapters, trained
    expected = as_planned(make(), without)
    for plan in (without, with_adapters):
        for model in (make(), adapted(make())):
            found = as_planned(model, plan)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    plain = logits(make())
    assert (expected - plain).abs().max() > 1e-2


def test_everything_of_a_plan_comes_along() -> None:
    bare = planned(llama(), "nf4", "int8", "16-bit")
    model = adapted(llama())
    there = plan_for(model, bare)
    assert all(".base_layer" in layer.path for layer in there.layers if not layer.pinned)
    assert there.measured == bare.measured and there.formats == bare.formats and there.kl == bare.kl
    assert plan_for(llama(), there) == bare and plan_for(llama(), bare) is bare
    wrapped = planned(model, "nf4", "int8", "16-bit")
    back = plan_for(llama(), wrapped)
    assert [la.paths for la in back.layers] == [la.paths for la in bare.layers]
    assert len(wrapped.measured) == len(back.measured) and all(
        len(m.formats) == len(back.layers) for m in back.measured
    )


def test_a_checkpoint_is_loaded_by_the_plan_of_the_adapted_model(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    plan = planned(adapted(llama()), "nf4", "16-bit")
    expected = as_planned(llama(), plan)
    torch.testing.assert_close(logits(load_planned(tmp_path, plan)), expected, rtol=1e-3, atol=1e-3)


def test_a_plan_for_another_model_is_still_refused() -> None:
    plan = planned(adapted(llama(num_hidden_layers=2)), "nf4", "16-bit")
    model = llama(num_hidden_layers=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PrecisionError, match=r"the plan has a linear .*layers\.1\.self_attn\.q_proj"):
        optimize(model, precision=plan)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
