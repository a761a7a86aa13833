"""A test that turns TensorFloat-32 on leaves the others as precise as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .float32 import SETTINGS, as_precise_as_before


def _allow() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def _of_products() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _of_all() -> None:
    torch.backends.fp32_precision = "tf32"


def _high() -> None:
    torch.set_float32_matmul_precision("high")


WAYS = (_allow, _of_products, _of_all, _high, lambda: (_high(), _of_products()), lambda: (_of_all(), _allow()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", ["highest", "high"])
def test_either_interface_is_as_it_was(way: Callable[[], object], before: str) -> None:
    with as_precise_as_before():
        torch.set_float32_matmul_precision(before)
        kept = [each.fp32_precision for each in SETTINGS]
        for _ in range(2):
            with as_precise_as_before():
                way()
                assert before == "high" or [each.fp32_precision for each in SETTINGS] != kept
            assert [each.fp32_precision for each in SETTINGS] == kept
            assert torch.get_float32_matmul_precision() == before
            assert torch.backends.cuda.matmul.allow_tf32 == (before == "high")
    assert not torch.backends.cuda.matmul.allow_tf32
