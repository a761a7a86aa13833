"""The rung below Dynamo: one module's forward as torch.fx traces it symbolically.

Tracing runs the forward once on proxies. A branch on a size or a value ends it, so the graph holds for all sizes and values.
What it bakes in are arguments that are no tensors, the modes, and the plain attributes of the modules: each call compares
them (:func:`state`). Attributes of other objects, such as a config's, are taken for constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import TreeSpec, tree_unflatten

from .errors import CaptureError
from .report import RewriteReport

PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
"""Types of arguments and attributes that are compared by value."""

_OWN = frozenset(vars(nn.Module())) - {"training"}
"""What every module has: its tensors are inputs of the graph, its hooks are compared below."""


@dataclass
class Traced:
    """A forward as a graph. Its inputs are the module's parameters and buffers that it reads, then the tensors given."""

    module: fx.GraphModule
    names: list[str]
    positions: list[int]
    """Where among the flattened arguments the tensors are."""
    fakes: list[Any] = field(default_factory=list)
    environment: ShapeEnv = field(default_factory=ShapeEnv)
    _guards: str | None = None

    def inputs(self, root: nn.Module, leaves: Sequence[Any]) -> list[Tensor]:
        """What the graph is called with, for arguments that were flattened into ``leaves``."""
        return [_tensor_at(root, name) for name in self.names] + [leaves[i] for i in self.positions]

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether sizes and strides meet the conditions under which the graph was rewritten."""
        if self._guards is None:
            self._guards = self.environment.produce_guards_expression(self.fakes) or "True"
        return bool(self.environment.evaluate_guards_expression(self._guards, inputs))


def trace(root: nn.Module, function: Callable[..., Any], leaves: Sequence[Any], spec: TreeSpec) -> Traced:
    """Trace ``function``, a forward of ``root``, on the arguments that were flattened into ``leaves``.

    Raises:
        CaptureError: the forward makes tensors of its own or takes arguments that could not be compared.
        Exception: whatever the forward itself raises when it is given proxies.
    """
    strange = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))), None)
    if strange is not None:
        raise CaptureError(f"an argument holds a {type(strange).__name__}, which no later call could be compared with")
    tracer = _Tracer(root, function, leaves, spec)
    graph = tracer.trace(root)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and "parameter_path" in node.meta:
            graph.erase_node(node)
    names = [n.meta["parameter_path"] for n in graph.find_nodes(op="placeholder") if "parameter_path" in n.meta]
    traced = Traced(fx.GraphModule(nn.Module(), graph), names, tracer.positions)
    _propagate(traced, traced.inputs(root, leaves))
    return traced


class _Tracer(fx.Tracer):
    """Traces through all submodules, with every parameter and buffer of the root an input."""

    record_stack_traces = True

    def __init__(self, root: nn.Module, function: Callable[..., Any], leaves: Sequence[Any], spec: TreeSpec) -> None:
        super().__init__()
        self.positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._run = lambda values: _call(function, tree_unflatten(values, spec))
        self._leaves = leaves
        self._named = {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}
        self._inputs: dict[int, fx.Proxy] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Inputs as :class:`Traced` orders them."""
        for key, name in self._named.items():
            proxy = self.create_proxy("placeholder", name.replace(".", "_"), (), {})
            proxy.node.meta["parameter_path"] = name
            self._inputs[key] = proxy
        values = list(self._leaves)
        for i in self.positions:
            values[i] = self.create_proxy("placeholder", f"input_{i}", (), {})
        return lambda root: self._run(values), [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """None: torch's own modules are spelt out too."""
        return False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are inputs, also where only they are computed with."""
        return self._inputs.get(id(attr_val), attr_val)

    def create_arg(self, a: Any) -> Any:
        """Refuse tensors that the forward made while it was traced: they would be constants of the graph."""
        if isinstance(a, Tensor):
            if id(a) not in self._inputs:
                raise CaptureError("the forward makes a tensor from no input, which tracing would keep as it is")
            return self._inputs[id(a)].node
        return super().create_arg(a)


def _call(function: Callable[..., Any], arguments: Any) -> Any:
    args, kwargs = arguments
    return function(*args, **kwargs)


def _propagate(traced: Traced, inputs: Sequence[Tensor]) -> None:
    """Give every node its fake value. Sizes of inputs are symbols, but for the last one: models fix that."""
    mode = FakeTensorMode(shape_env=traced.environment)
    parameters = len(traced.names)
    with mode, enable_python_dispatcher():
        for i, tensor in enumerate(inputs):
            free = [DimDynamic.DYNAMIC] * max(tensor.dim() - 1, 0) + [DimDynamic.STATIC] * min(tensor.dim(), 1)
            context = StatelessSymbolicContext(dynamic_sizes=free) if i >= parameters else None
            traced.fakes.append(mode.from_tensor(tensor, static_shapes=i < parameters, symbolic_context=context))
        _Recorder(traced.module).run(*traced.fakes)


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        """Keep what the node computes where the engine looks for it."""
        n.meta["val"] = found = super().run_node(n)
        return found


def state(module: nn.Module) -> tuple[Any, ...]:
    """What a traced forward of ``module`` depends on besides its arguments: equal states, equal graphs."""
    devices = ("cuda", "cpu")
    modes = [torch.is_grad_enabled(), *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)]
    return (*modes, *(_own_state(m) for m in module.modules()))


def _own_state(module: nn.Module) -> tuple[Any, ...]:
    held = ((name, value) for name, value in vars(module).items() if name not in _OWN)
    plain = tuple((name, _value(value)) for name, value in held if not isinstance(value, RewriteReport))
    hooks = tuple(id(h) for kept in (module._forward_hooks, module._forward_pre_hooks) for h in kept.values())
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    types = tuple((t.dtype, t.shape, t.requires_grad, t.device) for t in tensors)
    return (*plain, *hooks, *types)


def _value(found: Any) -> Any:
    if isinstance(found, PLAIN):
        return type(found), found
    if isinstance(found, tuple | list):
        return type(found), tuple(_value(v) for v in found)
    if isinstance(found, dict):
        return type(found), tuple((_value(k), _value(v)) for k, v in found.items())
    return id(found)


def _tensor_at(root: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    owner = root.get_submodule(path)
    found = owner._parameters.get(last, owner._buffers.get(last))
    if found is None:
        raise CaptureError(f"{name} is gone since the model was captured")
    return found
