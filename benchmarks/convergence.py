"""200 steps of supervised fine-tuning, weft beside transformers + PEFT: the same weights, the same batches, every loss.

    python -m benchmarks.convergence [--size full|small|mini|tiny] [--steps 200] [--minutes 4] [--out FILE]

A Llama-shaped model is first trained on the source text of installed packages (see :mod:`.precision_language`), then
fine-tuned with LoRA on excerpts of other files, of ragged length, in {float32, bfloat16} × {LoRA, QLoRA} × {padded, packed}.
A third arm says what a difference means: transformers + PEFT with its attention written out, as exact as the first and
rounded otherwise. ``python -m benchmarks.render_convergence`` draws the curves.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from weft import optimize
from weft.packing import collator

from .environment import cpu_model, gpu, slug, write
from .precision_language import SIZES, Size, tokens_of, trained

ARMS = ("hf", "weft", "hf, attention written out")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL_SIZES = {
    **SIZES,
    "tiny": Size(64, 2, 512, 64, 8, 60, 2e-3, 400_000, 8),
    "mini": Size(128, 4, 1024, 128, 8, 500, 2e-3, 1_500_000, 16),
}
LAST = 20
"""Steps over which the losses at the end are averaged."""


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    dtype: str
    weights: str
    data: str


CELLS = [Cell(*each) for each in product(DTYPES, ("LoRA", "QLoRA"), ("padded", "packed"))]


def documents(tokens: Tensor, size: Size, count: int) -> list[Tensor]:
    """Excerpts of held-out text, between 16 tokens and ``size.length``, a quarter of that in the mean."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.empty(count).exponential_(4 / size.length, generator=generator)
    lengths = drawn.clamp(16, size.length).long().tolist()
    starts = torch.randint(0, len(tokens) - size.length, (count,), generator=generator).tolist()
    return [tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def padded(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows filled up to the longest."""
    ids = [e["input_ids"] for e in examples]
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # noqa: E731
    return {
        "input_ids": pad(ids, 0), "attention_mask": pad([torch.ones_like(i) for i in ids], 0), "labels": pad(ids, -100),
    }  # fmt: skip


def load(folder: Path, cell: Cell, arm: str, device: torch.device) -> Any:
    """The trained model in the cell's dtype and storage, with fresh adapters, the same in every arm."""
    dtype = DTYPES[cell.dtype]
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": str(device)},
        attn_implementation="eager" if arm.endswith("written out") else "sdpa",
        quantization_config=stored if cell.weights == "QLoRA" else None,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def fine_tune(model: Any, batches: Sequence[dict[str, Any]], rate: float) -> dict[str, list[float]]:
    """Loss and gradient norm of every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    device, losses, norms = parameters[0].device, [], []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10, (len(batches) - step) / len(batches))
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        loss = model(**inputs).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": _rounded(losses), "gradient_norms": _rounded(norms)}


def _rounded(values: Sequence[Tensor]) -> list[float]:
    return [float(f"{v:.8g}") for v in torch.stack(list(values)).float().tolist()]


def differences(arm: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """How far an arm is from the first one: at most in any step, at the end, and in the first gradient."""
    losses = list(zip(arm["losses"], reference["losses"], strict=True))
    end = [sum(r["losses"][-LAST:]) / len(r["losses"][-LAST:]) for r in (arm, reference)]
    norms = arm["gradient_norms"][0], reference["gradient_norms"][0]
    return {
        "largest": max(abs(a - b) for a, b in losses),
        "largest_relative": max(abs(a / b - 1) for a, b in losses),
        "end": end[0] - end[1],
        "first_gradient_norm": norms[0] / norms[1] - 1,
    }


def run_cell(
    cell: Cell, folder: Path, size: Size, chosen: Sequence[Tensor], device: torch.device, rate: float
) -> dict[str, Any]:
    """All arms of one comparison."""
    groups = [chosen[i : i + size.batch] for i in range(0, len(chosen), size.batch)]
    examples = [[{"input_ids": ids} for ids in group] for group in groups]
    arms: dict[str, Any] = {}
    for arm in ARMS:
        model = load(folder, cell, arm, device)
        collate: Callable[[Any], Any] = padded if cell.data == "padded" else collator(model, size.length)
        batches = [collate(group) for group in examples]
        if arm == "weft":
            model = optimize(model)
        arms[arm] = fine_tune(model, batches, rate)
        if arm == "weft":
            rules = [r.rule for r in model.rewrite_report.rewrites]
            arms[arm]["rewrites"] = {rule: rules.count(rule) for rule in sorted(set(rules))}
            arms[arm]["notes"] = list(model.rewrite_report.notes)
        if arm != "hf":
            arms[arm] |= differences(arms[arm], arms["hf"])
    print(
        f"{cell.dtype:9} {cell.weights:6} {cell.data:7} loss {arms['hf']['losses'][0]:.4f} → {arms['hf']['losses'][-1]:.4f}; "
        + "; ".join(f"{arm}: off by {arms[arm]['largest']:.1e} at most" for arm in ARMS[1:]),
        flush=True,
    )
    return {"dtype": cell.dtype, "weights": cell.weights, "data": cell.data, "arms": arms}


def main() -> None:
    """Train a base model, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=ALL_SIZES, default="full" if torch.cuda.is_available() else "small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=4, help="for training the base model")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--data", nargs="+", choices=("padded", "packed"), default=["padded", "packed"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    size, device = ALL_SIZES[given.size], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, held = tokens_of(size)
    base = trained(size, train, device, given.minutes)
    chosen = documents(held, size, given.steps * size.batch)
    with tempfile.TemporaryDirectory() as name:
        base.save_pretrained(name)
        parameters = sum(p.numel() for p in base.parameters())
        del base
        wanted = [cell for cell in CELLS if cell.data in given.data]
        records = [run_cell(cell, Path(name), size, chosen, device, given.rate) for cell in wanted]
    host = (gpu() or {}).get("name") or cpu_model()
    out = given.out or Path(__file__).parent / "results" / f"convergence-{given.size}-{slug(host)}.json"
    tokens = sum(len(d) for d in chosen)
    write(out, "convergence", size=given.size, parameters=parameters, steps=given.steps, documents=len(chosen),
          tokens=tokens, mean_length=round(tokens / len(chosen)), row=size.length, cells=records)  # fmt: skip
    worst = max(r["arms"]["weft"]["largest"] for r in records)
    print(f"largest difference of weft's losses from transformers + PEFT: {worst:.1e}")
    if not math.isfinite(worst):
        raise SystemExit("a loss is not finite")


if __name__ == "__main__":
    main()
