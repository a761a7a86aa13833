"""Linears of one input become one operator with their adapters, whatever stands between them, or say why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.passes.lora_linear import FuseLoraLinear
from weft.passes.parallel_linears import FuseParallelLinears

from ..graphs import apply, cases, check, computed, copied, normal, record, targets, trace

RULES = [FuseLoraLinear(), FuseParallelLinears()]
IN, RANK = 6, 2
KINDS = ("plain", "bias", "lora", "lora, bias", "lora, own input", "columns")
BETWEEN = ("nothing", "reads the first", "reads x", "chain")

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "adapter_dtype": st.sampled_from(("same", "float32")),
        "kinds": st.lists(st.sampled_from(KINDS), min_size=2, max_size=4),
        "between": st.sampled_from(BETWEEN),
        "more": st.sampled_from(("nothing", "x")),
        "shape": st.sampled_from(((2, 3), (4,), (1, 1), (0, 3))),
        "grads": st.tuples(*[st.booleans()] * 3),
        "dynamic": st.booleans(),
    }
)


def one(x: Any, z: Any, i: int, s: dict[str, Any], p: dict[str, Any]) -> Any:
    """Linear ``i`` of ``x``."""
    kind = s["kinds"][i]
    w, bias, a, b = (p[f"{n}{i}"] for n in "wcab")
    y = x @ w.t() if kind == "columns" else F.linear(x, w, bias if "bias" in kind else None)
    if "lora" not in kind:
        return y
    read = z if "own" in kind else x
    low = read.to(torch.float32) if s["adapter_dtype"] == "float32" else read
    return (y + F.linear(F.linear(low, a), b) * 0.5).to(s["dtype"])


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes."""

    def linears(x: Any, z: Any, w0: Any, w1: Any, w2: Any, w3: Any, c0: Any, c1: Any, c2: Any, c3: Any,
                a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, b2: Any, b3: Any) -> Any:  # fmt: skip
        p = dict(locals())
        found, first = [], None
        for i in range(len(s["kinds"])):
            y = one(x, z, i, s, p)
            if s["between"] == "reads the first" and i == 0:
                first = torch.tanh(y) * 2
            if s["between"] == "reads x" and i == 0:
                first = torch.sigmoid(x) + z
            if s["between"] == "chain":
                first = torch.tanh(y).sum() if first is None else first * torch.tanh(y).sum()
            found.append(torch.relu(y))
        return (*found, *(() if first is None else (first,)), *((x * 2,) if s["more"] == "x" else ()))

    return linears


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """x, z, and four of everything."""
    kind = torch.float32 if s["adapter_dtype"] == "float32" else s["dtype"]
    gx, gw, ga = s["grads"]
    inputs = {n: normal(i, *s["shape"], IN, dtype=s["dtype"], grad=gx) for i, n in enumerate("xz")}
    outs = (4, 8, 4, 10)
    inputs |= {f"w{i}": normal(10 + i, outs[i], IN, dtype=s["dtype"], grad=gw) for i in range(4)}
    inputs |= {f"c{i}": normal(20 + i, outs[i], dtype=s["dtype"], grad=ga) for i in range(4)}
    inputs |= {f"a{i}": normal(30 + i, RANK + i, IN, dtype=kind, grad=ga) for i in range(4)}
    return inputs | {f"b{i}": normal(40 + i, outs[i], RANK + i, dtype=kind, grad=ga) for i in range(4)}


@cases
@given(s=spellings)
def test_linears_of_one_input_become_one_operator(s: dict[str, Any]) -> None:
    inputs = inputs_of(s)
    module, outcome = check(spelt(s), inputs, RULES, terms=8 * IN, dynamic=s["dynamic"])
    merged = [r for r in outcome.rewrites if r.rule == "parallel_linears"]
    named = [k for k in s["kinds"] if k != "columns"]
    wanted = len(named) > 1 and any("lora" in k for k in named)
    assert len(merged) == wanted and targets(module).count("parallel_linears") == wanted, module.graph
    assert not wanted or "lora_linear" not in targets(module)


def run(function: Any, count: int, grad: bool = True, **sizes: tuple[int, ...]) -> tuple[list[str], Any]:
    """Names of the operations and the outcome, for inputs of the given sizes."""
    inputs = {n: normal(i, *size, grad=grad and n in "ab") for i, (n, size) in enumerate(sizes.items())}
    module, outcome = check(function, inputs, RULES, terms=8 * IN)
    assert sum(r.rule == "parallel_linears" for r in outcome.rewrites) == count, (outcome, module.graph)
    return targets(module), outcome


def lora(x: Any, w: Any, a: Any, b: Any) -> Any:
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0


