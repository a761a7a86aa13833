"""The visible list of what ``optimize`` runs, in order."""

from __future__ import annotations

from typing import Literal, get_args

from ..kernels import flops as flops  # registers what the operators cost
from ..rewrite.errors import OptionError
from ..rewrite.pipeline import Pass, Rules
from .attention import FuseAttention
from .common_subexpressions import CommonSubexpressions
from .compile_leftovers import CompileLeftovers
from .drop_identities import DropIdentities
from .fix_widths import FixWidths
from .fp8_products import Fp8Products
from .functionalize import Functionalize
from .gated_linears import FuseGatedLinears
from .gated_mlp import FuseGatedMlp
from .layer_norm import FuseLayerNorm
from .linear_cross_entropy import FuseLinearCrossEntropy, Logits
from .lora_linear import FuseLoraLinear
from .parallel_linears import FuseParallelLinears
from .quant_linear import FuseQuantLinear
from .residual_norm import FuseResidualNorm
from .rms_norm import FuseRmsNorm
from .rope import FusePartialRope, FuseRope, PairRope
from .split_once import SplitOnce

Products = Literal["stored", "fp8", "fp8_kept"]


def default_passes(mode: str = "train", *, logits: Logits = "defer", products: Products = "stored") -> tuple[Pass, ...]:
    """The passes for ``mode`` ("train" or "inference").

    Args:
        logits: for models that return logits beside a loss: computed when read (``"defer"``), always (``"keep"``), or
            never, an access then raising an explanation (``"drop"``).
        products: in what products with weights that are not trained are computed while training: the dtype of the
            activations (``"stored"``), or FP8 (``"fp8"``), which is less exact; ``"fp8_kept"`` keeps what it reads of the
            weights, two bytes for each; see docs/training.md.

    Raises:
        OptionError: ``products`` is none of these, or FP8 for inference.
    """
    if products not in get_args(Products):
        raise OptionError(f'products must be "stored", "fp8" or "fp8_kept", not {products!r}')
    if products != "stored" and mode != "train":
        raise OptionError(f"products={products!r} is for training, and mode is {mode!r}: leave it out")
    return (
        Functionalize(),
        CommonSubexpressions(),
        FixWidths(),
        DropIdentities(),
        Rules("layer_norm", (FuseLayerNorm(),)),  # before rms_norm, which would take x − mean x for its input
        Rules("rms_norm", (FuseRmsNorm(),)),
        Rules("rope", (FuseRope(), FusePartialRope(), PairRope())),
        Rules("attention", (FuseAttention(),)),
        Rules("lora_linear", (FuseLoraLinear(),)),
        Rules("quant_linear", (FuseQuantLinear(),)),
        Rules("residual_norm", (FuseResidualNorm(),)),
        Rules("parallel_linears", (FuseParallelLinears(),)),
        *((Fp8Products(kept=products == "fp8_kept"),) if products != "stored" else ()),
        Rules("gated_mlp", (FuseGatedMlp(),)),
        *((FuseGatedLinears(),) if mode == "train" else ()),
        Rules("linear_cross_entropy", (FuseLinearCrossEntropy(logits),)),
        SplitOnce(),
        *((CompileLeftovers(),) if mode == "train" else ()),
    )
