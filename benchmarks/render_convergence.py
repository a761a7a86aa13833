"""Draws ``docs/convergence.svg`` and fills the table of ``docs/training.md`` from a result of :mod:`.convergence`.

    python -m benchmarks.render_convergence [FILE]

FILE is the newest in ``benchmarks/results/`` where none is given. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

from .precision_plots import save
from .render import FOLDER, machine, table

DOCS = FOLDER.parent / "docs"
MARKED = re.compile(r"(<!-- convergence -->\n).*?(<!-- end -->)", re.DOTALL)
Result = Mapping[str, Any]


def draw(result: Result, path: Path) -> None:
    """One panel a comparison: both curves over each other, and their difference on a scale of its own."""
    cells = result["cells"]
    columns = max(len(cells) // 2, 1)
    figure = Figure(figsize=(3.2 * columns, 5.2), layout="constrained")
    for i, cell in enumerate(cells):
        axes = figure.add_subplot(2, columns, i + 1)
        arms = cell["arms"]
        axes.plot(arms["hf"]["losses"], color="#888888", linewidth=3, label="transformers + PEFT")
        axes.plot(arms["weft"]["losses"], color="#1e8449", linewidth=1, label="weft")
        beside = axes.twinx()
        pairs = zip(arms["weft"]["losses"], arms["hf"]["losses"], strict=True)
        beside.plot([a - b for a, b in pairs], color="#c0392b", linewidth=0.6, label="difference")
        limit = max(10 * arms["weft"]["largest"], 1e-6)
        beside.set_ylim(-limit / 10, limit)
        beside.tick_params(labelsize=6, colors="#c0392b")
        axes.set_title(f"{cell['dtype']}, {cell['weights']}, {cell['data']}", fontsize=8)
        axes.tick_params(labelsize=6)
        if i == 0:
            handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
            axes.legend(handles=handles, fontsize=6, loc="upper right")
    save(figure, path)


def described(result: Result) -> list[str]:
    """The table of differences, and on what it was measured."""
    rows = []
    for cell in result["cells"]:
        hf, weft, other = (cell["arms"][arm] for arm in ("hf", "weft", "hf, attention written out"))
        rows.append([
            f"{cell['dtype']}, {cell['weights']}, {cell['data']}", f"{hf['losses'][0]:.3f} → {hf['losses'][-1]:.3f}",
            f"{weft['largest']:.1e}", f"{other['largest']:.1e}", f"{weft['end']:+.1e}",
            f"{weft['first_gradient_norm']:+.1e}",
        ])  # fmt: skip
    head = ("", "loss", "weft: largest difference", "attention written out: largest difference",
            "weft: mean of the last 20 steps", "weft: first gradient norm, relative")  # fmt: skip
    worst = max(cell["arms"]["weft"]["largest"] for cell in result["cells"])
    return [
        *table(head, rows),
        f"Largest difference of all: {worst:.1e}. {result['parameters'] / 1e6:.1f} M parameters, {result['steps']} steps, "
        f"{result['documents']} excerpts of {result['mean_length']} tokens in the mean, rows of {result['row']}.",
        "",
        *machine(result),
    ]


def main() -> None:
    """Reads one result, writes the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    newest = sorted((FOLDER / "results").glob("convergence-*.json"), key=lambda p: p.stat().st_mtime)
    path = parser.parse_args().file or newest[-1]
    result = json.loads(path.read_text())
    draw(result, DOCS / "convergence.svg")
    page = DOCS / "training.md"
    text = "\n".join([*described(result), f"From `benchmarks/results/{path.name}`.", ""])
    page.write_text(MARKED.sub(lambda m: m[1] + text + m[2], page.read_text()))


if __name__ == "__main__":
    main()
