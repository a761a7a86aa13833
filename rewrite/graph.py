"""What the engine asks of a torch.fx graph: values, where a node came from, slices, and what may not be reordered."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .vocabulary import bind, is_in_place, operation, target_name

_CONTEXT_TARGETS = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "set_grad_enabled",
    "_enter_inference_mode",
    "_exit_inference_mode",
)
_RANDOM = frozenset((
    "dropout", "dropout_", "bernoulli", "bernoulli_", "rand", "randn", "rand_like", "randn_like", "alpha_dropout",
    "normal_", "uniform_", "multinomial", "rrelu", "gumbel_softmax", "feature_dropout", "native_dropout",
))  # fmt: skip
VIEWS = frozenset((
    "view", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "getitem", "select", "narrow", "chunk", "split",
    "unbind", "flatten", "unflatten", "view_as", "view_as_real", "view_as_complex", "detach", "diagonal", "expand_as",
    "contiguous", "cast", "as_strided", "movedim", "real", "imag", "mT", "T", "H",
))  # fmt: skip


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
    return sorted(found, key=_position)


def _is_like(node: fx.Node) -> bool:
    """Whether ``node`` takes its first input's values, and of another tensor the dtype or the shape alone."""
    return node.op != "get_attr" and operation(node) in ("cast", "view_as", "expand_as")


def _position(node: fx.Node) -> Any:
    return node._sort_key


def before(a: fx.Node, b: fx.Node) -> bool:
    """Whether ``a`` stands before ``b`` in their graph."""
    return a._sort_key < b._sort_key


def is_context(node: fx.Node) -> bool:
    """Whether ``node`` switches gradient or autocast mode for the nodes after it."""
    return node.op == "call_function" and target_name(node.target) in _CONTEXT_TARGETS


def is_random(node: fx.Node) -> bool:
    """Whether ``node`` draws from the random generator."""
    return node.op in ("call_function", "call_method") and operation(node) in _RANDOM


def is_pure(node: fx.Node) -> bool:
    """Whether ``node`` may be erased when nothing reads it."""
    if node.op in ("get_attr",):
        return True
    return node.op in ("call_function", "call_method") and not (
        is_in_place(node) or is_context(node) or is_random(node)
    )


def storage_roots(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory ``node`` may share, through any chain of views, itself included."""
    roots, pending = {node}, [node]
    while pending:
        current = pending.pop()
        if current.op in ("call_function", "call_method") and _may_alias(current):
            for parent in current.all_input_nodes:
                if parent not in roots:
                    roots.add(parent)
                    pending.append(parent)
    return roots


def _may_alias(node: fx.Node) -> bool:
    """Whether ``node`` may return memory of an input: a view, a write in place, what need not convert or drop anything."""
    if operation(node) == "cast" and isinstance(node.args[0], fx.Node):
        before, after = dtype_of(node.args[0]), dtype_of(node)
        return before is None or after is None or before == after
    return operation(node) in VIEWS or is_in_place(node) or is_idle_dropout(node)


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether ``node`` is a dropout that drops nothing, and returns its input itself."""
    if operation(node) != "dropout":
        return False
    _, p, training, _ = bind("dropout", node.args, dict(node.kwargs)) or (None, 1.0, True, False)
    return training is False or (isinstance(p, int | float) and p == 0)


def overwritten(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory ``node`` may overwrite: what shares its ``out``, else its first argument."""
    if not is_in_place(node):
        return set()
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        written = node.all_input_nodes
    else:
        written = [n for n in (node.kwargs.get("out"), *node.args[:1]) if isinstance(n, fx.Node)]
    return set[fx.Node]().union(*(storage_roots(n) for n in written))


def written_to(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory something in ``graph`` may overwrite."""
    return set[fx.Node]().union(*map(overwritten, graph.nodes))


def written_inputs(graph: fx.Graph) -> list[int]:
    """The positions of the inputs that something in ``graph`` may overwrite."""
    written = written_to(graph)
    return [i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder") if n in written]


def context_of(graph: fx.Graph) -> dict[fx.Node, Any]:
    """For each node, the gradient and autocast modes that the graph put in force before it: equal where they are the same.

    Those in force when the graph starts equal no others: the graph does not say what they are.
    """
    contexts: dict[fx.Node, Any] = {}
    gradient, opened = None, tuple[fx.Node, ...]()
    for node in graph.nodes:
        name = target_name(node.target) if is_context(node) else ""
        if name.endswith("set_grad_enabled"):
            gradient = node.args[0]
        elif name.startswith("_exit"):
            opened = tuple(n for n in opened if n is not node.args[0])
        elif name:
            opened += (node,)
        contexts[node] = gradient, opened
    return contexts


def autograd_body(node: fx.Node) -> tuple[fx.Graph, dict[fx.Node, Any]] | None:
    """Of a call of an ``autograd.Function``: the graph of its forward, and what each of its inputs is outside of it."""
    body, root = node.args[0], node.graph.owning_module
    inner = getattr(root, str(body.target), None) if isinstance(body, fx.Node) and root is not None else None
    if not isinstance(inner, fx.GraphModule):
        return None
    inside = (n for n in inner.graph.nodes if n.op == "placeholder")
    return inner.graph, dict(zip(inside, node.args[2:], strict=False))


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


def erase_dead(nodes: Iterable[fx.Node]) -> int:
    """Erase those of ``nodes`` that are pure and unread, last first; returns how many."""
    erased = 0
    for node in sorted(nodes, key=_position, reverse=True):
        if not node.users and is_pure(node):
            node.graph.erase_node(node)
            erased += 1
    return erased


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
