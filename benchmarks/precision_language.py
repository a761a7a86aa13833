"""Precision plans on a language model that was trained on real text, against plain formats and blind choices.

    python -m benchmarks.precision_language [--size small|full] [--minutes 12] [--out FILE]

A Llama-shaped model is trained on the source text of the Python packages installed beside it (``full``: 45 M parameters,
for a GPU; ``small``: 3 M, for a CPU), then stored in each way and compared on held-out files: perplexity, and KL divergence
from the model in 16 bits, with 95 % confidence intervals over sequences.
"""

from __future__ import annotations

import argparse
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .environment import cpu_model, gpu, slug, write
from .precision_arms import choices, interval, measured_record, plan_record, rounded_otherwise, stored_copy


@dataclass(frozen=True)
class Size:
    """A model and how it is trained."""

    hidden: int
    layers: int
    vocab: int
    length: int
    batch: int
    steps: int
    rate: float
    characters: int
    held_out: int


SIZES = {
    "small": Size(192, 6, 2048, 128, 16, 1500, 2e-3, 6_000_000, 64),
    "full": Size(512, 12, 8192, 512, 32, 6000, 1e-3, 120_000_000, 256),
}


def text(characters: int, seed: int = 0) -> tuple[str, str]:
    """Training and held-out text: Python files of the installed packages, other files in each."""
    files = sorted(p for p in Path(sysconfig.get_path("purelib")).rglob("*.py") if "test" not in p.parts)
    random.Random(seed).shuffle(files)
    held, rest = files[: len(files) // 20], files[len(files) // 20 :]
    return _read(rest, characters), _read(held, characters // 10)


def _read(files: list[Path], characters: int) -> str:
    parts, count = list[str](), 0
    for path in files:
        if count >= characters:
            break
        parts.append(path.read_text("utf-8", errors="ignore")[:20_000])
        count += len(parts[-1])
    return "\n".join(parts)


def tokens_of(size: Size) -> tuple[Tensor, Tensor]:
    """Training and held-out tokens, by a byte-level vocabulary learned on the training text."""
    train, held = text(size.characters)
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size.vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator([train[:4_000_000]], trainer)
    pieces = [train[i : i + 1_000_000] for i in range(0, len(train), 1_000_000)]
    ids = [i for e in tokenizer.encode_batch(pieces) for i in e.ids]
    return torch.tensor(ids), torch.tensor(tokenizer.encode(held).ids)


def trained(size: Size, tokens: Tensor, device: torch.device, minutes: float) -> Any:
    """The model, trained for so many steps, or until time is up."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=(8 * size.hidden // 3 + 63) // 64 * 64, vocab_size=size.vocab,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, num_key_value_heads=size.hidden // 64,
        max_position_embeddings=size.length, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1)
    batches, deadline = _batches(tokens, size), time.monotonic() + 60 * minutes
    for step in range(size.steps):
        left = min(1 - step / size.steps, (deadline - time.monotonic()) / (60 * minutes))
        if left <= 0:
            break
        optimizer.param_groups[0]["lr"] = size.rate * min((step + 1) / 100, left)
        ids = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
    return model.to(torch.bfloat16).eval()


def _batches(tokens: Tensor, size: Size) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, len(tokens) - size.length, (size.batch,), generator=generator)
        yield torch.stack([tokens[s : s + size.length] for s in starts.tolist()])


@torch.no_grad()
def compare(model: nn.Module, other: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For each held-out sequence, the mean negative log-likelihood under ``other``, and its mean divergence."""
    losses, divergences = [], []
    for ids in rows.split(8):
        p, q = (m(input_ids=ids).logits[:, :-1].float().log_softmax(-1) for m in (model, other))
        losses.append(-q.gather(-1, ids[:, 1:, None])[..., 0].mean(1))
        divergences.append((p.exp() * (p - q)).sum(-1).mean(1))
    return torch.cat(losses).cpu(), torch.cat(divergences).cpu()


def main() -> None:
    """Train, plan, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full" if torch.cuda.is_available() else "small")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size, device = SIZES[options.size], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, held = tokens_of(size)
    model = trained(size, train, device, options.minutes)
    rows = held[: len(held) // size.length * size.length].view(-1, size.length)[: size.held_out].to(device)
    calibration = [{"input_ids": ids.to(device)} for ids, _ in zip(_batches(train, size), range(4), strict=False)]
    found = choices(model, calibration)
    losses, _ = compare(model, model, rows)
    records: list[dict[str, Any]] = [{"arm": "16 bits", "perplexity": math.exp(float(losses.mean())), "kl": None}]
    _, kl = compare(model, rounded_otherwise(model, found.curve), rows)
    records.append({"arm": "16 bits, rounded otherwise", "perplexity": None, "kl": interval(kl)})
    for name, plan in found.plans.items():
        losses, kl = compare(model, stored_copy(model, plan, calibration), rows)
        perplexity = math.exp(float(losses.mean()))
        records.append({"arm": name, **plan_record(plan), "perplexity": perplexity, "kl": interval(kl)})
        print(f"{name:44} {plan.total_bytes / 1e6:8.2f} MB  perplexity {perplexity:8.3f}  "
              f"KL {records[-1]['kl']['mean']:.5f} ± {records[-1]['kl']['half']:.5f}", flush=True)  # fmt: skip
    host = (gpu() or {}).get("name") or cpu_model()
    out = options.out or Path(__file__).parent / "results" / f"precision-language-{options.size}-{slug(host)}.json"
    write(out, "precision-language", size=options.size, records=records, parameters=sum(p.numel() for p in model.parameters()),
          held_out_tokens=rows.numel(), **measured_record(found))  # fmt: skip


if __name__ == "__main__":
    main()
