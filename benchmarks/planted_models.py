"""Small models of several architectures, and where in each of them a layer can be planted.

A producer's output channels are scaled down and its consumer's input channels scaled up by the same factors. Where only
linear operations lie between the two, the function stays what it was; the consumer's large columns share blocks with its
other columns, which four bits then round away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

WIDTH, INNER, HEADS, KV_HEADS, LAYERS, CLASSES = 128, 256, 4, 2, 4, 64
SCALE = 0.12
"""Of random weights: as drawn by default (0.02), no layer says anything and nothing suffers from four bits."""
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    "initializer_range": SCALE,
}  # fmt: skip
TOKENS: dict[str, Any] = {"vocab_size": CLASSES, "bos_token_id": None, "eos_token_id": None, "use_cache": False}


@dataclass(frozen=True)
class Place:
    """One place to plant at.

    ``shrunk``: views of what the producer gives its output with; ``grown``: views of what reads it. The last dimensions
    of all are those of ``grown[0]`` from ``channels`` on: the channels that pass between them.
    """

    kind: str
    shrunk: list[Tensor]
    grown: list[Tensor]
    paths: tuple[str, ...]
    """The weights that suffer."""
    channels: int = 1

    @property
    def shape(self) -> torch.Size:
        """Of the channels between producer and consumer."""
        return self.grown[0].shape[-self.channels :]


@dataclass(frozen=True)
class Subject:
    """An architecture: a model from a seed, batches, and the places in one of its layers."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    places: Callable[[nn.Module, int], list[Place]]

    def model(self, seed: int) -> nn.Module:
        """Random weights; biases and norms too, so that scaling those is seen to be right.

        Embeddings are as large as what a block adds to them: else the first block makes the stream, and matters most
        whatever is planted in another.
        """
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.normal_()
        return model

    def batches(self, seed: int, count: int = 2) -> list[dict[str, Tensor]]:
        """Random inputs."""
        generator = torch.Generator().manual_seed(seed)
        return [self.batch(generator) for _ in range(count)]


def tokens(generator: torch.Generator) -> dict[str, Tensor]:
    """Random ones."""
    return {"input_ids": torch.randint(0, CLASSES, (4, 32), generator=generator)}


def pictures(generator: torch.Generator) -> dict[str, Tensor]:
    """Random ones, one prediction each."""
    return {"pixel_values": torch.randn(32, 3, 32, 32, generator=generator)}


def _from_config(kind: Any, config: PretrainedConfig) -> Callable[[], nn.Module]:
    return lambda: kind(config)


def _grouped(attention: Any, head: int, prefix: str) -> Place:
    """Values to output projection; a value head is read by all query heads of its group."""
    v, o = attention.v_proj.weight.data, attention.o_proj.weight.data
    groups = o.shape[1] // v.shape[0]
    shrunk = v.t().view(v.shape[1], -1, head)
    grown = o.view(len(o), -1, groups, head).transpose(1, 2)
    return Place("values", [shrunk], [grown], (f"{prefix}.o_proj",), channels=2)


