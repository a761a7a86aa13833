"""How long ``optimize`` takes on a Llama-shaped model with PEFT LoRA, by number of layers, with and without replay.

    python -m benchmarks.capture [--layers 8 32] [--threads 2] [--host NAME] [--out FILE]

Each measurement is a process of its own, on a CPU. Capturing follows the number of distinct blocks, so that 32 layers
take little longer than 8.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .environment import cpu_model, slug, write

LIMITS = {"verified": 60.0, "unverified": 20.0}
"""Seconds that 32 layers may take on two cores."""

PREFIX = "RESULT "


def lora_llama(layers: int, hidden: int, vocab: int = 512) -> Any:
    """A randomly initialized Llama with rank-8 adapters on all its linears, B not zero, in float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=hidden // 32, num_key_value_heads=max(hidden // 128, 1), max_position_embeddings=1024,
        use_cache=False,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


def measure_one(layers: int, verify: bool) -> dict[str, Any]:
    """Seconds of one ``optimize`` call, and what it did."""
    from weft import optimize

    model = lora_llama(layers, hidden=128).train()
    started = time.perf_counter()
    optimize(model, mode="train", verify=verify)
    seconds = time.perf_counter() - started
    report = model.rewrite_report
    return {
        "layers": layers, "verify": verify, "seconds": round(seconds, 2), "graphs": len(report.graphs),
        "capture_s": round(report.capture_seconds, 2), "rewrites": len(report.rewrites),
        "refusals": len(report.refusals), "notes": report.notes,
        "passes": {record.name: round(record.seconds, 2) for record in report.passes},
    }  # fmt: skip


def in_own_process(layers: int, verify: bool, threads: int) -> dict[str, Any]:
    """:func:`measure_one` where nothing has been imported or captured before.

    Raises:
        CalledProcessError: the call failed; its output has been shown.
    """
    safe = ["-P"] if sys.flags.safe_path else []
    one = [str(layers), "verified" if verify else "unverified"]
    command = [sys.executable, *safe, "-m", "benchmarks.capture", "--threads", str(threads), "--one", *one]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    lines = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return json.loads(next(line for line in lines if line.startswith(PREFIX)).removeprefix(PREFIX))


def default_path(kind: str, host: str | None) -> Path:
    """Where results of ``kind`` belong, by the machine that they came from."""
    return Path(__file__).resolve().parent / "results" / f"{kind}-{host or slug(cpu_model())}.json"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--host", help="a name for the machine in the result's; its processor's if not given")
    parser.add_argument("--out", help="result file; benchmarks/results/capture-HOST.json if not given")
    parser.add_argument("--one", nargs=2, metavar=("LAYERS", "VERIFY"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measures all combinations; 1 if 32 layers take longer than they may, or a graph could not be rewritten."""
    given = parse()
    torch.set_num_threads(given.threads)
    if given.one:
        print(PREFIX + json.dumps(measure_one(int(given.one[0]), given.one[1] == "verified")))
        return 0
    runs = []
    for verify in (False, True):
        for layers in given.layers:
            runs.append(in_own_process(layers, verify, given.threads))
            show(runs[-1])
    write(given.out or default_path("capture", given.host), "capture", threads=given.threads, limits=LIMITS, runs=runs)
    return int(any(run["notes"] or (run["layers"] == 32 and run["seconds"] > limit_of(run)) for run in runs))


def limit_of(run: dict[str, Any]) -> float:
    """Seconds that a run over 32 layers may take."""
    return LIMITS["verified" if run["verify"] else "unverified"]


def show(run: dict[str, Any]) -> None:
    """One line, and what the report says went wrong."""
    state = "verified" if run["verify"] else "unverified"
    print(f"{run['layers']:3} layers, {state:10}  {run['seconds']:7.1f} s  {run['rewrites']} rewrites", flush=True)
    for note in run["notes"]:
        print(f"    {note}")


if __name__ == "__main__":
    sys.exit(main())
