"""``python -m benchmarks.coverage [types ...]``: every type that transformers lists, rewritten and compared.

Results are kept in ``benchmarks/results/coverage.json``, one line a type, and ``docs/coverage.md`` is made from them,
so that some types can be run again and merged. Each type runs in a process of its own, on one thread, with a limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .coverage_models import types
from .coverage_table import is_whole, write_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
TABLE = ROOT / "docs" / "coverage.md"
PRELOADED = ["torch", "torch._dynamo", "transformers.modeling_utils", "peft", "weft", "benchmarks.coverage_measure"]

Key = tuple[str, str]


def main() -> None:
    """Run the types that were asked for, and write results and table."""
    options = _options()
    known = read_results()
    todo = [t for t in types() if _wanted(t, options, known)][: options.first]
    print(f"{len(todo)} types")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(run_apart, context, t, options.limit) for t in todo]
        for future in as_completed(running):
            row = future.result()
            known = read_results() | {(row["type"], row["model"]): row}
            write_results(known.values())
            print(line(row), flush=True)
    write_table(list(read_results().values()), TABLE, types())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="types or kinds (decoder, image-text, ...); all, if none are given")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one type")
    parser.add_argument("--first", type=int, help="at most so many types")
    parser.add_argument("--only", nargs="*", default=[], help="those that are new, equal, partial, wrong, refused, ...")
    return parser.parse_args()


def _wanted(entry: tuple[str, str, str], options: argparse.Namespace, known: dict[Key, dict[str, Any]]) -> bool:
    kind, name, model = entry
    row = known.get((name, model), {"outcome": "new"})
    partial = "partial" in options.only and row["outcome"] == "equal" and not is_whole(row)
    named = not options.names or kind in options.names or name in options.names
    return named and (not options.only or partial or row["outcome"] in options.only)


def run_apart(context: Any, entry: tuple[str, str, str], limit: float) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, entry))
    process.start()
    theirs.close()
    blank = dict(zip(("kind", "type", "model"), entry, strict=True))
    try:
        if not ours.poll(limit):
            return blank | {"outcome": "error", "reason": f"no result within {limit:.0f} s"}
        return ours.recv()
    except EOFError:
        return blank | {"outcome": "error", "reason": f"the process died with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _work(connection: multiprocessing.connection.Connection, entry: tuple[str, str, str]) -> None:
    import torch
    import transformers

    from .coverage_measure import measure

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    connection.send(measure(*entry).to_dict())


def read_results(path: Path = RESULTS) -> dict[Key, dict[str, Any]]:
    """The known rows by type and class."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows: Iterator[dict[str, Any]] = (json.loads(text) for text in lines)
    return {(row["type"], row["model"]): row for row in rows}


def write_results(rows: Iterable[dict[str, Any]], path: Path = RESULTS) -> None:
    """One line a row, sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda r: (r["type"], r["model"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in ordered))


def line(row: dict[str, Any]) -> str:
    """One row as the terminal shows it."""
    norms, adapters = ("/".join(map(str, row.get(k, ()))) for k in ("norms", "adapters"))
    start = f"{row['outcome']:9}{row['type']:26}{row.get('seconds', 0):6.0f} s"
    return f"{start}  norms {norms:7}  lora {adapters:7}  {row['reason'][:150]}"


if __name__ == "__main__":
    main()
