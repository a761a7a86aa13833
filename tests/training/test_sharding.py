"""What 4-bit weights need when they are sharded; that they then train, test_two_processes.py shows."""

from __future__ import annotations

import pytest
import torch
from packaging import version
from torch import nn

import weft.sharding
from weft.rewrite.errors import OptionError, UnsupportedModelError
from weft.sharding import keep_four_bit, shard

from ..models import batch, llama
from .runs import adapted

WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj.base_layer"


def gathered(model: nn.Module) -> None:
    """As FSDP2 leaves a packed weight when it gathered it: a plain parameter over the same memory."""
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.weight = nn.Parameter(module.weight.data.as_subclass(torch.Tensor), requires_grad=False)  # type: ignore[union-attr]


def test_scales_are_put_back_when_a_block_is_entered() -> None:
    model = adapted("nf4")
    wanted = model(**batch()).logits
    handles = keep_four_bit(model)
    assert len(handles) == 2
    gathered(model)
    assert not hasattr(model.get_submodule(WEIGHT).weight, "quant_state")
    torch.testing.assert_close(model(**batch()).logits, wanted, rtol=0, atol=0)
    restored = model.get_submodule(WEIGHT).weight
    gathered(model)
    torch.testing.assert_close(model(**batch()).logits, wanted, rtol=0, atol=0)
    assert type(restored).__name__ == "Params4bit"


def test_models_without_four_bit_weights_get_no_hooks() -> None:
    assert keep_four_bit(llama()) == []


def test_scales_that_are_lost_are_named() -> None:
    model = adapted("nf4")
    gathered(model)
    with pytest.raises(UnsupportedModelError, match=f"{WEIGHT}.weight is sharded already"):
        keep_four_bit(model)


def test_weights_of_whole_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch shards none; the model is then as it was, and has no hooks."""
    model = adapted("nf4")
    monkeypatch.setattr(weft.sharding, "TORCH", version.parse("2.11.0"))
    with pytest.raises(OptionError, match="bnb_4bit_quant_storage"):
        shard(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
