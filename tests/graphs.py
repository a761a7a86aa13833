"""Small graphs without Dynamo: traced from generated functions, given fake values, rewritten, compared with themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from hypothesis import HealthCheck, settings
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from weft.passes.common_subexpressions import CommonSubexpressions
from weft.passes.functionalize import Functionalize
from weft.rewrite.driver import Outcome, Verifier
from weft.rewrite.pipeline import Rules
from weft.rewrite.report import Rewrite
from weft.rewrite.verify import Replayer

Inputs = Mapping[str, Any]
Named = dict[str, Tensor | None]

cases = settings(
    max_examples=int(os.environ.get("WEFT_EXAMPLES", "200")),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Standard normal numbers."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_(grad)


def trace(function: Callable[..., Any], inputs: Inputs, *, dynamic: bool = False) -> fx.GraphModule:
    """``function`` as a graph at torch level whose nodes carry fake values.

    Where ``dynamic``, the leading sizes of what has more than two dimensions are symbols.
    """
    module = made(traced(function))
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    mode.cache_enabled = not dynamic  # with symbols, looking whether a shape is known takes longer than to compute it
    fakes = [_fake(mode, t) if isinstance(t, Tensor) else t for t in inputs.values()]
    with mode, enable_python_dispatcher() if dynamic else nullcontext():
        # composite operators take symbolic sizes only through it, and all are slower
        _Recorder(module).run(*fakes)
    return module


def traced(function: Callable[..., Any]) -> fx.Graph:
    """``function`` as a graph. ``fx.Tracer.trace`` replaces methods of ``nn.Module``, which none of these calls: what Python
    has found of the methods of all classes below it is forgotten twice a trace."""
    tracer = fx.Tracer()
    tracer.root, tracer.graph, tracer.tensor_attrs = torch.nn.Module(), fx.Graph(tracer_cls=fx.Tracer), {}
    function, arguments = tracer.create_args_for_root(function, False)
    tracer.create_node("output", "output", (tracer.create_arg(function(*arguments)),), {})
    return tracer.graph


def made(graph: fx.Graph, root: torch.nn.Module | None = None) -> fx.GraphModule:
    """A module that runs ``graph``, whose code is written when it is first run or asked for."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root or torch.nn.Module(), graph)


def _fake(mode: FakeTensorMode, x: Tensor) -> Tensor:
    if mode.shape_env is None or x.ndim < 3:
        return mode.from_tensor(x, static_shapes=True)
    sizes = [DimDynamic.DYNAMIC] * (x.ndim - 1) + [DimDynamic.STATIC]
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def here(x: Any, function: Callable[..., Any], *args: Any) -> Any:
    """While tracing: record ``function(*args)``, which takes no traced value, at this place."""
    return x.tracer.create_proxy("call_function", function, args, {})


def record(function: Callable[..., Any], *args: Any) -> Any:
    """While tracing: record ``function(*args)`` as it is, where Python would take another road for a traced value."""
    return next(a for a in args if isinstance(a, fx.Proxy)).tracer.create_proxy("call_function", function, args, {})


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A module whose graph does not change when that of ``module`` does."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return made(graph, module)


def operations(module: fx.GraphModule) -> int:
    """How many operations the graph performs."""
    return sum(n.op in ("call_function", "call_method") for n in module.graph.nodes)


def targets(module: fx.GraphModule) -> list[str]:
    """The names of the operations that the graph performs, in order."""
    nodes = [n for n in module.graph.nodes if n.op in ("call_function", "call_method")]
    return [n.target if isinstance(n.target, str) else n.target.__name__ for n in nodes]


def described(module: fx.GraphModule) -> list[str]:
    """Every node of the graph in full, meta data included."""
    return [repr((n.name, n.op, n.target, n.args, n.kwargs, sorted(n.meta))) for n in module.graph.nodes]


def normalize(module: fx.GraphModule) -> None:
    """Run the passes that come before all rules."""
    for each in (Functionalize(), CommonSubexpressions()):
        each.run(module, None)


def apply(module: fx.GraphModule, rules: Sequence[Any], verify: bool = False) -> Outcome:
    """Run ``rules`` over the graph, normalized first, then passes among them."""
    verifier: Verifier | None = Replayer() if verify else None
    normalize(module)
    passes = [each for each in rules if hasattr(each, "run")]
    outcome = Rules("rules", tuple(each for each in rules if each not in passes)).run(module, verifier)
    for each in passes:
        outcome.extend(each.run(module, verifier))
    module.graph.lint()
    module.recompile()
    return outcome


class _InFloat64(TorchFunctionMode):
    _NARROW = (torch.float32, torch.bfloat16, torch.float16)
    _CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        widen = lambda a: torch.float64 if isinstance(a, torch.dtype) and a in self._NARROW else a  # noqa: E731
        args, kwargs = tree_map(widen, (args, kwargs or {}))
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            return _product_4bit(*args, **kwargs)
        return (Tensor.double if func in self._CASTS else func)(*args, **kwargs)


