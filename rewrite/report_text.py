"""The report as a person reads it: a table in a terminal, one page of HTML, sentences for one module."""

from __future__ import annotations

import html
from collections import defaultdict
from typing import Any

from weft.text import fold, table, unnumbered

from .memory_plan import MemoryPlan
from .report import RewriteReport, join

Section = tuple[str, list[str], list[list[str]]]
"""Title, headers and rows of a table."""


def rewrite_rows(report: RewriteReport) -> list[list[str]]:
    """One row per rule and folded module path."""
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for r in report.rewrites:
        groups[r.rule, unnumbered(r.module_path)].append(r)
    rows = []
    for (rule, _), records in groups.items():
        errors = [r.error for r in records if r.error is not None]
        rows.append([
            rule,
            fold(r.module_path for r in records),
            str(len(records)),
            f"{sum(r.nodes_removed for r in records)} → {sum(r.nodes_added for r in records)}",
            _bytes(sum(r.bytes_saved for r in records)),
            f"{max(errors):.2f}" if errors else "–",
        ])  # fmt: skip
    return rows


def _reason_rows(records: list[Any]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for r in records:
        groups[r.rule, r.reason].append(r.module_path)
    return [[rule, fold(paths), reason] for (rule, reason), paths in groups.items()]


def _note_rows(report: RewriteReport) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for region in report.regions:
        if region.note:
            groups[region.note] += region.paths
    return [[fold(paths), note] for note, paths in groups.items()]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def memory_rows(plan: MemoryPlan) -> list[list[str]]:
    """One row for the blocks that do the same."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for b in plan.blocks:
        groups[b.choice, b.saved_bytes, b.host_bytes, f"{1000 * b.extra_seconds:.2f} ms"].append(b.path)
    return [
        [fold(paths), choice, _bytes(saved), _bytes(host) if host else "–", extra]
        for (choice, saved, host, extra), paths in groups.items()
    ]


def memory_line(plan: MemoryPlan) -> str:
    """The limit, and what the step is predicted to take."""
    limit = "as little as possible" if plan.limit is None else f"at most {_bytes(plan.limit)}"
    fits = "" if plan.fits else ", which does not fit"
    measured, before = "", plan.before
    if before is not None and before.measured is not None:
        measured = f"; the step before took {_bytes(before.measured)} of {_bytes(before.predicted)} predicted"
    flight = f", in flight {_bytes(plan.in_flight)}" if plan.in_flight else ""
    return (
        f"{limit}: predicted peak {_bytes(plan.predicted)}{fits} (resident {_bytes(plan.resident)}, "
        f"working {_bytes(plan.working)}{flight}){measured}; {1000 * plan.extra_seconds:.2f} ms more a step"
    )


def _memory_section(report: RewriteReport) -> Section | None:
    plan = report.memory
    if plan is None or not plan.blocks:
        return None
    title = f"Memory of a training step, {memory_line(plan)}"
    return title, ["where", "choice", "saved by each", "on the host", "extra time of each"], memory_rows(plan)


def summary(report: RewriteReport) -> str:
    """The first lines: how much was reached, in what time."""
    rungs = defaultdict(int)
    for region in report.regions:
        rungs[region.rung] += len(region.paths)
    reached = ", ".join(f"{n} by {rung}" if rung != "untouched" else f"{n} untouched" for rung, n in rungs.items())
    return (
        f"weft report ({report.mode}): {len(report.rewrites)} rewrites, {len(report.refusals)} refusals in "
        f"{report.total_seconds:.1f} s (capture {report.capture_seconds:.1f} s)\n"
        f"regions: {reached or 'none'}; {len(report.graphs)} distinct graphs\n"
        f"reached: {report.node_share:.0%} of graph nodes, {report.parameter_share:.0%} of parameters"
    )


def sections(report: RewriteReport) -> list[Section]:
    """Title, headers and rows of every table that is not empty."""
    passes = [[p.name, f"{p.seconds:.2f}", str(p.rewrites), str(p.refusals)] for p in report.passes]
    found = [
        ("Rewritten", ["rule", "where", "count", "nodes", "not written", "error/allowed"], rewrite_rows(report)),
        ("Refused", ["rule", "where", "why"], _reason_rows(report.refusals)),
        ("Left as they were", ["where", "why"], _note_rows(report)),
        ("Nearest misses", ["rule", "where", "stopped at"], _reason_rows(report.near_misses)),
        ("Passes", ["pass", "seconds", "rewrites", "refusals"], passes),
        _memory_section(report),
    ]
    return [section for section in found if section and section[2]]


def to_text(report: RewriteReport) -> str:
    """The whole report for a terminal."""
    blocks = [summary(report), *(f"note: {n}" for n in report.remarks)]
    blocks += [f"\n{title}\n{table(headers, rows)}" for title, headers, rows in sections(report)]
    return "\n".join(blocks)


def to_html(report: RewriteReport) -> str:
    """The whole report as one self-contained page."""
    parts = [f"<h1>weft report</h1><pre>{html.escape(summary(report))}</pre>"]
    parts += [f"<p>note: {html.escape(n)}</p>" for n in report.remarks]
    for title, headers, rows in sections(report):
        head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in rows)
        parts.append(f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{body}</table>")
    style = "body{font:14px sans-serif;margin:2em}td,th{text-align:left;padding:.2em 1em .2em 0;border-bottom:1px solid #ddd}"
    return f"<!doctype html><meta charset=utf-8><title>weft report</title><style>{style}</style>{''.join(parts)}"


def why_not(report: RewriteReport, path: str) -> str:
    """Everything the report knows of the module at ``path`` and those inside it."""
    inside = lambda p: not path or p == path or p.startswith(path + ".")  # noqa: E731
    lines = [f"{r.module_path}: rewritten by {r.rule}" for r in report.rewrites if inside(r.module_path)]
    lines += [
        f"{r.module_path}: {r.rule} refused: {r.reason} ({r.source})" for r in report.refusals if inside(r.module_path)
    ]
    lines += [
        f"{m.module_path}: {m.rule} came as far as {m.progress}, then {m.reason} ({m.source})"
        for m in report.near_misses
        if inside(m.module_path)
    ]
    lines += [f"{p}: {r.note}" for r in report.regions if r.note for p in r.paths if inside(p)]
    if lines:
        return "\n".join(lines)
    if path not in report.modules:
        inner = next((whole for whole in report.modules if whole.endswith(f".{path}")), None)
        return f"no module had the path {path!r} when the model was optimized" + (
            f": did you mean {inner!r}?" if inner else ""
        )
    held = [r for r in report.regions if any(path == p or path.startswith(p + ".") or not p for p in r.paths)]
    if not held:
        return f"{path!r} was in no captured graph: the example inputs did not reach it"
    around = sorted(
        {r.rule for r in report.rewrites if f"{path}.".startswith(f"{r.module_path}.") or not r.module_path}
    )
    read = (join(p, name) for r in held for p in r.paths for name in r.parameters)
    if around and any(name.startswith(f"{path}.") for name in read):
        return f"{path!r} is read by what was rewritten around it: {', '.join(around)}"
    notes = "; ".join(dict.fromkeys(r.note for r in held if r.note))
    text = f"{path!r} was captured and no rule found anything like its pattern there" + (f" ({notes})" if notes else "")
    if path and any(path in r.paths for r in held):
        text += "; it has a graph of its own: what is made of its result is in another, and no rewrite spans two"
    return text
