"""FP8: rows rounded bit for bit as torch does it, by both kernels, and linears within what that rounding may cost."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels import fp8, lora_linear, parallel_linears, quant_linear, rows, widened
from weft.kernels.dispatch import Backend, backend
from weft.quant.four_bit import dequantize
from weft.quant.layout import Layout

from .accuracy import DTYPES, in_float64, largest, run, ulp
from .drawing import among, drawn, maybe
from .linear_cases import BACKENDS, DEVICE, MEMORY, adapters, cases, lay, normal, packed_weight, tensors

SIZES = among((0, 1, 3, 7, 8, 16, 21, 33))
SMALL: dict[str, Any] = {"ROWS": 32, "COLS": 32, "TILES": 2}
"""Tiles of which a small matrix has several."""
NATIVE = DEVICE == "cuda" and not fp8.missing(torch.device(DEVICE))
"""The matrix units compute, which take not every size."""
KINDS = ("rows", "columns", "nf4", "fp4")
LEADS = ((), (0,), (1,), (17,), (3, 8), (2, 0), (2, 1, 9))
fewer = settings(cases, max_examples=30)


def bits(x: Tensor) -> Tensor:
    """What is stored, NaN included."""
    return x.view(torch.uint8 if x.dtype == fp8.E4M3 else torch.int32)


@drawn
def matrices(draw: st.DrawFn, dtype: torch.dtype, top: int = 100) -> Tensor:
    """Numbers of many magnitudes; some rows of zeros, some that hold NaN or infinity."""
    shape, seed, spread = (draw(SIZES), draw(SIZES)), draw(st.integers(0, 2**20)), draw(among((0, 3, 12)))
    power = draw(st.integers(-top, top)) if dtype != torch.float16 else draw(st.integers(-14, 10)) - spread
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64)
    wide *= torch.exp2(torch.randint(-spread, spread + 1, shape, generator=generator) + power)
    for i, value in enumerate((0.0, torch.nan, torch.inf, -torch.inf)):
        if shape[1] and shape[0] > i and draw(st.integers(0, 3)) == 0:
            wide[i, 0 if value else slice(None)] = value
    found = lay(wide.to(DEVICE, dtype), draw(among(MEMORY)))
    return found.t() if draw(st.booleans()) else found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_the_kernels_round_as_torch_does_and_to_nearest(dtype: torch.dtype, data: st.DataObject) -> None:
    matrix = data.draw(matrices(dtype))
    q, scale = fp8.quantize_reference(matrix)
    longest = data.draw(among((16, 16384)))
    with backend("triton"), patch.multiple(fp8, **SMALL), patch.object(rows, "LONGEST", longest):
        found, scales = fp8.quantize_rows(matrix)
    assert torch.equal(bits(found), bits(q)) and torch.equal(bits(scales), bits(scale))
    assert found.is_contiguous() and q.is_contiguous() and found.shape == matrix.shape and scales.dtype == torch.float32
    assert_nearest(matrix.double(), q.double(), scale.double())


def assert_nearest(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """``q`` is off by at most half of an e4m3's last place, and the scale is the least power of two that fits."""
    finite = x.isfinite().all(1)
    assert torch.equal(scale.isnan(), ~finite) and not q[~finite].any()
    x, q, scale = x[finite], q[finite], scale[finite, None]
    scaled = x / scale
    place = torch.exp2(scaled.abs().clamp_min(2.0**-6).log2().floor() - 3)
    assert bool((scaled - q).abs().le(place / 2).all()) and bool(scaled.abs().le(448).all())
    assert bool((torch.frexp(scale).mantissa == 0.5).all()), "no power of two"
    if x.shape[1]:
        smaller = scaled.abs().amax(1) * 2 <= 448
        assert bool((scale[smaller, 0] == fp8.SMALLEST_SCALE).all())


@pytest.mark.parametrize("turned", [False, True])
def test_every_number_of_e4m3_and_what_lies_between(turned: bool) -> None:
    """Ties go to the even neighbour, and what is next to a tie to the nearer one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(between, torch.full_like(between, end)) for end in (-1e3, 1e3)]
    drawn = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 30
    x = torch.cat((numbers, between, *near, drawn, torch.tensor([448.0, -0.0, 2**-9, 2**-11, 1e-40]))).clamp(-448, 448)
    matrix = torch.stack((x, x.flip(0))).to(DEVICE)
    matrix = matrix.t().contiguous().t() if turned else matrix
    with backend("triton"):
        found, scales = fp8.quantize_rows(matrix)
    assert bool((scales == 1).all())
    assert torch.equal(bits(found), bits(matrix.to(fp8.E4M3).contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_and_huge_numbers(dtype: torch.dtype) -> None:
    """In plain torch: Triton's interpreter flushes subnormal bfloat16."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    matrix = torch.tensor([[smallest, -3 * smallest, 0.0], [info.tiny, smallest, 0.0], [info.max, -info.max, 1.0]])
    assert_nearest(matrix.to(dtype).double(), *(t.double() for t in fp8.quantize_reference(matrix.to(dtype))))


