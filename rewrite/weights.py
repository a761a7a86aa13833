"""The weights of a model that is trained: what a step adds to what they take, and whether those that should stay have changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .device_memory import here, resident_bytes

ADAM_BYTES = 8
"""Of optimizer state for each trained number, as long as there is none to be seen: AdamW's two moments in float32."""


@dataclass(frozen=True)
class Trained:
    """The parameters that get a gradient, the bytes of each on this device, and how many numbers they are."""

    parameters: list[nn.Parameter]
    bytes: list[int]
    count: int


@dataclass
class Weights:
    """The parameters of ``model``, looked for once: walking over its modules takes longer than anything else that a step begins
    with."""

    model: nn.Module
    _parameters: list[nn.Parameter] | None = None
    _trained: Trained | None = None
    _versions: int | None = None
    _first_resident: int = 0

    def recount(self) -> None:
        """The model may have other parameters than before, or train others."""
        self._parameters = self._trained = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        if self._parameters is None:
            self._parameters = list(self.model.parameters())
        return self._parameters

    @property
    def trained(self) -> Trained:
        """What a step trains."""
        if self._trained is None:
            trained = [p for p in self.parameters if p.requires_grad]
            parts = [here(p) for p in trained]
            self._trained = Trained(trained, [t.nbytes for t in parts], sum(t.numel() for t in parts))
        return self._trained

    def resident(self, device: torch.device) -> int:
        """Bytes that they, buffers, and on a CUDA device all else take there."""
        return resident_bytes(self.parameters, self.model.buffers(), device)

    def frozen_versions(self) -> int:
        """Another number whenever torch counts a change of what is not trained."""
        with torch._C.DisableTorchFunctionSubclass():
            return sum([p._version for p in self.parameters if not p.requires_grad and not p.is_inference()])

    def pending(self, now: int) -> int:
        """Bytes that a step will add to ``now``, and keep: gradients that are not there, and before the first one the optimizer's
        state.

        An optimizer that has stepped has changed the parameters in place, or if it did so unseen, has taken memory.
        """
        trained = self.trained
        versions = sum([p._version for p in trained.parameters])
        if self._versions is None:
            self._versions, self._first_resident = versions, now
        missing = sum([n for p, n in zip(trained.parameters, trained.bytes, strict=True) if p.grad is None])
        held = sum(trained.bytes) - missing  # gradients are as large as what they are of
        stepped = versions != self._versions or now - held - self._first_resident >= trained.count
        return missing + (0 if stepped else ADAM_BYTES * trained.count)
