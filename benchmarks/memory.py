"""What the peak of a training step consists of: the allocations alive then, by the line that made them.

    python -m benchmarks.memory weft_nf4 [--layers 4] [--checkpointing] [--out FILE]

On a GPU. Some layers are enough: the peak of more is the same and what each layer keeps.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .arm_settings import Setting
from .arms import build
from .training import train_step

LINES = 25


def traced_step(setting: Setting) -> list[dict[str, Any]]:
    """The allocator's events of one step, after one that warmed up."""
    model = build(setting)
    if setting.base == "weft":
        from weft import optimize

        with torch.autocast("cuda", torch.bfloat16):
            optimize(model, mode="train", verify=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(3, model.config.vocab_size, (setting.batch, setting.length), device="cuda")
    train_step(model, optimizer, ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    torch.cuda.reset_peak_memory_stats()
    train_step(model, optimizer, ids)
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    print(f"before the step {before / 2**30:.2f} GiB, peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    return events


def at_peak(events: list[dict[str, Any]]) -> tuple[int, Counter[str]]:
    """Bytes allocated during the step and alive at its peak, in all and by line."""
    alive: dict[int, tuple[int, str]] = {}
    now = top = 0
    kept: dict[int, tuple[int, str]] = {}
    for event in events:
        if event["action"] == "alloc":
            alive[event["addr"]] = event["size"], line_of(event["frames"])
            now += event["size"]
            if now > top:
                top, kept = now, dict(alive)
        elif event["action"] == "free_completed" and event["addr"] in alive:
            now -= alive.pop(event["addr"])[0]
    lines: Counter[str] = Counter()
    for size, line in kept.values():
        lines[line] += size
    return top, lines


def line_of(frames: list[dict[str, Any]]) -> str:
    """The two innermost frames that are no part of torch itself."""
    own = [f for f in frames if "/torch/" not in f["filename"] and f["filename"] != "??"]
    return " < ".join(f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in (own or frames)[:2])


def main() -> None:
    """Print the largest lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    setting = Setting(
        options.arm, layers=options.layers, checkpointing=options.checkpointing, models="/tmp/weft-memory"
    )  # fmt: skip
    top, lines = at_peak(traced_step(setting))
    print(f"allocated in the step and alive at its peak: {top / 2**30:.2f} GiB")
    for line, size in lines.most_common(LINES):
        print(f"{size / 2**20:9.1f} MiB  {line}")
    if options.out:
        options.out.write_text(json.dumps({"arm": options.arm, "peak": top, "lines": lines.most_common(100)}, indent=1))


if __name__ == "__main__":
    main()
