"""Ragged documents: rows packed by weft beside rows padded to the longest, in real tokens a second.

    python -m benchmarks.packed [--shape llama8b] [--layers N] [--documents 64] [--length 2048] [--out FILE]

Lengths are drawn so that their mean is a quarter of the maximum. ``padded`` is transformers + PEFT as it is; ``weft padded``
and ``weft packed`` are the same model optimized. One step trains on all documents, in micro-batches of as many places as
--places; the losses, means over the same tokens, must agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import weft
from weft import packing

from .arm_settings import SHAPES, Setting
from .arms import build, device
from .environment import cpu_model, gpu, slug, write

Batch = dict[str, Tensor]


def documents(count: int, longest: int, vocab: int) -> list[list[int]]:
    """Random token ids; lengths between 8 and ``longest`` with a mean of about a quarter of it."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(count, generator=generator).pow(3) * (longest - 8) + 8).long()
    lengths[0] = longest
    return [torch.randint(3, vocab, (int(n),), generator=generator).tolist() for n in lengths]


def padded(given: Sequence[list[int]], places: int) -> list[Batch]:
    """Micro-batches in the order of the documents, padded on the right."""
    longest = max(map(len, given))
    rows = max(1, places // longest)
    return [_pad(given[i : i + rows], longest) for i in range(0, len(given), rows)]


def _pad(rows: Sequence[list[int]], longest: int) -> Batch:
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, 1 : len(row)] = ids[i, 1 : len(row)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(model: Any, given: Sequence[list[int]], longest: int, places: int) -> list[Batch]:
    """Micro-batches of packed rows."""
    collate: Callable[[Any], Any] = packing.collator(model, longest)
    rows = packing.pack([len(d) for d in given], longest)
    at_once = max(1, places // longest)
    groups = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
    return [collate([{"input_ids": given[i]} for row in group for i in row]) for group in groups]


def seconds(model: Any, batches: Sequence[Batch], tokens: int, rounds: int) -> tuple[float, float]:
    """Of one step over all batches, the median; and the loss, a mean over ``tokens``."""
    moved = [{k: v.to(device()) if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches]
    taken, loss = [], 0.0
    for _ in range(rounds + 1):
        _wait()
        started, losses = time.perf_counter(), []
        for batch in moved:
            with torch.autocast(device().type, torch.bfloat16):
                output = model(**batch, num_items_in_batch=torch.tensor(tokens, device=device()))
            output.loss.backward()
            losses.append(output.loss.detach())
        model.zero_grad(set_to_none=True)
        _wait()
        taken.append(time.perf_counter() - started)
        loss = float(torch.stack(losses).sum())
    return median(taken[1:]), loss


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """The three ways, one after the other on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--places", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = build(Setting("hf", given.shape, given.layers))
    ragged = documents(given.documents, given.length, model.config.vocab_size)
    real = sum(map(len, ragged))
    tokens = real - len(ragged)
    ways: dict[str, Any] = {}

    def measure(way: str, batches: Sequence[Batch]) -> None:
        took, loss = seconds(model, batches, tokens, given.rounds)
        places = sum(b["input_ids"].numel() for b in batches)
        ways[way] = {"s": round(took, 4), "tokens_per_s": round(real / took), "loss": loss, "places": places}
        print(f"{way:12} {took:8.3f} s  {real / took:9.0f} real tokens/s  loss {loss:.5f}  {places} places", flush=True)

    measure("padded", padded(ragged, given.places))
    with torch.autocast(device().type, torch.bfloat16):
        weft.optimize(model, mode="train", verify=False)
    measure("weft padded", padded(ragged, given.places))
    measure("weft packed", packed(model, ragged, given.length, given.places))
    gain = ways["weft packed"]["tokens_per_s"] / ways["padded"]["tokens_per_s"]
    print(f"weft packed over padded: {gain:.2f} x; mean length {real / len(ragged) / given.length:.2f} of the maximum")
    host = (gpu() or {}).get("name") or cpu_model()
    write(given.out or Path(__file__).parent / "results" / f"packed-{given.shape}-{slug(host)}.json", "packed",
          shape=given.shape, layers=given.layers, length=given.length, documents=given.documents, real_tokens=real,
          ways=ways, gain=round(gain, 3), rewrites=len(model.rewrite_report.rewrites))  # fmt: skip


if __name__ == "__main__":
    main()
