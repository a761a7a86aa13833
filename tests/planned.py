"""Small models, plans of them that took no measuring, and what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from weft import PrecisionPlan
from weft.applying import apply_plan
from weft.quant.layers import Layer, LayerOption
from weft.quant.stored import FORMATS, stored_bytes
from weft.saving import describe

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A small Llama with weights as large as trained ones."""
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "num_hidden_layers": 1, "initializer_range": 0.2, **SIZES, **options}
    return LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=dtype).eval()


def tied() -> Any:
    """Embedding and head are one weight, in bfloat16."""
    return llama(torch.bfloat16, tie_word_embeddings=True)


def gpt2() -> Any:
    """A small GPT-2, whose linears lie by columns."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=1)
    ).eval()


def mixtral() -> Any:
    """Experts stacked in parameters of three dimensions."""
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    return MixtralForCausalLM(config).eval()


def batch() -> dict[str, Tensor]:
    """Random tokens."""
    return {"input_ids": torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))}


def logits(model: nn.Module) -> Tensor:
    """Of the batch."""
    with torch.no_grad():
        return model(**batch()).logits


def linears(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that is read by a product and may be chosen for, as (out_features, in_features), by path."""
    spared = ("embed", "lm_head", "wte", "wpe", "norm", "ln_", "gate.weight")
    found = {n: p for n, p in model.named_parameters() if p.dim() > 1 and not any(s in n for s in spared)}
    return {n.removesuffix(".weight"): p.t() if isinstance(model, GPT2LMHeadModel) else p for n, p in found.items()}


def plan_of(model: nn.Module, *chosen: str) -> PrecisionPlan:
    """A plan that stores the linears in ``chosen``, over and over; nothing is measured."""
    layers, formats = [], []
    for i, (path, weight) in enumerate(linears(model).items()):
        names = dict.fromkeys((chosen[i % len(chosen)], "16-bit"))
        options = tuple(LayerOption(f, stored_bytes(FORMATS[f], weight.shape, weight.dtype), 0.0) for f in names)
        dtype = str(weight.dtype).removeprefix("torch.")
        layers.append(Layer((path,), tuple(weight.shape), dtype, options))
        formats.append(chosen[i % len(chosen)])
    return PrecisionPlan(tuple(layers), tuple(formats), 0)


def stored(model: Any, *chosen: str) -> Any:
    """``model`` with its linears in those formats, and no rewrite, so that the same kernels run as elsewhere."""
    apply_plan(model, plan_of(model, *chosen))
    describe(model)
    return model
