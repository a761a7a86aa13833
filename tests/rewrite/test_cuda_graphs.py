"""Recorded calls: the same numbers as unrecorded ones, whatever is kept, moved or added up between them.

Without a GPU a stand-in takes the place of ``torch.cuda.CUDAGraph`` (``recorded.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from weft.rewrite import recorded_calls
from weft.rewrite.cuda_graphs import WORTH_IT, Recordings
from weft.rewrite.rates import Rates
from weft.rewrite.recorded_calls import LATER, WARM, bound_by_host
from weft.rewrite.recording import IN_USE, MOVED

from ..graphs import cases, normal
from .recorded import DEVICE, ON_GPU, Stand
from .saving import Captured

WIDTH = 6


class Block(nn.Module):
    """A residual block that saves several values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(seed, WIDTH, WIDTH) / 3)
        self.v = nn.Parameter(normal(seed + 1, WIDTH))
        self.frozen = nn.Parameter(normal(seed + 2, WIDTH, WIDTH) / 3, requires_grad=False)


def forward(x: Tensor, w: Tensor, v: Tensor, frozen: Tensor) -> Tensor:
    """What a block computes."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1) * v
    return x + torch.tanh(F.silu(normed @ w) * (normed @ frozen))


class Model:
    """Three blocks, through one graph for all or as they are."""

    def __init__(self, recorded: bool) -> None:
        self.blocks = nn.ModuleList([Block(10 * i) for i in range(3)]).to(DEVICE)
        kind = Recordings if ON_GPU else Stand
        self.recordings = kind(self.blocks.parameters, DEVICE)
        self.block: Callable[..., Any] = Captured(forward, self.recordings.recorded) if recorded else forward

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs of the blocks."""
        outputs = []
        for block in self.blocks:
            x = self.block(x, block.w, block.v, block.frozen)
            outputs.append(x)
        return outputs

    def grads(self) -> list[Tensor]:
        """Of the trained parameters, which have none afterwards."""
        found = [p.grad.clone() for p in self.blocks.parameters() if p.grad is not None]
        self.blocks.zero_grad(set_to_none=True)
        return found


@pytest.fixture(autouse=True)
def _everything_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_calls, "bound_by_host", lambda *_: True)
    torch._dynamo.reset()


def inputs(seed: int, length: int = 5) -> Tensor:
    """Of a model."""
    return normal(seed, 2, length, WIDTH).to(DEVICE)


def both() -> tuple[Model, Model]:
    """One that is recorded, and its twin."""
    return Model(True), Model(False)


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Up to the order of sums."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def step(model: Model, seed: int, length: int = 5) -> list[Tensor]:
    """Outputs' sum and gradients of one step."""
    outputs = model(inputs(seed, length))
    loss = (outputs[-1] * torch.linspace(-1, 1, outputs[-1].numel(), device=DEVICE).view_as(outputs[-1])).sum()
    loss.backward()
    return [loss.detach(), *model.grads()]


def test_steps_are_recorded_the_third_time_and_replayed_from_then_on() -> None:
    model, plain = both()
    for seed in range(7):
        same(step(model, seed), step(plain, seed))
        assert model.recordings.count == (6 if seed >= 2 else 0)
    assert model.recordings.replays == 4 * 6 and not model.recordings.notes
    assert "6 recordings" in model.recordings.remarks()[0]


ACTIONS = ("step", "add", "keep", "keep last", "forward", "two", "longer", "update", "move", "in place")


