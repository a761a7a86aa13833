"""Captures regions through Dynamo with a backend of our own, runs the passes on each graph, and remembers who uses it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from . import effects
from . import graph as g
from .alike import Alias
from .blocks import BlockGraph
from .device_memory import free_bytes
from .driver import Verifier
from .errors import first_line
from .exact import packed_weights
from .joint import JointGraph, unseen
from .leftovers import COMPILED, Leftovers
from .lower import has_checkpoint, lower
from .parameters import Anchor, find_anchors, reached_parameters
from .pipeline import Pass, run_pipeline
from .recompute import head_of
from .report import GraphRecord, RegionRecord, RewriteReport, join
from .step_memory import StepMemory
from .verify import Replayer

_log = logging.getLogger(__name__)


@dataclass
class Session:
    """One ``optimize`` call: its passes, its report, and the graphs captured for it, now and later.

    It is the Dynamo backend of all its regions, so that equal blocks find each other's graph.
    """

    passes: Sequence[Pass]
    report: RewriteReport
    verify: bool = True
    names: dict[int, str] = field(default_factory=dict)
    """Path of each of the model's parameters, by identity."""
    reached: set[int] = field(default_factory=set)
    """Identities of the parameters that are inputs of captured graphs."""
    memory: StepMemory | None = None
    """Plans what blocks save for their backward; None: all that it reads."""
    before: list[Callable[[], None]] = field(default_factory=list)
    """Called whenever a module runs that holds blocks."""
    _region: threading.local = field(default_factory=threading.local)
    _replays: dict[Any, Any] = field(default_factory=dict)
    _kept: dict[int, tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        self.compiler: Callable[..., Any] = self.compile
        self.leftovers = self.report.leftovers = Leftovers(verify=self.verify)

    @property
    def path(self) -> str:
        """Path of the region that is running on this thread."""
        return getattr(self._region, "path", "")

    @contextmanager
    def inside(self, path: str, alias: Alias | None = None) -> Iterator[None]:
        """Run a region, that was given ``alias``: graphs captured meanwhile belong to ``path``."""
        previous = self.path, self.alias
        self._region.path, self._region.alias = path, alias or self.alias
        try:
            yield
        finally:
            self._region.path, self._region.alias = previous

    @property
    def alias(self) -> Alias | None:
        """What the region that is running on this thread was given in place of its input."""
        return getattr(self._region, "alias", None)

    @contextmanager
    def keeping_weights(self) -> Iterator[None]:
        """What the model's own forward overwrites inside, weights that it normalizes, say, has its values again afterwards."""
        self._kept = {}
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in self._kept.values():
                    parameter.copy_(value)
            self._kept = None

    def keep(self, inputs: Sequence[Any]) -> None:
        """A graph that overwrites ``inputs`` is about to run for the first time."""
        if self._kept is not None:
            for each in inputs:
                if (
                    isinstance(each, torch.nn.Parameter) and each.is_floating_point()
                ):  # packed weights are libraries' to store
                    self._kept.setdefault(id(each), (each, each.detach().clone()))

    def compile(self, module: fx.GraphModule, example_inputs: list[Any], rung: str = "graph") -> Callable[..., Any]:
        """Dynamo's backend: rewrite ``module``. Never fails: what cannot be rewritten runs as captured, and is reported."""
        started = time.perf_counter()
        record = GraphRecord(RegionRecord([], rung))
        anchors, writes = find_anchors(module), effects.written_inputs(module.graph)
        function: Callable[..., Any] = module.forward
        original = g.copied(module.graph)
        try:
            with unseen():
                self.rewrite(module, example_inputs, record)
            function = self._lowered(module, example_inputs, rung)
        except Exception as error:  # whatever a rule does, the model must run; the report and the log say what happened
            _log.debug("rewriting %s failed", self.path, exc_info=True)
            record = GraphRecord(RegionRecord([], rung, note=f"left as captured: {first_line(error)}"))
            record.region.nodes_before = record.region.nodes_after = len(module.graph.nodes)
            self.report.notes.append(f"{self.path or '(top)'}: rewriting failed, runs as captured: {first_line(error)}")
            function = lower(fx.GraphModule(module, original))
        self.report.graphs.append(record)
        self.report.total_seconds += time.perf_counter() - started
        return CapturedGraph(self, record, function, anchors, writes)

    def _lowered(self, module: fx.GraphModule, example_inputs: Sequence[Any], rung: str) -> Callable[..., Any]:
        """The callable: a block in training saves what is planned, anything else what its operators save."""
        trained = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in example_inputs)
        if self.memory is not None:
            self.memory.recount()
        if self.memory is None or rung != "graph" or not trained or self.path not in self.memory.paths:
            if self.memory is not None and trained and (head := head_of(module.graph, example_inputs)):
                self.memory.heads.append(head)
            return lower(module)
        try:
            recordings = self.memory.recordings
            prepared = self.leftovers.fused if COMPILED in module.meta else None
            joint = JointGraph(module, example_inputs, recordings and recordings.recorded, prepared)
            joint.lower()
        except Exception as error:  # what AOTAutograd cannot trace runs node by node, and the report says so
            _log.debug("lowering %s failed", self.path, exc_info=True)
            self.report.notes.append(f"{self.path}: saves all that its backward reads: {first_line(error)}")
            return lower(module)
        return BlockGraph(joint, self.memory, lambda: self.path, has_checkpoint(module))

    def rewrite(self, module: fx.GraphModule, example_inputs: Sequence[Any], record: GraphRecord) -> None:
        """Run the passes over ``module``."""
        for part in g.subgraphs(module):
            annotate(part)
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        verifier: Verifier | None = None
        if self.verify:
            examples = dict(zip(placeholders, example_inputs, strict=False))
            room = free_bytes if self.memory is None else self.memory.room_beside
            verifier = Replayer(examples, self._replays, room)
        run_pipeline(module, self.passes, verifier, record)
        record.region.parameters = reached_parameters(module)

    def reach(self, arguments: Sequence[Any], names: set[str]) -> None:
        """Note parameters as reached: by identity, and by path where another tensor stands in for them (sharded ones)."""
        self.reached |= {id(a) for a in arguments if isinstance(a, torch.nn.Parameter)}
        self.reached |= {identity for identity, name in self.names.items() if name in names}

    def place(self, anchors: Sequence[Anchor], arguments: Sequence[Any]) -> str:
        """Whole path of the module whose forward a graph is, from those of the parameters that it is called with.

        A parameter that several modules share is known by one path alone, which may lie outside the region.
        """
        for anchor in anchors:
            place = self.names.get(id(arguments[anchor.index]), "").removesuffix("." + anchor.name)
            inside = not self.path or f"{place}.".startswith(f"{self.path}.")
            if inside and f"{place}.{anchor.name}" in self.report.parameters:
                return place
        return self.path


