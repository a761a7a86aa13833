"""Makes ``docs/benchmarks.md`` from the result files in ``benchmarks/results/``.

python -m benchmarks.render
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).resolve().parent
DOCUMENT = FOLDER.parent / "docs" / "benchmarks.md"
Result = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def machine(result: Result) -> list[str]:
    """On what, with what, and when."""
    found = result["environment"]
    chip = found["gpu"]
    where = f"{chip['name']}, {chip['memory_gib']} GiB, CUDA {chip['cuda']}, driver {chip['driver']}" if chip else ""
    where = where or f"{found['cpu']['model']}, {found['cpu']['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return [f"{where}. Python {found['python']}, {versions}. weft {found['weft_revision']}, {found['date']}.", ""]


def limits(result: Result) -> list[str]:
    """The ceilings measured in the same run."""
    found = result["ceilings"]
    return [
        f"Ceilings of this run: copy {found['copy_tb_s']} TB/s, matrix product {found['matmul_tflop_s']} TFLOP/s.",
        "",
    ]


def kernels(result: Result) -> list[str]:
    """Times, rates and errors of every operator and arm."""
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    lines = ["## Operators", "", *machine(result), *limits(result), f"Sizes: {sizes}; {result['dtype']}.", ""]
    lines += ["Share: of the copy bandwidth, or of the matrix product's rate. Error: against float64, relative.", ""]
    rows = [row for case in result["cases"] for row in kernel_rows(case)]
    return lines + table(("operator", "pass", "arm", "µs", "rate", "share", "weft is faster by", "error"), rows)


def kernel_rows(case: Result) -> list[list[str]]:
    """One row a direction and arm."""
    rows = []
    for direction in ("forward", "forward+backward"):
        ours = case["arms"]["weft"].get(direction)
        for arm, found in case["arms"].items():
            timed = found.get(direction)
            if timed is None:
                continue
            rate = f"{timed['tb_s']:.2f} TB/s" if "tb_s" in timed else f"{timed['tflop_s']:.0f} TFLOP/s"
            gain = f"{timed['us'] / ours['us']:.2f} ×" if ours and arm != "weft" else ""
            note = " (host-bound)" if timed["host_bound"] else ""
            row = [f"{timed['us']:.1f}{note}", rate, f"{timed['share']:.0%}", gain, f"{found['error']:.1e}"]
            rows.append([case["case"], direction, arm, *row])
    failed = [(arm, f) for arm, f in case["arms"].items() if "failed" in f or "missing" in f]
    rows += [
        [case["case"], "", arm, f.get("failed", f.get("missing", "")).splitlines()[0], *[""] * 4] for arm, f in failed
    ]
    return rows


def train_step(result: Result) -> list[str]:
    """Step time, memory and agreement of every arm."""
    given = result["setting"]
    setting = ", ".join(f"{name} {value}" for name, value in given.items() if value not in (None, ""))
    case = f"{given['shape']}, {given['batch']} × {given['length']}{', checkpointing' * given['checkpointing']}"
    lines = [f"## Training step: {case}", "", *machine(result), *limits(result), f"Setting: {setting}.", ""]
    head = (
        "arm",
        "s / step",
        "tokens/s",
        "peak GiB",
        "first step, s",
        "first loss",
        "last loss",
        "gradient norm",
    )
    rows = [train_row(arm, runs) for arm, runs in result["arms"].items() if runs]
    rows += [[arm, f"not installed ({package})", *[""] * 6] for arm, package in result["not_installed"].items()]
    return lines + table(head, rows) + rewrites(result)


def rewrites(result: Result) -> list[str]:
    """What weft did in each of its arms."""
    counted = {arm: run["rewrites"] for arm, runs in result["arms"].items() for run in runs[:1] if "rewrites" in run}
    texts = {arm: ", ".join(f"{rule} {count}" for rule, count in found.items()) for arm, found in counted.items()}
    return [line for arm, text in texts.items() for line in (f"Rewrites of {arm}: {text or 'none'}.", "")]


def train_row(arm: str, runs: Sequence[Result]) -> list[str]:
    """The median over rounds of the step, and the first round's other figures."""
    done = [run for run in runs if "failed" not in run]
    if not done:
        return [arm, runs[0]["failed"], *[""] * 6]
    first = done[0]
    return [
        arm, f"{median(r['step_s'] for r in done):.4f}", f"{median(r['tokens_per_s'] for r in done):.0f}",
        str(first["peak_gib"]), f"{first['first_s']:.1f}", f"{first['losses'][0]:.5f}", f"{first['losses'][-1]:.5f}",
        f"{first['gradient_norm']:.5g}",
    ]  # fmt: skip


def memory_by_length(result: Result) -> list[str]:
    """Peak and rate of every arm, a row for each length."""
    layers = f", {result['layers']} layers" if result["layers"] else ""
    lines = [f"## Memory by length: {result['shape']}{layers}", "", *machine(result)]
    lines += ['One row a batch; each arm checkpoints in its own way, weft under `memory="min"`.', ""]
    found = {(run["arm"], run.get("length")): run for run in result["runs"]}
    arms = list(dict.fromkeys(arm for arm, _ in found))
    lengths = sorted({run["length"] for run in result["runs"] if "length" in run})
    head = ["length", *(f"{arm}, {figure}" for arm in arms for figure in ("peak GiB", "tokens/s"))]
    rows = [[str(n), *(cell for arm in arms for cell in length_cells(found, arm, n))] for n in lengths]
    notes = [f"{arm} ended early: {run['failed']}." for (arm, length), run in found.items() if length is None]
    notes += [f"Not installed: {arm} ({package})." for arm, package in result["not_installed"].items()]
    return lines + table(head, rows) + [line for note in notes for line in (note, "")]


