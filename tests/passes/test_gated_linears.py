"""Two linears with adapters and the gate that reads them become one call, or stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.kernels.dispatch import INTERPRETED, Backend, backend
from weft.passes.defaults import default_passes
from weft.passes.gated_linears import FuseGatedLinears
from weft.passes.gated_mlp import FuseGatedMlp
from weft.passes.lora_linear import FuseLoraLinear
from weft.passes.parallel_linears import FuseParallelLinears

from ..graphs import cases, check, normal, targets

RULES = [FuseLoraLinear(), FuseParallelLinears(), FuseGatedMlp(), FuseGatedLinears(everywhere=True)]
IN, OUT = 6, 8

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "activation": st.sampled_from((F.silu, F.gelu, F.relu)),
        "up_first": st.booleans(),
        "reads": st.sampled_from(("nothing", "nothing", "gate", "up")),
        "adapted": st.sampled_from(("both", "both", "gate")),
        "own": st.booleans(),
        "bias": st.booleans(),
        "shape": st.sampled_from(((2, 3), (4,), (0, 3))),
        "grads": st.tuples(*[st.booleans()] * 2),
        "dynamic": st.booleans(),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """A gated feed-forward as ``s`` describes it."""

    def one(x: Any, z: Any, w: Any, c: Any, a: Any, b: Any, adapted: bool) -> Any:
        y = F.linear(x, w, c if s["bias"] else None)
        return y + F.linear(F.linear(z if s["own"] else x, a), b) * 0.5 if adapted else y

    def gated(x: Any, z: Any, w0: Any, w1: Any, c0: Any, c1: Any, a0: Any, a1: Any, b0: Any, b1: Any) -> Any:
        first, second = (w0, c0, a0, b0), (w1, c1, a1, b1)
        if s["up_first"]:
            up = one(x, z, *second, s["adapted"] == "both")
            gate = one(x, z, *first, True)
        else:
            gate = one(x, z, *first, True)
            up = one(x, z, *second, s["adapted"] == "both")
        h = s["activation"](gate) * up
        return h if s["reads"] == "nothing" else (h, (gate if s["reads"] == "gate" else up) * 2)

    return gated


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """x, z, and two of everything."""
    gx, ga = s["grads"]
    inputs = {n: normal(i, *s["shape"], IN, dtype=s["dtype"], grad=gx) for i, n in enumerate("xz")}
    for i in range(2):
        sizes = {"w": (OUT, IN), "c": (OUT,), "a": (2 + i, IN), "b": (OUT, 2 + i)}
        inputs |= {
            f"{n}{i}": normal(10 * i + ord(n), *size, dtype=s["dtype"], grad=ga and n in "ab")
            for n, size in sizes.items()
        }
    return {name: inputs[name] for name in ("x", "z", "w0", "w1", "c0", "c1", "a0", "a1", "b0", "b1")}


@pytest.mark.parametrize("name", ["reference", *(["triton"] if INTERPRETED else [])])  # these tensors are on no GPU
@cases
@given(s=spellings)
def test_two_linears_and_their_gate_become_one_call(name: Backend, s: dict[str, Any]) -> None:
    with backend(name):
        module, outcome = check(spelt(s), inputs_of(s), RULES, terms=64 * IN, dynamic=s["dynamic"])
    merged = [r for r in outcome.rewrites if r.rule == "gated_linears"]
    wanted = s["reads"] == "nothing" and s["adapted"] == "both" and not s["own"]
    assert len(merged) == wanted and targets(module).count("gated_linears") == wanted, module.graph
    assert not wanted or not {"parallel_linears", "gated_activation"} & set(targets(module))


def test_a_write_between_keeps_them_apart() -> None:
    def written(x: Any, w: Any, a: Any, b: Any, seen: Any) -> Any:
        lora = lambda w: F.linear(x, w) + F.linear(F.linear(x, a), b)  # noqa: E731
        gate, up = lora(w), lora(w * 2)
        seen = seen * 1.0
        seen.view(-1).add_(1.0)
        return F.silu(gate) * up, seen

    sizes = {"x": (3, IN), "w": (OUT, IN), "a": (2, IN), "b": (OUT, 2), "seen": (4,)}
    inputs = {n: normal(i, *size) for i, (n, size) in enumerate(sizes.items())}
    module, _ = check(written, inputs, RULES, terms=64 * IN)
    assert "gated_linears" not in targets(module)


def test_only_in_training_and_on_a_gpu_unless_asked() -> None:
    assert [p.name for p in default_passes("train")].count("gated_linears") == 1
    assert "gated_linears" not in [p.name for p in default_passes("inference")]
    s = {"activation": F.silu, "up_first": False, "reads": "nothing", "adapted": "both", "own": False, "bias": False}
    s |= {"dtype": torch.float32, "shape": (4,), "grads": (True, True)}
    module, _ = check(spelt(s), inputs_of(s), [*RULES[:3], FuseGatedLinears()], terms=64 * IN)
    assert "gated_linears" not in targets(module) and "gated_activation" in targets(module), (
        "these tensors are on no GPU"
    )
