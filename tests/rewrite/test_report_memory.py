"""The section of the report on the memory of a training step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from weft.rewrite.memory_plan import BlockMemory, MemoryPlan
from weft.rewrite.report import RewriteReport
from weft.rewrite.report_text import memory_line, memory_rows, to_html, to_text

MIB = 2**20


def plan(limit: int | None = 400 * MIB, measured: int | None = None) -> MemoryPlan:
    """Two blocks that compute all again, one of them with its input on the host, and two that save all."""
    blocks = [
        BlockMemory(f"layers.{i}", 0 if i == 0 else 2 * MIB, 2 * MIB * (i == 0), 0.004, "recomputes all")
        for i in (0, 1)
    ]
    blocks += [BlockMemory(f"layers.{i}", 64 * MIB, 0, 0.0, "saves all") for i in (2, 3)]
    before = MemoryPlan(limit, 128 * MIB, 96 * MIB, blocks, measured)
    return MemoryPlan(limit, 128 * MIB, 96 * MIB, blocks, before=before, spare=32 * MIB)


def report(of: MemoryPlan | None) -> RewriteReport:
    """One without rewrites."""
    return RewriteReport(steps=SimpleNamespace(plan=of))


def test_blocks_that_do_the_same_are_one_row() -> None:
    assert memory_rows(plan()) == [
        ["layers.0", "recomputes all", "0 B", "2.0 MiB", "4.00 ms"],
        ["layers.1", "recomputes all", "2.0 MiB", "–", "4.00 ms"],
        ["layers.2-3", "saves all", "64.0 MiB", "–", "0.00 ms"],
    ]


def test_limit_and_prediction_are_stated() -> None:
    line = memory_line(plan())
    assert line.startswith(
        "at most 400.0 MiB: predicted peak 292.0 MiB (resident 128.0 MiB, working 96.0 MiB, in flight 2.0 MiB)"
    )
    assert line.endswith("8.00 ms more a step") and "does not fit" not in line
    assert memory_line(plan(None)).startswith("as little as possible: predicted peak 292.0 MiB (")
    assert "the step before took 300.0 MiB of " in memory_line(plan(measured=300 * MIB))


def test_a_limit_that_is_not_met_is_said_to_be() -> None:
    assert "predicted peak 292.0 MiB, which does not fit" in memory_line(plan(200 * MIB))


@pytest.mark.parametrize("page", [to_text, to_html])
def test_the_section_is_on_every_page(page: Callable[[RewriteReport], str]) -> None:
    text = page(report(plan()))
    assert "Memory of a training step, at most 400.0 MiB" in text
    assert all(word in text for word in ("layers.2-3", "64.0 MiB", "on the host", "4.00 ms"))


@pytest.mark.parametrize("of", [None, MemoryPlan(None, 1, 1)])
def test_no_section_without_a_plan(of: MemoryPlan | None) -> None:
    assert "Memory of" not in to_text(report(of)) and "Memory of" not in to_html(report(of))


def test_the_plan_is_plain_data() -> None:
    found = report(plan()).to_dict()["memory"]
    assert found["predicted"] == 292 * MIB and found["fits"] and len(found["blocks"]) == 4
    assert '"limit": 419430400' in report(plan()).to_json()