@dataclass
class CapturedGraph:
    """The callable that Dynamo installs; notes which module instance runs it."""

    session: Session
    record: GraphRecord
    function: Callable[..., Any]
    anchors: Sequence[Anchor] = ()
    writes: Sequence[int] = ()
    """Positions of the inputs that it overwrites."""
    _seen: set[Any] = field(default_factory=set)

    def __call__(self, *args: Any) -> Any:
        key = (self.session.path, id(args[self.anchors[0].index]) if self.anchors else None)
        if key not in self._seen:
            self._seen.add(key)
            self._note(args)
        alias, function = self.session.alias, self.function
        if alias is not None:
            args, at = alias.instead(args)
            # a trial need not wait for it: nobody asks for its gradients
            if at is not None and isinstance(function, BlockGraph) and not function.memory.tried:
                function = function.without_gradient(at)
        return function(*args)

    def _note(self, args: tuple[Any, ...]) -> None:
        region, path, place = self.record.region, self.session.path, self.session.place(self.anchors, args)
        self.session.keep([args[i] for i in self.writes])
        self.session.reach(args, {join(where, a.name) for a in self.anchors for where in (place, path)})
        for known, new in ((region.paths, path), (region.places, place)):
            if new not in known:
                known.append(new)


def annotate(module: fx.GraphModule) -> None:
    """Put every node's fake value where the engine looks for it, and mark packed weights, whose products later passes hide."""
    for node in module.graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    for node in packed_weights(module.graph):
        node.meta["packed"] = True
