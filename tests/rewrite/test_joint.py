"""A graph lowered with its backward: the same numbers whatever is saved, and saved is what was chosen, no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.rewrite.joint import recompute_problem
from weft.rewrite.remat import choose

from ..graphs import cases, normal
from .saving import Captured, counting, random_calls, run

WIDTH = 6


def heads(x: Tensor, k: Tensor) -> Tensor:
    """Causal attention of two heads."""
    q, k, v = (t.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for t in (x, k, x))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, v: F.linear(x, w),
    "gate": lambda x, w, v: F.silu(x) * (x @ w),
    "halves": lambda x, w, v: torch.cat([a * b for a, b in [(x @ w).chunk(2, -1)] for _ in range(2)], -1),
    "one half": lambda x, w, v: torch.cat([torch.tanh((x @ w).split(3, -1)[1]), x[..., :3]], -1),
    "norm": lambda x, w, v: F.layer_norm(x, (WIDTH,), v),
    "root mean square": lambda x, w, v: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1) * v,
    "attention": lambda x, w, v: heads(x, x @ w),
    "softmax": lambda x, w, v: torch.softmax(x @ x.mT, -1) @ (x * v),
    "dropout": lambda x, w, v: F.dropout(x * v, 0.4, True),
    "attention with dropout": lambda x, w, v: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.3)[
        :, 0
    ],
    "turned": lambda x, w, v: (x.mT.contiguous().exp().mT + v).sin(),
    "constant": lambda x, w, v: torch.where(x > 0, x, torch.zeros_like(x) + 0.1),
}  # fmt: skip
programs = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.booleans()), min_size=1, max_size=5)


def program(steps: Sequence[tuple[str, bool]], outputs: int) -> Callable[..., Any]:
    """The steps, one after another, some with the input added; the last values are returned."""

    def forward(x: Tensor, w: Tensor, v: Tensor) -> Any:
        values = [x]
        for name, residual in steps:
            made = STEPS[name](values[-1], w, v)
            values.append(made + values[-1] if residual else made)
        return values[-1] if outputs == 1 else tuple(dict.fromkeys(values[1:]))[-outputs:]

    return forward


def leaves(length: int, grads: Sequence[bool] = (True, True, True)) -> list[Tensor]:
    """An input and two weights."""
    made = [normal(length, 2, length, WIDTH), normal(1, WIDTH, WIDTH) / 3, normal(2, WIDTH)]
    return [t.requires_grad_(grad) for t, grad in zip(made, grads, strict=True)]


def seeded(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The same random numbers each time."""
    torch.manual_seed(0)
    return run(function, inputs)


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Outputs and gradients, up to rounding."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(cases, max_examples=max(4, cases.max_examples // 40))
@given(
    programs, st.sampled_from([1, 2]), st.sampled_from([(True, True, True), (True, False, True), (False, True, True)])
)
def test_every_choice_computes_the_same_and_saves_what_it_says(
    steps: Sequence[tuple[str, bool]], outputs: int, grads: tuple[bool, ...]
) -> None:
    torch._dynamo.reset()
    plain = program(steps, outputs)
    if not grads[0] and steps[0][0] in ("attention with dropout", "constant"):
        grads = (True, True, True)  # else nothing may be left that has a gradient
    captured = Captured(plain)
    wanted, _ = seeded(plain, leaves(5, grads))
    found, everything = seeded(captured, leaves(5, grads))
    assert_close(found, wanted)
    choices = captured.choices()
    assert everything == choices[0].bytes and choices[0].seconds == 0
    for choice in choices:
        found, saved = seeded(lambda *a, c=choice: captured(*a, saved=c.saved), leaves(5, grads))
        assert_close(found, wanted)
        assert saved == choice.bytes
        backward = captured.joint.backward[choice.saved]
        assert not random_calls(backward) and "rng_state" not in str(backward)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_all_lengths_run_through_one_lowering(name: str) -> None:
    torch._dynamo.reset()
    plain = program([("linear", True), (name, True), ("gate", False)], 1)
    captured = Captured(plain)
    seeded(captured, leaves(5))
    least = captured.choices()[-1].saved
    for length in (5, 9, 4):
        for saved in (None, least):
            found, held = seeded(lambda *a, s=saved: captured(*a, saved=s), leaves(length))
            assert_close(found, seeded(plain, leaves(length))[0])
            assert (
                held
                == next(c for c in captured.choices() if c.saved == least or (saved is None and not c.seconds)).bytes
            )
    assert captured.graphs == 1 and len(captured.joint.backward) == 2


def test_the_least_is_the_inputs_alone_where_nothing_is_random() -> None:
    captured = Captured(program([("norm", True), ("gate", True), ("softmax", False)], 1))
    seeded(captured, leaves(5))
    assert captured.choices()[-1].bytes == 0


def test_what_a_dropout_drew_is_kept() -> None:
    captured = Captured(program([("gate", True), ("dropout", True), ("gate", False)], 1))
    seeded(captured, leaves(5))
    least = captured.choices()[-1]
    assert 0 < least.bytes < captured.choices()[0].bytes
    assert random_calls(captured.joint.graph)


def test_attention_that_drops_nothing_is_done_twice_without_the_generators_state() -> None:
    captured = Captured(program([("attention", False)], 1))
    wanted, _ = seeded(captured, leaves(5))
    found, saved = seeded(lambda *a: captured(*a, saved=frozenset()), leaves(5))
    assert_close(found, wanted)
    assert saved == 0 and "rng_state" not in str(captured.joint.backward[frozenset()])


def test_half_of_a_product_that_is_needed_keeps_the_whole() -> None:
    """A part of a split lies in what was split: saving it saves all of that."""
    torch._dynamo.reset()
    captured = Captured(
        lambda x, w, v: torch.tanh(x).split(3, -1)[0].exp().sum() + (x @ w).split(2, -1)[0].pow(2).sum()
    )
    _, saved = seeded(captured, leaves(5))
    assert saved == captured.choices()[0].bytes


def test_sizes_of_the_problem_are_those_of_the_call() -> None:
    captured = Captured(program([("gate", True), ("norm", True)], 1))
    sizes = []
    for length in (4, 12):
        seeded(captured, leaves(length))
        sizes.append(captured.choices()[0].bytes)
    assert sizes[1] == 3 * sizes[0]


def test_a_tangent_never_decides_what_is_saved() -> None:
    """All that the problem calls needed belongs to the forward."""
    captured = Captured(program([("attention", True), ("norm", False)], 1))
    seeded(captured, leaves(5))
    graph = captured.joint.graph
    assert graph is not None
    names = {n.name for n in graph.nodes if n.op == "call_function"}
    problem = captured.problem()
    assert set(problem.needed) <= set(problem.producer) <= names
    assert choose(problem, 1.0).saved <= names
    assert not [n for n in problem.operations if "tangents" in n]
    assert recompute_problem(graph, set(), lambda _: 0.0, lambda size: int(size)) is not None


def test_saved_values_are_seen_by_hooks_and_may_be_replaced() -> None:
    captured = Captured(program([("gate", False)], 1))
    inputs = leaves(5)
    wanted, _ = seeded(captured, inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        found, _ = seeded(captured, inputs)
    assert_close(found, wanted)
    with counting() as count:
        captured(*inputs)
    assert count.bytes > 0
