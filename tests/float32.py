"""Puts back how precisely float32 is multiplied: TensorFloat-32, once it is on, is on for all that a process computes later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_of = torch.backends
SETTINGS: tuple[Any, ...] = (
    _of, _of.cuda.matmul, _of.cudnn, _of.cudnn.conv, _of.cudnn.rnn,
    _of.mkldnn, _of.mkldnn.matmul, _of.mkldnn.conv, _of.mkldnn.rnn,
)  # fmt: skip
"""Of torch's newer interface, the general one first: it sets the others."""


@contextmanager
def as_precise_as_before() -> Iterator[None]:
    """What is set inside, by either of torch's interfaces, is as it was afterwards.

    transformers uses the newer one, accelerate the older one, under ``torch.compile`` and on a GPU alone. The older cannot be
    read while the two contradict each other, and setting it sets the newer.
    """
    kept, of_products = [each.fp32_precision for each in SETTINGS], torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        _put_back(kept)
        if torch.get_float32_matmul_precision() != of_products:
            torch.set_float32_matmul_precision(of_products)
            _put_back(kept)


def _put_back(kept: list[str]) -> None:
    for setting, value in zip(SETTINGS, kept, strict=True):
        setting.fp32_precision = value
