"""Every kind of adapter, on every kind of linear: fused or refused, the model computes what it computed."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from .models import VOCABULARY, Output, assert_same, batch, fill_adapters, llama, outcome, quickly, twin, with_lora

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def gpt2(**changes: float) -> PreTrainedModel:
    """A random GPT-2, whose linears are ``Conv1D``: transposed, with a bias."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def in_eight_bits(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with LLM.int8 weights in its blocks."""
    for path, linear in [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in p]:
        packed = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        packed.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False).to("cpu")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed)
    model.is_loaded_in_8bit = True  # as from_pretrained leaves it, for PEFT to look at
    return model


def several(model: PreTrainedModel) -> nn.Module:
    """Two adapters at once, of different ranks and scales, with dropout."""
    from peft import LoraConfig

    adapted = with_lora(model, target_modules=["q_proj", "down_proj"], lora_dropout=0.2)
    adapted.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True))
    adapted.base_model.set_adapter(["default", "second"])
    fill_adapters(adapted)
    return adapted


class ByHand(nn.Module):
    """Adapters without a library, each spelt in another way, on a weight that is no module's."""

    def __init__(self, size: int = 16, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, size)
        self.blocks = nn.ModuleList(_Adapted(size) for _ in range(layers))
        self.head = nn.Linear(size, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + block(h)
        logits = self.head(h)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(logits=logits, loss=loss)


class _Adapted(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        made = lambda *shape: nn.Parameter(torch.randn(*shape) * 0.2)  # noqa: E731
        self.w, self.v = made(size, size).requires_grad_(False), made(size, size)
        self.a, self.b = made(size, 3), made(3, size)
        self.down, self.up = nn.Linear(size, 2, bias=False), nn.Linear(2, size, bias=False)
        self.norm = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        first = x @ self.w + torch.matmul(x @ self.a, self.b) * 2.0
        second = F.linear(first, self.v) + 0.5 * self.up(self.down(first))
        return torch.tanh(second) * self.norm


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "dropout": (lambda: with_lora(llama(**SMALL), lora_dropout=0.4), 14),
    "rank-stabilized": (lambda: with_lora(llama(**SMALL), use_rslora=True, r=3), 14),
    "magnitude and direction": (lambda: with_lora(llama(**SMALL), target_modules=["q_proj"], use_dora=True), None),
    "one layer of two": (lambda: with_lora(llama(**SMALL), target_modules=LINEARS, layers_to_transform=[1]), 7),
    "several at once": (lambda: several(llama(**SMALL)), 8),
    "biases trained": (lambda: with_lora(llama(attention_bias=True, **SMALL), bias="all"), 14),
    "bias in the adapter": (lambda: with_lora(llama(**SMALL), target_modules=["q_proj"], lora_bias=True), None),
    "ranks by name": (lambda: with_lora(llama(**SMALL), rank_pattern={"q_proj": 1}, alpha_pattern={"q_proj": 5}), 14),
    "saved modules": (lambda: with_lora(llama(**SMALL), modules_to_save=["lm_head"]), 14),
    "transposed base": (lambda: with_lora(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), 8),
    "8-bit base": (lambda: with_lora(in_eight_bits(llama(**SMALL)), target_modules=LINEARS), 14),
    "by hand": (ByHand, 4),
}
"""Each with the number of linears whose adapters are fused, where that is settled."""


@pytest.mark.parametrize("kind", MODELS)
def test_kinds_of_adapters(kind: str) -> None:
    make, count = MODELS[kind]
    model = make().train()
    plain = twin(model)
    quickly(model)
    inputs, results = batch(2, 7, seed=6), []
    for each in (model, plain):
        torch.manual_seed(7)
        results.append(outcome(each, inputs))
    assert_same(*results)
    assert any("lora_B" in name for name in results[0]) or kind == "by hand"
    fused = [r for r in model.rewrite_report.rewrites if r.rule == "lora_linear"]
    assert count is None or len(fused) == count, str(model.rewrite_report)
    assert not [n for n in model.rewrite_report.notes if "failed" in n]
