"""rope and rope_single against float64, through both implementations, and where autograd meets them."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weft.kernels import rope as module
from weft.kernels.dispatch import Backend, backend
from weft.kernels.rope import reference, reference_single, rope, rope_single

from .accuracy import DTYPES, assert_accurate, largest
from .drawing import among, drawn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS: tuple[Backend, ...] = ("reference", "triton")
LAYOUTS = ("contiguous", "transposed", "sliced", "reversed", "expanded")
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
pairing = pytest.mark.parametrize("interleaved", (False, True))
many = settings(
    max_examples=int(os.environ.get("WEFT_EXAMPLES", "300")),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def normal(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Normal numbers that lie in memory as ``layout`` says."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    if layout == "transposed" and len(shape) > 2:
        return draw(*shape[:-3], shape[-2], shape[-3], shape[-1]).transpose(-2, -3)
    if layout == "sliced":
        return draw(*shape[:-1], shape[-1] + 3)[..., 3:]
    if layout == "reversed":
        return draw(*shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "expanded":
        return draw(1, *shape[1:]).expand(shape)
    return draw(*shape)


@drawn
def lengths(draw: st.DrawFn, shape: tuple[int, ...], shared: int) -> tuple[int, ...]:
    """Leading sizes of tables that broadcast to ``shape``, of any rank, and share at least dimension ``shared``."""
    sizes = [1 if d == shared or draw(st.booleans()) else n for d, n in enumerate(shape[:-1])]
    while sizes and sizes[0] == 1 and draw(st.booleans()):
        sizes.pop(0)
    return tuple(sizes)


@drawn
def cases(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of :func:`rope`."""
    rank, seed = draw(st.integers(2, 4)), draw(st.integers(0, 2**16))
    rotary_dim, rest = 2 * draw(st.integers(1, 9)), draw(among((0, 0, 1, 6)))
    shape = (*(draw(st.integers(0 if draw(st.booleans()) else 1, 4)) for _ in range(rank - 1)), rotary_dim + rest)
    heads = draw(st.integers(0, rank - 2))
    k_shape = (*shape[:heads], draw(st.integers(1, 3)), *shape[heads + 1 :])
    table = (*draw(lengths(shape, heads)), draw(among((rotary_dim, rotary_dim // 2))))
    table_dtype = draw(among((dtype, torch.float32)))
    needs = draw(among(((1, 1, 0, 0), (1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 1, 1), (0, 0, 1, 0))))
    q, k, cos, sin = (
        normal(s, t, draw(among(LAYOUTS)), seed + i).requires_grad_(bool(n))
        for i, (s, t, n) in enumerate(
            zip((shape, k_shape, table, table), (dtype, dtype, table_dtype, table_dtype), needs, strict=True)
        )
    )
    inputs = {"q": q, "k": k, "cos": cos, "sin": sin, "interleaved": draw(st.booleans()), "rotary_dim": rotary_dim}
    return inputs | {"dtype": draw(among((None, None, torch.float32)))}


@both
@every_dtype
@many
@given(data=st.data())
def test_matches_float64(implementation: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    inputs, tile = data.draw(cases(dtype)), data.draw(among((128, 2048, 2048, 2048)))
    q, k, cos, sin = (inputs[name].detach() for name in ("q", "k", "cos", "sin"))
    # Every result is a sum of products of these; a table's gradient sums two for each row that shares its entry.
    scale = 4 * max(largest(q), largest(k)) * max(1.0, largest(cos), largest(sin))
    terms = 2 * (q.numel() + k.numel()) + 2
    operators: tuple[Any, Any] = (rope, reference)
    if data.draw(among((False, False, True))):
        inputs["x"] = inputs.pop("q")
        del inputs["k"]
        operators = (rope_single, reference_single)
    with backend(implementation), patch.object(module, "TILE", tile):
        assert_accurate(*operators, inputs, scale=scale, reduction=terms)


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The spelling of Hugging Face's models, for a table of one entry for each element."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def test_reference_is_the_common_spelling() -> None:
    x, cos, sin = (normal((2, 3, 5, 8), torch.float64, seed=i) for i in range(3))
    torch.testing.assert_close(reference_single(x, cos, sin), plain(x, cos, sin))
    pairs = x.unflatten(-1, (4, 2)).movedim(-1, -2).flatten(-2)
    swapped = [t.unflatten(-1, (4, 2)).movedim(-1, -2).flatten(-2) for t in (cos, sin)]
    expected = plain(pairs, *swapped).unflatten(-1, (2, 4)).movedim(-2, -1).flatten(-2)
    torch.testing.assert_close(reference_single(x, cos, sin, interleaved=True), expected)


@both
@pairing
def test_turns_complex_numbers(implementation: Backend, interleaved: bool) -> None:
    """With real angles it multiplies by exp(i·angle), and so keeps lengths."""
    x, angle = normal((2, 3, 4, 10), torch.float32), normal((4, 5), torch.float32, seed=1)
    with backend(implementation):
        y = rope_single(x, angle.cos(), angle.sin(), interleaved=interleaved, rotary_dim=10)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    table = torch.polar(torch.ones_like(angle), angle)
    turned = torch.complex(a, b) * table
    parts = (turned.real, turned.imag)
    expected = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    torch.testing.assert_close(y, expected)
    with backend(implementation):
        again = rope_single(x, table, None, interleaved=interleaved)
        back = rope_single(again, table.conj(), None, interleaved=interleaved)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(back, x)


@both
def test_gradient_of_a_complex_table(implementation: Backend) -> None:
    x, angle = normal((2, 3, 4, 10), torch.float32), normal((4, 5), torch.float32, seed=1)
    table = torch.polar(torch.ones_like(angle), angle).requires_grad_()
    turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (5, 2))) * table).flatten(-2)
    (expected,) = torch.autograd.grad(turned.square().sum(), table)
    with backend(implementation):
        (found,) = torch.autograd.grad(rope_single(x, table, None, interleaved=True).square().sum(), table)
    torch.testing.assert_close(found, expected)


@both
@pairing
def test_realistic_heads(implementation: Backend, interleaved: bool) -> None:
    """More heads than a program takes at once, several tokens in one program, and a last one that is partly filled."""
    for heads, k_heads, tokens, width in ((70, 1, 3, 64), (2, 2, 37, 64), (8, 2, 5, 128), (3, 5, 2, 80)):
        inputs = {
            "q": normal((2, heads, tokens, width), torch.float32, "transposed", 1).requires_grad_(),
            "k": normal((2, k_heads, tokens, width), torch.float32, "transposed", 2).requires_grad_(),
            "cos": normal((2, 1, tokens, 32), torch.float32, seed=3),
            "sin": normal((2, 1, tokens, 32), torch.float32, seed=4),
        }
        options = {"interleaved": interleaved, "rotary_dim": 64 if width == 64 else 32}
        with backend(implementation):
            assert_accurate(rope, reference, inputs | options, scale=8 * largest(inputs["q"].detach()))


@pairing
def test_gradients_follow_from_the_formula(interleaved: bool) -> None:
    """In float64, which runs the explicit formulas, against finite differences, the tables' gradients included."""
    q, k = (normal((2, h, 3, 7), torch.float64, "transposed", h).requires_grad_() for h in (2, 1))
    for width in (6, 3):
        cos, sin = (normal((3, width), torch.float64, seed=i).requires_grad_() for i in (5, 6))
        with backend("triton"):
            assert torch.autograd.gradcheck(
                lambda *inputs: rope(*inputs, interleaved=interleaved, rotary_dim=6), (q, k, cos, sin)
            )


@both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_memory_order(implementation: Backend, layout: str) -> None:
    """Outputs, and gradients whatever the order of the gradients that come in, lie as q does."""
    q = normal((2, 3, 5, 8), torch.float32, layout).requires_grad_()
    cos, sin = (normal((5, 8), torch.float32, seed=i) for i in (1, 2))
    with backend(implementation):
        y = rope_single(q, cos, sin)
        (dq,) = torch.autograd.grad(y, q, normal((2, 3, 5, 8), torch.float32, "reversed"))
    assert y.stride() == dq.stride() == torch.empty_like(q).stride()
    if layout in ("contiguous", "transposed", "reversed"):
        assert y.stride() == q.stride()


@both
@pairing
def test_shared_tables_need_no_size_one_dimension(implementation: Backend, interleaved: bool) -> None:
    """Expanded tables share as tables of size one do, and tables that differ everywhere are obeyed."""
    q, k = (normal((2, 3, 5, 8), torch.float32, "transposed", i) for i in range(2))
    cos, sin = (normal((2, 1, 5, 8), torch.float32, seed=i) for i in (2, 3))
    with backend(implementation):
        expected = rope(q, k, cos, sin, interleaved=interleaved)
        expanded = rope(q, k, cos.expand(2, 3, 5, 8), sin.expand(2, 3, 5, 8), interleaved=interleaved)
        repeated = rope(q, k, cos.repeat(1, 3, 1, 1), sin.repeat(1, 3, 1, 1), interleaved=interleaved)
    for a, b, c in zip(expected, expanded, repeated, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_expanded_tables_are_launched_once() -> None:
    q = normal((2, 3, 5, 8), torch.float32)
    cos = normal((2, 1, 5, 8), torch.float32).expand(2, 3, 5, 8)
    with backend("triton"), patch.object(module, "_launch", wraps=module._launch) as launch:
        rope_single(q, cos, cos)
    assert launch.call_count == 1


@both
@every_dtype
@pairing
def test_nan_and_inf_like_eager(implementation: Backend, dtype: torch.dtype, interleaved: bool) -> None:
    special = torch.tensor((float("nan"), float("inf"), -float("inf"), 0.0, 3.0, -3.0))
    x = torch.cartesian_prod(special, special).to(DEVICE, dtype)  # one pair of elements a row
    table = special.to(DEVICE, dtype)[:, None, None].expand(6, 1, 2)
    x = x.expand(6, 36, 2).clone().requires_grad_()
    peer = x.detach().clone().requires_grad_()
    with backend(implementation):
        y = rope_single(x, table, table.flip(0), interleaved=interleaved)
        y.sum().backward()
    expected = plain(peer, table, table.flip(0))
    expected.sum().backward()
    assert x.grad is not None and peer.grad is not None
    for got, want in ((y, expected), (x.grad, peer.grad)):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isposinf(), want.isposinf()) and torch.equal(got.isneginf(), want.isneginf())


@both
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 3, 0, 8), (0, 8)])
def test_empty(implementation: Backend, shape: tuple[int, ...]) -> None:
    q, k = (torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    cos = torch.ones(shape[-2], 8, device=DEVICE, requires_grad=True)
    with backend(implementation):
        outs = rope(q, k, cos, cos)
        grads = torch.autograd.grad(outs, (q, k, cos), [torch.ones_like(y) for y in outs])
    assert [y.shape for y in outs] == [q.shape, k.shape]
    assert [g.shape for g in grads] == [q.shape, k.shape, cos.shape] and not grads[2].any()


@both
def test_no_keys_beside_queries(implementation: Backend) -> None:
    q, k = normal((2, 3, 4, 8), torch.float32), torch.zeros(2, 0, 4, 8, device=DEVICE)
    cos, sin = (normal((4, 8), torch.float32, seed=i) for i in (1, 2))
    with backend(implementation):
        y, z = rope(q, k, cos, sin)
        z_first, y_second = rope(k, q, cos, sin)
    torch.testing.assert_close(y, reference_single(q, cos, sin))
    assert torch.equal(y, y_second) and z.shape == z_first.shape == k.shape


@both
@pytest.mark.parametrize(
    ("needs", "expected"), [((1, 1, 0, 0), "cs"), ((1, 0, 0, 0), "cs"), ((1, 1, 1, 0), "csqk"), ((0, 0, 0, 1), "csqk")]
)
def test_saves_tables_alone_unless_they_learn(implementation: Backend, needs: tuple[int, ...], expected: str) -> None:
    shapes = ((2, 3, 4, 8), (2, 1, 4, 8), (4, 8), (4, 8))
    tensors = [
        normal(s, torch.float32, seed=i).requires_grad_(bool(n))
        for i, (s, n) in enumerate(zip(shapes, needs, strict=True))
    ]
    names, saved = {t.data_ptr(): name for t, name in zip(tensors, "qkcs", strict=True)}, []
    with (
        backend(implementation),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(names.get(t.data_ptr(), "?")), lambda t: t),
    ):
        rope(*tensors)
    assert "".join(saved) == expected


