"""Several linears of one x against float64, forward and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from weft.kernels import parallel_linears as module
from weft.kernels.dispatch import Backend, backend
from weft.kernels.lora_linear import lora_linear
from weft.kernels.parallel_linears import parallel_linears
from weft.quant.layout import Layout

from .accuracy import DTYPES, assert_accurate
from .drawing import among, drawn, maybe
from .linear_cases import (
    BACKENDS,
    DEVICE,
    LEADS,
    Results,
    adapters,
    cases,
    checkpointed,
    in_features,
    layouts,
    normal,
    opcheck_backward,
    packed_weight,
    running,
    tensors,
    terms,
    weights,
)

KINDS = ("rows", "rows", "columns", "nf4", "fp4")
LISTS = ("biases", "a", "b", "x_adapters")


def flat(function: Any) -> Any:
    """``function`` with its lists spread over keyword arguments, as ``assert_accurate`` wants them."""

    def spread(x: Tensor, count: int, **named: Any) -> list[Tensor]:
        lists = {key: [named[f"{key}{i}"] for i in range(count)] for key in ("weights", "layouts", "scales", *LISTS)}
        return function(x, **lists, adapter_dtype=named["adapter_dtype"])

    return spread


@drawn
def groups(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Up to three linears over one x, some with a bias, an adapter, an adapter's own input."""
    ins, count = draw(in_features(whole=draw(st.booleans()))), draw(st.integers(1, 3))
    shape = (*draw(among(LEADS)), ins)
    kept, computed = draw(among(((dtype, None), (torch.float32, torch.float32), (torch.float32, None))))
    inputs = {"x": draw(tensors(shape, dtype)), "count": count, "adapter_dtype": computed}
    for i in range(count):
        layout = draw(layouts(KINDS, ins))
        adapted = draw(among((True, True, False)))
        a, b = draw(adapters(layout, kept)) if adapted else (None, None)
        inputs |= {
            f"weights{i}": draw(weights(layout, dtype)),
            f"layouts{i}": layout.encode(),
            f"biases{i}": draw(maybe(tensors((layout.out_features,), dtype))),
            f"a{i}": a,
            f"b{i}": b,
            f"scales{i}": draw(among((1.0, 0.5, -2.0))),
            f"x_adapters{i}": draw(maybe(tensors(shape, computed or dtype))) if adapted else None,
        }
    return inputs


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_matches_float64(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs = data.draw(groups(dtype))
    with running(name):
        ours, plain = flat(parallel_linears), flat(module.reference)
        assert_accurate(ours, plain, inputs, reduction=128, scale=terms(*inputs.values()))


def operands(dtype: torch.dtype = torch.float32, rows: int = 9, own: tuple[int, ...] = ()) -> dict[str, Any]:
    """Arguments of ``parallel_linears``: 4 bits, rows, columns; an adapter on the first two, a bias on the last two."""
    kinds = (Layout("nf4", 6, 64, 64, 256), Layout("rows", 5, 64), Layout("columns", 7, 64))
    dense = [normal(9, shape, dtype, 0.1).requires_grad_() for shape in ((5, 64), (64, 7))]

    def leaf(i: int, *shape: int) -> Tensor:
        return normal(10 * i + len(shape), shape, dtype, 0.5).requires_grad_()

    return {
        "x": leaf(0, rows, 64),
        "weights": [packed_weight(kinds[0], 5), [dense[0]], [dense[1]]],
        "layouts": [kind.encode() for kind in kinds],
        "biases": [None, leaf(1, 5), leaf(2, 7)],
        "a": [leaf(3, 4, 64), leaf(4, 3, 64), None],
        "b": [leaf(5, 6, 4), leaf(6, 5, 3), None],
        "scales": [0.5, 2.0, 1.0],
        "x_adapters": [leaf(7 + i, rows, 64) if i in own else None for i in range(3)],
    }


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    """Every tensor of ``inputs`` that needs a gradient."""
    found = [inputs["x"]]
    for key in ("weights", *LISTS):
        found += [t for item in inputs[key] for t in (item if isinstance(item, list) else [item])]
    return [t for t in found if t is not None and t.requires_grad]


@pytest.mark.parametrize("own", [(), (1,), (0, 1)])
def test_is_what_single_linears_are(own: tuple[int, ...]) -> None:
    inputs = operands(torch.float64, own=own)
    keys = ("weights", "layouts", "biases", "a", "b", "scales", "x_adapters")
    single = [
        lora_linear(inputs["x"], w, layout, bias, a, b, s, x_adapter=z)
        for w, layout, bias, a, b, s, z in list(zip(*(inputs[key] for key in keys), strict=True))[:2]
    ]
    ours = parallel_linears(**inputs)
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(ours[:2], single, strict=True))
    wanted = [t for t in leaves(inputs) if t is not inputs["biases"][2] and t is not inputs["weights"][2][0]]
    grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), wanted) for ys in (ours[:2], single)]
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(*grads, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("own", [(), (1,), (0, 1)])
def test_opcheck(name: Backend, own: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: list[Any] = []
    operator = module._parallel_linears
    monkeypatch.setattr(module, "_parallel_linears", lambda *given: arguments.append(given) or operator(*given))
    with backend(name):
        parallel_linears(**operands(own=own))
        without = {key: value for key, value in operands().items() if key not in ("a", "b", "scales", "x_adapters")}
        parallel_linears(**without)
        assert len(arguments) == 2
        for given_ in arguments:
            torch.library.opcheck(torch.ops.weft.parallel_linears.default, given_)
        opcheck_backward("weft::parallel_linears_backward", parallel_linears(**operands(own=own)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "a", "b"])
def test_special_values_spread_as_in_eager(name: Backend, value: float, where: str) -> None:
    inputs = operands()
    with torch.no_grad():
        (inputs["x"] if where == "x" else inputs[where][0]).view(-1)[3] = value
    spread = {"x": inputs["x"], "count": 3, "adapter_dtype": None}
    for key in ("weights", "layouts", "scales", *LISTS):
        spread |= {f"{key}{i}": inputs[key][i] for i in range(3)}
    with backend(name):
        assert_accurate(flat(parallel_linears), flat(module.reference), spread, reduction=64, scale=25.0)


@pytest.mark.parametrize("kept", range(9))
def test_only_the_gradients_that_are_needed_are_computed(kept: int) -> None:
    inputs = operands(own=(1,))
    every = leaves(inputs)
    assert len(every) == 10
    for i, leaf in enumerate(every):
        leaf.requires_grad_(i == kept)
    ys = parallel_linears(**inputs)
    assert [y.requires_grad for y in ys] == [y.requires_grad for y in module.reference(**inputs)]
    with Results("weft::parallel_linears_backward") as record:
        sum(y.sum() for y in ys if y.requires_grad).backward()
    assert [len(result) for result in record.results] == [1]
    assert [leaf.grad is not None for leaf in every] == [i == kept for i in range(len(every))]


def test_an_output_may_stay_unused() -> None:
    inputs = operands()
    wanted = [inputs["x"], inputs["a"][0], inputs["a"][1]]
    ys, single = parallel_linears(**inputs), module.reference(**inputs)
    ours, plain = (torch.autograd.grad(y[1].square().sum(), wanted, allow_unused=True) for y in (ys, single))
    assert torch.equal(ours[1], torch.zeros_like(ours[1])) and plain[1] is None
    assert torch.allclose(ours[0], plain[0], rtol=1e-4) and torch.allclose(ours[2], plain[2], rtol=1e-4)


def test_x_is_saved_once_and_no_dequantized_weight() -> None:
    inputs, saved = operands(), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        parallel_linears(**inputs)
    given_ = {t.data_ptr() for t in (*leaves(inputs), *inputs["weights"][0])}
    assert [t.shape for t in saved if t.data_ptr() not in given_] == [(9, 7)]
    assert sum(t.data_ptr() == inputs["x"].data_ptr() for t in saved) == 1


@pytest.mark.parametrize("trained", [True, False])
def test_the_input_of_an_adapter_is_saved_only_for_a_trained_a(trained: bool) -> None:
    inputs, saved = operands(own=(1,)), []
    inputs["a"][1].requires_grad_(trained)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        parallel_linears(**inputs)
    assert (inputs["x_adapters"][1].data_ptr() in {t.data_ptr() for t in saved}) == trained


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_works_in_a_checkpoint(name: Backend, use_reentrant: bool) -> None:
    inputs = operands(own=(1,))
    given_ = leaves(inputs)
    with backend(name):
        plain = torch.autograd.grad(sum(y.square().sum() for y in parallel_linears(**inputs)), given_)
        again = checkpointed(lambda x: parallel_linears(**{**inputs, "x": x}), use_reentrant, [inputs["x"]])
    assert torch.equal(plain[0], again[0])
    assert all(torch.allclose(p, leaf.grad) for p, leaf in zip(plain, given_, strict=True))


@pytest.mark.parametrize("own", [(), (0,)])
def test_under_autocast_each_is_a_linear_under_autocast(own: tuple[int, ...]) -> None:
    inputs = operands(own=own)
    keys = ("weights", "layouts", "biases", "a", "b", "scales", "x_adapters")
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = parallel_linears(**inputs)
        each = list(zip(*(inputs[key] for key in keys), strict=True))[:2]
        single = [lora_linear(inputs["x"], *rest, x_adapter=z) for *rest, z in each]
    assert [y.dtype for y in ours] == [torch.bfloat16] * 3
    assert all(torch.allclose(p, q, rtol=0.01, atol=0.01) for p, q in zip(ours[:2], single, strict=True))
    grads = torch.autograd.grad(sum(y.square().sum() for y in ours), leaves(inputs))
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves(inputs), strict=True))


def test_compiles_with_dynamic_shapes() -> None:
    fixed = operands()

    def run(x: Tensor) -> Tensor:
        return sum(y.square().sum() for y in parallel_linears(**{**fixed, "x": x}))

    compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (5, 7):
        x = normal(rows, (rows, 64), torch.float32).requires_grad_()
        wanted = [x, fixed["a"][0], fixed["b"][1], fixed["weights"][2][0], fixed["biases"][1]]
        ours, plain = (torch.autograd.grad(f(x), wanted) for f in (compiled, run))
        assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))


def test_errors_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"argument .* is (shorter|longer)"):
        parallel_linears(**{**operands(), "layouts": operands()["layouts"][:2]})
    with pytest.raises(ValueError, match="64 input features was given"):
        parallel_linears(normal(0, (3, 32), torch.float32), operands()["weights"], operands()["layouts"])
