"""Measuring leaves a model as it was, holds no second copy of it, and takes fewer batches of a model that is slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from weft.passes import sensitivity
from weft.passes.sensitivity import ATTENTION, Candidate, Sensitivity, attention_operations, nudged
from weft.passes.survey import Use
from weft.precision import plan_precision
from weft.quant.formats import FORMATS, quantize
from weft.quant.plan import PrecisionPlan
from weft.quant.statistics import Statistics

BATCHES = [{"x": torch.randn(3, 64, generator=torch.Generator().manual_seed(i))} for i in range(6)]


class Model(nn.Module):
    """Two linears, the second of twice the work."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def candidates(model: nn.Module) -> list[Candidate]:
    """Every matrix, in NF4 or as it is."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            use = Use(name, parameter, "rows", Statistics(parameter.shape[1]))
            stored: dict[str, Any] = {"nf4": quantize(parameter, FORMATS["nf4"])}
            found.append(Candidate(use, None, "rows", ("nf4", "16-bit"), stored=stored))
    return found


def test_whole_choices_are_written_over_in_place() -> None:
    model = Model()
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    layers = candidates(model)
    with Sensitivity(model, [], BATCHES).together(layers) as measure:
        assert measure(dict.fromkeys(before, "16-bit")) == 0
        assert measure({"up.weight": "nf4", "down.weight": "16-bit"}) > 0
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == {n: at for n, (at, _) in before.items()}
        assert not torch.equal(model.up.weight, before["up.weight"][1])
        assert measure(dict.fromkeys(before, "16-bit")) == 0
        measure(dict.fromkeys(before, "nf4"))
    assert all(torch.equal(p, before[n][1]) and p.data_ptr() == before[n][0] for n, p in model.named_parameters())


def test_parameters_of_one_storage_are_given_back() -> None:
    model = Model()
    other = nn.Linear(64, 128)
    other.weight.data = model.up.weight.data
    both = nn.ModuleDict({"a": model, "b": other})
    kept = model.up.weight.detach().clone()
    with Sensitivity(model, [], BATCHES).together(candidates(both)) as measure:
        measure({c.name: "nf4" for c in candidates(both)})
    assert torch.equal(model.up.weight, kept)


@pytest.mark.parametrize(
    ("of_one_batch", "expected"), [(100, [0, 1, 2, 3, 4, 5]), (3.5, [0, 2, 4]), (2.2, [0, 3]), (0.1, [0])]
)
def test_as_many_batches_as_the_operations_allow(of_one_batch: float, expected: list[int]) -> None:
    model = Model()
    each = 2 * 3 * (64 * 128 + 128 * 128)  # operations of a forward
    operations = of_one_batch * 2 * each  # of two weights in one format
    found = Sensitivity(model, [], BATCHES).sample(candidates(model), operations)
    assert [next(i for i, b in enumerate(BATCHES) if b is f) for f in found] == expected


def test_a_plan_says_that_it_took_fewer_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan_precision(Model(), BATCHES, formats=("nf4", "16-bit"))
    monkeypatch.setattr(sensitivity, "MOST_OPERATIONS", 1.0)
    fewer = plan_precision(Model(), BATCHES, formats=("nf4", "16-bit"))
    assert not any("only" in note for note in whole.notes)
    assert any("alone on 1 of the 6 batches only" in note for note in fewer.notes)
    assert whole.layers[0].smallest.sensitivity != fewer.layers[0].smallest.sensitivity
    assert whole.kl == fewer.kl  # whole choices are measured on all
    assert fewer == plan_precision(Model(), BATCHES, formats=("nf4", "16-bit"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nudge_is_one_bit_of_an_eighth(dtype: torch.dtype) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    moved = nudged(weight)
    changed = weight != moved
    assert moved.shape == weight.shape and torch.equal(moved, nudged(weight))
    assert 0.12 < changed.float().mean() < 0.13
    relative = (moved.float() - weight.float()).norm() / weight.float().norm()
    assert torch.finfo(dtype).eps / 8 < relative < torch.finfo(dtype).eps / 3


def test_rounding_is_no_weights_fault() -> None:
    """What bfloat16 weights do alone is near what they do where everything else is exact; noise is most of it for int8."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, initializer_range=0.08, **sizes))
    model = model.to(torch.bfloat16).eval()
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    rounded = plan_precision(model, [{"input_ids": ids}], formats=("int8", "16-bit"), measurements=1)
    exact = plan_precision(model.float(), [{"input_ids": ids}], formats=("int8", "16-bit"), measurements=1)

    def total(plan: PrecisionPlan) -> float:
        return sum(layer.smallest.sensitivity for layer in plan.layers if not layer.pinned)

    noise = next(float(n.split("by KL ")[1].split()[0]) for n in rounded.notes if "rounding anew" in n)
    free = sum(not layer.pinned for layer in rounded.layers)
    assert total(exact) < total(rounded) < 2 * total(exact) < free * noise
    assert not any("rounding anew" in n for n in exact.notes)


def test_operations_of_attention_with_shared_keys() -> None:
    def attention() -> torch.Tensor:
        q, k = torch.zeros(2, 8, 5, 16, device="meta"), torch.zeros(2, 2, 7, 16, device="meta")
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, k, None, False)[0]

    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(ATTENTION, attention_operations)) as counter:
        attention()
    assert counter.get_total_flops() == 2 * 2 * 8 * 5 * 7 * (16 + 16)


class Brittle(Model):
    """Predicts NaN if its second weight is any other."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.down.weight.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where((self.down.weight == self.kept).all(), super().forward(x), torch.nan)


def test_what_makes_predictions_nan_is_never_chosen() -> None:
    plan = plan_precision(Brittle(), BATCHES, formats=("nf4", "int8", "16-bit"))
    up, down = plan.layers
    assert [o.format for o in down.options] == ["16-bit"] and len(up.options) == 3
    assert plan.choice == {"up": "nf4", "down": "16-bit"} and plan.kl is not None and 0 < plan.kl < 1
    model = Brittle()
    with Sensitivity(model, [], BATCHES).together(candidates(model)) as measure:
        assert measure({"up.weight": "nf4", "down.weight": "nf4"}) == float("inf")