@both
def test_turns_back_only_what_needs_it(implementation: Backend) -> None:
    q, k = (normal((2, 3, 4, 8), torch.float32, seed=i).requires_grad_() for i in range(2))
    cos, sin = (normal((4, 8), torch.float32, seed=i) for i in (2, 3))
    counts = []
    original = module._turn

    def count(xs: list[Tensor], *rest: Any) -> None:
        counts.append(len(xs))
        original(xs, *rest)

    with backend(implementation), patch.object(module, "_turn", count):
        torch.autograd.grad(rope(q, k.detach(), cos, sin)[0].sum(), q)
        unused = torch.autograd.grad(rope(q, k, cos, sin)[1].sum(), (q, k), allow_unused=True)
        learning = cos.clone().requires_grad_()
        torch.autograd.grad(rope(q.detach(), k.detach(), learning, sin)[0].sum(), learning)
    assert counts == [2, 1, 2, 1, 2]
    assert unused[0] is None and unused[1] is not None


@both
@pytest.mark.parametrize("reentrant", (False, True))
def test_under_checkpoint(implementation: Backend, reentrant: bool) -> None:
    q = normal((2, 3, 4, 8), torch.float32).requires_grad_()
    cos, sin = (normal((4, 8), torch.float32, seed=i) for i in (2, 3))

    def block(x: Tensor) -> Tensor:
        y, z = rope(x * 2, x[:, :1], cos, sin)
        return y * z

    with backend(implementation):
        (straight,) = torch.autograd.grad(block(q).square().sum(), q)
        wrapped: Any = checkpoint(block, q, use_reentrant=reentrant)
        wrapped.square().sum().backward()
    assert torch.equal(q.grad, straight)


