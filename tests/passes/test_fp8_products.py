"""Products with frozen weights go to FP8, those that must not be stay, and the replay knows the one from the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from weft.kernels import fp8, quant_linear
from weft.passes.defaults import default_passes
from weft.passes.fp8_products import OURS, WHAT, Fp8Products
from weft.passes.lora_linear import FuseLoraLinear
from weft.passes.parallel_linears import FuseParallelLinears
from weft.passes.quant_linear import FuseQuantLinear
from weft.quant.layout import Layout
from weft.rewrite.driver import Outcome
from weft.rewrite.errors import OptionError
from weft.rewrite.report import Asked, GraphRecord, RegionRecord, Rewrite, RewriteReport
from weft.rewrite.verify import Replayer

from ..graphs import apply, cases, computed, copied, described, in_float64, normal, operations, record, targets, trace

RULES = [FuseLoraLinear(), FuseQuantLinear(), FuseParallelLinears()]
SIZE, RANK = 64, 2
KINDS = ("plain", "bias", "lora", "lora, own input", "nf4", "nf4, lora", "shared", "narrow")
GEMM = torch.ops.bitsandbytes.gemm_4bit.default

chains = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
        "trained": st.lists(st.booleans(), min_size=4, max_size=4),
        "residual": st.booleans(),
        "grads": st.tuples(st.booleans(), st.booleans()),
        "shape": st.sampled_from(((2, 3), (20,), (2, 16))),
        "dynamic": st.booleans(),
        "verify": st.booleans(),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """Linears one after the other, with activations between them."""

    def one(x: Any, z: Any, kind: str, w: Any, c: Any, a: Any, b: Any, packed: Any, absmax: Any) -> Any:
        if "nf4" in kind:
            y = GEMM(x, packed, [SIZE, SIZE], absmax, 64, "nf4")
        else:
            y = F.linear(x, w, c if kind == "bias" else None)
        if kind == "narrow":
            y = torch.cat((y, y, y, y, y, y, y, y), -1)
        if "lora" in kind or kind == "shared":
            read = z if "own" in kind else x
            y = y + F.linear(F.linear(read, a), b) * 0.5
        return y + torch.sigmoid(F.linear(x, w)) if kind == "shared" else y

    def chain(x: Any, z: Any, packed: Any, absmax: Any, c: Any, a: Any, b: Any,
              w0: Any, w1: Any, w2: Any, w3: Any) -> Any:  # fmt: skip
        h = x
        for kind, w in zip(s["kinds"], (w0, w1, w2, w3), strict=False):
            y = one(torch.tanh(h), z, kind, w, c, a, b, packed, absmax)
            h = h + y if s["residual"] else y
        return h

    return chain


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """x, z, a weight in 4 bits, an adapter, and a dense weight for each linear."""
    kind, (gx, ga) = s["dtype"], s["grads"]
    packed, state = quantize_4bit(normal(1, SIZE, SIZE) / 8, blocksize=64, compress_statistics=False, quant_type="nf4")
    inputs = {n: normal(i, *s["shape"], SIZE, dtype=kind, grad=gx) for i, n in enumerate("xz")}
    inputs |= {"packed": packed, "absmax": state.absmax, "c": normal(2, SIZE, dtype=kind, grad=ga)}
    inputs |= {"a": normal(3, RANK, SIZE, dtype=kind, grad=ga) / 8, "b": normal(4, SIZE, RANK, dtype=kind, grad=ga)}
    inputs |= {n: inputs[n].detach().requires_grad_(ga) for n in "ab"}
    for i, name in enumerate([*s["kinds"], *["plain"] * 3][:4]):
        outs = SIZE // 8 if name == "narrow" else SIZE
        weight = normal(10 + i, outs, SIZE, dtype=kind) / 8
        inputs[f"w{i}"] = weight.detach().requires_grad_(s["trained"][i])
    return inputs


def prepared(function: Any, inputs: dict[str, Any], dynamic: bool = False) -> fx.GraphModule:
    """The graph after the rules that come before, its dense weights known as parameters."""
    module = trace(function, inputs, dynamic=dynamic)
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name[0] == "w":
            node.meta["parameter_path"] = f"layer.{node.name}"
    apply(module, RULES)
    return module


def run(module: fx.GraphModule, verify: bool = True) -> Outcome:
    """The pass, and what holds of any."""
    before = operations(module)
    outcome = Fp8Products().run(module, Replayer() if verify else None)
    module.graph.lint()
    module.recompile()
    assert operations(module) == before + sum(r.nodes_added - r.nodes_removed for r in outcome.rewrites)
    assert all(r.rule == "fp8_products" and r.asked is not None and r.asked.what == WHAT for r in outcome.rewrites)
    assert all((r.error is not None) == verify and not r.bytes_saved for r in outcome.rewrites)
    assert all(r.rule == "fp8_products" and r.reason for r in outcome.refusals)
    once = described(module)
    assert not Fp8Products().run(module, None).rewrites and described(module) == once
    return outcome


def layouts(module: fx.GraphModule) -> list[Layout]:
    """Of every linear of ours, in order."""
    found = [n.args[2] for n in module.graph.nodes if n.target in OURS]
    return [Layout.decode(text) for each in found for text in ([each] if isinstance(each, str) else each)]


def expected(s: dict[str, Any]) -> tuple[int, int]:
    """How many linears are to run in FP8, and how many calls are refused, in whole or in part."""
    turned, refused = 0, 0
    for i, kind in enumerate(s["kinds"]):
        last = i == len(s["kinds"]) - 1
        free = "nf4" in kind or not s["trained"][i]
        surely = kind not in ("plain", "bias") or not last or s["residual"]
        fits = free and kind != "narrow" and surely
        turned += (2 if kind == "shared" else 1) * fits
        refused += not fits
    return turned, refused


@settings(cases, max_examples=80)
@given(s=chains)
def test_any_chain_of_linears(s: dict[str, Any]) -> None:
    inputs = inputs_of(s)
    module = prepared(spelt(s), inputs, s["dynamic"])
    original = copied(module)
    outcome = run(module, s["verify"])
    turned, refused = expected(s)
    assert (sum(layout.fp8 for layout in layouts(module)), len(outcome.refusals)) == (turned, refused), module.graph
    assert bool(outcome.rewrites) == bool(turned)
    with patch.object(fp8, "FEW_ROWS", 0):
        truth, eager, ours = in_float64(original, inputs), computed(original, inputs), computed(module, inputs)
    for name, exact in truth.items():
        got, peer = ours[name], eager[name]
        if name.startswith("input"):
            continue
        if exact is None or peer is None:
            assert got is None, name
            continue
        assert got is not None and got.dtype == peer.dtype and got.shape == peer.shape
        own = float((peer.double() - exact).norm())
        off = float((got.double() - exact).norm())
        assert off <= 2 * own + (0.15 if turned else 1e-6) * float(exact.norm()) + 1e-6, name
        assert turned or torch.equal(got, peer)


def lora(x: Any, w: Any, a: Any, b: Any) -> Any:
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * 0.5


def simple(**changes: Any) -> dict[str, Any]:
    """Arguments of ``lora``."""
    made = {"x": normal(0, 2, 3, 64, grad=True), "w": normal(1, 32, 64), "a": normal(2, 2, 64, grad=True)}
    return {**made, "b": normal(3, 32, 2, grad=True), **changes}


def refusal(function: Any, inputs: dict[str, Any]) -> str:
    """Why the one product was refused."""
    module = prepared(function, inputs)
    before = described(module)
    outcome = run(module)
    assert not outcome.rewrites and described(module) == before
    return outcome.refusals[0].reason


def test_what_is_refused_says_why() -> None:
    assert refusal(lora, simple(w=normal(1, 32, 64, grad=True))) == "the weight is trained"
    assert "16, and the weight is 24 x 64" in refusal(lora, simple(w=normal(1, 24, 64), b=normal(3, 24, 2)))
    wide = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in simple().items()}
    assert refusal(lora, wide) == "it is computed in torch.float64"
    with patch.object(fp8, "missing", lambda device: f"no FP8 on {device.type}"):
        assert refusal(lora, simple()) == "no FP8 on cpu"


def test_a_head_and_a_router_stay() -> None:
    inputs = {"x": normal(0, 2, 3, 32), "w0": normal(1, 32, 32), "w1": normal(2, 48, 32), "w2": normal(3, 32, 48)}

    def head(x: Any, w0: Any, w1: Any, w2: Any) -> Any:
        h = torch.relu(F.linear(x, w0))
        logits = torch.tanh(F.linear(h, w1) / 30) * 30
        return logits, torch.log_softmax(logits, -1).sum()

    def router(x: Any, w0: Any, w1: Any, w2: Any) -> Any:
        chosen, index = torch.topk(torch.softmax(F.linear(x, w1), -1), 2)
        return x + F.linear(x, w0) * chosen.sum(-1, keepdim=True), index

    def block(x: Any, w0: Any, w1: Any, w2: Any) -> Any:
        return x + torch.relu(F.linear(torch.relu(F.linear(x, w1)), w2))

    def biased(x: Any, w0: Any, w1: Any, w2: Any) -> Any:
        return F.linear(torch.relu(x), w0) + x[0, 0]

    for function, turned, why in (
        (head, [(32, 32)], ["it may be the head"]), (router, [(32, 32)], ["the largest of its results"]),
        (block, [(48, 32), (32, 48)], []), (biased, [], ["it may be the head"]),
    ):  # fmt: skip
        module = prepared(function, inputs)
        outcome = run(module)
        assert [(i.out_features, i.in_features) for i in layouts(module) if i.fp8] == turned
        assert [r.reason[: len(w)] for r, w in zip(outcome.refusals, why, strict=True)] == why


def test_a_linear_over_what_is_no_parameter_is_none_of_ours() -> None:
    module = prepared(lambda x, v: F.linear(F.linear(x, v), v), {"x": normal(0, 20, 32), "v": normal(1, 32, 32)})
    outcome = run(module)
    assert targets(module).count("linear") == 2 and not outcome.rewrites and not outcome.refusals


def test_the_replay_measures_and_refuses_what_is_no_rounding() -> None:
    module = prepared(lora, simple())
    (done,) = run(copied_with_meta(module)).rewrites
    assert done.error is not None and 0.1 < done.error < 0.7
    assert done.asked is not None and done.asked.error is not None and 0.02 < done.asked.error < 0.05
    exact = fp8.quantize_reference
    spoiled = {
        "scales": lambda m: (exact(m)[0], exact(m)[1] * 1.5),
        "nothing": lambda m: (exact(m)[0], exact(m)[1] * 0.0),
        "no number": lambda m: (exact(m)[0], exact(m)[1] * torch.nan),
        "another row": lambda m: (exact(m)[0].view(torch.uint8).roll(1, 0).view(fp8.E4M3), exact(m)[1]),
    }
    for name, wrong in spoiled.items():
        with patch.object(fp8, "quantize_rows", wrong):
            outcome = Fp8Products().run(module, Replayer())
        assert not outcome.rewrites and "replay: output 0 is off by" in outcome.refusals[0].reason, name
    with patch.object(fp8, "multiply", side_effect=RuntimeError("no such product")):
        outcome = Fp8Products().run(module, Replayer())
    assert "does not run by itself: RuntimeError: no such product" in outcome.refusals[0].reason


def test_a_wrong_gradient_is_refused_too() -> None:
    module = prepared(lora, simple())
    true = quant_linear.x_gradient
    wrong = lambda dy, weight, layout, *over: true(dy, weight, layout, *over) * (0.8 if layout.fp8 else 1.0)  # noqa: E731
    with patch("weft.kernels.linears.x_gradient", wrong):
        outcome = Fp8Products().run(module, Replayer())
    assert "replay: gradient 0 is off by" in outcome.refusals[0].reason


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_packed_weights_are_replayed_as_they_are_stored(storage: torch.dtype) -> None:
    packed, state = quantize_4bit(normal(1, 32, 64), blocksize=64, compress_statistics=False, quant_type="nf4")
    text = Layout("nf4", 32, 64, 64).encode()

    def product(x: Any, packed: Any, absmax: Any) -> Any:
        return record(quant_linear.quant_linear, x, [packed, absmax], text)

    inputs = {"x": normal(0, 20, 64, grad=True), "packed": packed.view(-1).view(storage), "absmax": state.absmax}
    module = trace(product, inputs)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    outcome = Fp8Products().run(module, Replayer(dict(zip(placeholders, inputs.values(), strict=True))))
    assert [round(r.asked.error, 2) for r in outcome.rewrites if r.asked and r.asked.error] == [0.04], outcome


def copied_with_meta(module: fx.GraphModule) -> fx.GraphModule:
    """A copy to rewrite."""
    made = copied(module)
    for ours, theirs in zip(made.graph.nodes, module.graph.nodes, strict=True):
        ours.meta = dict(theirs.meta)
    return made


def test_the_options() -> None:
    names = [p.name for p in default_passes("train", products="fp8")]
    assert names.index("fp8_products") == names.index("parallel_linears") + 1
    assert [n for n in names if n != "fp8_products"] == [p.name for p in default_passes("train")]
    assert [p.kept for p in default_passes("train", products="fp8_kept") if isinstance(p, Fp8Products)] == [True]
    with pytest.raises(OptionError, match="mode is 'inference'"):
        default_passes("inference", products="fp8")
    with pytest.raises(OptionError, match='"fp8" or "fp8_kept", not \'int8\''):
        default_passes("train", products="int8")  # type: ignore[arg-type]


def test_the_report_says_it_once() -> None:
    record = GraphRecord(RegionRecord([], "graph", places=["layers.0", "layers.1"]))
    record.rewrites = [Rewrite("fp8_products", "q", "", 1, 1, 0, 0.4, Asked(WHAT, e)) for e in (0.031, 0.042, None)]
    report = RewriteReport(graphs=[record, replace(record)], notes=["another"])
    said = f"{WHAT}, as asked: relative error up to 4.20% where replayed"
    assert report.remarks == ["another", said] and report.to_dict()["notes"] == report.remarks
    assert str(report).count(said) == 1 and report.to_html().count(said) == 1
    record.rewrites = [replace(record.rewrites[0], asked=Asked(WHAT))]
    assert RewriteReport(graphs=[record]).remarks == [f"{WHAT}, as asked, not replayed"]
