"""The whole of weft on one small model, next to a twin that it does not touch. ``make demo`` runs this.

Two equal Llamas (NF4 weights by bitsandbytes, rank-16 LoRA by PEFT on all linears) are fine-tuned with the same seed on
the same text, which is this repository's own documents. One of them is optimized first. The loss curves, the greedy
continuations of one prompt and the report are printed; the exit status is 1 if the two models disagree.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import tiny
import torch
from torch import nn

from weft import optimize

PROMPT = "A rule is "
LARGEST_GAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""By how much a loss may differ. Rounding differs from the first step on, and training amplifies it."""


@dataclass
class Arm:
    """One of the two models: what it did, and how long its fastest step took."""

    losses: list[float]
    step_seconds: float
    tokens: list[int]


def fine_tune(model: nn.Module, batches: list[torch.Tensor]) -> tuple[list[float], float]:
    """Losses, and the time of the fastest step: on a busy machine the others tell of its load."""
    times = [time.perf_counter()]
    losses = tiny.train(model, batches, each=lambda step, loss: times.append(time.perf_counter()))
    return losses, min(b - a for a, b in pairwise(times))


def continue_greedily(model: nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """The ``count`` most likely tokens after ``prompt``, one after the other."""
    options = {"max_new_tokens": count, "do_sample": False, "no_repeat_ngram_size": 4}
    with tiny.without_gradients(model):
        found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return found[0, prompt.shape[1] :].tolist()


def run_arm(model: nn.Module, batches: list[torch.Tensor], prompt: torch.Tensor, count: int) -> Arm:
    """Fine-tune, then generate."""
    losses, seconds = fine_tune(model, batches)
    return Arm(losses, seconds, continue_greedily(model, prompt, count))


def print_curves(plain: list[float], rewritten: list[float]) -> float:
    """Both loss curves side by side; returns their largest difference."""
    print(f"\n{'step':>4}  {'original':>9}  {'optimized':>9}  {'difference':>10}")
    for step, (a, b) in enumerate(zip(plain, rewritten, strict=True)):
        print(f"{step:>4}  {a:>9.5f}  {b:>9.5f}  {abs(a - b):>10.1e}")
    gap = max(abs(a - b) for a, b in zip(plain, rewritten, strict=True))
    print(f"largest difference of the two curves: {gap:.1e}")
    return gap


def compare(plain: Arm, rewritten: Arm, dtype: torch.dtype, decode: Callable[[list[int]], str]) -> bool:
    """Print what both did; whether they agree."""
    gap = print_curves(plain.losses, rewritten.losses)
    print(f"fastest step: original {plain.step_seconds:.3f} s, optimized {rewritten.step_seconds:.3f} s")
    same = plain.tokens == rewritten.tokens
    print(f"\n{PROMPT!r} continued greedily, the same {len(plain.tokens)} tokens from both: {'yes' if same else 'no'}")
    print(f"  original   {decode(plain.tokens)!r}\n  optimized  {decode(rewritten.tokens)!r}")
    # In bfloat16 two nearly equal logits may swap: there the curves alone decide.
    return gap <= LARGEST_GAP[dtype] and (same or dtype != torch.float32)


def main() -> int:
    """Run both arms and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=60, help="tokens to generate")
    options = parser.parse_args()
    device, dtype = tiny.device_and_dtype()

    text = tiny.corpus()
    tokenizer = tiny.make_tokenizer(text)
    batches = tiny.make_batches(torch.tensor(tokenizer(text)["input_ids"]), options.steps)
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=device)
    print(f"Llama, {options.layers} layers, NF4 + LoRA r=16, {dtype}, {device}; {options.steps} steps of 4×128 tokens")

    original, optimized = (tiny.with_lora(tiny.four_bit_llama(len(tokenizer), options.layers)) for _ in range(2))
    optimized = optimize(optimized)
    print(f"optimized in {optimized.rewrite_report.total_seconds:.1f} s; fine-tuning both")
    arms = [run_arm(model, batches, prompt, options.tokens) for model in (original, optimized)]
    agreed = compare(*arms, dtype, tokenizer.decode)
    print(f"\n{optimized.rewrite_report}")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
