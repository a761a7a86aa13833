"""What a product multiplies with is known for every matrix of a stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft.passes.survey import Survey, Use
from weft.quant.error_measures import output_error
from weft.quant.statistics import Statistics

from ..planned import batch, mixtral


def test_experts_have_their_own_statistics() -> None:
    model = mixtral()
    block = model.model.layers[0].mlp
    seen: dict[str, Any] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach())),
        block.experts.register_forward_pre_hook(lambda _, args: seen.update(chosen=args[1].detach())),
    ]
    with torch.no_grad():
        model(**batch())
    for handle in handles:
        handle.remove()
    survey = Survey(model, model)

    @torch.no_grad()
    def run() -> None:
        model(**batch())

    survey.install(run)
    try:
        survey.watch(run)
    finally:
        survey.remove()
    use = next(u for name, u in survey.uses.items() if name.endswith("gate_up_proj"))
    assert use.calibration is use.each and len(use.each) == 4
    rows = seen["x"].reshape(-1, 64)
    for expert, statistics in enumerate(use.each):
        mine = rows[(seen["chosen"] == expert).any(-1)]
        assert statistics.count == len(mine) > 0
        torch.testing.assert_close(statistics.mean_square, mine.double().square().mean(0))


def test_rows_that_are_nobodys_make_it_everybodys() -> None:
    use = Use("w", torch.nn.Parameter(torch.zeros(2, 3, 4)), "rows", Statistics(4))
    use.update(torch.ones(5, 4), torch.tensor([2, 5]))
    assert use.calibration is use.each and [s.count for s in use.each] == [2, 3]
    use.update(torch.ones(1, 4), None)
    assert use.calibration is use.statistics


def test_the_error_of_a_stack_is_that_of_its_products() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 8, generator=generator)
    stored = weight + 0.1 * torch.randn(3, 5, 8, generator=generator)
    inputs = [torch.randn(n, 8, generator=generator) * s for n, s in ((7, 1), (0, 1), (3, 5))]
    each = [Statistics(8, hessian=True) for _ in inputs]
    for s, x in zip(each, inputs, strict=True):
        s.update(x)
    products = [(x @ w.T, x @ q.T) for x, w, q in zip(inputs, weight, stored, strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in products)
    whole = sum(float(a.square().sum()) for a, _ in products)
    assert output_error(weight, stored, each) == pytest.approx((error / whole) ** 0.5, rel=1e-4)
