"""Measuring leaves a model as it was, holds no second copy of it, and takes fewer batches of a model that is slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from weft.passes import sensitivity
from weft.passes.sensitivity import Candidate, Sensitivity
from weft.passes.survey import Use
from weft.precision import plan_precision
from weft.quant.formats import FORMATS, quantize
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
