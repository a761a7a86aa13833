"""Memory on the host while a checkpoint in 16 bits is loaded and stored in 4, by weft and by transformers alone.

    python -m benchmarks.loading [--layers 24] [--hidden 1024] [--shard 200MB] [--host NAME] [--out FILE]

Each measurement is a process of its own, on a CPU, which has loaded a tiny checkpoint in the same way before: what is
reported is how far the resident memory (pages of mapped files among it) rose above what it was then. The goal is the
quantized model and the largest shard.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .environment import cpu_model, slug, write

PREFIX = "RESULT "
WAYS = ("weft", "transformers")


def make(folder: Path, layers: int, hidden: int, shard: str) -> None:
    """Write a Llama-shaped checkpoint in bfloat16, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers, vocab_size=8000,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
    )  # fmt: skip
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=shard)


def plan_of(folder: Path) -> Any:
    """NF4 for every linear but the head; nothing is measured."""
    from weft.checkpoints import lazy_tensors
    from weft.quant.layers import Layer, LayerOption
    from weft.quant.plan import PrecisionPlan
    from weft.quant.stored import FORMATS, stored_bytes

    layers = []
    for name, tensor in lazy_tensors(folder).items():
        if "_proj" in name:
            shape = tuple(tensor[...].shape)
            option = LayerOption("nf4", stored_bytes(FORMATS["nf4"], shape, torch.bfloat16), 0.0)
            layers.append(Layer((name.removesuffix(".weight"),), shape, "bfloat16", (option,)))
    return PrecisionPlan(tuple(layers), ("nf4",) * len(layers), 0)


def load(way: str, folder: Path, plan: Any) -> Any:
    """The model, stored as ``plan`` says."""
    if way == "weft":
        from weft import load_planned

        return load_planned(folder, plan)
    from transformers import AutoModelForCausalLM

    from weft.bnb_config import config_for

    config = config_for(plan.choice, ["lm_head"], torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def measure_one(way: str, tiny: Path, folder: Path) -> dict[str, Any]:
    """Bytes by which loading ``folder`` raised the resident memory at its highest, and the sizes to compare with."""
    from weft.passes.candidates import model_bytes

    load(way, tiny, plan_of(tiny))
    plan = plan_of(folder)
    gc.collect()
    before, started = resident("VmRSS"), time.perf_counter()
    model = load(way, folder, plan)
    seconds = time.perf_counter() - started
    shards = [file.stat().st_size for file in folder.glob("*.safetensors")]
    size = model_bytes(model)
    return {
        "way": way, "peak_bytes": resident("VmHWM") - before, "seconds": round(seconds, 1), "model_bytes": size,
        "checkpoint_bytes": sum(shards), "largest_shard_bytes": max(shards), "goal_bytes": size + max(shards),
    }  # fmt: skip


def resident(field: str) -> int:
    """Bytes of this process that are in memory: now (``VmRSS``), or at the most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def in_own_process(*one: str) -> dict[str, Any] | None:
    """What ``--one`` prints in a process of its own.

    Raises:
        CalledProcessError: it failed; its output has been shown.
    """
    command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "benchmarks.loading", "--one", *one]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    lines = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return next((json.loads(line.removeprefix(PREFIX)) for line in lines if line.startswith(PREFIX)), None)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--shard", default="200MB", help="the largest size of a shard")
    parser.add_argument("--host", help="a name for the machine in the result's; its processor's if not given")
    parser.add_argument("--out", help="result file; benchmarks/results/loading-HOST.json if not given")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measures both ways; 1 if weft took more than the quantized model and the largest shard."""
    given = parse()
    if given.one:
        return one(*given.one)
    with tempfile.TemporaryDirectory() as temporary:
        tiny, folder = f"{temporary}/tiny", f"{temporary}/model"
        in_own_process("make", tiny, "1", "64", "1GB")
        in_own_process("make", folder, str(given.layers), str(given.hidden), given.shard)
        runs = [run for way in WAYS if (run := in_own_process(way, tiny, folder))]
    for run in runs:
        show(run)
    default = Path(__file__).resolve().parent / "results" / f"loading-{given.host or slug(cpu_model())}.json"
    write(given.out or default, "loading", layers=given.layers, hidden=given.hidden, runs=runs)
    return int(any(run["way"] == "weft" and run["peak_bytes"] > run["goal_bytes"] for run in runs))


def one(what: str, first: str, *rest: str) -> int:
    """Make a checkpoint, or measure one way of loading it."""
    if what == "make":
        make(Path(first), int(rest[0]), int(rest[1]), rest[2])
    else:
        print(PREFIX + json.dumps(measure_one(what, Path(first), Path(rest[0]))))
    return 0


def show(run: dict[str, Any]) -> None:
    """One line, in megabytes."""
    peak, goal, size, whole = (round(run[f"{key}_bytes"] / 1e6) for key in ("peak", "goal", "model", "checkpoint"))
    print(f"{run['way']:12} {peak:6} MB at most (goal {goal}: model {size}), checkpoint {whole} MB, {run['seconds']} s")


if __name__ == "__main__":
    sys.exit(main())
