"""weft weaves LoRA adapters, 4-bit weights and Triton kernels into a model that somebody else wrote."""

from weft.api import optimize, undo
from weft.rewrite.errors import WeftError

__all__ = ["WeftError", "optimize", "undo"]