@both
def test_no_grad_leaves_no_graph(implementation: Backend) -> None:
    q = normal((2, 3, 4, 8), torch.float32).requires_grad_()
    cos = normal((4, 8), torch.float32)
    with backend(implementation), torch.no_grad():
        assert not any(y.requires_grad for y in rope(q, q, cos, cos))


@both
@pairing
def test_opcheck(implementation: Backend, interleaved: bool) -> None:
    q, k = (normal((2, h, 4, 10), torch.bfloat16, "transposed").requires_grad_() for h in (3, 1))
    full, half = normal((2, 1, 4, 8), torch.float32), normal((4, 4), torch.bfloat16)
    forward, backward = torch.ops.weft.rope.default, torch.ops.weft.rope_backward.default
    with backend(implementation):
        torch.library.opcheck(forward, ([q, k], full, full, 8, interleaved, torch.bfloat16))
        torch.library.opcheck(forward, ([q, k.detach()], half, half, 8, interleaved, torch.float32))
        torch.library.opcheck(forward, ([q], full.clone().requires_grad_(), full, 8, interleaved, torch.bfloat16))
        grads = [q.detach().contiguous(), k.detach()[..., :1].expand_as(k)]
        strides = [*q.stride(), *k.stride()]
        torch.library.opcheck(backward, (grads, full, full, 8, interleaved, torch.bfloat16, strides))
        torch.library.opcheck(backward, (grads[:1], half, half, 8, interleaved, torch.float32, strides[:4]))


