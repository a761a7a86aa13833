"""Fine-tune a 4-bit model with LoRA through transformers' Trainer, save the adapter, load it without weft.

The one line that concerns weft is ``model = optimize(model)``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import tiny
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from weft import optimize


def fine_tune(model: nn.Module, batches: list[Tensor], folder: Path) -> None:
    """Train the adapters and save them."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=batches[0].shape[0],
        max_steps=len(batches),
        learning_rate=3e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits that ``model`` computes for ``ids``."""
    with tiny.without_gradients(model):
        return model(input_ids=ids).logits.float()


def main() -> None:
    """Optimize, train, save, reload, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    text = tiny.corpus()
    tokenizer = tiny.make_tokenizer(text)
    batches = tiny.make_batches(torch.tensor(tokenizer(text)["input_ids"]), options.steps)

    model = tiny.with_lora(tiny.four_bit_llama(len(tokenizer), options.layers))
    model = optimize(model)
    print(model.rewrite_report)

    with tempfile.TemporaryDirectory() as folder:
        fine_tune(model, batches, Path(folder))
        base = tiny.four_bit_llama(len(tokenizer), options.layers)
        reloaded = PeftModel.from_pretrained(base, Path(folder) / "adapter")
    ids = batches[0].to(next(model.parameters()).device)
    difference = (logits(model, ids) - logits(reloaded, ids)).abs().max().item()
    print(f"largest difference of the logits, trained model and adapter reloaded by PEFT alone: {difference:.1e}")


if __name__ == "__main__":
    main()