@settings(cases, max_examples=max(6, cases.max_examples // 30))
@given(st.lists(st.sampled_from(ACTIONS), max_size=8))
def test_whatever_happens_between_the_steps(actions: Sequence[str]) -> None:
    torch._dynamo.reset()
    models = both()
    kept: list[list[Tensor]] = []
    for seed in range(3):
        same(*(step(m, seed) for m in models))
    for seed, action in enumerate((*actions, "step", "step"), 3):
        found = [act(m, action, seed) for m in models]
        same(*found)
        for tensors, copies in zip(kept[::2], kept[1::2], strict=True):
            same(tensors, copies)
        if action.startswith("keep"):
            kept += [found[0], [t.clone() for t in found[1]]]


def act(model: Model, action: str, seed: int) -> list[Tensor]:
    """What a user may do; the numbers that come of it."""
    if action == "keep":  # results of a forward that nobody differentiates, held on to
        return [o.detach() for o in model(inputs(seed))]
    if action == "keep last":  # of the block that was recorded last
        return [model(inputs(seed))[-1].detach()]
    if action == "forward":
        return [model(inputs(seed))[-1].sum().detach()]
    if action == "two":  # two forwards before either backward
        first, second = model(inputs(seed))[-1], model(inputs(seed + 100))[-1]
        second.square().sum().backward()
        first.square().sum().backward()
        return model.grads()
    if action == "add":  # gradients of several batches
        for i in range(3):
            model(inputs(seed + i))[-1].square().sum().backward()
        return model.grads()
    if action == "in place":
        output = model(inputs(seed))[-1]
        output.detach().mul_(2)
        return [output.detach()]
    if action == "update":
        with torch.no_grad():
            for p in model.blocks.parameters():
                p.mul_(0.9)
    if action == "move":
        for p in model.blocks.parameters():
            p.data = p.data.clone()
        model.recordings.moved()
    return step(model, seed, 4 if action == "longer" else 5)


def test_added_gradients_are_copies_from_the_second_time_on() -> None:
    model, plain = both()
    for _ in range(6):
        for m in (model, plain):
            for i in range(3):
                m(inputs(i))[-1].square().sum().backward()
        same(model.grads(), plain.grads())
    assert model.recordings.notes[IN_USE] <= 6
    assert model.recordings.replays > 30


def test_results_that_are_kept_are_not_overwritten() -> None:
    model, _ = both()
    for seed in range(4):
        step(model, seed)
    kept = model(inputs(9))
    copies = [k.detach().clone() for k in kept]
    replays = model.recordings.replays
    model(inputs(10))
    same(kept, copies)
    assert model.recordings.replays == replays and model.recordings.notes == {IN_USE: 1, MOVED: 2}


def test_what_lies_where_others_compute_is_not_overwritten() -> None:
    model, plain = both()
    for seed in range(4):
        step(model, seed)
    kept = model(inputs(9))[-1].detach()
    copy, replays = kept.clone(), model.recordings.replays
    same([model(inputs(10))[-1]], [plain(inputs(10))[-1]])
    same([kept], [copy])
    assert model.recordings.replays == replays and model.recordings.notes == {LATER: 1, MOVED: 2}
    del kept
    same(step(model, 3), step(plain, 3))
    assert model.recordings.replays == replays + 6


def test_an_input_that_stayed_and_has_moved_is_read_where_it_is() -> None:
    model, plain = both()
    for seed in range(4):
        same(step(model, seed), step(plain, seed))
    held = model(inputs(5))  # the first block's last results are in use: the second finds its input elsewhere
    for seed in range(2):
        same([model(inputs(seed))[-1]], [plain(inputs(seed))[-1]])
    assert model.recordings.notes.keys() <= {IN_USE, MOVED}
    del held
    same(step(model, 3), step(plain, 3))


def test_no_more_sizes_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_calls, "MOST_SIZES", 1)
    model, plain = both()
    for _ in range(3):
        for length in (5, 4):
            same(step(model, 0, length), step(plain, 0, length))
    assert model.recordings.count == 6
    assert any("sizes" in note for note in model.recordings.notes)


def test_recordings_that_are_given_up_are_not_made_again() -> None:
    model, plain = both()
    for seed in range(6):
        outputs, wanted = model(inputs(seed)), plain(inputs(seed))
        if seed == 4:
            model.recordings.give_up()
        for found in (outputs, wanted):
            found[-1].pow(2).sum().backward()
        same([outputs[-1].detach(), *model.grads()], [wanted[-1].detach(), *plain.grads()])
    assert model.recordings.count == model.recordings.bytes == 0
    assert sum(model.recordings.given_up.values()) == 6


@pytest.mark.parametrize(("every", "left"), [(WARM + 2, 0), (2 * WORTH_IT, 6)])
def test_for_a_weight_that_keeps_changing_none_are_made(every: int, left: int) -> None:
    """Each time they would be made anew, to be replayed once; not where they are replayed often in between."""
    model, plain = both()
    for seed in range(1, 6 * every):
        same(step(model, seed), step(plain, seed))
        if seed % every == 0:
            model.recordings.outdated()
    assert model.recordings.count == left
    assert any("keeps changing" in remark for remark in model.recordings.remarks()) == (not left)


def test_what_cannot_be_recorded_runs_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = both()

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(model.recordings, "capture", refuse)
    for seed in range(5):
        same(step(model, seed), step(plain, seed))
    assert model.recordings.count == 0
    assert "operation not permitted" in model.recordings.remarks()[0]


def test_each_replay_draws_anew_and_its_backward_knows_what() -> None:
    recordings = (Recordings if ON_GPU else Stand)(lambda: (), DEVICE)
    drawn = Captured(lambda x: F.dropout(x * x, 0.5, True), recordings.recorded)
    x = inputs(0, 50).requires_grad_()
    seen = []
    for _ in range(6):
        x.grad = None
        y = drawn(x)
        y.sum().backward()
        same([x.grad * x.detach() / 2], [y.detach()])  # pyright: ignore[reportOptionalOperand]
        seen.append(y.detach().clone())
        del y
    assert recordings.replays == 6
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_sharded_parameters_are_not_recorded() -> None:
    model, plain = both()
    sharded: Any = nn.Parameter(torch.zeros(1))
    sharded.to_local = lambda: sharded
    model.recordings.parameters = lambda: [sharded]
    for seed in range(4):
        same(step(model, seed), step(plain, seed))
    assert model.recordings.count == 0


def test_what_the_host_is_slower_at_is_recorded() -> None:
    """Products of 2·n³ operations on a device of 10¹² a second, and a host that takes 13 · 5 µs to launch one."""
    rates = Rates(copy=1e15, product=1e12, host=0.0, call=5e-6)
    for n, worth in ((256, True), (330, False)):  # 33.6 and 71.9 µs, and a call's own 5
        graph = fx.Graph()
        a, b = (graph.placeholder(name) for name in "ab")
        graph.output(graph.call_function(torch.ops.aten.mm.default, (a, b)))
        for node in graph.nodes:
            node.meta["val"] = torch.empty(n, n, device="meta")
        assert bound_by_host(graph, int, rates, 1.0) is worth
        assert bound_by_host(graph, int, rates, 0.5)
