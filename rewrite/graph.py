"""What the engine asks of a torch.fx graph: values and their sizes, where a node came from, slices and copies of nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .vocabulary import operation


def value(node: Any) -> Any:
    """The fake value that ``node`` was traced with: a tensor, a tuple of them, a number; None if unknown."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def tensor_of(node: Any) -> Tensor | None:
    """:func:`value` where that is a tensor, else None."""
    found = value(node)
    return found if isinstance(found, Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of the tensor that ``node`` computes."""
    found = tensor_of(node)
    return None if found is None else found.dtype


def sizes(node: Any) -> tuple[Any, ...]:
    """The shape of the tensor that ``node`` computes, symbolic sizes included; () if it computes none."""
    found = tensor_of(node)
    return () if found is None else tuple(settled(size) for size in found.shape)


def settled(size: Any) -> Any:
    """A symbolic size as the integer that the graph's guards fix it to, if they do."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if known is None else known


def static_size(node: Any, dim: int = -1) -> int | None:
    """Size along ``dim`` where it is a plain integer."""
    shape = sizes(node)
    if not shape or not -len(shape) <= dim < len(shape):
        return None
    return shape[dim] if isinstance(shape[dim], int) else None


def traced_size(node: Any, dim: int = -1) -> int | None:
    """Size along ``dim`` as it was while tracing; other calls of the graph may have another, unless something forbids it."""
    shape = sizes(node)
    return hint(shape[dim]) if shape and -len(shape) <= dim < len(shape) else None


def fixed_size(node: Any, dim: int = -1) -> int | None:
    """:func:`static_size`, where need be by fixing the one symbol in a size to what it was while tracing: the graph then
    serves no other, and Dynamo guards that."""
    shape = sizes(node)
    size = shape[dim] if shape and -len(shape) <= dim < len(shape) else None
    if isinstance(size, torch.SymInt):
        symbols = list(size.node.expr.free_symbols)
        if size.node.has_hint() and len(symbols) == 1:
            _fix(size.node.shape_env, symbols[0])
        size = settled(size)
    return size if isinstance(size, int) else None


def _fix(environment: Any, symbol: Any) -> None:
    environment.evaluate_expr(sympy.Eq(symbol, traced_symbols(environment)[symbol]))


def traced_symbols(environment: Any) -> Mapping[Any, Any]:
    """What each symbol of a size was while tracing; without those that depend on data."""
    return getattr(environment, "backed_var_to_val", None) or environment.var_to_val


def memory_order(x: Tensor, *, wide: bool = False) -> list[int]:
    """The dimensions of ``x`` from the slowest to the fastest in memory; without those of size 1 if ``wide``."""
    dims = [d for d in range(x.ndim) if not wide or hint(x.shape[d]) != 1]
    return sorted(dims, key=lambda d: -hint(x.stride(d)))


def requires_grad(node: Any) -> bool:
    """Whether autograd tracks the tensor that ``node`` computes."""
    found = tensor_of(node)
    return bool(found is not None and found.requires_grad)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward created ``node``, relative to the captured region; "" for its own."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple) and isinstance(entry[0], str)]
    return clean_path(paths[-1]) if paths else ""


def clean_path(text: str) -> str:
    """``L['self'].layers['0'].mlp`` and ``L['fn'].layers[0].mlp`` as ``layers.0.mlp``."""
    text = re.sub(r"^L\[['\"][^'\"]*['\"]\]\.?", "", text)
    text = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", text)
    return re.sub(r"\._modules\.|\.\.", ".", text).strip(".")


def source(node: fx.Node) -> str:
    """``file.py:line`` of the innermost frame that created ``node``; "" if unknown."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def backward_slice(outputs: Iterable[fx.Node], stop: Iterable[fx.Node]) -> list[fx.Node]:
    """Every node that ``outputs`` need and that is not in ``stop``, in graph order; placeholders excluded."""
    barrier, found = set(stop), set[fx.Node]()
    pending = [n for n in outputs if n not in barrier]
    while pending:
        node = pending.pop()
        if node in found or node.op in ("placeholder", "output"):
            continue
        found.add(node)
        read = node.all_input_nodes[:1] if _is_like(node) else node.all_input_nodes
        pending.extend(n for n in read if n not in barrier)
    return sorted(found, key=position)


def _is_like(node: fx.Node) -> bool:
    """Whether ``node`` takes its first input's values, and of another tensor the dtype or the shape alone."""
    return node.op != "get_attr" and operation(node) in ("cast", "view_as", "expand_as")


def position(node: fx.Node) -> Any:
    """Compares as the places of nodes in their graph do."""
    return node._sort_key


def before(a: fx.Node, b: fx.Node) -> bool:
    """Whether ``a`` stands before ``b`` in their graph."""
    return position(a) < position(b)


def autograd_body(node: fx.Node) -> tuple[fx.Graph, dict[fx.Node, Any]] | None:
    """Of a call of an ``autograd.Function``: the graph of its forward, and what each of its inputs is outside of it."""
    body, root = node.args[0], node.graph.owning_module
    inner = getattr(root, str(body.target), None) if isinstance(body, fx.Node) and root is not None else None
    if not isinstance(inner, fx.GraphModule):
        return None
    inside = (n for n in inner.graph.nodes if n.op == "placeholder")
    return inner.graph, dict(zip(inside, node.args[2:], strict=False))


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph that does not change when ``graph`` does; its nodes have the same names."""
    found = fx.Graph()
    found.output(found.graph_copy(graph, {}))
    return found


def copy_nodes(
    nodes: Iterable[fx.Node], inputs: Iterable[fx.Node], outputs: Iterable[fx.Node], root: fx.GraphModule
) -> fx.GraphModule:
    """``nodes`` as a graph module of their own, with ``inputs`` as placeholders and a tuple of ``outputs``."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, node in enumerate(inputs):
        env[node] = graph.placeholder(f"in_{i}")
        env[node].meta = dict(node.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[n] for n in outputs))
    return fx.GraphModule(root, graph)


def map_nodes(argument: Any, function: Any) -> Any:
    """``argument`` with every node in it replaced by ``function(node)``."""
    return map_arg(argument, function)


def tensor_bytes(node: fx.Node) -> int:
    """Bytes of the tensor that ``node`` computes at the shapes it was traced with; 0 if unknown."""
    found = tensor_of(node)
    return 0 if found is None else traced_bytes(found)


def traced_bytes(tensor: Tensor) -> int:
    """Bytes of ``tensor`` at the shape it was traced with."""
    return math.prod(map(hint, tensor.shape)) * tensor.element_size()


def hint(size: Any) -> int:
    """The value that a symbolic size had while tracing."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.hint is not None else 2


def subgraphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``module`` and every graph module that its higher-order operators call, outermost first."""
    yield module
    for node in module.graph.nodes:
        if node.op == "get_attr":
            child = getattr(module, str(node.target), None)
            if isinstance(child, fx.GraphModule) and not str(node.target).startswith(("fwd_body", "bwd_body")):
                yield from subgraphs(child)
