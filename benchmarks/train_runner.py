"""Runs the arms of :mod:`benchmarks.train_step` in turn, each in a process of its own, and writes one result file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arm_settings import READY, missing
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
    common = {k: v for k, v in asdict(setting_of(given, "")).items() if k not in ("arm", "models", "in_turns")}
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    limits = _ceilings(given)
    save_models(arms, given)
    with tempfile.TemporaryDirectory() as caches:
        found = together(arms, given, Path(caches)) if given.together else in_turn(arms, given, Path(caches))
        for arm, result in found:
            results[arm].append(result)
            show(arm, result, results)
            write(
                given.out, "train_step", ceilings=limits, setting=common | {"together": given.together},
                arms=results, not_installed=absent,
            )  # fmt: skip
    for arm, package in absent.items():
        print(f"{arm:14} not installed: {package}")
    return int(any("failed" in found for runs in results.values() for found in runs))


def _ceilings(given: argparse.Namespace) -> dict[str, Any]:
    """Measured now, or as another result of the same call has them, if it is there."""
    if given.ceilings_of and Path(given.ceilings_of).exists():
        return json.loads(Path(given.ceilings_of).read_text())["ceilings"]
    return json.loads(_last_line(_python(["benchmarks.ceilings"], given.limit, stderr=None)))


Found = Iterator[tuple[str, dict[str, Any]]]
"""Results of arms, as they come."""


def in_turn(arms: Sequence[str], given: argparse.Namespace, caches: Path) -> Found:
    """One arm after the other, each in a process that has ended when the next one begins."""
    for arm in [arm for _ in range(given.rounds) for arm in arms]:
        yield arm, Started(arm, given, caches / arm).last()


def together(arms: Sequence[str], given: argparse.Namespace, caches: Path) -> Found:
    """All arms at once: they are set up side by side, and take their timed steps in turn."""
    started = [Waiting(arm, given, caches / arm, "--in-turns") for arm in arms]
    try:
        ready = [each for each in started if each.wait()]
        print("ready:", *(each.arm for each in ready), file=sys.stderr, flush=True)
        for _ in range(given.rounds):
            ready = [each for each in ready if each.turn()]
        for each in started:
            yield each.arm, each.end()
    finally:
        for each in started:
            each.process.kill()


class Started:
    """An arm in a fresh process, with compiler caches of its own, whose output is read as it comes."""

    def __init__(self, arm: str, given: argparse.Namespace, caches: Path, *options: str) -> None:
        self.arm, self.limit, self.began, self.late = arm, given.limit, time.monotonic(), False
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            _command([*_arm_arguments(arm, given), *options]), env=_environment(_caches(caches)), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = iter(self.process.stdout)

    @contextmanager
    def limited(self) -> Iterator[None]:
        """It is ended if this takes longer than the limit, counted from when it began, or was last heard of."""
        left = self.limit - (time.monotonic() - self.began)
        timer = threading.Timer(max(left, 0.0), self._expire)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self.late = True
        self.process.kill()

    def results(self) -> Iterator[dict[str, Any]]:
        """Its results within the limit, each as it comes; then how it failed, if it did."""
        try:
            with self.limited():
                yield from (_parsed(line) for line in self.lines if line.startswith(PREFIX))
                status = self.process.wait()
        finally:
            self.process.kill()
        if status:
            why = f"not finished after {self.limit:g} s" if self.late else f"exit status {status}"
            yield {"failed": why, "output": self._written()}

    def last(self) -> dict[str, Any]:
        """Its last result, or how it failed."""
        found = list(self.results())
        return found[-1] if found else {"failed": "no result", "output": self._written()}

    def _written(self) -> str:
        """The end of what it has written to stderr."""
        self.errors.seek(0)
        return self.errors.read()[-3000:]


class Waiting(Started):
    """An arm whose process takes timed steps when it is told to."""

    def wait(self) -> bool:
        """Until it is ready; False if it has ended, or takes too long and is ended."""
        with self.limited():
            return any(line.strip() == READY for line in self.lines)

    def turn(self) -> bool:
        """Its timed steps."""
        assert self.process.stdin is not None
        self.began = time.monotonic()
        print(file=self.process.stdin, flush=True)
        return self.wait()

    def end(self) -> dict[str, Any]:
        """Its result: without more lines to read it ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.last()


def save_models(arms: Sequence[str], given: argparse.Namespace) -> None:
    """Write the model that some of the arms load, if they do, in a process that ends before they begin."""
    if any(setting_of(given, arm).loads for arm in arms):
        _python(["benchmarks.train_step", "--save", *_options(given)], given.limit, stderr=None)


def _arm_arguments(arm: str, given: argparse.Namespace) -> list[str]:
    return ["benchmarks.train_step", "--arm", arm, *_options(given), *([] if given.verify else ["--no-verify"])]


def _caches(folder: Path) -> dict[str, str]:
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


def _parsed(line: str) -> dict[str, Any]:
    return json.loads(line.removeprefix(PREFIX))


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
    return subprocess.run(
        _command(arguments), env=_environment(extra or {}), stdout=subprocess.PIPE, stderr=stderr, text=True,
        timeout=limit, check=True,
    )  # fmt: skip


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", *arguments]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    quiet = {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }  # fmt: skip
    return {**os.environ, **quiet, **extra}


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
