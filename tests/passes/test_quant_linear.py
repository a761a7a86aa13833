"""A 4-bit product becomes one operator on the same packed tensors, whatever surrounds it."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import quantize_4bit
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from weft.passes.lora_linear import FuseLoraLinear
from weft.passes.quant_linear import FuseQuantLinear
from weft.rewrite.capture import annotate

from ..graphs import apply as rewrite
from ..graphs import cases, check, copied, normal, targets

GEMM = torch.ops.bitsandbytes.gemm_4bit.default
RULES = [FuseLoraLinear(), FuseQuantLinear()]
SHAPES = ((2, 3), (4,), (1, 1), (0, 3))
LATER = {
    "alone": lambda y: y,
    "cast": lambda y: y.float(),
    "activated": torch.relu,
    "twice": lambda y: (y, y * 2),
}
PACKED = {
    "as it is": lambda p: p,
    "column": lambda p: p.view(-1, 1),
    "turned": lambda p: p.t(),
    "row": lambda p: p.reshape(1, -1),
}

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "kind": st.sampled_from(("nf4", "fp4")),
        "block": st.sampled_from((64, 128)),
        "nested": st.booleans(),
        "bias": st.booleans(),
        "sizes": st.sampled_from(
            ((8, 128), (5, 128), (1, 128))
        ),  # rows of whole blocks: else bitsandbytes errs on CPUs
        "shape": st.sampled_from(SHAPES),
        "packed": st.sampled_from(sorted(PACKED)),
        "keywords": st.booleans(),
        "later": st.sampled_from(sorted(LATER)),
        "adapter": st.sampled_from(("none", "none", "same", "float32")),
        "dynamic": st.booleans(),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes."""

    def linear(
        x: Any, packed: Any, absmax: Any, bias: Any, absmax8: Any, code: Any, offset: Any, a: Any, b: Any
    ) -> Any:
        stored, bias = PACKED[s["packed"]](packed), bias if s["bias"] else None
        nested = {"absmax_8bit": absmax8, "absmax_code": code, "absmax_offset": offset} if s["nested"] else {}
        tail = {"bias": bias, **nested} if s["keywords"] else {}
        head = (x, stored, list(s["sizes"]), absmax, s["block"], s["kind"])
        y = GEMM(*head, **tail) if s["keywords"] else GEMM(*head, bias, *nested.values())
        if s["adapter"] != "none":
            low = x.float() if s["adapter"] == "float32" else x
            y = (y + F.linear(F.linear(low, a), b) * 0.5).to(s["dtype"])
        return LATER[s["later"]](y)

    return linear


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """x and a weight as bitsandbytes packs it; in the graph it takes no gradient."""
    rows, columns = s["sizes"]
    packed, state = quantize_4bit(
        normal(1, rows, columns), blocksize=s["block"], compress_statistics=s["nested"], quant_type=s["kind"]
    )
    kind = torch.float32 if s["adapter"] == "float32" else s["dtype"]
    outer = state.state2.absmax if s["nested"] else state.absmax
    inner = (state.absmax, state.state2.code, state.offset) if s["nested"] else (torch.zeros(1),) * 3
    return {
        "x": normal(0, *s["shape"], columns, dtype=s["dtype"]), "packed": packed, "absmax": outer,
        "bias": normal(2, rows, dtype=s["dtype"]), "absmax8": inner[0], "code": inner[1], "offset": inner[2],
        "a": normal(3, 2, columns, dtype=kind), "b": normal(4, rows, 2, dtype=kind),
    }  # fmt: skip


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    module, _ = check(spelt(s), inputs_of(s), RULES, count=1, terms=128, dynamic=s["dynamic"])
    names = targets(module)
    assert names.count("quant_linear") == (s["adapter"] == "none") and names.count("lora_linear") == (
        s["adapter"] != "none"
    )
    assert not any("gemm_4bit" in name for name in names)


def test_a_weight_of_another_kind_is_left_alone() -> None:
    packed, state = quantize_4bit(normal(1, 8, 16), blocksize=64, quant_type="nf4")
    inputs = {"x": normal(0, 3, 16), "packed": packed, "absmax": state.absmax, "code": state.code}

    def dequantized(x: Any, packed: Any, absmax: Any, code: Any) -> Any:
        return F.linear(
            x, torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, 64, "nf4", [8, 16], torch.float32)
        )

    module = fx.GraphModule(torch.nn.Module(), fx.Tracer().trace(dequantized))
    assert not rewrite(module, RULES).rewrites
    assert module(*inputs.values()).shape == (3, 8)


class Layer(torch.nn.Module):
    """A 4-bit linear as bitsandbytes makes it on the CPU, with or without an adapter beside it."""

    def __init__(self, nested: bool, bias: bool, adapter: bool) -> None:
        super().__init__()
        self.base = bnb.nn.Linear4bit(64, 8, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
        weight = bnb.nn.Params4bit(normal(1, 8, 64), requires_grad=False, quant_type="nf4", compress_statistics=nested)
        self.base.weight = weight.to("cpu")
        self.a, self.b = (torch.nn.Parameter(normal(i, *s)) for i, s in ((2, (2, 64)), (3, (8, 2))))
        self.adapter = adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(torch.tanh(x))
        return y + F.linear(F.linear(torch.tanh(x), self.a), self.b) * 0.5 if self.adapter else y


@pytest.mark.parametrize(("nested", "bias", "adapter"), [(True, False, True), (False, True, True), (True, True, False)])
def test_the_product_inside_an_autograd_function(nested: bool, bias: bool, adapter: bool) -> None:
    layer, kept = Layer(nested, bias, adapter), list[fx.GraphModule]()
    given = list[Any]()

    def keep(module: fx.GraphModule, inputs: list[Any]) -> Any:
        kept.append(module)
        given.extend(inputs)
        return module.forward

    torch.compile(layer, backend=keep, fullgraph=True)(normal(0, 3, 64, grad=True))
    module = kept[0]
    annotate(module)
    original = copied(module)
    outcome = rewrite(module, RULES, verify=True)
    assert [r.rule for r in outcome.rewrites] == ["lora_linear" if adapter else "quant_linear"], outcome
    assert outcome.rewrites[0].error is not None and "autograd_function_apply" not in targets(module)
    inputs = {n.name: v for n, v in zip((n for n in module.graph.nodes if n.op == "placeholder"), given, strict=True)}
    ours, eager = (dict(run(m, inputs).items()) for m in (module, original))
    for name, wanted in eager.items():
        torch.testing.assert_close(ours[name], wanted, msg=name)


def run(module: fx.GraphModule, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The output and the gradients of all that requires one."""
    fresh = {k: v.detach().clone().requires_grad_(v.requires_grad) if torch.is_tensor(v) and v.is_floating_point() else v
             for k, v in inputs.items()}  # fmt: skip
    (output,) = module(*fresh.values())
    leaves = {k: v for k, v in fresh.items() if torch.is_tensor(v) and v.requires_grad}
    assert leaves
    found = torch.autograd.grad(output.square().sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}
