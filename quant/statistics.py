"""What a linear's input was over the calibration, kept as sums: nothing of the activations themselves.

    mean_square[j] = mean over tokens of x[j]²          how much an error in column j of the weight matters
    largest[j]     = max over tokens of |x[j]|          which channels are outliers (LLM.int8, arXiv:2208.07339)
    hessian[i, j]  = mean over tokens of x[i] · x[j]    half the Hessian of the squared output error (arXiv:2208.11580)

Squares are added in float64. The matrix is a running mean in float32: it is large, and a mean neither grows nor overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import QuantizationError

_TOKENS_AT_ONCE = 4096


class Statistics:
    """Sums over every input of one linear. Updating never waits for the device: bad values are found when read.

    Args:
        in_features: channels of the input.
        hessian: keep the (in_features, in_features) second-moment matrix too, 4 · in_features² bytes.
    """

    def __init__(self, in_features: int, hessian: bool = False) -> None:
        self.in_features = in_features
        self.keeps_hessian = hessian
        self.count = 0
        self._squares = torch.zeros(in_features, dtype=torch.float64)
        self._largest = torch.zeros(in_features)
        self._hessian = torch.zeros(in_features, in_features) if hessian else None

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in activations of any dtype and shape (..., in_features).

        Raises:
            QuantizationError: the last dimension is another one.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise QuantizationError(
                f"an input of shape {tuple(x.shape)} for a linear of {self.in_features} in_features"
            )
        self._move_to(x.device)
        for tokens in x.detach().reshape(-1, self.in_features).split(_TOKENS_AT_ONCE):
            self._add(tokens)

    def _add(self, tokens: Tensor) -> None:
        if not len(tokens):
            return
        self.count += len(tokens)
        self._squares += tokens.double().square_().sum(0)
        self._largest = torch.maximum(self._largest, tokens.abs().amax(0).float())
        if self._hessian is not None:
            x = tokens.float()
            self._hessian.addmm_(x.T, x, beta=1 - len(tokens) / self.count, alpha=1 / self.count)

    def _move_to(self, device: torch.device) -> None:
        if self._squares.device == device:
            return
        self._squares, self._largest = self._squares.to(device), self._largest.to(device)
        if self._hessian is not None:
            self._hessian = self._hessian.to(device)

    @torch.no_grad()
    def merge(self, other: Statistics) -> None:
        """Take in what ``other`` saw, which stays as it is.

        Raises:
            QuantizationError: it is of another number of channels, or only one of the two keeps the matrix.
        """
        if (other.in_features, other.keeps_hessian) != (self.in_features, self.keeps_hessian):
            raise QuantizationError(f"statistics of {self.in_features} and {other.in_features} channels do not add up")
        device, count = self._squares.device, self.count + other.count
        self._squares += other._squares.to(device)
        self._largest = torch.maximum(self._largest, other._largest.to(device))
        if self._hessian is not None and other._hessian is not None and count:
            self._hessian.lerp_(other._hessian.to(device), other.count / count)
        self.count = count

    def forget_hessian(self) -> None:
        """Free the matrix; the rest is kept."""
        self._hessian, self.keeps_hessian = None, False

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each channel, (in_features,), float64.

        Raises:
            QuantizationError: no input was seen, or one held NaN or inf.
        """
        self._check(self._squares)
        return self._squares / self.count

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each channel, (in_features,), float32; raises as :attr:`mean_square` does."""
        self._check(self._squares)
        return self._largest

    @property
    def hessian(self) -> Tensor | None:
        """The second-moment matrix, (in_features, in_features), float32, if it is kept; raises as above."""
        if self._hessian is not None:
            self._check(self._hessian)
        return self._hessian

    def _check(self, sums: Tensor) -> None:
        if not self.count:
            raise QuantizationError("no input was seen: the calibration data never reached this linear")
        if not torch.isfinite(sums).all():
            raise QuantizationError("the inputs seen in the calibration hold NaN or inf, or their squares overflow")

    def outliers(self, threshold: float = 6.0) -> Tensor:
        """Channels that once were ``threshold`` times larger than the root mean square over all channels, ascending."""
        typical = self.mean_square.mean().sqrt()
        return (self.largest > threshold * typical).nonzero().view(-1)
