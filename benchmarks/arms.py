"""The models that the training benchmark compares: one architecture, random weights, LoRA on all linears, by arm.

All arms start from the same weights and adapters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arm_settings import ATTENTION, MLP, SHAPES, TARGETS, TOKENS, Setting

RANK = 16


def device() -> torch.device:
    """The first CUDA device, or the CPU for trying the program out."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config_of(setting: Setting) -> Any:
    """The model's config."""
    import transformers

    name, fields = SHAPES[setting.shape]
    layers = {} if setting.layers is None else {"num_hidden_layers": setting.layers}
    return getattr(transformers, name)(**fields | layers | TOKENS)


@contextmanager
def _bfloat16() -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def random_model(setting: Setting) -> Any:
    """The base model in bfloat16, the same weights every time."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with _bfloat16(), device():
        return AutoModelForCausalLM.from_config(config_of(setting), attn_implementation="sdpa")


def save(setting: Setting) -> Path:
    """Write the base model and a small tokenizer to ``setting.folder``, unless they are there."""
    done = setting.folder / "done"
    if not done.exists():
        setting.folder.mkdir(parents=True, exist_ok=True)
        random_model(setting).save_pretrained(setting.folder)
        _tokenizer().save_pretrained(setting.folder)
        done.touch()
    return setting.folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 50, trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build(setting: Setting) -> Any:
    """The model of an arm with its adapters, in training mode; ``torch.compile`` is applied, weft is not."""
    model = _unsloth(setting) if setting.base == "unsloth" else _peft(setting)
    draw_adapters(model)
    model.train()
    model.config.use_cache = False
    if setting.base == "compile":
        model.compile(dynamic=False)
    if setting.base == "regional":
        from transformers.modeling_layers import GradientCheckpointingLayer

        for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
            layer.compile(dynamic=False)
    return model


def targets_of(setting: Setting) -> list[str]:
    """Names of the linears."""
    return TARGETS.get(SHAPES[setting.shape][0], ATTENTION + MLP)


def _lora(setting: Setting) -> dict[str, Any]:
    """LoRA on every linear."""
    return {
        "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "bias": "none", "target_modules": targets_of(setting)
    }  # fmt: skip


def _unsloth(setting: Setting) -> Any:
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    checkpointing = "unsloth" if setting.checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        str(save(setting)), max_seq_length=setting.length, dtype=torch.bfloat16, load_in_4bit=setting.nf4
    )
    return FastLanguageModel.get_peft_model(
        model, use_gradient_checkpointing=checkpointing, random_state=0, **_lora(setting)
    )  # fmt: skip


def _peft(setting: Setting) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if setting.base == "liger":
        _apply_liger(setting)
    model = _load(setting) if setting.loads else random_model(setting)
    options = {"use_reentrant": False}
    # the preparation casts embeddings and head to float32; TRL does without, and so does weft
    if setting.nf4 and setting.base != "weft":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=setting.checkpointing, gradient_checkpointing_kwargs=options
        )
        return get_peft_model(model, LoraConfig(**_lora(setting)))
    if setting.checkpointing and not (setting.base == "weft" and setting.memory):
        model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(**_lora(setting)))


def _apply_liger(setting: Setting) -> None:
    import liger_kernel.transformers as liger  # pyright: ignore[reportMissingImports]

    llama = SHAPES[setting.shape][0] == "LlamaConfig"
    (liger.apply_liger_kernel_to_llama if llama else liger.apply_liger_kernel_to_qwen2)()


def _load(setting: Setting) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    where = {"": 0} if device().type == "cuda" else {"": "cpu"}
    return AutoModelForCausalLM.from_pretrained(
        save(setting), dtype=torch.bfloat16, device_map=where, attn_implementation="sdpa",
        quantization_config=quantization,
    )  # fmt: skip


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    """The same adapters in every arm, and B not zero, so that every gradient of the first step says something."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
            parameter.copy_(drawn if "lora_A" in name else 0.1 * drawn)
