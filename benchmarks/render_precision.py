"""Fills the tables of ``docs/precision.md`` from the result files in ``benchmarks/results/``, and draws its plots.

    python -m benchmarks.render_precision

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``, where NAME is a result file's, without ``.json``; its
text is not to be edited by hand. Plots are ``docs/NAME-memory.svg`` and ``docs/NAME-layers.svg``, of results that hold a
curve.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .precision_arms import part_of
from .precision_plots import layers_alone, memory_and_divergence
from .render import FOLDER, machine, table

DOCUMENT = FOLDER.parent / "docs" / "precision.md"
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Result = Mapping[str, Any]


def number(value: float) -> str:
    """Three digits, or two of small ones, without an exponent where that is short."""
    return f"{value:.5f}" if value >= 1e-4 else f"{value:.1e}"


def language(result: Result) -> list[str]:
    """Perplexity and divergence of every arm."""
    rows = [[r["arm"], *_bytes(r), *_perplexity(r), *_kl(result, r)] for r in result["records"]]
    return table(("stored as", "MB", "perplexity", "KL", "of plain NF4's"), rows)


def vision(result: Result) -> list[str]:
    """Captions and divergence of every arm, and where single weights do harm."""
    rows = [[r["arm"], *_bytes(r), _share(r["right"]), *_kl(result, r)] for r in result["records"]]
    return [*table(("stored as", "MB", "captions right", "KL", "of plain NF4's"), rows), *_harm(result)]


def size(result: Result) -> list[str]:
    """Phases of planning a large model: seconds and peaks."""
    rows = [
        [name, f"{p['seconds']:.0f}", *[f"{p.get(k, 0) / 1e9:.1f}" for k in ("peak_allocated", "peak_reserved")]]
        for name, p in result["phases"].items()
    ]
    before, after = result["bytes_before"], result["bytes_after"]
    peaks = [f"{result[k] / 1e9:.1f}" for k in ("peak_allocated", "peak_reserved")]
    lines = table(
        ("", "s", "GB allocated at most", "GB reserved"), [*rows, ["the plan", f"{result['seconds']:.0f}", *peaks]]
    )
    formats = ", ".join(f"{count} in {name}" for name, count in result["formats"].items())
    return [
        *lines,
        f"{before / 1e9:.2f} GB before, {after / 1e9:.2f} GB after ({1 - after / before:.1%} less): {formats}.",
        "",
    ]


def _bytes(record: Result) -> list[str]:
    return [f"{record['bytes'] / 1e6:.2f}" if record.get("bytes") else ""]


def _perplexity(record: Result) -> list[str]:
    return [f"{record['perplexity']:.3f}" if record.get("perplexity") else ""]


def _share(found: Result) -> str:
    return f"{found['mean']:.1%} ± {found['half']:.1%}"


def _kl(result: Result, record: Result) -> list[str]:
    """The divergence with its interval, and as a share of plain NF4's."""
    kl = record["kl"]
    if kl is None:
        return ["", ""]
    plain = next(r["kl"]["mean"] for r in result["records"] if r["arm"] == "plain NF4")
    digits = ".5f" if kl["mean"] >= 1e-4 else ".1e"
    return [f"{kl['mean']:{digits}} ± {kl['half']:{digits}}", f"{kl['mean'] / plain:.2f}"]


def _harm(result: Result) -> list[str]:
    """Sums of what single weights do in NF4, by part, and the three weights that do most."""
    alone = {la["path"]: la["options"]["nf4"]["alone"] for la in result["layers"] if "nf4" in la["options"]}
    total = sum(alone.values()) or 1.0
    parts = dict.fromkeys(map(part_of, alone), 0.0)
    counts = dict.fromkeys(parts, 0)
    for path, kl in alone.items():
        parts[part_of(path)] += kl
        counts[part_of(path)] += 1
    rows = [[f"`{part}`", str(counts[part]), number(kl), f"{kl / total:.0%}"] for part, kl in parts.items()]
    most = sorted(alone, key=lambda path: -alone[path])[:3]
    named = ", ".join(f"`{path}` {alone[path] / total:.0%}" for path in most)
    return [*table(("part", "weights", "KL alone in NF4, added up", "share"), rows), f"Most of it: {named}.", ""]


KINDS: dict[str, Callable[[Result], list[str]]] = {
    "precision-language": language, "precision-vision": vision, "precision-size": size,
}  # fmt: skip


def filled(text: str, folder: Path) -> str:
    """The document with every table made anew, and its plots shown; where a result is not there, it says so."""

    def replace(match: re.Match[str]) -> str:
        path = folder / f"{match[2]}.json"
        if not path.is_file():
            return f"{match[1]}\nNot measured yet.\n\n{match[3]}"
        result = json.loads(path.read_text())
        lines = [*KINDS[result["kind"]](result), *_plots(result, path.stem), *machine(result)]
        return match[1] + "\n".join(["", *lines]) + "\n" + match[3]

    return MARKED.sub(replace, text)


def _plots(result: Result, name: str) -> list[str]:
    if not result.get("curve"):
        return []
    memory, layers = "bytes and divergence", "what each weight does alone, in the model's order"
    return [f"![{memory}]({name}-memory.svg)", "", f"![{layers}]({name}-layers.svg)", ""]


def main() -> None:
    """Writes document and plots."""
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), FOLDER / "results"))
    for path in sorted((FOLDER / "results").glob("precision-*.json")):
        result = json.loads(path.read_text())
        if result.get("curve"):
            memory_and_divergence(result, DOCUMENT.parent / f"{path.stem}-memory.svg")
            layers_alone(result, DOCUMENT.parent / f"{path.stem}-layers.svg")


if __name__ == "__main__":
    main()
