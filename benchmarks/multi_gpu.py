"""Training over several GPUs: how DDP scales, and whether FSDP2 fits and trains a QLoRA model of a 70 B shape.

    python -m benchmarks.multi_gpu ddp [--shape llama8b] [--batch 4] [--length 2048] [--out FILE]
    python -m benchmarks.multi_gpu fsdp2 [--shape llama70b] [--batch 1] [--length 2048] [--out FILE]

``ddp`` trains LoRA in bfloat16 on one process and on all, with the same batch in each process; the speed-up is in tokens per
second. ``fsdp2`` shards NF4 weights block by block as they are made, optimizes the sharded model, and trains it on one batch,
whose loss must fall. Without GPUs both run over gloo, to be tried out (``--shape tiny``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from weft import optimize

from .arm_settings import SHAPES, Setting
from .environment import cpu_model, gpu, slug, write

GIB = 2**30


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("ddp", "fsdp2"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--arm", choices=("weft", "hf"), default="weft", help="hf: not optimized")
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, help="rows a process")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: with fsdp2")
    parser.add_argument("--memory", help="what optimize(memory=...) is told")
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sharded = given.engine == "fsdp2"
    given.shape = given.shape or ("llama70b" if sharded else "llama8b")
    given.batch = given.batch or (1 if sharded else 4)
    given.checkpointing = sharded if given.checkpointing is None else given.checkpointing
    return given


def worker(rank: int, world: int, given: argparse.Namespace, folder: str) -> None:
    """One process; the first writes what all measured."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    options: dict[str, Any] = {"device_id": device} if on_gpu else {}
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=store, rank=rank, world_size=world, **options)
    found = (ddp if given.engine == "ddp" else fsdp2)(given, device, rank)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, found)
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(gathered))
    dist.destroy_process_group()


def setting_of(given: argparse.Namespace) -> Setting:
    """As the other benchmarks describe a model."""
    return Setting(
        given.arm, shape=given.shape, layers=given.layers, batch=given.batch, length=given.length,
        checkpointing=given.checkpointing, verify=given.verify,
    )  # fmt: skip


def ddp(given: argparse.Namespace, device: torch.device, rank: int) -> dict[str, Any]:
    """Every process has the whole model and rows of its own."""
    from .arms import build

    model = build(setting_of(given))
    found = _optimized(model, given)
    wrapped = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )  # fmt: skip
    return found | train(wrapped, model, given, device, seed=rank)


def fsdp2(given: argparse.Namespace, device: torch.device, rank: int) -> dict[str, Any]:
    """Every process has a share of each block."""
    from .sharded_model import qlora_on_meta, shard_by_blocks

    started = time.perf_counter()
    model = qlora_on_meta(setting_of(given))
    if given.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    shard_by_blocks(model, device)
    model.train()
    model.config.use_cache = False
    found = {
        "build_s": round(time.perf_counter() - started, 1),
        "build_peak_gib": _peak(device),
        "held_gib": _held(device),
    }
    found |= _optimized(model, given)
    return found | train(model, model, given, device, seed=rank)


def _optimized(model: nn.Module, given: argparse.Namespace) -> dict[str, Any]:
    if given.arm != "weft":
        return {}
    started = time.perf_counter()
    optimize(model, mode="train", verify=given.verify, memory=given.memory)
    report: Any = model.rewrite_report
    rules = [r.rule for r in report.rewrites]
    return {
        "optimize_s": round(time.perf_counter() - started, 1),
        "rewrites": {rule: rules.count(rule) for rule in sorted(set(rules))},
        "not_captured": sorted({p for r in report.regions if r.rung != "graph" for p in r.paths})[:20],
        "notes": list(report.notes),
    }


def train(wrapped: nn.Module, model: Any, given: argparse.Namespace, device: torch.device, seed: int) -> dict[str, Any]:
    """The same batch in every step: seconds, memory, and a loss that falls."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (given.batch, given.length), generator=generator).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, seconds = [], []
    for _ in range(given.warmup + given.steps):
        _wait(device)
        started = time.perf_counter()
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        _wait(device)
        seconds.append(time.perf_counter() - started)
    step = median(seconds[given.warmup :])
    return {
        "step_s": round(step, 4), "tokens_per_s": round(ids.numel() / step, 1), "peak_gib": _peak(device),
        "first_step_s": round(seconds[0], 2), "losses": [round(x, 5) for x in losses],
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    """For this process' device, then for all processes: a step ends when the slowest does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def _peak(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / GIB, 2) if device.type == "cuda" else None


def _held(device: torch.device) -> float | None:
    return round(torch.cuda.memory_allocated(device) / GIB, 2) if device.type == "cuda" else None


def print_runs(name: str, tokens_per_s: float, runs: list[dict[str, Any]]) -> None:
    """One count of processes; what is the same in all is the first one's."""
    first = runs[0]
    peaks = [run["peak_gib"] for run in runs]
    print(f"{name}: {first['step_s']} s a step, {tokens_per_s:.0f} tokens/s in all, peak {peaks} GiB, "
          f"loss {first['losses'][0]} → {first['losses'][-1]}")  # fmt: skip
    for key in (
        "build_s",
        "build_peak_gib",
        "held_gib",
        "optimize_s",
        "first_step_s",
        "rewrites",
        "not_captured",
        "notes",
    ):
        if key in first:
            print(f"    {key}: {first[key]}")


def main() -> None:
    """Runs all process counts that the engine is measured with."""
    given = parse()
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # where the new processes find this module
    counts = [1, given.processes] if given.engine == "ddp" else [given.processes]
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for world in counts:
            spawn(worker, (world, given, folder), nprocs=world)
            found[world] = json.loads(Path(folder, f"{world}.json").read_text())
    speed = {world: sum(each["tokens_per_s"] for each in runs) for world, runs in found.items()}
    for world, runs in found.items():
        print_runs(f"{given.engine}, {world} process(es)", speed[world], runs)
    speedup = round(speed[given.processes] / speed[1], 3) if 1 in speed else None
    if speedup is not None:
        print(f"speed-up over one process: {speedup} ×")
    host = (gpu() or {}).get("name") or cpu_model()
    name = f"multi-gpu-{given.engine}-{given.shape}-{slug(host)}.json"
    setting = {k: v for k, v in vars(given).items() if k != "out"}
    write(
        given.out or Path(__file__).parent / "results" / name, "multi_gpu", setting=setting, runs=found, speedup=speedup
    )
    if any(run["losses"][-1] >= run["losses"][0] for runs in found.values() for run in runs):
        raise SystemExit("the loss of a repeated batch did not fall")


if __name__ == "__main__":
    main()
