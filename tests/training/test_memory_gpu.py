"""What only a GPU has: inputs of blocks in the host's memory, measured peaks, a plan without being asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
import weft.rewrite.choices
from weft.rewrite.choices import Choices
from weft.rewrite.offload import HostStore
from weft.rewrite.pinned import LARGE, PinnedPool, pinned
from weft.rewrite.placement import BlockCosts, Placement

from ..models import assert_same, batch, outcome, twin
from .held import adapted

pytestmark = pytest.mark.gpu
WIDE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    """Where the model is."""
    return {name: value.cuda() for name, value in inputs.items()}


def planned(memory: str | int | None) -> tuple[Any, Any]:
    """A model of six blocks on the GPU, and its twin."""
    model = adapted(6, **WIDE).cuda()
    plain = twin(model)
    return weft.optimize(
        model, example_inputs=on_gpu(batch(2, 6)), verify=False, memory=memory, cuda_graphs=False
    ), plain


def peak(model: Any, inputs: dict[str, Any]) -> int:
    """Of the third step, above what was there when it began."""
    for _ in range(2):
        outcome(model, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome(model, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_inputs_of_blocks_on_the_host() -> None:
    inputs, (model, plain) = on_gpu(batch(8, 256)), planned("min")
    for _ in range(3):
        assert_same(outcome(model, inputs), outcome(plain, inputs), rounding=1e-3)
    blocks = model.rewrite_report.memory.blocks
    assert any(b.host_bytes == 8 * 256 * 256 * 4 for b in blocks)
    assert "on the host" in str(model.rewrite_report)


def test_all_that_blocks_save_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(blocks: Sequence[BlockCosts], *_: Any) -> Placement:
        sent = [next((o for o in b.options if o.all_away), b.options[0]) for b in blocks[:-1]]
        return Placement([*sent, blocks[-1].options[0]], ahead=2)

    monkeypatch.setattr(weft.rewrite.choices, "options_within", away)
    inputs, (model, plain) = on_gpu(batch(8, 256)), planned("1TB")
    for _ in range(4):
        assert_same(outcome(model, inputs), outcome(plain, inputs), rounding=1e-3)
    blocks = model.rewrite_report.memory.blocks
    assert any(b.host_bytes > 8 * 256 * 256 * 4 for b in blocks)
    taken = peak(model, inputs)
    monkeypatch.undo()
    model.rewrite_report.steps._choices = Choices()
    assert taken < 0.8 * peak(model, inputs)


def test_a_smaller_limit_has_a_smaller_peak() -> None:
    inputs, (model, plain) = on_gpu(batch(8, 256)), planned("1TB")
    del plain
    roomy = peak(model, inputs)
    model.rewrite_report.steps.limit = "min"
    assert peak(model, inputs) < 0.8 * roomy


def test_replays_stay_within_the_limit_of_a_step() -> None:
    """The head in float64 would take 400 MB, as much as the whole model."""
    model = adapted(2, **WIDE, vocab_size=100_000, tie_word_embeddings=True).cuda()
    resident, few = torch.cuda.memory_allocated(), on_gpu(batch(2, 6))
    torch.cuda.reset_peak_memory_stats()
    weft.optimize(model, example_inputs=few, memory=resident + 100 * 2**20, cuda_graphs=False)
    assert torch.cuda.max_memory_allocated() < resident + 200 * 2**20
    assert any(r.rule == "linear_cross_entropy" for r in model.rewrite_report.rewrites)


def test_without_a_limit_the_free_memory_is_one() -> None:
    model, _ = planned(None)
    outcome(model, on_gpu(batch(8, 256)))
    plan = model.rewrite_report.memory
    assert plan.limit <= torch.cuda.get_device_properties(0).total_memory and plan.fits
    assert all(b.choice == "saves all" for b in plan.blocks)


def test_two_forwards_before_one_backward_on_the_host() -> None:
    model, plain = planned("min")
    gradients = []
    for each in (model, plain):
        losses = [each(**on_gpu(batch(4, length, seed=length))).loss for length in (128, 128, 64)]
        (losses[0] - 2 * losses[1] + losses[2]).backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert_same(gradients[0], gradients[1], rounding=1e-3)


def test_a_pinned_buffer_is_used_again_once_it_is_free() -> None:
    store, device = HostStore(torch.device("cuda", 0)), torch.device("cuda", 0)
    for seed in range(4):
        given = torch.full((512, 512), float(seed + 1), device=device, requires_grad=True)
        kept: list[Tensor] = []
        for factor in (1.0, 2.0, 3.0):
            x = given * factor
            with store.offloading(x):
                kept.append(x.square())
        del x
        sum(k.sum() for k in kept).backward()  # type: ignore[union-attr]
        assert given.grad is not None
        torch.testing.assert_close(given.grad, torch.full_like(given, 2 * (seed + 1) * (1 + 4 + 9)))
        kept.clear()
    assert sum(map(len, store._pool._free.values())) == 3


@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_large_buffers_are_locked_page_by_page_and_let_go(strides: str) -> None:
    """Copies from and to them are queued: the host is free before they are over."""
    given = torch.randn(4096, 4096 + 1, device="cuda")  # a size that is no whole number of pages
    given = given if strides == "rows" else given.t()
    assert given.nbytes >= LARGE
    for _ in range(3):  # the addresses of what was let go may come again
        pool, back = PinnedPool(given.device), torch.empty_like(given)
        buffer = pool.take(given)
        assert buffer.shape == given.shape and buffer.stride() == given.stride() and buffer.device.type == "cpu"
        torch.cuda._sleep(50_000_000)
        buffer.copy_(given, non_blocking=True)
        back.copy_(buffer, non_blocking=True)
        assert not torch.cuda.current_stream().query(), "still asleep"
        assert torch.equal(back, given) and torch.equal(buffer, given.cpu())
        del buffer, pool


def test_a_buffer_that_is_dropped_waits_for_its_copy() -> None:
    given, back = torch.randn(2**24, device="cuda"), torch.empty(2**24, device="cuda")
    place = pinned(given.nbytes)
    buffer = place.view(torch.float32)
    buffer.copy_(given)
    torch.cuda._sleep(50_000_000)
    back.copy_(buffer, non_blocking=True)
    del buffer, place
    other = torch.full((2**24,), 7.0)  # may lie where it lay
    assert torch.equal(back, given) and float(other[0]) == 7.0


def test_what_a_thread_has_locked_is_copied_beside_the_computation() -> None:
    given = torch.randn(4096, 4096, device="cuda")
    pool = PinnedPool(given.device)
    pool.reserve(3 * given.nbytes, given.nbytes)
    buffers = [pool.take(given) for _ in range(3)]
    torch.cuda._sleep(50_000_000)
    for i, buffer in enumerate(buffers):
        buffer.copy_(given + i, non_blocking=True)
    assert not torch.cuda.current_stream().query(), "still asleep"
    torch.cuda.synchronize()
    assert all(torch.equal(b, (given + i).cpu()) for i, b in enumerate(buffers))