SIZES = {"x": (2, 3, IN), "w": (IN, IN), "a": (RANK, IN), "b": (IN, RANK)}


def test_arguments_by_name() -> None:
    def named(x: Any, w: Any, a: Any, b: Any) -> Any:
        return F.linear(input=x, weight=w + 1), lora(x, w, a, b), F.linear(x, bias=None, weight=w)

    names, _ = run(named, 1, **SIZES)
    assert names.count("parallel_linears") == 1 and "linear" not in names


def test_plain_linears_stay_apart() -> None:
    names, _ = run(lambda x, w: (F.linear(x, w), F.linear(x, w + 1)), 0, x=SIZES["x"], w=SIZES["w"])
    assert names.count("linear") == 2


def test_linears_of_two_inputs_stay_apart() -> None:
    names, _ = run(lambda x, w, a, b: (lora(x, w, a, b), lora(x * 2, w, a, b)), 0, **SIZES)
    assert names.count("lora_linear") == 2


def test_a_linear_that_reads_another_of_its_input_is_refused() -> None:
    def chained(x: Any, w: Any, a: Any, b: Any) -> Any:
        first = lora(x, w, a, b)
        return first, F.linear(x, w * first.mean())

    _, outcome = run(chained, 0, **SIZES)
    assert "reads another's result" in outcome.refusals[0].reason


def test_a_write_between_keeps_them_apart() -> None:
    def written(x: Any, w: Any, a: Any, b: Any) -> Any:
        y = x * 1.0
        first = lora(y, w, a, b)
        y.add_(torch.tanh(first).detach())
        return first, lora(y, w, a, b), y.view(-1)

    run(written, 0, grad=False, **SIZES)


def test_a_write_between_that_nothing_reads_first_keeps_them_apart() -> None:
    def written(x: Any, w: Any, a: Any, b: Any) -> Any:
        y = x * 1.0
        first = lora(y, w, a, b)
        y.add_(1.0)
        return first, lora(y, w, a, b), y.view(-1)

    run(written, 0, grad=False, **SIZES)


def test_a_weight_written_between_keeps_them_apart() -> None:
    def written(x: Any, w: Any, a: Any, b: Any) -> Any:
        first = lora(x, w, a, b)
        w.mul_(2.0)
        return first, lora(x, w, a, b)

    run(written, 0, grad=False, **SIZES)


def test_a_mode_switch_between_keeps_them_apart() -> None:
    def switched(x: Any, w: Any, a: Any, b: Any) -> Any:
        first = lora(x, w, a, b)
        x.tracer.create_proxy("call_function", torch._C._set_grad_enabled, (False,), {})
        second = lora(x, w, a, b)
        x.tracer.create_proxy("call_function", torch._C._set_grad_enabled, (True,), {})
        return first, second

    run(switched, 0, **SIZES)


def test_groups_are_no_larger_than_the_rule_allows() -> None:
    def many(x: Any, w: Any, a: Any, b: Any) -> Any:
        return tuple(lora(x, w * i, a, b) for i in range(1, 11))

    names, _ = run(many, 2, **SIZES)
    assert names.count("parallel_linears") == 2


@pytest.mark.parametrize("other", [True, False])
def test_random_readers_between_draw_in_their_order(other: bool) -> None:
    def dropped(x: Any, w: Any, a: Any, b: Any) -> Any:
        first = F.dropout(lora(x, w, a, b), 0.5, True)
        second = F.dropout(x, 0.5, True) if other else first * 2
        return first, second, lora(x, w * 2, a, b)

    inputs = {n: normal(i, *size) for i, (n, size) in enumerate(SIZES.items())}
    module = trace(dropped, inputs)
    original = copied(module)
    outcome = apply(module, RULES)
    assert targets(module).count("parallel_linears") == (not other)
    assert [r.reason for r in outcome.refusals] == ["between them random numbers would be drawn in another order"][
        :other
    ]
    torch.manual_seed(3)
    wanted = computed(original, inputs)
    torch.manual_seed(3)
    for name, found in computed(module, inputs).items():
        torch.testing.assert_close(found, wanted[name], msg=name)


def test_the_merged_operator_is_verified() -> None:
    def linears(x: Any, w: Any, a: Any, b: Any) -> Any:
        return lora(x, w, a, b), F.linear(x, w), lora(x, record(torch.neg, w), a, b)

    inputs = {n: normal(i, *size, dtype=torch.bfloat16, grad=True) for i, (n, size) in enumerate(SIZES.items())}
    _, outcome = check(linears, inputs, RULES, terms=8 * IN, verify=True)
    assert outcome.rewrites[-1].rule == "parallel_linears" and outcome.rewrites[-1].error is not None
