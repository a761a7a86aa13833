"""Runs the arms of :mod:`benchmarks.train_step` in turn, each in a process of its own, and writes one result file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arm_settings import missing
from .environment import write
from .train_step import PREFIX, setting_of

Finished = subprocess.CompletedProcess[str]
FLAGS = ("shape", "layers", "batch", "length", "steps", "warmup", "memory", "models")


def interleave(given: argparse.Namespace) -> int:
    """All arms, ``given.rounds`` times; the file is written after each, so that a time limit costs only what is left.

    Returns:
        1 if an arm that is installed failed.
    """
    absent = {arm: package for arm in given.interleave if (package := missing(arm))}
    arms = [arm for arm in given.interleave if arm not in absent]
    common = {k: v for k, v in asdict(setting_of(given, "")).items() if k not in ("arm", "models")}
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    limits = json.loads(_last_line(_python(["benchmarks.ceilings"], given.limit, stderr=None)))
    if any(setting_of(given, arm).loads for arm in arms):
        save_models(given)
    with tempfile.TemporaryDirectory() as caches:
        for arm in [arm for _ in range(given.rounds) for arm in arms]:
            results[arm].append(run(arm, given, Path(caches) / arm))
            show(arm, results[arm][-1], results)
            write(
                given.out, "train_step", ceilings=limits, setting=common,
                arms=results, not_installed=absent,
            )  # fmt: skip
    for arm, package in absent.items():
        print(f"{arm:14} not installed: {package}")
    return int(any("failed" in found for runs in results.values() for found in runs))


def save_models(given: argparse.Namespace) -> None:
    """Write the model that some arms load, in a process that ends before they begin."""
    _python(["benchmarks.train_step", "--save", *_options(given)], given.limit, stderr=None)


def run(arm: str, given: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """One arm in a fresh process, with compiler caches of its own: no arm finds what another has compiled."""
    verify = [] if given.verify else ["--no-verify"]
    arguments = ["benchmarks.train_step", "--arm", arm, *_options(given), *verify]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    try:
        finished = _python(arguments, given.limit, environment)
    except subprocess.CalledProcessError as error:
        return {"failed": f"exit status {error.returncode}", "output": (error.stdout + error.stderr)[-3000:]}
    except subprocess.TimeoutExpired as error:
        return {"failed": f"not finished after {given.limit:g} s", "output": _text(error.stderr)[-3000:]}
    lines = [line for line in finished.stdout.splitlines() if line.startswith(PREFIX)]
    return (
        json.loads(lines[-1].removeprefix(PREFIX))
        if lines
        else {"failed": "no result", "output": finished.stderr[-3000:]}
    )


def _options(given: argparse.Namespace) -> list[str]:
    options = [f"--{name}={getattr(given, name)}" for name in FLAGS if getattr(given, name) not in (None, "")]
    return options + (["--checkpointing"] if given.checkpointing else [])


def _python(
    arguments: Sequence[str], limit: float, extra: dict[str, str] | None = None, stderr: int | None = subprocess.PIPE
) -> Finished:
    """``python -m`` as this process was started, offline and without telemetry.

    Raises:
        CalledProcessError, TimeoutExpired: it failed, or took longer than ``limit`` seconds.
    """
    quiet = {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }  # fmt: skip
    safe = ["-P"] if sys.flags.safe_path else []
    command = [sys.executable, *safe, "-m", *arguments]
    environment = os.environ | quiet | (extra or {})
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=limit, check=True
    )  # fmt: skip


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _last_line(finished: Finished) -> str:
    return finished.stdout.strip().splitlines()[-1]


def show(arm: str, found: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> None:
    """One line; losses and gradients beside those of the first arm that finished."""
    if "failed" in found:
        print(f"{arm:14} {found['failed']}\n{found.get('output', '')}", flush=True)
        return
    first = next(runs[0] for runs in results.values() if runs and "failed" not in runs[0])
    loss = max(abs(a / b - 1) for a, b in zip(found["losses"], first["losses"], strict=True))
    gradient = found["gradient_norm"] / first["gradient_norm"] - 1
    print(
        f"{arm:14} {found['step_s']:8.4f} s/step {found['tokens_per_s']:7} tokens/s  peak {found['peak_gib']} GiB  "
        f"first {found['first_s']:6.1f} s  loss {found['losses'][0]:.5f} → {found['losses'][-1]:.5f} "
        f"(off by {loss:.1e})  gradient norm {found['gradient_norm']:.5g} ({gradient:+.1e})",
        flush=True,
    )
    if "rewrites" in found:
        counts = ", ".join(f"{rule} {count}" for rule, count in found["rewrites"].items()) or "none"
        print("\n".join([f"{'':14} rewrites: {counts}", *found["refusals"], *found["notes"]]), flush=True)