def llama_places(model: Any, layer: int) -> list[Place]:
    """Values, the linear branch of the gated MLP, and a norm that two linears read."""
    block, at = model.model.layers[layer], f"model.layers.{layer}"
    mlp = block.mlp
    inner = Place("gated", [mlp.up_proj.weight.data.t()], [mlp.down_proj.weight.data], (f"{at}.mlp.down_proj",))
    readers = [mlp.gate_proj.weight.data, mlp.up_proj.weight.data]
    paths = (f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
    norm = Place("norm", [block.post_attention_layernorm.weight.data], readers, paths)
    return [_grouped(block.self_attn, WIDTH // HEADS, f"{at}.self_attn"), inner, norm]


def moe_places(model: Any, layer: int) -> list[Place]:
    """Values, and the linear branches of all experts, which are stacked in parameters of three dimensions."""
    block, at = model.model.layers[layer], f"model.layers.{layer}"
    wide, narrow = block.mlp.experts.gate_up_proj.data, block.mlp.experts.down_proj.data
    up = wide[:, narrow.shape[-1] :].permute(2, 0, 1)
    inner = Place("experts", [up], [narrow.permute(1, 0, 2)], (f"{at}.mlp.experts.down_proj",), channels=2)
    return [_grouped(block.self_attn, block.self_attn.head_dim, f"{at}.self_attn"), inner]


def gpt2_places(model: Any, layer: int) -> list[Place]:
    """The values' part of the fused projection, and both norms. Weights lie by columns."""
    block, at = model.transformer.h[layer], f"transformer.h.{layer}"
    fused = block.attn.c_attn
    values = [fused.weight.data[:, 2 * WIDTH :], fused.bias.data[2 * WIDTH :]]
    out = block.attn.c_proj.weight.data.t()
    found = [Place("values", values, [out], (f"{at}.attn.c_proj",))]
    for norm, reader, name in ((block.ln_1, fused, "attn.c_attn"), (block.ln_2, block.mlp.c_fc, "mlp.c_fc")):
        found.append(Place("norm", [norm.weight.data, norm.bias.data], [reader.weight.data.t()], (f"{at}.{name}",)))
    return found


def vit_places(model: Any, layer: int) -> list[Place]:
    """Values, and the norm before the MLP."""
    block, at = model.vit.layers[layer], f"vit.layers.{layer}"
    v, o, norm, reader = block.attention.v_proj, block.attention.o_proj, block.layernorm_after, block.mlp.fc1
    values = Place("values", [v.weight.data.t(), v.bias.data], [o.weight.data], (f"{at}.attention.o_proj",))
    return [values, Place("norm", [norm.weight.data, norm.bias.data], [reader.weight.data], (f"{at}.mlp.fc1",))]


class Mixer(nn.Module):
    """A block of no library: a running mean over the sequence instead of attention, both halves of the MLP in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.mix, self.back = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.back(self.mix(F.rms_norm(x, (WIDTH,))).cumsum(1) / steps)
        straight, gate = self.wide(F.rms_norm(x, (WIDTH,)) * self.gain).chunk(2, -1)
        return x + self.narrow(straight * torch.sigmoid(gate))


class Mixers(nn.Module):
    """A language model of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, WIDTH)
        self.steps = nn.ModuleList(Mixer() for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, CLASSES, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=SCALE)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for step in self.steps:
            x = step(x)
        return self.out(F.rms_norm(x, (WIDTH,)))


def mixer_places(model: Any, layer: int) -> list[Place]:
    """One linear behind another, the linear branch of the MLP, and a norm."""
    block, at = model.steps[layer], f"steps.{layer}"
    mixed = Place("values", [block.mix.weight.data.t(), block.mix.bias.data], [block.back.weight.data], (f"{at}.back",))
    straight = block.wide.weight.data[:INNER].t()
    inner = Place("gated", [straight], [block.narrow.weight.data], (f"{at}.narrow",))
    return [mixed, inner, Place("norm", [block.gain.data], [block.wide.weight.data], (f"{at}.wide",))]


GROUPED: dict[str, Any] = SIZES | TOKENS | {"num_key_value_heads": KV_HEADS}
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": WIDTH // HEADS,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "initializer_range": SCALE, "tie_word_embeddings": False,
}  # fmt: skip
PICTURE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": CLASSES}
SUBJECTS = (
    Subject("llama", _from_config(LlamaForCausalLM, LlamaConfig(**GROUPED)), tokens, llama_places),
    Subject("gpt2", _from_config(GPT2LMHeadModel, GPT2Config(**GPT2, **TOKENS)), tokens, gpt2_places),
    Subject("moe", _from_config(Qwen3MoeForCausalLM, Qwen3MoeConfig(**GROUPED, **EXPERTS)), tokens, moe_places),
    Subject("vit", _from_config(ViTForImageClassification, ViTConfig(**SIZES, **PICTURE)), pictures, vit_places),
    Subject("by hand", Mixers, tokens, mixer_places),
)
