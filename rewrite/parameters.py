"""The parameters among a graph's inputs: their names relative to the module whose forward it is, and which of them we read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from . import graph as g


@dataclass(frozen=True)
class Anchor:
    """A parameter among a graph's inputs: its position, and its name relative to the module whose forward the graph is."""

    index: int
    name: str


def find_anchors(module: fx.GraphModule) -> list[Anchor]:
    """The parameters among the inputs of ``module``."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    return [Anchor(i, name) for i, n in enumerate(placeholders) if (name := parameter_name(n))]


def parameter_name(placeholder: fx.Node) -> str:
    """Path of the parameter that ``placeholder`` stands for, relative to the region; "" for other inputs."""
    if "parameter_path" in placeholder.meta:
        return placeholder.meta["parameter_path"]
    argument = placeholder.meta.get("grapharg")
    origin = getattr(argument, "source", None)
    name = getattr(origin, "name", "")
    name = name() if callable(name) else name
    if "_parameters[" not in name:
        return ""
    return g.clean_path(name.replace("_modules", "").replace("_parameters", ""))


def reached_parameters(module: fx.GraphModule) -> list[str]:
    """Parameters of the region that one of our operators reads."""
    found = []
    for node in module.graph.nodes:
        if node.op == "placeholder" and any(_is_ours(u) for u in node.users):
            found.append(parameter_name(node))
    return [name for name in found if name]


def _is_ours(node: fx.Node) -> bool:
    return (getattr(node.target, "__module__", "") or "").startswith("weft.")
