"""What a host may give: a share of its memory, or of what its container may take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weft.rewrite import device_memory


@pytest.mark.parametrize(("text", "wanted"), [("1073741824\n", 2**28), ("max\n", None), ("9223372036854771712", None)])
def test_the_limit_of_a_container_counts(
    text: str, wanted: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(device_memory, "GROUP_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "absent")))
    device_memory.host_memory.cache_clear()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_memory.host_memory() == (wanted or physical // 4)
    device_memory.host_memory.cache_clear()
