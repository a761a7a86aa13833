"""DDP and FSDP2 around an optimized model, in two processes over gloo: what one process computes on all rows."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .two_processes import CASES, WORLD, Case, build, train

SCRIPT = Path(__file__).with_name("two_processes.py")
LORA = {"attention", "gated_mlp", "lora_linear", "parallel_linears", "residual_norm", "rms_norm", "rope"}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw of each case: two processes for all, since starting them takes longer than a case."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--folder", str(folder)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@functools.cache
def one_process(kind: str, length: int) -> tuple[list[float], dict[str, Tensor]]:
    """A plain model on all rows."""
    losses, gradients = train(build(kind), None, length)
    return [float(x) for x in losses], gradients


def seen(together: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """What each process saw of one case."""
    found = [results[name] for results in together]
    failed = [f["failed"] for f in found if "failed" in f]
    assert not failed, failed[0]
    return found


def assert_like_one_process(found: list[dict[str, Any]], case: Case, close: float = 2e-5) -> None:
    """Losses and gradients of every process are those of a plain model on all rows."""
    losses, gradients = one_process(case.kind, case.length)
    assert len(gradients) > 10
    for each in found:
        assert each["losses"] == pytest.approx(losses, rel=close)
        assert each["gradients"].keys() == gradients.keys()
        for name, wanted in gradients.items():
            off = float((each["gradients"][name] - wanted).norm() / wanted.norm())
            assert off < 10 * close, f"{name}: off by {off}"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.mixed])
def test_like_one_process(name: str, together: list[dict[str, Any]]) -> None:
    """Optimized before it is wrapped, or after: nothing falls back, and one graph serves all blocks."""
    case, found = CASES[name], seen(together, name)
    assert_like_one_process(found, case)
    for each in found:
        rules = LORA if case.kind != "full" else LORA - {"lora_linear", "parallel_linears"}
        assert rules <= set(each["rules"]), each["report"]
        assert not each["untouched"] and not each["notes"], each["report"]
        assert each["graphs"] <= 8, each["report"]
    assert found[0]["rules"] == found[1]["rules"]


def test_sharded_in_bfloat16(together: list[dict[str, Any]]) -> None:
    """FSDP2's mixed precision: parameters gathered in bfloat16, losses as far off as rounding allows."""
    found = seen(together, "fsdp2 in bfloat16")
    wanted, _ = one_process("lora", CASES["fsdp2 in bfloat16"].length)
    assert found[0]["losses"] == pytest.approx(wanted, rel=2e-2)
    assert found[0]["losses"] != pytest.approx(wanted, rel=1e-6)
    assert set(found[0]["rules"]) >= LORA, found[0]["report"]
