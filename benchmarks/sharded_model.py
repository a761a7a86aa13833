"""A QLoRA model of random weights over several processes, made block by block: no process ever holds all of it.

The architecture is built on the meta device; a block's weights are drawn on this process' device, quantized, and sharded
before the next block's exist. All processes draw the same numbers.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from weft.rewrite.regions import find_blocks
from weft.sharding import keep_four_bit

from .arm_settings import Setting
from .arms import RANK, config_of, targets_of

STD = 0.02
STORAGE = torch.bfloat16
"""FSDP2 of torch before 2.13 shards no packed whole numbers."""


def qlora_on_meta(setting: Setting) -> Any:
    """The architecture with 4-bit linears and adapters, without any value."""
    targets = targets_of(setting)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(setting), dtype=torch.bfloat16, attn_implementation="sdpa")
        for path, linear in [(p, m) for p, m in model.named_modules() if p.rpartition(".")[2] in targets]:
            parent, _, name = path.rpartition(".")
            settings: dict[str, Any] = {
                "bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "quant_storage": STORAGE
            }  # fmt: skip
            packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **settings)
            setattr(model.get_submodule(parent), name, packed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapters = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    return get_peft_model(model, adapters, low_cpu_mem_usage=True)


def shard_by_blocks(model: nn.Module, device: torch.device, **options: Any) -> nn.Module:
    """Give every parameter a random value, block by block, and leave each process with its share."""
    torch.manual_seed(0)
    for block in find_blocks(model).values():
        materialize(block, device)
        fully_shard(block, **options)
    materialize(model, device)
    fully_shard(model, **options)
    keep_four_bit(model)
    return model


@torch.no_grad()
def materialize(module: nn.Module, device: torch.device) -> None:
    """Random values in place of every parameter on the meta device; buffers are computed anew by the module's own class."""
    for owner in module.modules():
        if isinstance(owner, bnb.nn.Linear4bit):
            if owner.weight.is_meta:
                owner.weight = _quantized(owner, device)
            continue
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                value = value.fill_(1.0) if parameter.dim() == 1 else value.normal_(std=STD)
                setattr(owner, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        if any(b.is_meta for b in owner.buffers(recurse=False)):
            made: Any = type(owner)(owner.config)  # pyright: ignore[reportCallIssue]
            for name, buffer in made.named_buffers(recurse=False):
                owner.register_buffer(name, buffer.to(device), persistent=False)


def _quantized(linear: Any, device: torch.device) -> Any:
    drawn = torch.empty(linear.out_features, linear.in_features, dtype=torch.bfloat16, device=device).normal_(std=STD)
    settings: dict[str, Any] = {
        "quant_type": "nf4", "compress_statistics": True, "quant_storage": STORAGE, "module": linear
    }  # fmt: skip
    return bnb.nn.Params4bit(drawn, requires_grad=False, **settings).to(device)