def test_the_backward_sees_the_weight_of_the_forward() -> None:
    """Scales are powers of two: the same numbers, whether they go along rows or columns."""
    weight = normal(0, (64, 96), torch.bfloat16)
    q, scale = fp8.quantize_rows(weight)
    turned, scales = fp8.quantize_rows(weight.t())
    there = (q.float().abs() >= 2**-6) & (turned.float().abs().t() >= 2**-6)
    assert torch.equal((q.float() * scale[:, None])[there], (turned.float() * scales[:, None]).t()[there])
    assert there.float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
@given(data=st.data())
def test_a_product_is_within_its_bound(dtype: torch.dtype, data: st.DataObject) -> None:
    m, n, k = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
    if NATIVE:
        n, k = (size * fp8.MULTIPLE for size in (n, k))
    spread, seed = data.draw(among((0.0, 1.0, 3.0))), data.draw(st.integers(0, 2**20))
    left, right = (
        normal(i + seed, s, dtype, 0.1) * (normal(i + 9, s, torch.float32) * spread).exp2().to(dtype)
        for i, s in enumerate(((m, k), (n, k)))
    )
    found = fp8.multiply(fp8.quantize_rows(left), fp8.quantize_rows(right), dtype)
    off = (found.double() - left.double() @ right.double().t()).abs()
    assert found.dtype == dtype and found.is_contiguous() and found.shape == (m, n)
    # results that small are rounded to multiples of the least subnormal number
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(off.le(fp8.error_bound(left, right) + subnormal).all())


# the linears ----------------------------------------------------------------------------------------------------------
def dense(weight: list[Tensor], layout: Layout) -> Tensor:
    """The (out, in) matrix in float64."""
    if layout.is_4bit:
        return dequantize(weight, layout, torch.float32).double()
    return weight[0].detach().double() if layout.kind == "rows" else weight[0].detach().double().t()


def assert_within(function: Any, reference: Any, inputs: dict[str, Any], parts: list[tuple[list[Tensor], str]]) -> None:
    """Outputs and every gradient, against float64: what FP8 may lose where it is used, else what eager loses twice."""
    truth, eager = run(reference, in_float64(inputs), 0), run(reference, inputs, 0)
    ours = run(function, inputs, 0)
    generator = torch.Generator().manual_seed(0)
    x = inputs["x"].detach().reshape(-1, inputs["x"].shape[-1])
    forward, backward = [], torch.zeros_like(x, dtype=torch.float64)
    for (weight, text), y in zip(parts, truth[0], strict=True):
        layout = Layout.decode(text)
        w = dense(weight, layout)
        forward.append(fp8.error_bound(x, w).view(y.shape) if layout.fp8 else torch.zeros_like(y))
        dy = torch.randn(y.shape, generator=generator).to(x.device, x.dtype).reshape(-1, y.shape[-1])
        backward += fp8.error_bound(dy, w.t()) if layout.fp8 else 0
    named = [(f"output {i}", *t) for i, t in enumerate(zip(truth[0], eager[0], ours[0], forward, strict=True))]
    extra = {"x": backward.view(inputs["x"].shape)}
    named += [(n, truth[1][n], eager[1][n], ours[1][n], extra.get(n)) for n in truth[1]]
    for name, exact, peer, got, bound in named:
        if exact is None or peer is None:
            assert got is None or largest(got) == 0.0, name
            continue
        assert got is not None and (got.shape, got.dtype) == (peer.shape, peer.dtype), name
        own = largest(peer.double() - exact)
        allowed = 2 * own + ulp(got.dtype, largest(exact)) + 2e-6 * max(25.0, largest(exact))
        assert bool((got.double() - exact).abs().le(allowed + (0.0 if bound is None else bound)).all()), name