@both
@pairing
def test_compiles_with_dynamic_shapes(implementation: Backend, interleaved: bool) -> None:
    def block(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, z = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved=interleaved)
        return y * z

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    with backend(implementation):
        for tokens in (3, 5):
            q, k = (normal((2, tokens, h, 8), torch.float32, seed=h).requires_grad_() for h in (4, 1))
            cos, sin = (normal((2, 1, tokens, 8), torch.float32, seed=i) for i in (5, 6))
            got = torch.autograd.grad(compiled(q, k, cos, sin).sum(), (q, k))
            assert all(map(torch.equal, got, torch.autograd.grad(block(q, k, cos, sin).sum(), (q, k))))


@pytest.mark.parametrize(
    ("q", "k", "cos", "sin", "rotary_dim", "message"),
    [
        ((2, 3, 4, 8), (2, 1, 5, 8), (1, 8), (1, 8), None, "all sizes but one"),
        ((2, 3, 4, 8), (2, 3, 4, 10), (4, 8), (4, 8), None, "all sizes but one"),
        ((2, 3, 4, 8), (3, 4, 8), (4, 8), (4, 8), None, "all sizes but one"),
        ((2, 3, 4, 8), (2, 1, 4, 8), (4, 8), (4, 4), None, "cos and sin must"),
        ((2, 3, 4, 8), (2, 1, 4, 8), (4, 2), (4, 2), 8, "cos and sin must"),
        ((2, 3, 4, 8), (2, 1, 4, 8), (4, 10), (4, 10), None, "at most"),
        ((2, 3, 4, 8), (2, 1, 4, 8), (4, 3), (4, 3), None, "even"),
        ((2, 3, 4, 8), (2, 1, 4, 8), (3, 8), (3, 8), None, "broadcast"),
        ((2, 3, 4, 8), (2, 1, 4, 8), (3, 4, 8), (3, 4, 8), None, "broadcast"),
        ((4, 8), (4, 8), (2, 4, 8), (2, 4, 8), None, "broadcast"),
        ((8,), (8,), (8,), (8,), None, "two to four"),
    ],
)
def test_refuses_what_does_not_fit(q: Any, k: Any, cos: Any, sin: Any, rotary_dim: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(torch.zeros(q), torch.zeros(k), torch.zeros(cos), torch.zeros(sin), rotary_dim=rotary_dim)


def test_refuses_other_devices_and_dtypes() -> None:
    x, table = torch.zeros(2, 4, 8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="cpu, meta and cpu"):
        rope_single(x, table.to("meta"), table)
    with pytest.raises(ValueError, match="agree in dtype"):
        rope(x, x.half(), table, table)
    with pytest.raises(ValueError, match="floating-point"):
        rope_single(x.int(), table, table)