def length_cells(found: Mapping[tuple[str, int | None], Result], arm: str, length: int) -> list[str]:
    """Peak and rate of one arm at one length; where there are none, how it failed there or its process ended before."""
    run = found.get((arm, length)) or found.get((arm, None)) or {"failed": "not run"}
    return [run["failed"], ""] if "failed" in run else [str(run["peak_gib"]), str(run.get("tokens_per_s", ""))]


def packed(result: Result) -> list[str]:
    """Ragged documents, padded and packed."""
    layers = f", {result['layers']} layers" if result["layers"] else ""
    lines = [f"## Packed documents: {result['shape']}{layers}", "", *machine(result)]
    mean = result["real_tokens"] / result["documents"] / result["length"]
    lines += [
        f"{result['documents']} documents of at most {result['length']} tokens, {mean:.2f} of that in the mean. Packed by weft "
        f"over padded in transformers: **{result['gain']:.2f} ×**.",
        "",
    ]
    rows = [
        [way, f"{found['s']:.3f}", str(found["tokens_per_s"]), str(found["places"]), f"{found['loss']:.5f}"]
        for way, found in result["ways"].items()
    ]
    return lines + table(("", "s a step over all documents", "real tokens/s", "places computed", "loss"), rows)


def multi_gpu(result: Result) -> list[str]:
    """Training over several GPUs."""
    setting = result["setting"]
    lines = [f"## Several GPUs: {setting['engine']}, {setting['shape']}", "", *machine(result)]
    lines += [f"{setting['batch']} × {setting['length']} tokens a process, the same batch in every step.", ""]
    if result["speedup"] is not None:
        lines += [f"Over one process: **{result['speedup']:.2f} ×**.", ""]
    rows = [
        [
            processes, f"{runs[0]['step_s']:.4f}", f"{sum(r['tokens_per_s'] for r in runs):.0f}",
            " ".join(str(r["peak_gib"]) for r in runs), f"{runs[0]['optimize_s'] + runs[0]['first_step_s']:.1f}",
            f"{runs[0]['losses'][0]:.5f}", f"{runs[0]['losses'][-1]:.5f}",
        ]
        for processes, runs in result["runs"].items()
    ]  # fmt: skip
    head = ("processes", "s a step", "tokens/s in all", "peak GiB", "optimize and first step, s", "loss, first", "last")
    return lines + table(head, rows)


def capture(result: Result) -> list[str]:
    """Seconds of ``optimize`` by layers."""
    lines = ["## Capture and rewriting", "", *machine(result), f"On {result['threads']} threads of a CPU.", ""]
    rows = [
        [str(r["layers"]), "yes" if r["verify"] else "no", str(r["seconds"]), str(r["graphs"]), str(r["rewrites"])]
        for r in result["runs"]
    ]
    return lines + table(("layers", "replayed", "seconds", "graphs", "rewrites"), rows)


def cpu(result: Result) -> list[str]:
    """Optimized beside eager on a CPU."""
    size = ", ".join(f"{name} {value}" for name, value in result["size"].items())
    lines = ["## On a CPU", "", *machine(result), f"{size}. Ratio: median over pairs, at most {result['limit']}.", ""]
    rows = [
        [r["mode"], str(r["eager_ms"]), str(r["weft_ms"]), f"{r['ratio']:.3f}", f"{r['difference']:.1e}"]
        for r in result["runs"]
    ]
    return lines + table(("mode", "eager ms", "weft ms", "ratio", "difference"), rows)


PEERS = ("bitsandbytes", "compiled eager", "dense", "torch", "clone", "neg")
"""Variants of a sweep that are not ours; the others are settings of one kernel."""


def sweep(result: Result) -> list[str]:
    """The fastest setting of each kernel beside what it is compared with, in one run."""
    lines = [
        "## Settings of kernels",
        "",
        *machine(result),
        f"Copy bandwidth of this run: {result['copy_tb_s']:.3f} TB/s.",
        "",
    ]
    lines += [
        "The fastest of a kernel's settings; backward is forward and backward. `clone` copies what a norm reads.",
        "",
    ]
    groups = list(dict.fromkeys(r["group"] for r in result["records"]))
    return lines + table(("kernel", "variant", "µs", "share"), [row for g in groups for row in sweep_rows(result, g)])


def sweep_rows(result: Result, group: str) -> list[list[str]]:
    """The fastest of ours, and every peer."""
    timed = sorted((r for r in result["records"] if r["group"] == group and r.get("us")), key=lambda r: r["us"])
    ours = [r for r in timed if r["variant"] not in (*PEERS, "frozen")][:1]
    shown = ours + [r for r in timed if r["variant"] in PEERS]
    return [[group, r["variant"], f"{r['us']:.1f}", f"{r['share']:.0%}"] for r in shown]


KINDS: dict[str, Callable[[Result], list[str]]] = {
    "sweep": sweep, "kernels": kernels, "train_step": train_step, "memory_by_length": memory_by_length, "packed": packed,
    "multi_gpu": multi_gpu, "capture": capture, "cpu": cpu,
}  # fmt: skip


def render(folder: Path) -> str:
    """The document for the results in ``folder``; files of other kinds are others' to show."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*-*.json"))]
    lines = ["# Benchmarks", "", "Made by `python -m benchmarks.render` from `benchmarks/results/`.", ""]
    for kind, section in KINDS.items():
        for path, result in found:
            if isinstance(result, dict) and result.get("kind") == kind:
                lines += [*section(result), f"From `benchmarks/results/{path.name}`.", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Writes the document."""
    DOCUMENT.write_text(render(FOLDER / "results"))


if __name__ == "__main__":
    main()
