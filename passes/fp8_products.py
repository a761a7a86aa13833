"""Products with weights that are not trained are computed in FP8, as the user asked."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from posixpath import commonpath
from typing import Any

import torch
from torch import fx

from ..kernels import fp8
from ..kernels.lora_linear import lora_linear
from ..kernels.parallel_linears import parallel_linears
from ..kernels.quant_linear import quant_linear
from ..kernels.residual_rms_norm import residual_rms_norm
from ..quant.layout import Layout
from ..rewrite import effects
from ..rewrite import graph as g
from ..rewrite.change import Change, commit, describe
from ..rewrite.driver import Outcome, Verifier
from ..rewrite.parameters import parameter_name
from ..rewrite.report import Asked, Refusal, Rewrite
from ..rewrite.vocabulary import bind, operation
from .fp8_replay import Product, measure
from .storage import dense_layout, product_dtype

WHAT = "products of frozen weights run in FP8"
DTYPES = {torch.float32, torch.bfloat16, torch.float16}
OURS = (lora_linear, parallel_linears, quant_linear)
CHOICES = frozenset(("topk", "argmax", "max", "sort", "argsort"))


@dataclass(frozen=True)
class Fp8Products:
    """x · W  →  s_x · (e4m3(x / s_x) · e4m3(W / s_W)) · s_W, in the forward and for dx, where W gets no gradient

    That holds of every linear with an adapter, in 4 bits, or merged with others. A plain linear over a parameter is
    changed too where it is surely not the head, which stays as it is: something learned reads what follows from it in
    its graph, or that is added to what it was computed from (a residual stream). One from whose result the largest are
    chosen, as a router does, stays as well.
    """

    name: str = "fp8_products"
    kept: bool = False
    """Whether weights in FP8 are kept between products, at two bytes each; see :mod:`weft.kernels.fp8_kept`."""

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Change layouts, and plain linears into calls that have one; each is measured against float64."""
        outcome = Outcome()
        for node in list(module.graph.nodes):
            products = _products(node)
            if not products or all(p.layout.fp8 for p in products):
                continue
            problems = [_problem(node, p) for p in products]
            if any(problems):
                reason = "; ".join(dict.fromkeys(p for p in problems if p))
                outcome.refusals.append(Refusal(self.name, _path(node, products), g.source(node), reason))
            turned = [
                p if problem else replace(p, layout=replace(p.layout, fp8=True, kept=self.kept))
                for p, problem in zip(products, problems, strict=True)
            ]
            if turned != products:
                self._turn(module, node, turned, verifier, outcome)
        return outcome

    def _turn(
        self,
        module: fx.GraphModule,
        node: fx.Node,
        products: list[Product],
        verifier: Verifier | None,
        outcome: Outcome,
    ) -> None:
        """Put the call in that computes ``products`` as their layouts say, unless its replay fails."""
        change = _change(self.name, module.graph, node, products)
        measured, problem = (None, "") if verifier is None else measure(module, change, products, verifier)
        path, place = _path(node, products), g.source(node)
        if problem:
            effects.erase_dead(change.new)
            outcome.refusals.append(Refusal(self.name, path, place, f"replay: {problem}"))
            return
        share, error = (None, None) if measured is None else (measured.share, measured.relative)
        removed, added, _ = commit(change)
        outcome.rewrites.append(Rewrite(self.name, path, place, removed, added, 0, share, Asked(WHAT, error)))


def _path(node: fx.Node, products: list[Product]) -> str:
    """The module that holds all weights of a call; that of a single one is where it was called."""
    names = [parameter_name(p.weight[0]).replace(".", "/") for p in products]
    return commonpath(names).replace("/", ".") if len(names) > 1 and all(names) else g.module_path(node)


# what may be changed --------------------------------------------------------------------------------------------------
def _products(node: fx.Node) -> list[Product]:
    """The linears that ``node`` computes; none where it is something else."""
    arguments: Any = node.args
    if node.target in (lora_linear, quant_linear):
        return [Product(arguments[0], list(arguments[1]), Layout.decode(arguments[2]))]
    if node.target is parallel_linears:
        each = zip(*arguments[1:3], strict=True)
        return [Product(arguments[0], list(weight), Layout.decode(text)) for weight, text in each]
    bound = bind("linear", arguments, dict(node.kwargs)) if _is(node, "linear") else None
    if bound is None or not _is_parameter(bound[1]):
        return []
    return [Product(bound[0], [bound[1]], dense_layout(bound[1], by_rows=True))]


