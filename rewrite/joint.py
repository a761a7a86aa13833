"""A region's graph for training, lowered through AOTAutograd: a forward and a backward that save what is chosen.

The joint graph of forward and backward is traced once a choice; what is not among the saved values is computed again in the
backward, as late as it is needed, and nothing that no gradient needs is computed twice. Saved tensors are those of one
``autograd.Function``: hooks of ``torch.autograd.graph`` see them, and so does ``torch.utils.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._guards import TracingContext, tracing
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.graph import _BoxedCodeGen
from torch.utils.checkpoint import CheckpointPolicy

from .effects import written_inputs
from .gradient_sums import with_sums
from .graph import copied
from .overwriting import Overwritten, overwritten
from .remat import INFINITE, Operation, Problem
from .sizes import Evaluate, is_part, storages, value_bytes

Seconds = Callable[[fx.Node], float]
Function = Callable[[list[Any]], Any]
"""Of tensors and numbers, in a list that it empties."""
Prepare = Callable[[fx.GraphModule], fx.GraphModule]
Recorder = Callable[[Function, fx.Graph, bool], Function]
"""Makes the function that runs in place of one that runs a graph; True for a backward."""


class JointGraph:
    """The forward and backward of one rewritten graph, by what they save.

    Attributes:
        fakes: the inputs that it is lowered for, with the symbols of its capture for sizes that vary.
        graph: the joint graph of the first lowering, for analysis. Its inputs are those of the region's graph.
        backward: of each choice lowered so far, the backward's graph.
        recorded: what each forward and backward becomes.
        prepared: what becomes of their graphs before.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        recorded: Recorder | None = None,
        prepared: Prepare | None = None,
        context: TracingContext | None = None,
    ) -> None:
        self.module = module
        self.fakes = list(inputs) if context else _captured(module, inputs)
        self.recorded = recorded or (lambda function, *_: function)
        self.prepared = prepared or (lambda module: module)
        self.graph: fx.Graph | None = None
        self.backward: dict[frozenset[str] | None, fx.Graph] = {}
        self._context = context or TracingContext.try_get()
        self._lowered: dict[frozenset[str] | None, Callable[..., Any]] = {}
        self._returned: dict[frozenset[str] | None, set[int]] = {}
        """Where what a joint graph returns lies."""

    def lower(self, saved: frozenset[str] | None = None) -> Callable[..., Any]:
        """The callable that saves the values of these names for its backward; None saves all that the backward reads."""
        if saved not in self._lowered:
            backend = aot_autograd(
                fw_compiler=self._compiled,
                bw_compiler=lambda module, _: self._backward(saved, module),
                partition_fn=lambda joint, inputs, **options: self._partition(saved, joint, inputs, options),
            )
            with tracing(self._context), torch.enable_grad(), unseen():
                self._lowered[saved] = backend(self.module, self.fakes)
        return self._lowered[saved]

    def without_gradient(self, at: int) -> JointGraph:
        """The same where the input at this position needs no gradient."""
        fakes = [f.detach() if i == at else f for i, f in enumerate(self.fakes)]
        return JointGraph(self.module, fakes, self.recorded, self.prepared, self._context)

    def only_once(self, joint: fx.Graph) -> set[fx.Node]:
        """The calls of a joint graph's forward that would compute something else a second time: what is random, and what reads
        an input that the forward overwrites."""
        primals = [n for n in joint.nodes if _is_primal(n)]
        stale = {primals[i] for i in written_inputs(self.module.graph) if i < len(primals)}
        found = set[fx.Node]()
        for node in forward_nodes(joint):
            if stale.intersection(node.all_input_nodes):
                (stale if is_view(node) else found).add(node)
            if is_random(node):
                found.add(node)
        return found

    def overwritten(self, backward: fx.Graph, saved: frozenset[str] | None = None) -> Overwritten:
        """What calls of the backward of this choice may overwrite: not what was given to it or to the forward, nor what either
        returns."""
        given = [n for n in backward.nodes if n.op == "placeholder" and n.name.startswith(("primals", "tangents"))]
        own = (*given, *backward.output_node().all_input_nodes)
        return overwritten(backward, {s for n in own for s in storages(n.meta.get("val"))} | self._returned[saved])

    def _backward(self, saved: frozenset[str] | None, module: fx.GraphModule) -> Callable[..., Any]:
        self.backward[saved] = module.graph
        over = partial(self.overwritten, saved=saved)
        return self.recorded(_boxed(self.prepared(with_sums(module)), over), module.graph, True)

    def _compiled(self, module: fx.GraphModule, _: Any = None) -> Callable[..., Any]:
        _donate_nothing()
        return self.recorded(_boxed(self.prepared(module)), module.graph, False)

    def _partition(self, saved: frozenset[str] | None, joint: fx.GraphModule, inputs: Any, options: Any) -> Any:
        if self.graph is None:
            self.graph = copied(joint.graph)
        # of this trace: another one's values lie elsewhere
        self._returned[saved] = {
            s for n in joint.graph.output_node().all_input_nodes for s in storages(n.meta.get("val"))
        }
        if saved is not None:
            once = self.only_once(joint.graph)
            for node in forward_nodes(joint.graph):
                keep = node.name in saved or node in once
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0
                if not keep and _may_draw(node.target):
                    node.target = _Undrawn(node.target)
        parts = default_partition(joint, inputs, **options)
        for node in (n for part in parts for n in part.graph.nodes if isinstance(n.target, _Undrawn)):
            node.target = node.target.operator
        return parts


