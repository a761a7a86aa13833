"""An optimized LoRA Llama beside the same model as it was, on a CPU, where every operator runs its reference.

    python -m benchmarks.cpu [--hidden 512] [--layers 4] [--tokens 256] [--threads 2] [--host NAME] [--out FILE]

The two take turns, so that a disturbance hits both; the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from .capture import default_path, lora_llama
from .environment import write

LIMIT = 1.1
"""How much slower than eager an optimized model may be."""


def train_call(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward of one step."""

    def call() -> Any:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return call


def forward_call(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Forward without gradients."""

    @torch.no_grad()
    def call() -> Any:
        return [model(input_ids=ids, use_cache=False).logits]

    return call


def seconds(call: Callable[[], Any]) -> float:
    """One call, by the clock."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(eager: Callable[[], Any], ours: Callable[[], Any], pairs: int) -> dict[str, float]:
    """Medians of both, the median ratio, and the largest relative difference of their results and gradients."""
    pairs_of_results = zip(eager(), ours(), strict=True)
    difference = max(float((g.double() - e.double()).norm() / e.double().norm()) for e, g in pairs_of_results)
    ours()
    taken = [(seconds(eager), seconds(ours)) for _ in range(pairs)]
    return {
        "eager_ms": round(statistics.median(e for e, _ in taken) * 1e3, 2),
        "weft_ms": round(statistics.median(w for _, w in taken) * 1e3, 2),
        "ratio": round(statistics.median(w / e for e, w in taken), 4),
        "difference": difference,
    }


def run(given: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Forward + backward in training mode, or forward in inference mode."""
    from weft import optimize

    eager = lora_llama(given.layers, given.hidden, given.vocab).train(mode == "train")
    ours: Any = optimize(copy.deepcopy(eager), mode=mode, verify=False)
    ids = torch.randint(0, given.vocab, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    call = train_call if mode == "train" else forward_call
    with torch.random.fork_rng():
        found = compare(call(eager, ids), call(ours, ids), given.pairs)
    return {"mode": mode, "rewrites": len(ours.rewrite_report.rewrites), **found}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 512, "layers": 4, "tokens": 256, "vocab": 8192, "pairs": 15, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--host", help="a name for the machine in the result's; its processor's if not given")
    parser.add_argument("--out", help="result file; benchmarks/results/cpu-HOST.json if not given")
    return parser.parse_args()


def main() -> int:
    """Measures both modes; 1 if one is slower than it may be."""
    given = parse()
    torch.set_num_threads(given.threads)
    size = {name: getattr(given, name) for name in ("hidden", "layers", "tokens", "vocab", "threads")}
    runs = []
    for mode in ("train", "inference"):
        runs.append(run(given, mode))
        found = runs[-1]
        times = f"eager {found['eager_ms']:8.1f} ms  weft {found['weft_ms']:8.1f} ms  ratio {found['ratio']:.3f}"
        print(f"{mode:9}  {times}  difference {found['difference']:.1e}  {found['rewrites']} rewrites", flush=True)
    write(given.out or default_path("cpu", given.host), "cpu", size=size, limit=LIMIT, runs=runs)
    return int(any(r["ratio"] > LIMIT for r in runs))


if __name__ == "__main__":
    sys.exit(main())
