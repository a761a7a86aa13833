"""Train on documents of different lengths without padding: rows are shared, and no document sees another.

Prints the loss and the tokens of the same documents padded and packed, and why a convolutional model cannot be packed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Lfm2Config

from weft import optimize
from weft.packing import PackingError, check_packing, collator


def step(model: nn.Module, batch: dict[str, Any]) -> tuple[float, float]:
    """The loss of one batch, and the seconds that its forward and backward take, the second time."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        seconds = time.perf_counter() - started
    return float(loss.detach()), seconds


def convolutional(vocabulary: int) -> nn.Module:
    """A small random model with a convolution along the sequence."""
    config = Lfm2Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    """Pad, pack, compare; then a model that is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    text = tiny.corpus()
    tokenizer = tiny.make_tokenizer(text)
    paragraphs = [p for p in text.split("\n\n") if len(p) > 20][: options.documents]
    examples = [{"input_ids": tokenizer(p)["input_ids"][:512]} for p in paragraphs]
    lengths = [len(e["input_ids"]) for e in examples]
    print(f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")

    model = tiny.with_lora(tiny.four_bit_llama(len(tokenizer), options.layers))
    pack = collator(model, max_length=512)
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = optimize(model, mode="train")
    for name, batch in (("padded", dict(pad(examples))), ("packed", pack(examples))):
        loss, seconds = step(model, batch)
        rows, width = batch["input_ids"].shape
        print(f"{name}: {rows} rows of {width}, {rows * width} places, {seconds:.2f} s, loss {loss:.5f}")

    try:
        check_packing(convolutional(len(tokenizer)))
    except PackingError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
