"""Settings of the memory-bound kernels, against each other and their peers: µs, and the share of the copy bandwidth.

    python3 -m benchmarks.sweep --out sweep.json [--only rope decode] [--workers 12] [--limit 280] [--tiny]

First, worker processes compile every variant, all at once, and check what it computes, with whatever it does not write
filled with NaN; a variant that fails is one line with the reason. Then this process times the others one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from weft.kernels.dispatch import INTERPRETED, backend

from .ceilings import copy_bandwidth
from .environment import write
from .kernel_case import Draw, Sizes
from .sweep_gated import gated_updates
from .sweep_variants import Group, Variant, groups
from .timing import measure, rotation

TINY = Sizes(batch=2, length=4, hidden=256, intermediate=256, heads=4, kv_heads=2, head_dim=16)
CHECKED, LATE = "checked", "left out: out of time"


@contextmanager
def under(variant: Variant) -> Iterator[None]:
    """Applies a variant's settings."""
    with ExitStack() as stack:
        for (module, name), value in variant.settings.items():
            stack.enter_context(patch.object(module, name, value))
        if INTERPRETED:
            stack.enter_context(backend("triton"))
        yield


def draw_on(device: torch.device, seed: int) -> Draw:
    """A source of random inputs."""
    return Draw(device, torch.bfloat16, torch.Generator(device).manual_seed(seed))


def tensors(results: Any) -> list[Tensor]:
    """Those that hold something."""
    return [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.numel()]


def problem(group: Group, variant: Variant, inputs: Mapping[str, Any], exact: list[Tensor]) -> str:
    """Runs a variant; why it does not count, or :data:`CHECKED`."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        with under(variant), torch.no_grad():
            found = tensors(variant.call(**inputs))
            errors = [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=False)]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    finally:
        torch.use_deterministic_algorithms(False)
    return CHECKED if all(e <= group.limit for e in errors) else f"wrong: errors {errors}"


def chosen(options: argparse.Namespace) -> list[tuple[Group, list[Variant]]]:
    """The groups that the command line asks for."""
    sizes = TINY if options.tiny else Sizes()
    every = [
        g for g in [*groups(sizes), *gated_updates(sizes)] if not options.only or g.name.startswith(tuple(options.only))
    ]
    return [(group, list(group.variants)) for group in every]


def check_part(options: argparse.Namespace, device: torch.device) -> None:
    """A worker: checks every ``of``-th variant, and writes down what it found after each."""
    part, of, found, number = *options.part, {}, 0
    for group, variants in chosen(options):
        inputs = exact = None
        for variant in variants:
            number += 1
            if number % of != part:
                continue
            if inputs is None:
                inputs = group.inputs(draw_on(device, 1))
                exact = [] if group.exact is None else [t.detach().double() for t in tensors(group.exact(**inputs))]
            found[f"{group.name}|{variant.name}"] = problem(group, variant, inputs, exact or [])
            Path(options.out).write_text(json.dumps(found))


def check_all(options: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """What the workers found, by group and variant."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(options.workers)]
        given = [*(["--tiny"] if options.tiny else []), *(["--only", *options.only] if options.only else [])]
        base = [sys.executable, "-m", "benchmarks.sweep", *given]
        commands = [[*base, "--out", str(o), "--part", str(i), str(options.workers)] for i, o in enumerate(outs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        running = [subprocess.Popen(command, env=environment) for command in commands]
        deadline = time.monotonic() + options.limit / 2
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                process.kill()
        read = [json.loads(out.read_text()) for out in outs if out.exists()]
    return {name: result for part in read for name, result in part.items()}


def time_group(
    group: Group, variants: list[Variant], checked: Mapping[str, str], device: torch.device, copy: float, until: float
) -> list[dict[str, Any]]:
    """Microseconds and share of every variant that was checked."""
    draw, records = draw_on(device, 2), []
    first = group.inputs(draw)
    sets = [first, *(group.inputs(draw) for _ in range(rotation(first, device) - 1))]
    for variant in variants:
        record: dict[str, Any] = {"group": group.name, "variant": variant.name}
        result = checked.get(f"{group.name}|{variant.name}", "not checked: its worker ended before")
        if result != CHECKED or time.monotonic() > until:
            record["failed"] = LATE if result == CHECKED else result
        else:
            with under(variant), torch.no_grad():
                calls = [partial(variant.call, **inputs) for inputs in sets]
                timing = measure(calls, device, 30 if device.type == "cuda" else 1)
            record |= {"us": round(timing.us, 2), "share": round(group.moved / timing.us / 1e6 / copy, 4)}
            record |= {"host_bound": timing.host_bound}
        records.append(record)
    return records


def show(records: list[dict[str, Any]]) -> None:
    """Fastest first; what failed at the end."""
    for record in sorted(records, key=lambda r: r.get("us", float("inf"))):
        label = f"{record['group']:28} {record['variant']:44}"
        late = " host-bound" if record.get("host_bound") else ""
        print(
            label,
            record["failed"][:160] if "failed" in record else f"{record['us']:9.2f} µs {record['share']:6.1%}{late}",
        )
    sys.stdout.flush()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="result file, rewritten after each group")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the groups' names; all if none")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile and check")
    parser.add_argument("--limit", type=float, default=280.0, help="seconds, half of them for compiling")
    parser.add_argument("--tiny", action="store_true", help="sizes at which the program can be tried out on a CPU")
    parser.add_argument("--part", nargs=2, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Checks, then times."""
    options, started = parse(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.part:
        check_part(options, device)
        return 0
    checked = check_all(options, device)
    print(f"checked {len(checked)} variants in {time.monotonic() - started:.0f} s", flush=True)
    copy = copy_bandwidth(device) if device.type == "cuda" else copy_bandwidth(device, 2**26)
    print(f"copy {copy:.3f} TB/s", flush=True)
    records: list[dict[str, Any]] = []
    for group, variants in chosen(options):
        found = time_group(group, variants, checked, device, copy, started + options.limit)
        show(found)
        records += found
        write(options.out, "sweep", copy_tb_s=copy, records=records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
