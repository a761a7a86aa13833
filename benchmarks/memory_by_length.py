"""Peak memory of a training step by the length of its rows: weft beside Unsloth and transformers + PEFT.

    python -m benchmarks.memory_by_length --out FILE [--arms weft_nf4 unsloth_nf4 hf_nf4] [--lengths 1024 ... 32768]

One row a batch; the arms checkpoint, each in its own way, weft under ``memory="min"``. Each arm goes through all lengths, the
shortest first, in a process of its own. That it ends for lack of memory is part of the result. ``--at-once 2`` runs two arms
side by side: peaks are each process's own, speeds are then left out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .arm_settings import SHAPES, missing
from .environment import write
from .train_runner import Started, save_models

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def main() -> None:
    """Run one arm after the other; the file is written after each length, so that a time limit costs only what is left."""
    given = _options()
    absent = {arm: package for arm in given.arms if (package := missing(arm))}
    arms = [arm for arm in given.arms if arm not in absent]
    save_models(arms, given)
    runs = list[dict[str, Any]]()
    for run in _runs(arms, given):
        runs.append(run)
        print(run["arm"], run.get("length", ""), _shown(run), flush=True)
        write(given.out, "memory_by_length", shape=given.shape, layers=given.layers, runs=runs, not_installed=absent)


def _runs(arms: Sequence[str], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the arms' processes say, as they say it."""
    with tempfile.TemporaryDirectory() as caches:
        started = list[Started]()
        for i, arm in enumerate(arms):
            while len(started) < min(i + given.at_once, len(arms)):
                started.append(_start(arms[len(started)], given, Path(caches)))
            for result in started[i].results():
                if given.at_once > 1:
                    result.pop("tokens_per_s", None)
                yield {"arm": arm} | result


def _start(arm: str, given: argparse.Namespace, caches: Path) -> Started:
    given.memory = "min" if arm.startswith("weft") else ""
    return Started(arm, given, caches / arm, "--lengths", *map(str, given.lengths))


def _shown(run: dict[str, Any]) -> str:
    if "failed" in run:
        return "\n".join([run["failed"], *([run["output"]] if "output" in run else [])])
    return (
        f"{run['peak_gib']} GiB  {run.get('tokens_per_s', '-')} tokens/s  loss {run['loss']:.5f}  "
        f"gradient norm {run['gradient_norm']:.5g}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--arms", nargs="+", default=["weft_nf4", "unsloth_nf4", "hf_nf4"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--shape", default="llama8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--limit", type=float, default=240, help="seconds for one arm at all lengths")
    parser.add_argument("--at-once", type=int, default=1, help="arms side by side")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the two timed ones of each length")
    parser.add_argument("--models", default="")
    parser.set_defaults(batch=1, length=None, memory="", steps=2, checkpointing=True, verify=False, in_turns=False)
    return parser.parse_args()


if __name__ == "__main__":
    main()
