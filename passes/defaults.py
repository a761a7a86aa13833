"""The visible list of what ``optimize`` runs, in order."""

from __future__ import annotations

from ..kernels import flops as flops  # registers what the operators cost
from ..rewrite.pipeline import Pass, Rules
from .attention import FuseAttention
from .common_subexpressions import CommonSubexpressions
from .fix_widths import FixWidths
from .functionalize import Functionalize
from .gated_mlp import FuseGatedMlp
from .layer_norm import FuseLayerNorm
from .linear_cross_entropy import FuseLinearCrossEntropy, Logits
from .lora_linear import FuseLoraLinear
from .parallel_linears import FuseParallelLinears
from .quant_linear import FuseQuantLinear
from .residual_norm import FuseResidualNorm
from .rms_norm import FuseRmsNorm
from .rope import FusePartialRope, FuseRope, PairRope


def default_passes(mode: str = "train", *, logits: Logits = "defer") -> tuple[Pass, ...]:
    """The passes for ``mode`` ("train" or "inference").

    ``logits`` is for models that return logits beside a loss: computed when read (``"defer"``), always (``"keep"``), or
    never, an access then raising an explanation (``"drop"``).
    """
    return (
        Functionalize(),
        CommonSubexpressions(),
        FixWidths(),
        Rules("layer_norm", (FuseLayerNorm(),)),  # before rms_norm, which would take x − mean x for its input
        Rules("rms_norm", (FuseRmsNorm(),)),
        Rules("rope", (FuseRope(), FusePartialRope(), PairRope())),
        Rules("attention", (FuseAttention(),)),
        Rules("lora_linear", (FuseLoraLinear(),)),
        Rules("quant_linear", (FuseQuantLinear(),)),
        Rules("residual_norm", (FuseResidualNorm(),)),
        Rules("parallel_linears", (FuseParallelLinears(),)),
        Rules("gated_mlp", (FuseGatedMlp(),)),
        Rules("linear_cross_entropy", (FuseLinearCrossEntropy(logits),)),
    )
