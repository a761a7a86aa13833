"""The visible list of what ``optimize`` runs, in order."""

from __future__ import annotations

from ..rewrite.pipeline import Pass, Rules
from .functionalize import Functionalize
from .gated_mlp import FuseGatedMlp
from .layer_norm import FuseLayerNorm
from .residual_norm import FuseResidualNorm
from .rms_norm import FuseRmsNorm
from .rope import FusePartialRope, FuseRope, PairRope


def default_passes(mode: str = "train") -> tuple[Pass, ...]:
    """The passes for ``mode`` ("train" or "inference")."""
    return (
        Functionalize(),
        Rules("rms_norm", (FuseRmsNorm(),)),
        Rules("layer_norm", (FuseLayerNorm(),)),
        Rules("residual_norm", (FuseResidualNorm(),)),
        Rules("rope", (FuseRope(), FusePartialRope(), PairRope())),
        Rules("gated_mlp", (FuseGatedMlp(),)),
    )
