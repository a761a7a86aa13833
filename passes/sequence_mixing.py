"""An analysis: operators that mix what stands at different places of a sequence, and cannot keep two documents apart.

It looks at shapes: the caller runs the model on one row of a length that no other size of the model equals, so that a
dimension of that size is the sequence. Of attention only what has no mask is named: a mask can keep documents apart, and
whether it does is a matter of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..rewrite.driver import Outcome, Verifier
from ..rewrite.graph import hint, module_path, sizes, source, tensor_of
from ..rewrite.report import Refusal
from ..rewrite.vocabulary import bind, operation

_SCANS = {"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "cumulative_trapezoid", "diff"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "norm", "vector_norm", "logsumexp"}
_ORDERS = {"sort", "argsort", "flip", "roll"}
_WHOLE = {"fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_fft2", "fft_fftn", "unfold", "as_strided"}
_LAST = {"group_norm", "instance_norm"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "__matmul__", "__rmatmul__"}
_POINTWISE = {
    "cast", "convert", "dropout", "mul", "div", "add", "sub", "view", "transpose", "permute", "contiguous", "clone",
    "expand", "getitem", "unsqueeze", "squeeze", "flatten", "unflatten", "detach", "where", "masked_fill", "masked_fill_",
    "nan_to_num", "reshape", "tanh", "clamp", "type_as", "float", "half", "cat", "part", "softmax",
}  # fmt: skip
"""What may stand between a softmax over keys and the product with the values."""
_MASKING = {"add", "sub", "where", "masked_fill", "masked_fill_", "maximum", "minimum", "mul", "add_"}
_STEPS = 40


@dataclass(frozen=True)
class FindSequenceMixing:
    """Refuses every operator that mixes along dimensions of size ``length`` where no mask says which places may mix."""

    length: int
    name: str = "sequence_mixing"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Look at the graph, which is not changed."""
        found = [(n, self._why(n)) for n in module.graph.nodes if n.op in ("call_function", "call_method")]
        return Outcome(refusals=[Refusal("packing", module_path(n), source(n), why) for n, why in found if why])

    def _why(self, node: fx.Node) -> str | None:
        inputs, name = [n for n in node.all_input_nodes if self._along(n)], operation(node)
        if not (inputs or (name == "cat" and self._along(node))) or not self._comes_back(node):
            return None
        why = self._joins(node) if name == "cat" else self._mixes(node, name, inputs[0])
        return None if why is None else f"{name} {why}"

    def _mixes(self, node: fx.Node, name: str, x: fx.Node) -> str | None:
        """How ``node`` mixes along the sequence, if it does."""
        dims = set(self._along(x))
        if name.startswith("conv"):
            return self._convolves(node, dims)
        if name == "scaled_dot_product_attention":
            bound = bind(name, node.args, dict(node.kwargs))
            return "has no mask: every token reads the documents before its own" if bound and bound[3] is None else None
        if name in _PRODUCTS or name == "einsum":
            return self._sums_over_places(node, name)
        if name in _SCANS | _REDUCTIONS | _ORDERS and dims & set(_dims(node, name, len(sizes(x)))):
            return "runs over the places of the sequence"
        if name in _WHOLE or (name in _LAST and len(sizes(x)) - 1 in dims):
            return "runs over the places of the sequence"
        if name in ("scan", "associative_scan", "while_loop"):
            return "is a recurrence over the places of the sequence"
        if name == "softmax":
            over = dims & set(_dims(node, name, len(sizes(x))))
            return "over all places has no mask" if over and not self._is_masked(node) else None
        return self._moves(node, name, dims, len(sizes(x)))

    def _moves(self, node: fx.Node, name: str, dims: set[int], rank: int) -> str | None:
        """Shifts, and reading places one by one."""
        if name == "pad":
            bound = bind(name, node.args, dict(node.kwargs))
            padded = {rank - 1 - i // 2 for i, n in enumerate(bound[1] if bound else ()) if not _is_zero(n)}
            return "shifts the sequence, or adds places to it" if padded & dims else None
        if name == "getitem" and isinstance(node.args[1], tuple):
            places = [
                i for i, index in enumerate(node.args[1]) if isinstance(index, int) and not isinstance(index, bool)
            ]
            ahead = node.args[1].index(Ellipsis) if Ellipsis in node.args[1] else len(node.args[1])
            picked = {p if p < ahead else p - len(node.args[1]) + rank for p in places}
            return "reads one place at a time: a recurrence" if picked & dims else None
        if name == "select":
            return "reads one place at a time: a recurrence" if dims & set(_dims(node, name, rank)) else None
        return None

    def _joins(self, node: fx.Node) -> str | None:
        """Pieces that only together are as long as the sequence."""
        joined = set(self._along(node)) & set(_dims(node, "cat", len(sizes(node))))
        whole = {d for n in node.all_input_nodes for d in self._along(n)}
        return "shifts the sequence" if joined - whole else None

    def _convolves(self, node: fx.Node, dims: set[int]) -> str | None:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        kernel, rank = sizes(weight), len(sizes(node))
        wide = {d for d in range(2, len(kernel)) if hint(kernel[d]) > 1}
        if not dims & {d + rank - len(kernel) for d in wide}:
            return None
        return f"of kernel {[hint(n) for n in kernel[2:]]} reads the tokens around each"

    def _sums_over_places(self, node: fx.Node, name: str) -> str | None:
        left = self._summed(node, name)
        if left is None or self._is_masked(left):
            return None
        has_softmax = any(operation(n) == "softmax" for n in _before(left))
        return "of a softmax over all places has no mask" if has_softmax else "sums over the places of the sequence"

    def _summed(self, node: fx.Node, name: str) -> fx.Node | None:
        """The factor that holds a weight for each place, where the product sums over places."""
        tensors = [n for n in node.all_input_nodes if tensor_of(n) is not None]
        if name == "einsum" and isinstance(node.args[0], str) and "->" in node.args[0]:
            terms, result = node.args[0].replace(" ", "").replace("...", "").split("->")
            for term, x in zip(terms.split(","), tensors, strict=False):
                offset = len(sizes(x)) - len(term)
                if any(term[d - offset] not in result for d in self._along(x) if d >= offset):
                    return x
            return None
        x, y = tensors[-2:] if len(tensors) > 1 else (tensors[0], tensors[0])
        return x if len(sizes(x)) - 1 in self._along(x) and max(len(sizes(y)) - 2, 0) in self._along(y) else None

    def _is_masked(self, node: fx.Node) -> bool:
        """Whether the weights of ``node`` are made with a mask over pairs of places."""
        made = (n for n in _before(node) if operation(n) in _MASKING)
        return any(self._is_mask(i) for n in made for i in n.all_input_nodes)

    def _is_mask(self, node: fx.Node) -> bool:
        """An input of the graph, or of bools, with two dimensions of places."""
        pairs = sum(hint(n) == self.length for n in sizes(node)) > 1
        found = tensor_of(node)
        given = node.op == "placeholder" or operation(node) in ("getitem", "cast", "expand", "unsqueeze", "part")
        return pairs and found is not None and (given or found.dtype == torch.bool)

    def _along(self, node: Any) -> list[int]:
        """The dimensions of a tensor of numbers that are the sequence."""
        found = tensor_of(node)
        if found is None or not (found.is_floating_point() or found.is_complex()):
            return []
        return [d for d, n in enumerate(sizes(node)) if hint(n) == self.length]

    def _comes_back(self, node: fx.Node) -> bool:
        """Whether something with a sequence dimension is made of it: a loss that sums over tokens mixes nothing."""
        seen, pending = set[fx.Node](), [node]
        while pending:
            current = pending.pop()
            if current not in seen and current.op != "output":
                seen.add(current)
                pending.extend(current.users)
        return any(self._along(n) for n in seen)


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and what it is made of, through what changes numbers one by one and products, nearest first."""
    seen, pending = set[fx.Node](), [node]
    while pending and len(seen) < _STEPS:
        current = pending.pop(0)
        if current in seen or current.op not in ("call_function", "call_method"):
            continue
        seen.add(current)
        yield current
        if current is node or operation(current) in _POINTWISE:
            pending.extend(current.all_input_nodes)


def _dims(node: fx.Node, name: str, rank: int) -> list[int]:
    """The dimensions that ``node`` runs over, counted from the front; all, where it names none."""
    at = 2 if name in ("roll", "diff", "norm", "vector_norm") else 1
    given = next((node.kwargs[k] for k in ("dim", "dims", "axis") if k in node.kwargs), None)
    given = node.args[at] if given is None and len(node.args) > at else given
    if name == "cat" and given is None:
        given = 0
    if isinstance(given, fx.Node):  # max(x, y), sub(x, y): no reduction
        return []
    if given is None:
        return list(range(rank))
    listed = given if isinstance(given, tuple | list) else (given,)
    return [d % rank for d in listed if isinstance(d, int)]


def _is_zero(n: Any) -> bool:
    return isinstance(n, int) and n == 0
