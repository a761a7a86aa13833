"""Plots of precision results as SVG: memory against divergence, and what every weight does alone. Needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl  # pyright: ignore[reportMissingImports]
from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

from .precision_arms import part_of

Result = Mapping[str, Any]
FORMATS = {"nf4": "#c0392b", "nf4-feedback": "#e08e0b", "int8": "#2471a3"}
MARKS = {"weft": ("#1e8449", "o"), "random": ("#888888", "^"), "first": ("#888888", "v"), "plain": ("#c0392b", "s"),
         "NF4": ("#e08e0b", "s"), "int8": ("#2471a3", "s")}  # fmt: skip
SMALLEST = 1e-8
"""Divergences below it are drawn at it: the axis is logarithmic."""


def save(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure."""
    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def memory_and_divergence(result: Result, path: Path) -> None:
    """Every arm on held-out data, with its confidence interval, and the curve that the calibration data promise."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    arms = [r for r in result["records"] if r.get("bytes") and not r["arm"].endswith(" only")]
    plain = next(r["bytes"] for r in arms if r["arm"] == "plain NF4")
    noise = next((r["kl"]["mean"] for r in result["records"] if r["arm"].startswith("16 bits, rounded")), None)
    curve = [p for p in result["curve"] if p["kl"] > SMALLEST and p["bytes"] <= 1.6 * plain]
    x, y = [100 * (p["bytes"] / plain - 1) for p in curve], [p["kl"] for p in curve]
    axes.plot(x, y, color="#1e8449", linewidth=1, alpha=0.6, label="expected by the plan, calibration data")
    by_name: dict[str, list[Any]] = {}
    for record in arms:
        by_name.setdefault(re.sub(r", \+\d+%", "", record["arm"]), []).append(record)
    for name, records in by_name.items():
        color, mark = next((style for word, style in MARKS.items() if name.startswith(word)), ("#000000", "x"))
        at, kl = [100 * (r["bytes"] / plain - 1) for r in records], [r["kl"]["mean"] for r in records]
        axes.errorbar(
            at, kl, yerr=[r["kl"]["half"] for r in records], fmt=mark, color=color, markersize=5, capsize=3, label=name,
            fillstyle="none" if "curve" in name else "full",
        )  # fmt: skip
    if noise:
        axes.axhline(noise, color="#888888", linewidth=0.8, linestyle=":", label="16 bits, rounded otherwise")
    axes.set(yscale="log", xlabel="bytes more than plain NF4, %", ylabel="KL from 16 bits, nats a prediction")
    axes.legend(fontsize=7)
    save(figure, path)


def layers_alone(result: Result, path: Path) -> None:
    """What each weight does alone in each format, in the model's order; parts of the model set apart."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    layers = result["layers"]
    for name, color in FORMATS.items():
        points = [(i, la["options"][name]["alone"]) for i, la in enumerate(layers) if name in la["options"]]
        axes.plot([i for i, _ in points], [max(kl, SMALLEST) for _, kl in points], ".", color=color, label=name)
    for start, part in _parts([la["path"] for la in layers]):
        axes.axvline(start - 0.5, color="#888888", linewidth=0.8)
        axes.text(start, 1.02, part, transform=axes.get_xaxis_transform(), fontsize=7, rotation=12)
    axes.set(yscale="log", xlabel="weight, in the model's order", ylabel="KL alone, nats a prediction")
    axes.legend(fontsize=7, loc="lower left")
    save(figure, path)


def _parts(paths: Sequence[str]) -> list[tuple[int, str]]:
    """Where each part of the model begins."""
    parts = [part_of(path) for path in paths]
    return [(i, part) for i, part in enumerate(parts) if i == 0 or parts[i - 1] != part]
