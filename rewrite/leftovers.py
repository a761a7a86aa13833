"""What no rule takes: runs of elementwise operations, reductions and gathers become kernels of Inductor.

Rules know the operations that models have in common. What is left in a lowered graph, such as the routing of experts, would run
operation by operation, each writing what the next one reads. Where much of a graph's memory traffic is of that kind, such a run
is handed to ``torch.compile``, all at once; products, attention and weft's own operators stay as they are.

A run is a stretch of the graph, in the order in which it is executed, without any other operation in it: it may be computed where
its first operation stood, and holds no memory for longer. Views, and sizes, do nothing: those that the run needs are in it.

Sums into places that an index names have no fixed order then, as in all that Inductor compiles: where a token goes to more than
two experts, its gradient may differ in the last place from run to run, unless torch.use_deterministic_algorithms is on.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import graph as g
from .errors import first_line
from .joint import is_number, is_random, is_view
from .judge import judge
from .sizes import is_part, tensors
from .vocabulary import operation

_log = logging.getLogger(__name__)

COMPILED = "compile leftovers"
"""Key in the meta data of a graph module whose runs are compiled."""
SHARE = 1 / 8
"""Of the bytes that a graph writes: what a run must save for compiling it to be worth while."""

FUSIBLE = frozenset((
    "_to_copy", "clone", "copy", "fill", "floor_divide", "new_zeros", "new_full", "zeros", "zeros_like", "ones_like", "full",
    "full_like", "empty_like", "arange", "sum", "_softmax", "_softmax_backward_data", "_log_softmax",
    "_log_softmax_backward_data",
    "mean", "amax", "amin", "var_mean", "native_layer_norm", "native_layer_norm_backward", "index", "index_put", "index_select",
    "gather", "scatter", "scatter_add", "embedding", "cat", "slice_backward", "select_backward", "constant_pad_nd", "repeat",
    "roll", "flip",
))  # fmt: skip
"""Operations that Inductor fuses, beside those that torch calls pointwise."""

Compile = Callable[[fx.GraphModule], Callable[..., Any]]


def inductor(module: fx.GraphModule) -> Callable[..., Any]:
    """For all sizes: Dynamo guards what the kernels take for granted, and has them compiled anew where it does not hold."""

    def run(*arguments: Any) -> Any:
        return module(*arguments)

    run.__code__ = run.__code__.replace()  # of its own: Dynamo keeps graphs by code object, and not many for one
    return torch.compile(run, dynamic=True, fullgraph=True)


@dataclass
class Leftovers:
    """Compiles the runs of one model's graphs, and says how many.

    Args:
        device_type: of the tensors whose operations are compiled.
        verify: compare the first results of each compiled run with those of what it replaces, and in float64.
    """

    device_type: str = "cuda"
    verify: bool = True
    compile: Compile = inductor
    runs: int = 0
    operations: int = 0
    unchecked: int = 0
    problems: list[str] = field(default_factory=list)

    def fused(self, module: fx.GraphModule) -> fx.GraphModule:
        """``module`` with its runs compiled: a copy, or itself where there are none."""
        graph, before = g.copied(module.graph), self.runs
        for run in runs(graph, self.device_type):
            run.replace(Call(self, run.module(module)).named(f"leftovers_{self.runs}"))
            self.runs += 1
            self.operations += len(run.members)
        return fx.GraphModule(module, graph) if self.runs > before else module

    def remarks(self) -> list[str]:
        """What was compiled, and what could not be, for the report."""
        done = f"Inductor: {self.operations} operations that no rule takes are {self.runs} calls"
        return [
            *([done] if self.runs else []),
            *(
                [f"Inductor: {self.unchecked} of them were not compared: no memory for float64"]
                if self.unchecked
                else []
            ),
            *(f"Inductor: a run is left as it was: {problem}" for problem in dict.fromkeys(self.problems)),
        ]


class Call:
    """A run that is compiled when it is first called; left as it was if that fails, or computes something else."""

    def __init__(self, owner: Leftovers, original: fx.GraphModule) -> None:
        self.owner, self.original = owner, original
        self.function: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.function is None and _get_current_dispatch_mode_stack():  # somebody looks on, as AOTAutograd does once
            return self.original.forward(*arguments)
        if self.function is None:
            self.function = self._compiled(arguments)
        try:
            return self.function(*arguments)
        except (
            TorchDynamoException
        ) as error:  # other sizes are compiled anew, and may be what it cannot compile, or too many
            self.function = self._as_it_was(first_line(error))
            return self.function(*arguments)

    def named(self, name: str) -> Callable[..., Any]:
        """Itself as a function, which a graph can call by a name."""

        def call(*arguments: Any) -> Any:
            return self(*arguments)

        call.__name__ = call.__qualname__ = name
        return call

    def _compiled(self, arguments: Sequence[Any]) -> Callable[..., Any]:
        try:
            compiled = self.owner.compile(self.original)
            compiled(*arguments)
            problem = self._problem(compiled, arguments) if self.owner.verify else None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what Inductor cannot compile runs operation by operation, and the report says so
            _log.debug("compiling a run failed", exc_info=True)
            return self._as_it_was(first_line(error))
        return compiled if problem is None else self._as_it_was(problem)

    def _problem(self, compiled: Callable[..., Any], arguments: Sequence[Any]) -> str | None:
        try:
            return judge(self.original, compiled, arguments)[1]
        except torch.OutOfMemoryError:
            self.owner.unchecked += 1
            return None

    def _as_it_was(self, problem: str) -> Callable[..., Any]:
        self.owner.problems.append(problem)
        return self.original.forward


@dataclass
class Run:
    """Operations that are computed at once, where the first of them stands.

    Attributes:
        members: those that compute, in order.
        early: views and sizes between them that depend on none: they go before.
        inner: those that depend on some and are needed by others: they are in the run, too.
    """

    members: list[fx.Node]
    early: list[fx.Node]
    inner: list[fx.Node]

    def __post_init__(self) -> None:
        self.inside = sorted((*self.members, *self.inner), key=g.position)
        inside = set(self.inside)
        self.inputs = list(dict.fromkeys(i for n in self.inside for i in n.all_input_nodes if i not in inside))
        self.shown = list[fx.Node]()  # views in it that are read outside: there, they are taken again, of the results
        for node in reversed(self.inner):
            if any(u not in inside or u in self.shown for u in node.users):
                self.shown.insert(0, node)
        read = [n for n in self.members if any(u not in inside or u in self.shown for u in n.users)]
        self.outputs = [n for n in read if g.tensor_of(n) is not None]

    def saved_bytes(self) -> int:
        """Of intermediate results, what need not be written and read any more, at the sizes of the trace.

        A sum into places that an index names begins with sorting the index: that is two more passes, at the least.
        """
        passes = [n for m in self.members for n in (m, *m.all_input_nodes)]
        passes += [n for n in self.members if operation(n) == "index_put" and True in n.args for _ in range(2)]
        return sum(map(g.tensor_bytes, passes)) - sum(map(g.tensor_bytes, (*self.inputs, *self.outputs)))

    def module(self, root: fx.GraphModule) -> fx.GraphModule:
        """The run as a graph of its own."""
        return g.copy_nodes(self.inside, self.inputs, self.outputs, root)

    def replace(self, function: Callable[..., Any]) -> None:
        """Put a call of ``function`` in its place."""
        first = self.members[0]
        for node in self.early:
            first.prepend(node)
        graph, inside = first.graph, set(self.inside)
        with graph.inserting_before(first):
            made = graph.call_function(function, tuple(self.inputs))
            outside = {o: graph.call_function(operator.getitem, (made, i)) for i, o in enumerate(self.outputs)}
            for node in self.shown:
                outside[node] = graph.node_copy(node, lambda n: outside.get(n, n))
        for node, part in outside.items():
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside, propagate_meta=False)
        for node in reversed(self.inside):
            graph.erase_node(node)


def runs(graph: fx.Graph, device_type: str) -> Iterator[Run]:
    """Those of ``graph`` that are worth compiling, each as the graph is when it is asked for: the one before may be replaced."""
    computed = [n for n in graph.nodes if n.op == "call_function" and not _is_idle(n)]
    least = SHARE * sum(g.traced_bytes(t) for n in computed for t in tensors(n.meta.get("val")))
    for stretch in list(_stretches(graph, device_type)):
        run = _run(stretch)
        numbers = any((g.dtype_of(i) or torch.int).is_floating_point for i in run.inputs)  # not what makes a mask, say
        if len(run.members) > 1 and run.outputs and numbers and run.saved_bytes() >= least:
            yield run


def _stretches(graph: fx.Graph, device_type: str) -> Iterator[list[fx.Node]]:
    """Longest sequences without an operation that Inductor would not fuse."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "call_function" and (_is_idle(node) or _is_fusible(node, device_type)):
            found.append(node)
        elif node.op != "placeholder":
            yield found
            found = []


def _run(stretch: Sequence[fx.Node]) -> Run:
    members, early, late = dict[fx.Node, None](), list[fx.Node](), dict[fx.Node, None]()
    for node in stretch:
        depends = any(i in members or i in late for i in node.all_input_nodes)
        if not _is_idle(node) or (is_part(node) and node.args[0] in members):
            members[node] = None
        elif depends:
            late[node] = None
        else:
            early.append(node)
    needed = set(
        g.backward_slice([i for m in members for i in m.all_input_nodes if i in late], set(stretch) - set(late))
    )
    return Run(list(members), early, [n for n in late if n in needed])


def _is_idle(node: fx.Node) -> bool:
    """Whether nothing is computed: a view, a size, one of several results."""
    return is_number(node) or is_part(node) or is_view(node)


def _is_fusible(node: fx.Node, device_type: str) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    name = node.target._schema.name.partition("::")[2]
    known = torch.Tag.pointwise in node.target.tags or name in FUSIBLE
    if not known or is_random(node):
        return False
    found = [t for n in (node, *node.all_input_nodes) for t in tensors(n.meta.get("val"))]
    return bool(found) and all(t.device.type == device_type and not free_unbacked_symbols(t) for t in found)
