"""What was rewritten, what was refused and why, and how far the result is from the original."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """What the user asked for at the price of digits, and the relative error that a replay measured; None: no replay."""

    what: str
    error: float | None = None


@dataclass(frozen=True)
class Rewrite:
    """One rewrite in one module instance.

    ``bytes_saved`` are intermediate results no longer written, at the shapes of the example inputs. ``error`` is the
    replayed error over what is allowed (twice the original's own, plus one ulp): below 1 passes; None if not replayed.
    ``asked``: why more than that is allowed, where it is.
    """

    rule: str
    module_path: str
    source: str
    nodes_removed: int
    nodes_added: int
    bytes_saved: int
    error: float | None = None
    asked: Asked | None = None


@dataclass(frozen=True)
class Refusal:
    """A rule matched, and this says why it was not applied. Falsy, so that a check may ``return self.refuse(...)``."""

    rule: str
    module_path: str
    source: str
    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class NearMiss:
    """The attempt of one rule in one module that came furthest without matching, and where it stopped."""

    rule: str
    module_path: str
    source: str
    progress: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """One pass over all captured graphs: wall time and counts."""

    name: str
    seconds: float
    rewrites: int
    refusals: int


@dataclass
class RegionRecord:
    """One captured graph: the module instances that it serves, how it was reached, and how much of it was rewritten.

    ``paths`` are the regions that run it. ``places`` are the modules whose forward it is: those regions, or modules below
    them where a region's forward could only be captured in parts. ``rung`` is ``graph`` (Dynamo), ``fx`` (torch.fx
    symbolic tracing) or ``untouched``.
    """

    paths: list[str]
    rung: str
    nodes_before: int = 0
    nodes_after: int = 0
    nodes_covered: int = 0
    parameters: list[str] = field(default_factory=list)
    note: str = ""
    places: list[str] = field(default_factory=list)


def join(*paths: str) -> str:
    """The paths with a dot between those that are not empty."""
    return ".".join(p for p in paths if p)


@dataclass
class GraphRecord:
    """All that is known of one captured graph, with module paths relative to the instances that share it."""

    region: RegionRecord
    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def instances(self, records: Iterable[Any]) -> Iterator[Any]:
        """``records`` once per module instance, with whole paths."""
        for record in records:
            for path in self.region.places:
                yield replace(record, module_path=join(path, record.module_path))


@dataclass
class RewriteReport:
    """The record of one ``optimize`` call; it grows if later calls of the model are captured anew."""

    mode: str = "train"
    graphs: list[GraphRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    modules: Sequence[str] = ()
    capture_seconds: float = 0.0
    total_seconds: float = 0.0
    precision: Any = None
    steps: Any = None
    leftovers: Any = None
    installed: bool = True

    @property
    def rewrites(self) -> list[Rewrite]:
        """One per rule and module instance."""
        return _unique((g, r) for g in self.graphs for r in g.instances(g.rewrites))

    @property
    def refusals(self) -> list[Refusal]:
        """Matched and not applied, one per rule and module instance."""
        return _unique((g, r) for g in self.graphs for r in g.instances(g.refusals))

    @property
    def near_misses(self) -> list[NearMiss]:
        """The nearest miss of each rule in each module that it did not rewrite."""
        done = {(r.rule, r.module_path) for r in self.rewrites}
        found = _unique((g, m) for g in self.graphs for m in g.instances(g.misses))
        return [m for m in found if (m.rule, m.module_path) not in done]

    @property
    def remarks(self) -> list[str]:
        """The notes; once each what the user asked for at the price of digits, with the largest error of all graphs; what was
        compiled by Inductor, and what was recorded as CUDA graphs."""
        errors: dict[str, list[float]] = {}
        for asked in (r.asked for g in self.graphs for r in g.rewrites if r.asked is not None):
            errors.setdefault(asked.what, []).extend([] if asked.error is None else [asked.error])
        found = [
            f": relative error up to {max(e):.2%} where replayed" if e else ", not replayed" for e in errors.values()
        ]
        asked_for = [f"{what}, as asked{how}" for what, how in zip(errors, found, strict=True)]
        recordings = getattr(self.steps, "recordings", None)
        beside = [r for r in (self.leftovers, recordings) if r is not None]
        return [*self.notes, *asked_for, *(remark for each in beside for remark in each.remarks())]

    @property
    def memory(self) -> Any:
        """The :class:`.memory_plan.MemoryPlan` of the last training step that began; None where none is planned."""
        return None if self.steps is None else self.steps.plan

    @property
    def regions(self) -> list[RegionRecord]:
        """The captured graphs and what each serves."""
        return [g.region for g in self.graphs]

    @property
    def passes(self) -> list[PassRecord]:
        """Time and counts of each pass, over all graphs, in order."""
        names = list(dict.fromkeys(name for g in self.graphs for name in g.seconds))
        return [
            PassRecord(
                name,
                sum(g.seconds.get(name, 0.0) for g in self.graphs),
                sum(r.rule == name for r in self.rewrites),
                sum(r.rule == name for r in self.refusals),
            )
            for name in names
        ]

    @property
    def node_share(self) -> float:
        """Share of the captured operations that rewrites replaced, counted once per module instance."""
        covered = sum(g.region.nodes_covered * len(g.region.places) for g in self.graphs)
        return covered / max(1, sum(g.region.nodes_before * len(g.region.places) for g in self.graphs))

    @property
    def parameter_share(self) -> float:
        """Share of the model's parameters that a replacement reads."""
        reached = {join(path, p) for g in self.graphs for path in g.region.places for p in g.region.parameters}
        return sum(n for name, n in self.parameters.items() if name in reached) / max(1, sum(self.parameters.values()))

    def why_not(self, path: str) -> str:
        """Why the module at ``path`` was not rewritten (or that it was), in sentences."""
        from .report_text import why_not

        return why_not(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        lists = {
            n: [asdict(r) for r in getattr(self, n)]
            for n in ("rewrites", "refusals", "near_misses", "passes", "regions")
        }
        return {
            "mode": self.mode,
            **lists,
            "notes": self.remarks,
            "node_share": self.node_share,
            "parameter_share": self.parameter_share,
            "capture_seconds": self.capture_seconds,
            "total_seconds": self.total_seconds,
            "memory": None if self.memory is None else self.memory.to_dict(),
            "precision": self.precision.to_dict() if hasattr(self.precision, "to_dict") else self.precision,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to ``path`` where one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained page, also written to ``path`` where one is given."""
        from .report_text import to_html

        text = to_html(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        from .report_text import to_text

        return to_text(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled report is plain data, so that a saved model loads where weft is not installed."""
        return dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> RewriteReport:
        """A copied model runs its original forward: its report says so."""
        note = "this model is a copy: its rewrites did not travel with it; call optimize() on it"
        return replace(self, graphs=[], notes=[note], steps=None, installed=False)


def _unique(records: Iterable[tuple[GraphRecord, Any]]) -> list[Any]:
    """Each record once, where several graphs (of training and of evaluation, say) hold it for one module."""
    owners: dict[tuple[str, str, str], int] = {}
    kept = []
    for graph, record in records:
        if owners.setdefault((record.rule, record.module_path, record.source), id(graph)) == id(graph):
            kept.append(record)
    return kept