def _product_4bit(
    x: Tensor, packed: Tensor, shape: Any, absmax: Tensor, block: int, kind: str, bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None, absmax_code: Tensor | None = None, absmax_offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x · Wᵀ + b, with the weight as bitsandbytes dequantizes it into float32."""
    statistics = absmax.float()
    if absmax_8bit is not None and absmax_code is not None and absmax_offset is not None:
        nested = QuantState(absmax=statistics, code=absmax_code.float(), blocksize=256, dtype=torch.float32)
        statistics = dequantize_blockwise(absmax_8bit, nested) + absmax_offset.float()
    state = QuantState(statistics, torch.Size(shape), None, block, kind, torch.float32)
    return F.linear(x, dequantize_4bit(packed.reshape(-1, 1), state).double(), bias)


def in_float64(module: fx.GraphModule, inputs: Inputs) -> Named:
    """What the graph would compute if every floating-point value in it were of float64."""
    wide = {k: v.detach().double().requires_grad_(v.requires_grad) if _floats(v) else v for k, v in inputs.items()}
    with _InFloat64():
        return computed(module, wide)


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def computed(module: fx.GraphModule, inputs: Inputs) -> Named:
    """Every output, every input as the graph left it, and the gradient of every input that requires one."""
    fresh = {k: v.detach().clone().requires_grad_(v.requires_grad) if _floats(v) else v for k, v in inputs.items()}
    fresh = {k: v.clone() if isinstance(v, Tensor) and not _floats(v) else v for k, v in fresh.items()}
    outputs = [o for o in tree_leaves(module(*fresh.values())) if isinstance(o, Tensor)]
    found: Named = {f"output {i}": o if type(o) is Tensor else o.clone() for i, o in enumerate(outputs)}
    live = [
        (o, normal(i, *o.shape, dtype=o.dtype))
        for i, o in enumerate(found.values())
        if o is not None and o.requires_grad
    ]
    leaves = {k: v for k, v in fresh.items() if isinstance(v, Tensor) and v.requires_grad}
    found |= {f"input {k}": v for k, v in fresh.items() if isinstance(v, Tensor)}
    if live and leaves:
        outputs, seeds = zip(*live, strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), seeds, allow_unused=True)
        found |= {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
    return {k: None if v is None else v.detach() for k, v in found.items()}


def largest(x: Tensor) -> float:
    """Largest finite magnitude in ``x``; 0 for an empty tensor."""
    return float(x.detach().double().abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0


def assert_equal(module: fx.GraphModule, original: fx.GraphModule, inputs: Inputs, terms: int = 1) -> None:
    """Both graphs compute the same, judged by the error of ``original`` in the same dtypes and by those dtypes.

    Args:
        terms: the longest sum that a result takes, in terms.
    """
    truth, eager, ours = in_float64(original, inputs), computed(original, inputs), computed(module, inputs)
    assert ours.keys() == eager.keys()
    narrow = max((torch.finfo(v.dtype).eps for v in inputs.values() if _floats(v)), default=0.0)
    top = max(
        1.0, *(largest(v) for v in truth.values() if v is not None)
    )  # 1: gradients start from standard normal ones
    for name, exact in truth.items():
        peer, got = eager[name], ours[name]
        if peer is None or exact is None:
            assert got is None or largest(got) == 0.0, f"{name} exists"
            continue
        assert got is not None, f"{name} is missing"
        assert (got.shape, got.dtype) == (peer.shape, peer.dtype), name
        bad = ~torch.isfinite(peer)
        assert torch.equal(~torch.isfinite(got), bad), f"{name}: other NaN or inf"
        own, error = (largest((t.to(exact.dtype) - exact).masked_fill(bad, 0)) for t in (peer, got))
        allowed = 2 * own + max(narrow, torch.finfo(torch.float32).eps) * terms**0.5 * top
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, that of the original {own:.3g}"


def check(
    function: Callable[..., Any], inputs: Inputs, rules: Sequence[Any], *, count: int | None = None, terms: int = 1,
    verify: bool = False, dynamic: bool = False,
) -> tuple[fx.GraphModule, Outcome]:  # fmt: skip
    """Everything that must hold of any rule on any graph, and ``count`` rewrites where it is given."""
    module = trace(function, inputs, dynamic=dynamic)
    original = copied(module)
    normalize(module)
    before = operations(module)
    outcome = apply(module, rules, verify)
    assert operations(module) == before + sum(r.nodes_added - r.nodes_removed for r in outcome.rewrites)
    assert all(r.reason and r.rule and r.reason != "None" for r in outcome.refusals)
    assert all(_sensible(r) for r in outcome.rewrites)
    if count is not None:
        seen = f"{len(outcome.rewrites)} rewrites {outcome.refusals} {outcome.misses}\n{original.graph}"
        assert len(outcome.rewrites) == count, seen
    assert_equal(module, original, inputs, terms)
    once = described(module)
    assert not apply(module, rules, verify).rewrites
    assert described(module) == once
    return module, outcome


def _sensible(rewrite: Rewrite) -> bool:
    return bool(rewrite.rule) and rewrite.nodes_added > 0 and rewrite.nodes_removed >= 0 and rewrite.bytes_saved >= 0
