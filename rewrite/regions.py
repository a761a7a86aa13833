"""Cuts a model into the regions that are captured: by structure, never by name.

The repeated children of one class in a container are the blocks; a block is one region, and since all blocks of a class run
one code object, they share one graph. The outermost forward (head and loss) is a region too, captured around its calls into
what holds the blocks. Where it loops over the blocks itself, they are calls in its graph; Dynamo cannot be interrupted
inside a loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .report import join

Role = Literal["region", "inline", "opaque", "traced"]


@dataclass(frozen=True)
class Site:
    """One module whose forward is replaced.

    ``region``: captured, and an interruption of any graph around it. ``inline``: captured, and one call in the graph around
    it. ``opaque``: not captured, an interruption. ``traced``: captured by torch.fx, where Dynamo captures nothing.
    ``alike``: one of several of a class, that are to share graphs.
    """

    path: str
    module: nn.Module
    role: Role
    alike: bool = False


@dataclass(frozen=True)
class Plan:
    """The forwards to replace, in two steps.

    ``first`` is always replaced. ``root``, then, where every inline block turns out to return what Dynamo can be told of;
    ``instead``, where one does not. ``blocks`` are the paths of the blocks.
    """

    first: list[Site]
    root: Site | None = None
    instead: tuple[Site, ...] = ()
    blocks: tuple[str, ...] = ()


def plan_sites(root: nn.Module, prefix: str = "") -> Plan:
    """Cut ``root``; every module is replaced once, however often it is shared."""
    blocks = find_blocks(root)
    if not blocks:
        return Plan([Site(prefix, root, "region")])
    holders = _holders(root, blocks)
    plan, passed = _plan(root, prefix, blocks, holders), _passed(root, holders, blocks)
    if plan.root is not None or not passed:
        return plan
    through = _plan(root, prefix, blocks, {p: m for p, m in holders.items() if p not in passed})
    if through.root is None:
        return through
    done = {id(s.module) for s in through.first}
    return Plan(through.first, through.root, tuple(s for s in plan.first if id(s.module) not in done), through.blocks)


def _plan(root: nn.Module, prefix: str, blocks: dict[str, nn.Module], holders: dict[str, nn.Module]) -> Plan:
    """The plan where ``holders`` call what they hold."""
    direct = _direct(holders, blocks)
    inline = {p for p in blocks if next(a for a in _ancestors(p) if a in holders) == ""}
    sites = [Site(join(prefix, p), m, "inline" if p in inline else "region", True) for p, m in blocks.items()]
    sides = {h: [Site(join(prefix, p), m, "region") for p, m in _side_modules(h, holders[h], blocks)] for h in holders}
    opaque = [Site(join(prefix, p), m, "opaque") for p, m in holders.items() if p]
    inner = [site for h, found in sides.items() if h for site in found]
    top = Site(prefix, root, "region")
    names = tuple(join(prefix, p) for p in blocks)
    if "" not in direct:
        return Plan(_once([*sites, *inner, *opaque, top]), blocks=names)
    return Plan(_once([*sites, *inner, *opaque]), top, tuple(sides.get("", ())), names)


def _passed(root: nn.Module, holders: dict[str, nn.Module], blocks: dict[str, nn.Module]) -> set[str]:
    """The holders that a graph around them passes through, with nothing replaced there.

    What an adapter library's wrapper, or anybody's, calls as it is may hold head and loss itself. And what a head computes goes
    to whoever called its holder, so that one graph should have both: where a wrapper holds one that ends in a head, the holders
    in that are passed through as well, whose interruption would be one of the graph around.
    """
    wrapped = dict(_wrapped(root, holders))
    headed = [p for p, module in wrapped.items() if _ends_in_a_head(p, module, blocks)]
    passed = {*wrapped, *_chains(holders, blocks), *(p for p in holders for h in headed if p.startswith(f"{h}."))}
    return {p for p in passed if all(a in passed for a in _ancestors(p) if a and a in holders)}


def _wrapped(root: nn.Module, holders: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """From the root inwards, the holders that have all parameters of what is around them."""
    path, module = "", root
    while not _has_parameters(module, recurse=False):
        inner = [n for n, child in module.named_children() if _has_parameters(child)]
        path = join(path, inner[0]) if len(inner) == 1 else ""
        if path not in holders or not path:
            return
        module = holders[path]
        yield path, module


def _ends_in_a_head(path: str, holder: nn.Module, blocks: dict[str, nn.Module]) -> bool:
    """Whether the last child of ``holder`` that has parameters holds a matrix, and neither is nor has a block.

    The order in which children were assigned is no proof of what a forward does: it decides what is tried first, no more.
    """
    trained = [(join(path, n), child) for n, child in holder.named_children() if _has_parameters(child)]
    last, module = trained[-1]
    return not any(f"{b}.".startswith(f"{last}.") for b in blocks) and any(p.dim() > 1 for p in module.parameters())


def _chains(holders: dict[str, nn.Module], blocks: dict[str, nn.Module]) -> set[str]:
    """The ``nn.Sequential`` among the holders that end in something that is no block, such as the head."""
    found = set[str]()
    for path, module in holders.items():
        names = [name for name, _ in module.named_children()]
        plain = path and type(module).forward is nn.Sequential.forward and "forward" not in vars(module)
        ends = names and join(path, names[-1])
        if plain and ends not in blocks and any(join(path, n) in blocks for n in names):
            found.add(path)
    return found


def find_blocks(root: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated children: two or more of one class, with parameters, in one container."""
    found: dict[str, nn.Module] = {}
    for path, container in root.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        if any(path == b or path.startswith(b + ".") for b in found):
            continue
        children = list(container.named_children())
        classes = [type(c) for _, c in children]
        found |= {
            join(path, name): child for name, child in children if classes.count(type(child)) > 1 and _is_block(child)
        }
    return found


def _is_block(module: nn.Module) -> bool:
    """A block can be called and holds several parametrized modules: neither a list of linears is a list of blocks, nor a
    list of lists."""
    return has_forward(module) and sum(_has_parameters(m, recurse=False) for m in module.modules()) > 1


def _has_parameters(module: nn.Module, recurse: bool = True) -> bool:
    return any(True for _ in module.parameters(recurse))


def _holders(root: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module with a forward of its own on the way from the root to a block; the root is ``""``."""
    paths = {p for b in blocks for p in _ancestors(b)}
    return {p: root.get_submodule(p) for p in sorted(paths) if has_forward(root.get_submodule(p))}


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def has_forward(module: nn.Module) -> bool:
    """Whether ``module`` can be called, unlike a plain container."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _direct(holders: dict[str, nn.Module], blocks: dict[str, nn.Module]) -> set[str]:
    """The holders whose own forward runs the loop over the blocks."""
    return {next(p for p in _ancestors(b) if p in holders) for b in blocks}


def _side_modules(path: str, holder: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The children of a holder, and of the plain containers in it, that are no blocks and hold none.

    Without parameters, too: a norm may have no weight.
    """
    for name, child in holder.named_children():
        full = join(path, name)
        if full in blocks:
            continue
        if not has_forward(child):
            yield from _side_modules(full, child, blocks)
        elif not any(b.startswith(full + ".") for b in blocks):
            yield full, child


def _once(sites: list[Site]) -> list[Site]:
    """Shared modules appear under several paths and are replaced once."""
    return list({id(s.module): s for s in reversed(sites)}.values())[::-1]
