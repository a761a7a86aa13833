"""Read a report: what was rewritten, what was refused, the nearest misses, and why one module was left alone.

The model is written by hand and uses no library but torch: rules look at what it computes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import optimize, undo


class Block(nn.Module):
    """A gated MLP behind a norm, both spelt in an unusual way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))
        self.wide = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = (1 + self.gain) * (x / (x.square().mean(-1, keepdim=True) + 1e-5) ** 0.5)
        gate, up = self.wide(y).chunk(2, dim=-1)
        return x + self.narrow(F.silu(gate) * up)


class BatchScaled(nn.Module):
    """Looks like a norm, but its mean is over the sequence: no rule may touch it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * self.gain)


class Stack(nn.Module):
    """Blocks of both kinds."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.scaled = nn.ModuleList([BatchScaled(width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.scaled):
            x = block(x)
        return x


def main() -> None:
    """Optimize, and look at every part of the report."""
    torch.manual_seed(0)
    model = Stack()
    report = optimize(model, example_inputs={"x": torch.randn(2, 10, 32)}).rewrite_report
    print(report)

    print("\nrewrites, one for each module instance:")
    for r in report.rewrites:
        print(f"  {r.rule} in {r.module_path} ({r.source}): {r.nodes_removed} → {r.nodes_added} nodes")
    print("\nwhy not?")
    for path in ("blocks.0", "scaled.1", "scaled.7"):
        print("  " + report.why_not(path).replace("\n", "\n  "))

    with tempfile.TemporaryDirectory() as folder:
        report.to_json(Path(folder) / "report.json")
        report.to_html(Path(folder) / "report.html")
        print("\nwritten:", ", ".join(f"{f.name} ({f.stat().st_size} bytes)" for f in sorted(Path(folder).iterdir())))
    undo(model)
    print("undone; the model has a report:", hasattr(model, "rewrite_report"))


if __name__ == "__main__":
    main()
