"""weft weaves LoRA adapters, 4-bit weights and Triton kernels into a model that somebody else wrote."""

from weft.api import optimize, undo
from weft.errors import WeftError
from weft.loading import load_planned
from weft.precision import plan_precision
from weft.quant.plan import PrecisionBudget, PrecisionPlan
from weft.saving import save_pretrained

__all__ = [
    "PrecisionBudget",
    "PrecisionPlan",
    "WeftError",
    "load_planned",
    "optimize",
    "plan_precision",
    "save_pretrained",
    "undo",
]