def _donate_nothing() -> None:
    """Of the graph that AOTAutograd compiles now: what is saved and it takes for donated, it lets no backward keep, as one with
    retain_graph does, whether its compiler overwrites that or not."""
    found: Any = getattr(TracingContext.try_get(), "fw_metadata", None)
    if found is not None:
        found.bw_donated_idxs = []


def _captured(module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Dynamo's fake values of the graph's inputs, where it has left them. The real ones would be kept alive; and one made from
    them later, such as :meth:`JointGraph.without_gradient` makes, would have no symbols: it would be lowered for its size."""
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    return [n.meta.get("example_value", given) for n, given in zip(nodes, inputs, strict=True)]


def unseen() -> AbstractContextManager[Any]:
    """Inside, what autograd saves is hidden from hooks around: those of a checkpoint would count what a trace or replay saves."""
    return saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Undrawn:
    """Stands for an operator that could draw, and does not, while a joint graph is cut: done twice as it is, it would have
    the generator's state saved and set, which no CUDA graph can hold."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.__name__ = str(operator)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.operator(*args, **kwargs)


def _boxed(module: fx.GraphModule, over: Callable[[fx.Graph], Overwritten] = lambda _: {}) -> Callable[..., Any]:
    """Run node by node. The inputs come in a list that is emptied, so that each is freed after its last use; ``over`` says which
    calls write where their operands lay.

    An operator that offers a way past torch's dispatcher, as its attribute ``direct``, is called that way: what is run here has
    been traced, and nobody is left to watch it. ``module.graph`` still names the operators.
    """
    graph = copied(module.graph)
    graph.set_codegen(_BoxedCodeGen())
    overwriting = over(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            way = "overwriting" if node in overwriting else "direct"
            node.target = getattr(node.target, way, node.target)
    function: Any = fx.GraphModule(module, graph).forward

    def run(arguments: list[Any]) -> Any:
        return function(arguments)

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]  (AOTAutograd's own mark)
    return run


def forward_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The calls of a joint graph that depend on no incoming gradient and run before those that do."""
    last = max(
        (i for i, n in enumerate(graph.nodes) if n.meta.get("partitioner_tag") == "is_forward" or _is_primal(n)),
        default=-1,
    )
    return [n for i, n in enumerate(graph.nodes) if i <= last and n.op == "call_function"]


def _is_primal(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" not in str(node.target)


def is_random(node: fx.Node) -> bool:
    """Whether a call may return something else the next time."""
    return (_may_draw(node.target) and not _without_dropout(node)) or is_mutating(node)


def is_mutating(node: fx.Node) -> bool:
    """Whether a call changes one of its inputs."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _may_draw(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _without_dropout(node: fx.Node) -> bool:
    """Attention that could drop out, and does not, is the same every time."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    default = next((a.default_value for a in schema.arguments if a.name == "dropout_p"), None)
    return "dropout_p" in names and bool(given.get("dropout_p", default) == 0.0)


def recompute_problem(graph: fx.Graph, once: Set[fx.Node], seconds: Seconds, of: Evaluate) -> Problem:
    """What to save of a joint graph's forward, as a minimum cut asks it. The calls in ``once`` are not done again.

    Views are never saved: what they show is. Outputs of one call are saved apart.
    """
    forward = forward_nodes(graph)
    inside = set(forward)
    operations: dict[str, Operation] = {}
    producer, size, needed = dict[str, str](), dict[str, float](), []
    for node in forward:
        if is_number(node):
            continue
        part = is_part(node)
        if not part:
            reads = tuple(n.name for n in node.all_input_nodes if n in inside and not is_number(n))
            again = INFINITE if node in once else (0.0 if is_view(node) else seconds(node))
            operations[node.name] = Operation(again, reads)
        producer[node.name] = node.args[0].name if part else node.name  # pyright: ignore
        whole = isinstance(node.meta.get("val"), Tensor) and not is_view(node)
        size[node.name] = value_bytes(node.meta.get("val"), of) if whole else INFINITE
        if any(user not in inside and user.op != "output" for user in node.users):
            needed.append(node.name)
    return Problem(operations, producer, size, tuple(needed))


def is_number(node: fx.Node) -> bool:
    """Whether a call computes no tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def is_view(node: fx.Node) -> bool:
    """Whether a result lies in an input of its call; each part of a split does."""
    own = set(storages(node.meta.get("val")))
    call = node.args[0] if is_part(node) else node
    return bool(own) and any(own & set(storages(n.meta.get("val"))) for n in call.all_input_nodes)  # pyright: ignore
