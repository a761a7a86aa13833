"""How paths of modules and tables are written, in reports and in plans alike. It imports nothing of weft."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable


def fold(paths: Iterable[str]) -> str:
    """``layers.0.up``, ``layers.1.up``, ``layers.3.up`` as ``layers.{0-1,3}.up``; no path is the model itself."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        found = re.match(r"^(.*?\b)(\d+)(\b.*)$", path)
        groups[(found[1], found[3]) if found else (path, "")].append(int(found[2]) if found else -1)
    return ", ".join(
        head or "(top)" if numbers == [-1] else f"{head}{_ranges(numbers)}{tail}"
        for (head, tail), numbers in groups.items()
    )


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(runs) == 1 else "{" + text + "}"


def unnumbered(path: str) -> str:
    """What paths have in common that differ in numbers only."""
    return re.sub(r"\d+", "#", path)


def table(headers: list[str], rows: list[list[str]], *, ruled: bool = True) -> str:
    """Columns padded to their widest cell, the headers underlined if ``ruled``."""
    widths = [max(len(r[i]) for r in [headers, *rows]) for i in range(len(headers))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [headers, *rows]]
    return "\n".join([lines[0], *(["  ".join("-" * w for w in widths)] if ruled else []), *lines[1:]])
