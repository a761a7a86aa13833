"""What no rule takes is compiled by Inductor, where it is much of a block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..rewrite.driver import Outcome, Verifier
from ..rewrite.leftovers import COMPILED


@dataclass(frozen=True)
class CompileLeftovers:
    """Marks a graph: once it is lowered for training on a GPU, see :mod:`weft.rewrite.leftovers`."""

    name: str = "compile_leftovers"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """The graph itself stays as it is."""
        module.meta[COMPILED] = True
        return Outcome()
