"""Which layers of a vision-language model suffer from 4 bits: vision tower, projector or language model?

A tiny Llava is trained until it captions generated pictures (a shape, its color, the ground) that it has never seen, and
then stored as it is, in NF4 everywhere, and as weft plans it in the bytes of that and in a tenth more. Calibration counts
the predictions of the captions alone: ``logits_to_keep`` has the model give no others.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from weft import PrecisionBudget, PrecisionPlan, optimize, plan_precision

SIDE, PATCH = 32, 8
COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
SHAPES = ("square", "frame", "cross", "bar")
GROUNDS = {"black": 0.0, "grey": 0.5}
WORDS = ("<picture>", "<start>", "a", *COLORS, *SHAPES, "on", *GROUNDS)
PICTURE_TOKENS = (SIDE // PATCH) ** 2
MORE = 1.10
"""Bytes, relative to NF4 everywhere, of the last arm."""


def drawn(shape: str, at: Tensor, size: float) -> Tensor:
    """Where a shape is, (SIDE, SIDE), as zeros and ones."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    y, x = (rows - at[0]).abs(), (columns - at[1]).abs()
    inside = {
        "square": torch.maximum(x, y) <= size,
        "frame": (torch.maximum(x, y) <= size) & (torch.maximum(x, y) >= size - 2),
        "cross": (torch.minimum(x, y) <= 2) & (torch.maximum(x, y) <= size),
        "bar": (y <= 2) & (x <= size),
    }
    return inside[shape].float()


def pictures(count: int, seed: int) -> dict[str, Tensor]:
    """``count`` noisy pictures with captions of six words."""
    generator = torch.Generator().manual_seed(seed)
    index = {word: i for i, word in enumerate(WORDS)}
    images, captions = [], []
    for _ in range(count):
        names = [list(COLORS), SHAPES, list(GROUNDS)]
        color, shape, ground = (n[int(torch.randint(len(n), (), generator=generator))] for n in names)
        at, size = 13 + 6 * torch.rand(2, generator=generator), 7 + 4 * float(torch.rand((), generator=generator))
        mask = drawn(shape, at, size)
        tint = torch.tensor(COLORS[color], dtype=torch.float32)[:, None, None]
        noise = 0.1 * torch.randn(3, SIDE, SIDE, generator=generator)
        images.append(noise + torch.where(mask > 0, tint, GROUNDS[ground]))
        captions.append([0] * PICTURE_TOKENS + [index[word] for word in ("<start>", "a", color, shape, "on", ground)])
    device, _ = tiny.device_and_dtype()
    return {"input_ids": torch.tensor(captions).to(device), "pixel_values": torch.stack(images).to(device)}


CAPTION = 5
"""Words that are predicted; those before the last one are read."""


def questions(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs whose only predictions are those of the captions' words."""
    return {
        "input_ids": batch["input_ids"][:, :-1],
        "pixel_values": batch["pixel_values"].to(dtype),
        "logits_to_keep": CAPTION,
    }


def tiny_llava() -> nn.Module:
    """Three layers that see, a projector, three layers that speak. Large random weights learn faster at this size."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    vision = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, initializer_factor=3.0)
    text = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.06
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=0,
        image_seq_length=PICTURE_TOKENS,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def trained(steps: int, rate: float = 2e-3) -> nn.Module:
    """The model trained in 32 bits, then stored in 16."""
    device, _ = tiny.device_and_dtype()
    model = tiny_llava().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    for step in range(steps):
        batch = pictures(32, seed=step + 1)
        found = model(**questions(batch, torch.float32)).logits
        loss = cross_entropy(found.flatten(0, 1), batch["input_ids"][:, -CAPTION:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval().to(torch.bfloat16)


@torch.no_grad()
def judge(name: str, model: nn.Module, size: int, test: dict[str, Tensor], original: Tensor | None) -> Tensor:
    """Print one row: size, divergence of the captions' words, captions that are right in every word; return predictions."""
    logits = model(**questions(test, torch.bfloat16)).logits.float().log_softmax(-1)
    reference = logits if original is None else original
    kl = (reference.exp() * (reference - logits)).sum(-1).mean().item()
    right = (logits.argmax(-1) == test["input_ids"][:, -CAPTION:]).all(-1).float().mean().item()
    print(f"{name:22} {size / 1e3:7.1f} KB   KL {kl:8.5f}   captions right {right:.1%}")
    return logits


def where_it_hurts(plan: PrecisionPlan) -> None:
    """Print the harm of each part of the model, each weight alone in its smallest format, added up."""
    harm: defaultdict[str, float] = defaultdict(float)
    for layer in plan.layers:
        harm[layer.path.partition("layers.")[0].rstrip(".")] += layer.smallest.sensitivity
    total = sum(harm.values()) or 1.0
    for part, kl in sorted(harm.items(), key=lambda item: -item[1]):
        print(f"  {part:45} {kl:.5f}  {kl / total:.0%}")


def main() -> None:
    """Train, plan, store, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--measurements", type=int, default=8, help="whole choices measured at most, for each plan")
    options = parser.parse_args()

    model = trained(options.steps)
    calibration = [questions(pictures(32, seed=-1 - i), torch.bfloat16) for i in range(2)]
    started = time.perf_counter()
    plain = plan_precision(model, calibration, formats=("nf4", "16-bit"), measurements=1)

    def planned(memory: int) -> PrecisionPlan:
        budget = PrecisionBudget(memory=memory)
        return plan_precision(model, calibration, budget=budget, measurements=options.measurements)

    plans = {
        "NF4 everywhere": plain,
        "weft, as many bytes": planned(plain.total_bytes),
        f"weft, {MORE - 1:+.0%} bytes": planned(round(MORE * plain.total_bytes)),
    }
    print(f"three plans in {time.perf_counter() - started:.0f} s; the last of them:\n")
    print(list(plans.values())[-1])
    print("\nwhere NF4 hurts, one weight at a time:")
    where_it_hurts(plain)

    test = pictures(512, seed=10**6)
    print(f"\non {len(test['input_ids'])} pictures never seen:")
    original = judge("16-bit", model, sum(p.nbytes for p in model.parameters()), test, None)
    for name, plan in plans.items():
        stored = optimize(copy.deepcopy(model), precision=plan, calibration=calibration)
        judge(name, stored, plan.total_bytes, test, original)


if __name__ == "__main__":
    main()
