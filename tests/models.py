"""Tiny models, from configs and spelt by hand, and the comparison of an optimized model with its untouched twin."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import weft

VOCABULARY = 61
Inputs = dict[str, Any]


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random Llama of two layers with grouped-query attention."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def with_lora(model: nn.Module, seed: int = 1, **options: Any) -> PeftModel:
    """``model`` with adapters on all linears that already do something."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(model, LoraConfig(**settings))
    fill_adapters(adapted)
    return adapted.train()


def fill_adapters(model: nn.Module) -> None:
    """Give every B of an adapter values: at zero neither it nor A would show."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def in_four_bits(model: PreTrainedModel, nested: bool = True, storage: torch.dtype = torch.uint8) -> PreTrainedModel:
    """``model`` with bitsandbytes NF4 weights in its blocks; rows must be whole blocks of 64."""
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in path]
    for path, linear in linears:
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32,
            quant_storage=storage,
        )  # fmt: skip
        weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=nested, quant_storage=storage
        )
        packed.weight = weight.to("cpu")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed)
    return model


def batch(rows: int = 2, length: int = 9, seed: int = 0, padded: bool = False, labels: bool = True) -> Inputs:
    """Token ids, with labels and with the end of the last row padded where asked for."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if padded else {"input_ids": ids}
    if labels:
        made["labels"] = ids.clone()
    if padded:
        made["attention_mask"][-1, length // 2 :] = 0
        if labels:
            made["labels"][-1, length // 2 :] = -100
    return made


def outcome(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Loss, logits and the gradient of every parameter that has one; the model's own gradients are left empty."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    found = {"logits": output.logits.detach().clone()}
    if output.loss is not None:
        found |= {"loss": output.loss.detach()}
    if output.loss is not None and output.loss.requires_grad:
        output.loss.backward()
        found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[Any, Tensor], wanted: dict[Any, Tensor], rounding: float = 2e-5) -> None:
    """Equal within what float32, or whatever rounds more, leaves of sums taken in another order."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        size = max(float(value.abs().max()), 1e-2)
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=rounding * size, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_identical(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal in every bit."""
    assert found.keys() == wanted.keys()
    assert not [name for name, value in wanted.items() if not torch.equal(found[name], value)]


def quickly(model: nn.Module, verify: bool = False, **options: Any) -> nn.Module:
    """``optimize`` on short examples; replay has tests of its own."""
    return weft.optimize(model, **{"example_inputs": batch(2, 6), "verify": verify, **options})


def twin(model: nn.Module) -> nn.Module:
    """A copy to compare with."""
    return copy.deepcopy(model)


# spelt by hand ------------------------------------------------------------------------------------------------------
class Norm(nn.Module):
    """RMSNorm as somebody writes it who has never seen a library."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        length = (x.square().sum(-1, keepdim=True) / x.shape[-1] + 1e-5).sqrt()
        return x / length * (1 + self.gain)


class Block(nn.Module):
    """Attention of one head and a gated MLP, with an adapter by hand on one projection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.before, self.between = Norm(size), Norm(size)
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size)
        self.down_low = nn.Parameter(torch.randn(2, size) * 0.3)
        self.up_low = nn.Parameter(torch.randn(size, 2) * 0.3)
        self.fused = nn.Linear(size, 4 * size, bias=False)
        self.back = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = self.qkv(h).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), is_causal=True).squeeze(
            1
        )
        x = x + self.out(mixed) + 0.5 * (mixed @ self.down_low.T @ self.up_low.T)
        gate, up = self.fused(self.between(x)).chunk(2, -1)
        return x + self.back(F.silu(gate) * up)


class Stack(nn.Module):
    """What loops over the blocks."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(layers))
        self.final = Norm(size)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.final(h)


class Output(dict[str, Any]):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class RootLoop(Stack):
    """The root itself runs the loop, the head and the loss."""

    def __init__(self, size: int = 16, layers: int = 2) -> None:
        torch.manual_seed(0)
        super().__init__(size, layers)
        self.head = nn.Linear(size, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(super().forward(input_ids))
        if labels is None:
            return Output(logits=logits, loss=None)
        shifted = logits[:, :-1].reshape(-1, VOCABULARY)
        return Output(logits=logits, loss=F.cross_entropy(shifted, labels[:, 1:].reshape(-1)))


class Nested(nn.Module):
    """Loop, head and loss in modules of their own."""

    def __init__(self, size: int = 16, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack = Stack(size, layers)
        self.head = nn.Linear(size, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(self.stack(input_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits=logits, loss=loss)


class NoBlocks(nn.Module):
    """Nothing is repeated."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, size)
        self.norm = Norm(size)
        self.gate, self.up = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size)
        self.head = nn.Linear(2 * size, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        h = self.norm(self.embed(input_ids))
        logits = self.head(F.gelu(self.gate(h)) * self.up(h))
        loss = None if labels is None else F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
        return Output(logits=logits, loss=loss)
