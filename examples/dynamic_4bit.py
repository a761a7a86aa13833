"""Which layers of a model to keep in more than 4 bits, measured, and what that is worth.

A small Llama is trained on the repository's documents and then stored four ways: as it is (16 bits), in NF4 everywhere,
as weft plans it in the bytes of that, and as weft plans it in a tenth more. Each is judged on text that neither training
nor planning has seen: by its loss, and by how far its predictions are from those of the model in 16 bits.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from weft import PrecisionBudget, PrecisionPlan, optimize, plan_precision

MORE = 1.10
"""Bytes, relative to NF4 everywhere, of the last arm."""
FORMATS = ("nf4", "nf4-feedback", "16-bit")
"""Without int8: bitsandbytes' config can describe such a model, and ``save_pretrained`` write it."""
Batches = list[dict[str, Tensor]]


def split_text(held_out: float = 0.15) -> tuple[str, str]:
    """The repository's documents without their last part, and that."""
    text = tiny.corpus()
    cut = round((1 - held_out) * len(text))
    return text[:cut], text[cut:]


def trained_llama(vocabulary: int, ids: Tensor, steps: int, layers: int) -> nn.Module:
    """A Llama of a quarter of a million parameters a layer, trained in 32 bits, then stored in 16."""
    device, _ = tiny.device_and_dtype()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    losses = tiny.train(model, tiny.make_batches(ids, steps, batch=8), rate=2e-3)
    print(f"trained for {steps} steps: loss {losses[0]:.2f} → {losses[-1]:.2f}")
    return model.eval().to(torch.bfloat16)


def windows(ids: Tensor, count: int, length: int = 128) -> Batches:
    """``count`` batches of two windows each, one after the other; fewer if the text is shorter."""
    whole = ids[: len(ids) // (2 * length) * 2 * length].view(-1, 2, length)
    device, _ = tiny.device_and_dtype()
    return [{"input_ids": rows.to(device)} for rows in whole[:count]]


@torch.no_grad()
def logits(model: nn.Module, batches: Batches) -> Tensor:
    """Predictions for all but the last token of each row, as log-probabilities in 32 bits."""
    return torch.cat([model(**inputs).logits[:, :-1].float().log_softmax(-1).cpu() for inputs in batches])


def judge(name: str, size: int, found: Tensor, original: Tensor, batches: Batches) -> None:
    """Print one row: size, divergence from the original, loss."""
    targets = torch.cat([inputs["input_ids"][:, 1:].cpu() for inputs in batches])
    loss = cross_entropy(found.flatten(0, 1), targets.flatten()).item()
    kl = (original.exp() * (original - found)).sum(-1).mean().item()
    print(f"{name:22} {size / 1e3:8.1f} KB   KL {kl:8.2e}   loss {loss:.4f}")


def main() -> None:
    """Train, plan, store, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--measurements", type=int, default=12, help="whole choices measured at most, for each plan")
    options = parser.parse_args()

    seen, unseen = split_text()
    tokenizer = tiny.make_tokenizer(seen)
    ids, held_out = (torch.tensor(tokenizer(text)["input_ids"]) for text in (seen, unseen))
    model = trained_llama(len(tokenizer), ids, options.steps, options.layers)
    calibration, test = windows(ids, 4), windows(held_out, 16)

    def planned(memory: int) -> PrecisionPlan:
        budget = PrecisionBudget(memory=memory, formats=FORMATS)
        return plan_precision(model, calibration, budget=budget, measurements=options.measurements)

    started = time.perf_counter()
    plain = plan_precision(model, calibration, formats=("nf4", "16-bit"), measurements=1)
    plans = {
        "NF4 everywhere": plain,
        "weft, as many bytes": planned(plain.total_bytes),
        f"weft, {MORE - 1:+.0%} bytes": planned(round(MORE * plain.total_bytes)),
    }
    print(f"three plans in {time.perf_counter() - started:.0f} s; the last of them:\n")
    print(list(plans.values())[-1])

    print(f"\non {len(test)} batches of unseen text:")
    original = logits(model, test)
    judge("16-bit", sum(p.nbytes for p in model.parameters()), original, original, test)
    for name, plan in plans.items():
        stored = optimize(copy.deepcopy(model), precision=plan, calibration=calibration, example_inputs=test[0])
        judge(name, plan.total_bytes, logits(stored, test), original, test)


if __name__ == "__main__":
    main()