def _is_parameter(weight: Any) -> bool:
    """Whether a plain linear's weight is a matrix of the model's own; in a checkpoint's body it has lost its name."""
    if not isinstance(weight, fx.Node) or weight.op != "placeholder":
        return False
    known = isinstance(g.value(weight), torch.nn.Parameter) or bool(parameter_name(weight))
    return known and len(g.sizes(weight)) == 2 and all(isinstance(size, int) for size in g.sizes(weight))


def _is(node: fx.Node, *names: str) -> bool:
    return node.op in ("call_function", "call_method") and operation(node) in names


def _problem(node: fx.Node, product: Product) -> str:
    """Why a product stays as it is, if so."""
    x = g.tensor_of(product.x)
    if any(g.requires_grad(w) for w in product.weight):
        return "the weight is trained"
    if x is None or {x.dtype, product_dtype(product.x)} - DTYPES:
        return f"it is computed in {'an unknown dtype' if x is None else x.dtype}"
    return fp8.sizes_problem(product.layout) or fp8.missing(x.device) or ("" if node.target in OURS else _risk(node))


def _risk(node: fx.Node) -> str:
    """Why a plain linear might be one whose digits count: the head, or a router."""
    onward, learned = _onward(node)
    if any(_is(n, *CHOICES) for n in onward):
        return "the largest of its results are chosen"
    if learned or any(_adds_back(n, _before(node)) for n in onward):
        return ""
    return "it may be the head: nothing learned follows it, nor is it added to what it was computed from"


def _onward(node: fx.Node) -> tuple[list[fx.Node], bool]:
    """What follows from ``node`` up to the next linears, and whether there is one."""
    found, pending, learned = dict[fx.Node, None](), [node], False
    while pending:
        for user in pending.pop().users:
            if user.target in OURS or _is(user, "linear"):
                learned = True
            elif user not in found:
                found[user] = None
                pending.append(user)
    return list(found), learned


def _before(node: fx.Node) -> set[fx.Node]:
    """All that ``node`` is computed from."""
    found, pending = set[fx.Node](), [node]
    while pending:
        new = [n for n in pending.pop().all_input_nodes if n not in found]
        found.update(new)
        pending += new
    return found


def _adds_back(node: fx.Node, before: set[fx.Node]) -> bool:
    """Whether ``node`` adds two tensors of one shape, one of them out of ``before``."""
    if node.target is not residual_rms_norm and not _is(node, "add"):
        return False
    shapes = [[g.hint(size) for size in g.sizes(n)] for n in node.args[:2]]
    return shapes[:1] == shapes[1:] and any(_origin(n) in before for n in node.args[:2])


def _origin(node: Any) -> Any:
    """What ``node`` is one result of."""
    return _origin(node.args[0]) if isinstance(node, fx.Node) and node.target is operator.getitem else node


# the change -----------------------------------------------------------------------------------------------------------
def _change(name: str, graph: fx.Graph, node: fx.Node, products: list[Product]) -> Change:
    """The call with the layouts of ``products``, beside ``node``."""
    texts = [product.layout.encode() for product in products]
    with graph.inserting_before(node):
        if node.target in OURS:
            assert callable(node.target)
            given = texts if node.target is parallel_linears else texts[0]
            new = [graph.call_function(node.target, (*node.args[:2], given, *node.args[3:]), dict(node.kwargs))]
        else:
            x, weight, bias = bind("linear", node.args, dict(node.kwargs)) or (None,) * 3
            call = graph.call_function(parallel_linears, (x, [[weight]], texts, [bias]))
            new = [call, graph.call_function(operator.getitem, (call, 0))]
    for each in new:
        describe(each, node)
    return Change(name, list(node.all_input_nodes), [node], (node,), new, (new[-1],))
