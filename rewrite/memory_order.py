"""Whether anybody can see in what order a tensor lies in memory."""

from __future__ import annotations

from torch import fx

from .vocabulary import operation, target_name

FOLLOWING = frozenset((
    "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "getitem", "select", "narrow", "chunk", "split", "unbind",
    "flatten", "cast", "clone", "dropout", "neg", "add", "sub", "mul", "div", "scaled_dot_product_attention", "weft.attention",
    "weft.rope", "weft.rope_single",
))  # fmt: skip
"""Operations of which the result alone takes its order from the operands'."""
ABSORBING = frozenset(
    ("linear", "matmul", "contiguous", "cat", "stack", "size", "shape", "dim", "ndim", "dtype", "device")
)
"""Operations of which nothing depends on it."""


def order_is_seen(node: fx.Node) -> bool:
    """Whether a reader of ``node``, directly or not, could tell one memory order from another.

    A view could fail in one and not in another, and who gets the result may take one. What is not known here is taken to look.
    """
    pending, known = [*node.users], {node}
    while pending:
        user = pending.pop()
        if user in known:
            continue
        known.add(user)
        name = target_name(user.target) if user.op in ("call_function", "call_method") else user.op
        if name == "reshape" or (name != "view" and operation(user) in FOLLOWING):
            pending += user.users
        elif operation(user) not in ABSORBING:
            return True
    return False
