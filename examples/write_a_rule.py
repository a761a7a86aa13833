"""Add a rule of your own: the squared ReLU of Nemotron's MLP becomes one operator, and the report shows it."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, NemotronConfig

from weft import optimize
from weft.passes.defaults import default_passes
from weft.rewrite.match import Match
from weft.rewrite.pipeline import Rules
from weft.rewrite.rule import RewriteRule, call


class SquaredRelu(torch.autograd.Function):
    """y = max(x, 0)², dx = 2 max(x, 0) dy; only max(x, 0) is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp(min=0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return positive * dy * 2


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)²"""
    return SquaredRelu.apply(x)


class FuseSquaredRelu(RewriteRule):
    """relu(x)²  →  squared_relu(x)"""

    name = "squared_relu"

    def pattern(self, x: Any) -> Any:
        return torch.relu(x) ** 2

    def rewrite(self, m: Match, x: Any) -> Any:
        return call(squared_relu, x)


def main() -> None:
    """Optimize a random Nemotron with the default passes and the new one."""
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = AutoModelForCausalLM.from_config(config).to(tiny.device_and_dtype()[0]).train()
    ids = torch.randint(300, (2, 20), device=model.device)
    before = model(input_ids=ids, labels=ids).loss
    model = optimize(model, passes=(*default_passes("train"), Rules("squared_relu", (FuseSquaredRelu(),))))
    after = model(input_ids=ids, labels=ids).loss
    print(model.rewrite_report)
    print(f"\nloss before {before.item():.6f}, after {after.item():.6f}")


if __name__ == "__main__":
    main()
