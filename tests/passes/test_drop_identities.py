"""What changes nothing goes; what changes something, or could be seen to be another tensor, stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from weft.passes.drop_identities import DropIdentities

from ..graphs import copied, normal, targets, trace

EXPERTS = 4


def chosen(x: Any) -> Any:
    """Which of the experts a token goes to, sorted."""
    return torch.sort(torch.topk(x, 2, dim=-1)[1].reshape(-1))[0]


def masked(x: Any, bound: int) -> Any:
    """Rows of tokens whose expert is not there, set to zero in place, as transformers does."""
    mask = (chosen(x) >= bound).unsqueeze(-1)
    return (x.repeat_interleave(2, 0) * 2).masked_fill_(mask, 0.0)


IDLE: dict[str, Callable[[Any], Any]] = {
    "no dropout": lambda x: F.dropout(x.exp(), 0.0, True) + 1,
    "dropout in inference": lambda x: F.dropout(x.exp(), 0.5, training=False) + 1,
    "all of a slice": lambda x: x[..., :EXPERTS] * 2,
    "all of two slices": lambda x: x[:, 0:EXPERTS].exp(),
    "nothing beside": lambda x: torch.cat((x.exp(), x[..., EXPERTS:]), -1) * 2,
    "nothing before": lambda x: torch.cat([x[..., EXPERTS:], x.exp()], dim=1) * 2,
    "an empty list before": lambda x: torch.cat([x.new_empty(0), x.exp()], dim=-2) * 2,
    "a mask of nothing": lambda x: masked(x, EXPERTS) + 1,
    "a mask of nothing, apart": lambda x: x.exp().masked_fill(torch.argmax(x, -1)[:, None] > EXPERTS - 1, 0.0) + 1,
    "a limit beyond": lambda x: chosen(x).clamp_(max=EXPERTS - 1) + 1,
    "a limit beyond, apart": lambda x: chosen(x).clamp(0, EXPERTS) + 1,
}
NEAR: dict[str, Callable[[Any], Any]] = {
    "dropout": lambda x: F.dropout(x.exp(), 0.5, True) + 1,
    "part of a slice": lambda x: x[..., : EXPERTS - 1] * 2,
    "every second": lambda x: x[..., ::2] * 2,
    "a row": lambda x: x[0] * 2,
    "something beside": lambda x: torch.cat((x.exp(), x[..., EXPERTS - 1 :]), -1) * 2,
    "a mask of some": lambda x: masked(x, EXPERTS - 1) + 1,
    "a mask of values": lambda x: x.exp().masked_fill(x >= EXPERTS, 0.0) + 1,
    "a mask of positions": lambda x: (
        x.exp().masked_fill(torch.sort(x.flatten())[1][: x.shape[0], None] >= EXPERTS, 0.0) + 1
    ),
    "a limit within": lambda x: chosen(x).clamp(max=EXPERTS - 2) + 1,
    "a least": lambda x: chosen(x).clamp(min=1) + 1,
}


def inputs() -> dict[str, Any]:
    return {"x": normal(0, 6, EXPERTS)}


@pytest.mark.parametrize("name", IDLE)
def test_what_changes_nothing_goes(name: str) -> None:
    module = trace(IDLE[name], inputs())
    before, wanted = len(targets(module)), module(*inputs().values())
    assert not DropIdentities().run(module, None).rewrites
    module.graph.lint()
    module.recompile()
    assert len(targets(module)) < before, str(module.graph)
    assert torch.equal(module(*inputs().values()), wanted)


@pytest.mark.parametrize("name", NEAR)
def test_what_changes_something_stays(name: str) -> None:
    module = trace(NEAR[name], inputs())
    original = copied(module)
    DropIdentities().run(module, None)
    assert targets(module) == targets(original)


def test_a_limit_from_below_raises_what_is_below() -> None:
    """A clamp by 6 of what is less than 4 gives 6, which a mask from 5 on covers."""
    module = trace(
        lambda x: x.repeat_interleave(2, 0).masked_fill((chosen(x).clamp(min=6) >= 5)[:, None], 0.0), inputs()
    )
    before = targets(module)
    DropIdentities().run(module, None)
    assert targets(module) == before


def test_who_takes_a_view_of_the_result_can_take_it_still() -> None:
    """A concatenation is contiguous, whatever its parts are; a sum of it need not be."""

    def viewed(x: Any) -> Any:
        return torch.cat((x.t(), x.t()[:, 6:]), -1).view(-1) * 2

    module = trace(viewed, inputs())
    DropIdentities().run(module, None)
    module.recompile()
    assert "cat" not in targets(module) and torch.equal(module(*inputs().values()), inputs()["x"].t().reshape(-1) * 2)
    summed = trace(lambda x: torch.cat((x.t(), x.t()[:, 6:]), -1) @ x, inputs())
    DropIdentities().run(summed, None)
    assert "contiguous" not in targets(summed)


@pytest.mark.parametrize(
    ("function", "goes"),
    [
        (lambda nothing, y, x: (torch.cat((nothing, y), -1) @ x.t(), torch.cat((nothing, y), -1)), True),
        (lambda nothing, y, x: torch.cat((nothing, y), -1), True),
        (lambda nothing, y, x: (torch.cat((nothing, y), -1), y), False),
        (lambda nothing, y, x: (torch.cat((nothing, y), -1), y.t()), False),
        (lambda nothing, y, x: torch.cat((nothing, y.unsqueeze(0)[0]), -1), True),
        (lambda nothing, y, x: torch.cat((nothing, x), -1), False),
        (lambda nothing, y, x: torch.cat((nothing[:3], y[:3]), -1), False),
    ],
)
def test_what_is_returned_may_be_the_only_one_and_no_input(function: Callable[..., Any], goes: bool) -> None:
    """Keys are joined to an empty cache, read, and kept in the cache."""
    for given in ({"x": normal(0, 6, EXPERTS, grad=True)}, inputs()):
        module = trace(lambda x: function(x[:, EXPERTS:], x.exp(), x), given)
        wanted = module(*given.values())
        DropIdentities().run(module, None)
        module.graph.lint()
        module.recompile()
        assert ("cat" not in targets(module)) == (goes and given["x"].requires_grad)
        torch.testing.assert_close(module(*given.values()), wanted, rtol=0, atol=0)


def test_a_result_that_is_overwritten_is_no_other_tensor() -> None:
    def overwritten(x: Any) -> Any:
        y = x.exp()
        z = torch.cat((y, x[:, EXPERTS:]), -1)
        z.mul_(2)
        return y + z

    module = trace(overwritten, inputs())
    wanted = module(*inputs().values())
    DropIdentities().run(module, None)
    module.recompile()
    assert torch.equal(module(*inputs().values()), wanted)
    assert isinstance(module, fx.GraphModule) and "cat" in targets(module)
