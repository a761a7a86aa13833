"""What it costs to plan the precision of a large model: seconds, peak memory of the device, bytes afterwards.

    python -m benchmarks.precision_size [--size tiny|8b] [--tokens 16384] [--below 0.6] [--out FILE]

``8b`` has the shapes of Llama 3 8B: 32 layers, 4096 wide, a vocabulary of 128,256, bfloat16 (16 GB). Weights and tokens are
random: they cost what trained ones cost, and say nothing about which formats a trained model would get. ``tiny`` has as
many layers, for a CPU. The plan may take ``1 - below`` of the model's 16-bit bytes; then it is put into force.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from weft import PrecisionBudget, precision
from weft.applying import apply_plan
from weft.passes.candidates import model_bytes

from .environment import cpu_model, gpu, slug, write

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 448, "vocab_size": 512, "num_hidden_layers": 32,
             "num_attention_heads": 4, "num_key_value_heads": 1},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
ROWS = 8
"""Calibration batches, of one sequence each."""
PHASES = {"quantizing": "_candidates", "alone": "Sensitivity.alone", "whole choices": "make_plan"}
"""What is timed, and what of :mod:`weft.precision` does it."""


def random_model(size: str, device: torch.device) -> nn.Module:
    """Made on the device, in bfloat16: there is never a second copy."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], max_position_embeddings=8192, tie_word_embeddings=False)  # pyright: ignore
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def batches(model: nn.Module, tokens: int) -> list[dict[str, Tensor]]:
    """Random tokens in :data:`ROWS` batches."""
    generator = torch.Generator().manual_seed(1)
    classes = int(model.config.vocab_size)  # pyright: ignore
    ids = torch.randint(classes, (ROWS, 1, tokens // ROWS), generator=generator)
    return [{"input_ids": row.to(next(model.parameters()).device)} for row in ids]


class Watch:
    """Seconds and the largest number of bytes allocated, of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.phases = device, dict[str, dict[str, float]]()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One of them; its peak starts from what is allocated by then."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        self.phases[name] = {"seconds": round(time.perf_counter() - started, 2)}
        if on_gpu:
            self.phases[name] |= {
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "peak_reserved": torch.cuda.max_memory_reserved(),
            }
        print(f"{name}: {self.phases[name]}", flush=True)

    def wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, as a phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return timed


def planned(model: nn.Module, memory: int, tokens: int, watch: Watch) -> tuple[Any, Any, float]:
    """The plan, the weights as it stores them, and seconds; each phase on ``watch``."""
    calibration = batches(model, tokens)
    options = precision.Options(PrecisionBudget(memory=memory))
    with ExitStack() as stack:
        for name, path in PHASES.items():
            owner, _, attribute = path.rpartition(".")
            holder = getattr(precision, owner) if owner else precision
            call = getattr(holder, attribute)
            stack.enter_context(mock.patch.object(holder, attribute, _method(watch.wrapped(name, call))))
        started = time.perf_counter()
        plan, stored = precision.measure(model, calibration, options)
    return plan, stored, time.perf_counter() - started


def _method(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(*args, **kwargs)


def main() -> None:
    """Make, plan, store, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--tokens", type=int, default=16384 if torch.cuda.is_available() else 512)
    parser.add_argument(
        "--below", type=float, default=0.6, help="share of the 16-bit bytes that is to be saved at least"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watch = Watch(device)
    with watch.phase("making the model"):
        model = random_model(options.size, device)
    before = model_bytes(model)
    plan, stored, seconds = planned(model, int((1 - options.below) * before), options.tokens, watch)
    with watch.phase("storing"):
        apply_plan(model, plan, stored)
    after, peaks = model_bytes(model), [p.get("peak_reserved", 0) for p in watch.phases.values()]
    allocated = [p.get("peak_allocated", 0) for p in watch.phases.values()]
    print(plan, f"\n{seconds:.0f} s, {max(allocated) / 1e9:.2f} GB allocated at most, {max(peaks) / 1e9:.2f} reserved; "
          f"{before / 1e9:.3f} GB before, {after / 1e9:.3f} after: {1 - after / before:.1%} less", flush=True)  # fmt: skip
    host = (gpu() or {}).get("name") or cpu_model()
    out = options.out or Path(__file__).parent / "results" / f"precision-size-{options.size}-{slug(host)}.json"
    write(out, "precision-size", size=options.size, tokens=options.tokens, shapes=SIZES[options.size],
          parameters=before // 2, seconds=round(seconds, 1), phases=watch.phases, peak_allocated=max(allocated),
          peak_reserved=max(peaks), bytes_before=before, bytes_planned=plan.total_bytes, bytes_after=after,
          formats=Counter(plan.formats), kl=plan.kl, notes=plan.notes)  # fmt: skip


if __name__ == "__main__":
    main()