@drawn
def operands(draw: st.DrawFn, dtype: torch.dtype, ins: int) -> dict[str, Any]:
    """Weight, layout and perhaps a bias of one linear that is multiplied in FP8 more often than not."""
    kind, outs = draw(among(KINDS)), draw(among((16, 48)))
    blocks = (draw(among((32, 64))), draw(among((0, 256)))) if kind in ("nf4", "fp4") else (0, 0)
    layout = Layout(kind, outs, ins, *blocks, draw(among((True, True, True, False))))
    if layout.is_4bit:
        weight = packed_weight(layout, draw(st.integers(0, 2**20)))
    else:
        shape = (outs, ins) if kind == "rows" else (ins, outs)
        weight = [normal(draw(st.integers(0, 2**20)), shape, dtype, ins**-0.5)]
    return {"weight": weight, "layout": layout.encode(), "bias": draw(maybe(tensors((outs,), dtype)))}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@fewer
@given(data=st.data())
def test_linears_with_adapters(name: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    ins = data.draw(among((16, 64)))
    inputs: dict[str, Any] = {"x": data.draw(tensors((*data.draw(among(LEADS)), ins), dtype))}
    inputs |= data.draw(operands(dtype, ins)) | {"scale": 0.5}
    inputs["a"], inputs["b"] = data.draw(adapters(Layout.decode(inputs["layout"]), dtype))
    inputs["x_adapter"] = data.draw(maybe(tensors(tuple(inputs["x"].shape), dtype)))
    with backend(name), patch.object(fp8, "FEW_ROWS", 0):
        parts = [(inputs["weight"], inputs["layout"])]
        assert_within(lora_linear.lora_linear, lora_linear.reference, inputs, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@fewer
@given(data=st.data())
def test_several_linears(dtype: torch.dtype, data: st.DataObject) -> None:
    ins, count = data.draw(among((16, 64))), data.draw(st.integers(1, 3))
    inputs: dict[str, Any] = {"x": data.draw(tensors((*data.draw(among(LEADS)), ins), dtype))}
    each = [data.draw(operands(dtype, ins)) for _ in range(count)]
    parts = [(one["weight"], one["layout"]) for one in each]
    adapted = [data.draw(st.booleans()) for _ in each]
    pairs = [
        data.draw(adapters(Layout.decode(text), dtype)) if some else (None, None)
        for some, (_, text) in zip(adapted, parts, strict=True)
    ]
    inputs |= {f"weight{i}": one["weight"] for i, one in enumerate(each)}
    inputs |= {"biases": [one["bias"] for one in each], "a": [a for a, _ in pairs], "b": [b for _, b in pairs]}

    def spread(function: Any) -> Any:
        def call(x: Tensor, biases: Any, a: Any, b: Any, **weights: Any) -> Any:
            return function(x, list(weights.values()), [text for _, text in parts], biases, a, b, [0.5] * count)

        return call

    with patch.object(fp8, "FEW_ROWS", 0):
        assert_within(spread(parallel_linears.parallel_linears), spread(parallel_linears.reference), inputs, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@fewer
@given(data=st.data())
def test_linears_of_4_bits(dtype: torch.dtype, data: st.DataObject) -> None:
    ins = data.draw(among((64, 128)))
    inputs: dict[str, Any] = {"x": data.draw(tensors((*data.draw(among(LEADS)), ins), dtype))}
    inputs |= data.draw(operands(dtype, ins).filter(lambda o: Layout.decode(o["layout"]).is_4bit))
    with patch.object(fp8, "FEW_ROWS", 0):
        parts = [(inputs["weight"], inputs["layout"])]
        assert_within(quant_linear.quant_linear, quant_linear.reference, inputs, parts)


LAYOUTS = [Layout("rows", 48, 64, fp8=True), Layout("columns", 48, 64, fp8=True), Layout("nf4", 48, 64, 64, 256, True)]


def fixed(layout: Layout, count: int = 20, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of ``lora_linear``."""
    shape = (layout.out_features, layout.in_features)
    stored = normal(1, shape if layout.kind == "rows" else shape[::-1], dtype, 0.1)
    return {
        "x": normal(0, (count, 64), dtype).requires_grad_(),
        "weight": packed_weight(layout, 5) if layout.is_4bit else [stored],
        "layout": layout.encode(), "bias": None, "a": normal(2, (4, 64), dtype, 0.1).requires_grad_(),
        "b": normal(3, (48, 4), dtype).requires_grad_(), "scale": 0.5,
    }  # fmt: skip


def as_stored(layout: Layout) -> str:
    """The same storage, not multiplied in FP8."""
    return layout.encode().removesuffix(":fp8")


def outcome(inputs: dict[str, Any], text: str) -> dict[str, Tensor]:
    """y and every gradient under that layout."""
    (y,), grads = run(lora_linear.lora_linear, inputs | {"layout": text}, 0)
    return {"y": y, **{n: grad for n, grad in grads.items() if grad is not None}}


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.encode)
def test_the_text_of_a_layout(layout: Layout) -> None:
    assert Layout.decode(layout.encode()) == layout and layout.encode().endswith(":fp8")
    assert not Layout.decode(as_stored(layout)).fp8


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.encode)
def test_opcheck(name: Backend, layout: Layout) -> None:
    given_ = fixed(layout)
    ops, weight = torch.ops.weft, given_["weight"]
    rest = (given_["a"], given_["b"], 0.5, None, torch.float32)
    slot = parallel_linears.Slot(layout, len(weight), False, False, False, False)
    with backend(name):
        torch.library.opcheck(ops.lora_linear.default, (given_["x"], weight, layout.encode(), None, *rest))
        plan = parallel_linears.encode((slot,))
        torch.library.opcheck(ops.parallel_linears.default, (given_["x"], weight, plan, [1.0], torch.float32, True))
        if layout.is_4bit:
            torch.library.opcheck(ops.quant_linear.default, (given_["x"], weight, layout.encode(), None))


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.encode)
@pytest.mark.parametrize(("count", "dtype"), [(16, torch.float32), (20, torch.float64), (0, torch.float32)])
def test_few_rows_and_float64_read_the_weight_as_it_is(layout: Layout, count: int, dtype: torch.dtype) -> None:
    inputs = fixed(layout, count, dtype)
    ours, plain = (outcome(inputs, text) for text in (layout.encode(), as_stored(layout)))
    assert all(torch.equal(found, plain[n]) for n, found in ours.items())


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.encode)
def test_what_is_trained_gets_the_gradients_of_stored_products(layout: Layout) -> None:
    inputs = fixed(layout)
    ours, plain = (outcome(inputs, text) for text in (layout.encode(), as_stored(layout)))
    assert {n for n, found in ours.items() if not torch.equal(found, plain[n])} == {"y", "x"}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_what_is_not_finite_is_so_where_eager_has_it(name: Backend, value: float, where: str) -> None:
    inputs, dy = fixed(LAYOUTS[0]), normal(7, (20, 48), torch.float32)
    with torch.no_grad():
        {"x": inputs["x"], "weight": inputs["weight"][0], "dy": dy}[where][3, 5] = value
    found = []
    for text in (LAYOUTS[0].encode(), as_stored(LAYOUTS[0])):
        with backend(name):
            y = lora_linear.lora_linear(**{**inputs, "layout": text})
            found.append((y, torch.autograd.grad(y, inputs["x"], dy)[0]))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got.isfinite(), wanted.isfinite()) and (where == "x") <= (not found[0][0].isfinite().all())


def test_rows_of_zeros() -> None:
    inputs = fixed(LAYOUTS[0])
    with torch.no_grad():
        inputs["x"][2], inputs["weight"][0][3] = 0.0, 0.0
        inputs["b"].zero_()
    y = lora_linear.lora_linear(**inputs)
    assert not y[2].any() and not y[:, 3].any() and y.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.encode)
def test_under_autocast_it_is_a_product_of_what_autocast_casts(layout: Layout) -> None:
    inputs = fixed(layout)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = lora_linear.lora_linear(**inputs)
    cast: dict[str, Any] = {k: v.detach().bfloat16() for k, v in inputs.items() if k in ("x", "a", "b")}
    cast["weight"] = inputs["weight"] if layout.is_4bit else [inputs["weight"][0].bfloat16()]
    assert y.dtype == torch.bfloat16 and torch.equal(y, lora_linear.lora_linear(**{**inputs, **cast}))


def test_x_is_rounded_once_for_all_linears_and_never_widened() -> None:
    weights, layouts = zip(*((fixed(layout)["weight"], layout) for layout in LAYOUTS), strict=True)
    a, b = fixed(LAYOUTS[0])["a"], fixed(LAYOUTS[0])["b"]
    texts, seen = [layout.encode() for layout in layouts], list[Any]()
    note = lambda rows, layouts, dtype: bool(seen.append(layouts))  # noqa: E731
    with patch.object(widened, "serves", note), patch.object(fp8, "quantize_rows", wraps=fp8.quantize_rows) as rounded:
        parallel_linears.parallel_linears(fixed(LAYOUTS[0])["x"], weights, texts, a=[a] * 3, b=[b] * 3)
    assert rounded.call_count == 1 + 3 and seen == [[]]


def test_sizes_that_do_not_fit_are_named() -> None:
    inputs: dict[str, Any] = {"x": normal(0, (20, 24), torch.float32), "a": normal(1, (2, 24), torch.float32)}
    inputs |= {"weight": [normal(2, (16, 24), torch.float32)], "b": normal(3, (16, 2), torch.float32)}
    with pytest.raises(ValueError, match="divisible by 16, and the weight is 16 x 24"):
        lora_linear.lora_linear(**inputs, layout=Layout("rows", 16, 24, fp8=True).encode(), bias=None, scale=1.0)


def test_devices_that_have_no_fp8_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8.missing.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, said in (((8, 0), "this is sm_80"), ((8, 9), ""), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert said in fp8.missing(torch.device("cuda")) and bool(fp8.missing(torch.device("cuda"))) == bool(said)
        fp8.missing.cache_clear()
    assert "not on xpu" in fp8.missing(torch.device("xpu")) and not fp8.missing(torch.device("cpu"))
    fp8.missing.cache_clear()


# natively -------------------------------------------------------------------------------------------------------------
NEEDS_FP8 = pytest.mark.skipif(
    torch.cuda.is_available() and bool(fp8.missing(torch.device("cuda", 0))), reason="this GPU has no FP8"
)
SHAPES = [(4096, 14336), (14336, 4096), (2048, 20000), (100, 48), (777, 33), (8192, 1)]


@pytest.mark.gpu
@NEEDS_FP8
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_kernels_round_as_torch_does(dtype: torch.dtype, shape: tuple[int, int], turned: bool) -> None:
    matrix = normal(0, shape, dtype) * normal(1, shape, dtype).exp2()
    matrix[3] = 0.0
    matrix[5, 0], matrix[7, 0] = torch.nan, -torch.inf
    matrix[9] *= 2.0**-20
    matrix = matrix.t().contiguous().t() if turned else matrix
    found, wanted = fp8.quantize_rows(matrix), fp8.quantize_reference(matrix)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.gpu
@NEEDS_FP8
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2048, 4096, 14336), (2048, 14336, 4096), (17, 64, 48), (777, 4096, 1024)])
def test_on_matrix_units_as_on_a_cpu(shape: tuple[int, int, int], dtype: torch.dtype, fast: bool) -> None:
    """One rounding to bfloat16 apart; if sums stay in the matrix units, by what is known to be lost there."""
    m, k, n = shape
    left, right = normal(0, (m, k), dtype), normal(1, (n, k), dtype, k**-0.5)
    quantized = fp8.quantize_rows(left), fp8.quantize_rows(right)
    (x, s), (w, t) = ((q.double(), scale.double()[:, None]) for q, scale in quantized)
    exact = (x * s) @ (w * t).t()
    with patch.object(fp8, "FAST_ACCUMULATION", fast):
        found = fp8.multiply(*quantized, dtype)
        bound = fp8.error_bound(left, right)
    assert found.dtype == dtype and found.is_contiguous()
    assert float((found.double() - exact).norm() / exact.norm()) <= (2.0**-7 if fast else 2.0**-8)
    truth = left.double() @ right.double().t()
    assert bool((found.double() - truth).abs().le(bound).all())
    assert float((found.double() - truth).norm() / truth.norm()) <= 0.05


@pytest.mark.gpu
@NEEDS_FP8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.encode)
@pytest.mark.parametrize("bias", [False, True])
def test_linears_on_matrix_units(layout: Layout, dtype: torch.dtype, bias: bool) -> None:
    inputs = fixed(layout, 500, dtype)
    inputs |= {"bias": normal(8, (48,), dtype).requires_grad_() if bias else None}
    assert_within(lora_linear.lora_linear, lora_linear.reference, inputs, [(inputs["weight"], inputs["layout"])])


@pytest.mark.gpu
@NEEDS_FP8
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_scale_that_is_no_number_makes_its_row_none(value: float) -> None:
    inputs = fixed(LAYOUTS[0], 500, torch.bfloat16)
    with torch.no_grad():
        inputs["x"][3, 5], inputs["weight"][0][7, 9] = value, value
    y = lora_linear.lora_linear(**inputs)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[3], bad[:, 7] = True, True
    assert torch.equal(~y.isfinite(), bad)
