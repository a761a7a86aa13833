"""What the examples share: text that ships with the repository, a tokenizer made from it, and small random models.

Nothing is downloaded: the hub is switched off before transformers is imported.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

# bitsandbytes warns at import that it finds no compiled kernel for the CPU; its portable one is what runs here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

transformers_logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """CUDA and bfloat16 where there is a GPU; on a CPU float32, which it computes faster."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32


def corpus() -> str:
    """The repository's own documents."""
    names = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "LICENSE")
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)


def make_tokenizer(text: str, vocabulary: int = 257) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``text``; 257 leaves room for single bytes alone: few steps learn them."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocabulary, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_batches(ids: Tensor, steps: int, batch: int = 4, length: int = 128) -> list[Tensor]:
    """``steps`` batches of windows drawn from ``ids``, the same ones on every call."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(ids) - length, (steps, batch), generator=generator)
    return [torch.stack([ids[s : s + length] for s in row.tolist()]) for row in starts]


def llama_config(vocabulary: int, layers: int) -> LlamaConfig:
    """A Llama of about 700,000 parameters a layer, with grouped-query attention.

    Its weights are larger than usual: the base stays as it is drawn, and adapters learn faster from strong features.
    """
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        initializer_range=0.1,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def four_bit_llama(vocabulary: int, layers: int) -> nn.Module:
    """A random Llama, saved, and loaded by transformers in NF4 with double quantization; its head is not quantized."""
    device, dtype = device_and_dtype()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(vocabulary, layers), dtype=dtype)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=nf4, dtype=dtype, device_map={"": device}
        )


def with_lora(model: nn.Module) -> PeftModel:
    """``model`` with rank-16 LoRA on all its linears, drawn from a fixed seed."""
    torch.manual_seed(1)
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules=list(ADAPTED), task_type="CAUSAL_LM")
    return get_peft_model(model, adapters).train()


def without_gradients(model: nn.Module) -> torch.no_grad:
    """A context to compute in, with ``model`` in training mode (it has no dropout, so that changes no result).

    In evaluation mode bitsandbytes repacks 4-bit weights on some CPUs, for good, and computes in bfloat16: two models
    that agree to six digits would then agree to two.
    """
    model.train()
    return torch.no_grad()


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    rate: float = 3e-3,
    each: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Fine-tune what requires a gradient with AdamW; returns the loss of each step and passes it to ``each``."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        ids = batch.to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        each(step, losses[-1])
    return losses
