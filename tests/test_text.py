"""How paths and tables are written."""

from __future__ import annotations

import pytest

from weft.text import fold, table, unnumbered


@pytest.mark.parametrize(("paths", "folded"), [
    (["a.0.b", "a.1.b", "a.2.b"], "a.0-2.b"),
    (["a.0.b", "a.2.b", "a.3.b", "a.7.b"], "a.{0,2-3,7}.b"),
    (["a.1.b", "a.0.b", "a.1.b"], "a.0-1.b"),
    (["a.0.b", "a.0.c", "d"], "a.0.b, a.0.c, d"),
    (["layer10", "layer11"], "layer10, layer11"),
    (["", "a"], "(top), a"),
    ([], ""),
])  # fmt: skip
def test_folding(paths: list[str], folded: str) -> None:
    assert fold(paths) == folded


def test_paths_without_their_numbers() -> None:
    assert unnumbered("layers.10.experts.3.up") == unnumbered("layers.2.experts.11.up") == "layers.#.experts.#.up"


def test_tables() -> None:
    assert table(["a", "bb"], [["ccc", "d"], ["e", ""]]) == "a    bb\n---  --\nccc  d\ne"
    assert table(["a", "bb"], [["ccc", "d"]], ruled=False) == "a    bb\nccc  d"
