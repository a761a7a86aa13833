"""Peak memory of a training step by the length of its rows: weft beside Unsloth and transformers + PEFT.

    python -m benchmarks.memory_by_length --out FILE [--arms weft_nf4 unsloth_nf4 hf_nf4] [--lengths 1024 ... 32768]

One row a batch; the arms checkpoint, each in its own way, weft under ``memory="min"``. A run that ends for lack of memory is
part of the result. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from .arm_settings import SHAPES, missing
from .environment import write
from .train_runner import run, save_models

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def main() -> None:
    """Run every arm at every length; the file is written after each."""
    given = _options()
    absent = {arm: package for arm in given.arms if (package := missing(arm))}
    found: list[dict[str, Any]] = []
    save_models(given)
    with tempfile.TemporaryDirectory() as caches:
        for length in given.lengths:
            for arm in [a for a in given.arms if a not in absent]:
                given.length, given.memory = length, "min" if arm.startswith("weft") else ""
                result = run(arm, given, Path(caches) / arm)
                kept = ("peak_gib", "step_s", "tokens_per_s", "gradient_norm", "failed", "memory")
                found.append({"arm": arm, "length": length} | {k: result[k] for k in kept if k in result})
                print(arm, length, found[-1].get("peak_gib", found[-1].get("failed")), "GiB", flush=True)
                write(given.out, "memory_by_length", shape=given.shape, runs=found, not_installed=absent)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--arms", nargs="+", default=["weft_nf4", "unsloth_nf4", "hf_nf4"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--shape", default="llama8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one run")
    parser.add_argument("--models", default="")
    parser.set_defaults(batch=1, length=LENGTHS[0], memory="", steps=2, warmup=2, checkpointing=True, verify=False)
    return parser.parse_args()


if __name__ == "__main__":
    main()
