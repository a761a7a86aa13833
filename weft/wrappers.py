"""What others wrap around a model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers such as PEFT's, whose ``generate`` calls it; else ``model`` itself."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
