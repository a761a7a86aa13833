"""Processes that train one model together: started by test_two_processes.py, forked once everything is imported.

Each writes what it saw into ``--folder``: the loss of every step, the gradients of the first one, and weft's report.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from packaging import version
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from weft.sharding import SHARDS_WHOLE_NUMBERS, TORCH, shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import batch, in_four_bits, llama, quickly, with_lora
from quiet import turn_off

WORLD = 2


@dataclass(frozen=True)
class Case:
    """How a model is wrapped and trained."""

    engine: Literal["ddp", "fsdp2"]
    kind: Literal["full", "lora", "nf4", "nf4-bfloat16"] = "lora"
    checkpointing: bool = False
    optimize: Literal["before", "after"] = "before"
    mixed: bool = False
    memory: str | None = None
    again: bool = False
    """Capture what users do: rows longer than the examples', and a first block whose input needs no gradient.

    The other cases are about what the engine does around the blocks, and capture them once.
    """

    @property
    def length(self) -> int:
        """Of a row; the examples have 6."""
        return 10 if self.again else 6


CASES = {
    "ddp": Case("ddp", again=True),
    "ddp, nf4, checkpointed": Case("ddp", "nf4", checkpointing=True),
    "ddp, full": Case("ddp", "full"),
    "fsdp2": Case("fsdp2", again=True),
    "fsdp2, nf4": Case("fsdp2", "nf4"),
    "fsdp2, nf4, checkpointed": Case("fsdp2", "nf4", checkpointing=True, again=True),
    "fsdp2, nf4 stored as bfloat16": Case("fsdp2", "nf4-bfloat16"),
    "fsdp2, full": Case("fsdp2", "full"),
    "ddp, optimized after": Case("ddp", optimize="after"),
    "fsdp2, optimized after": Case("fsdp2", optimize="after"),
    "fsdp2 in bfloat16": Case("fsdp2", mixed=True),
    "ddp, planned": Case("ddp", memory="min"),
    "fsdp2, planned": Case("fsdp2", memory="min"),
    "fsdp2, nf4, planned, optimized after": Case("fsdp2", "nf4", optimize="after", memory="1TB"),
    "fsdp2, full, planned, checkpointed": Case("fsdp2", "full", checkpointing=True, memory="1TB"),
}
WHOLE_NUMBERS = version.parse(SHARDS_WHOLE_NUMBERS) <= TORCH
"""Whether FSDP2 shards what bitsandbytes packs by default."""
STEPS = 3
SMALL = {"hidden_size": 64, "intermediate_size": 64}


def build(kind: str) -> Any:
    """The model that every process makes for itself, the same one."""
    model = llama(**SMALL)
    if kind == "full":
        return model.train()
    if kind.startswith("nf4"):
        model = in_four_bits(model, storage=torch.uint8 if kind == "nf4" and WHOLE_NUMBERS else torch.bfloat16)
    return with_lora(model)


def share(step: int, rank: int | None, length: int) -> dict[str, Tensor]:
    """The rows of one process; of all where it is None."""
    whole = batch(2 * WORLD, length, seed=step)
    return whole if rank is None else {name: value[2 * rank : 2 * rank + 2] for name, value in whole.items()}


def train(model: nn.Module, rank: int | None, length: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of each step, and the gradients of the first."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, gradients = [], {}
    for step in range(STEPS):
        loss = model(**share(step, rank, length)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients = gradients or {n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def _whole(gradient: Tensor) -> Tensor:
    full = getattr(gradient, "full_tensor", None)
    return (gradient if full is None else full()).detach().clone()


def run(case: Case, rank: int) -> dict[str, Any]:
    """One case in one process: the losses, averaged over the processes, and what weft reports."""
    model = build(case.kind)
    if not case.again:
        model.enable_input_require_grads()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.optimize == "before":
        quickly(model, memory=case.memory)
    wrapped: nn.Module = model
    if case.engine == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16 if case.mixed else None))
    if case.optimize == "after":
        quickly(model, memory=case.memory)
    losses, gradients = train(wrapped, rank, case.length)
    for loss in losses:
        dist.all_reduce(loss)
    report: Any = model.rewrite_report
    return {
        "losses": [float(loss) / WORLD for loss in losses],
        "gradients": {n.removeprefix("module."): g for n, g in gradients.items()},
        "report": str(report),
        "rules": sorted({r.rule for r in report.rewrites}),
        "graphs": len(report.graphs),
        "untouched": sorted({p for r in report.regions if r.rung != "graph" for p in r.paths}),
        "notes": list(report.notes),
    }


def work(rank: int, folder: Path) -> None:
    """One rank, all cases; what one of them raises is its result."""
    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)  # as in conftest.py
    turn_off(setattr)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD, timeout=timedelta(minutes=10)
    )
    results = {}
    for name, case in CASES.items():
        try:
            results[name] = run(case, rank)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
        dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


work.__code__ = work.__code__.replace(co_stacksize=2**17)  # as in conftest.py


def main() -> None:
    """All ranks; if one fails, the others are ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    start_processes(work, (parser.parse_args().folder,), nprocs=WORLD, start_method="fork")


if __name__ == "__main__":
    main()
