"""weft weaves LoRA adapters, 4-bit weights and Triton kernels into a model that somebody else wrote."""

from weft.api import optimize, undo
from weft.precision import plan_precision
from weft.quant.plan import PrecisionBudget, PrecisionPlan
from weft.rewrite.errors import WeftError

__all__ = ["PrecisionBudget", "PrecisionPlan", "WeftError", "optimize", "plan_precision", "undo"]
