"""Every operator of ``weft.kernels`` against its eager spelling, also under ``torch.compile``, at Llama-3-8B sizes.

    python -m benchmarks.kernels --out results.json [--only rms_norm rope] [--no-compile] [--tiny]

Each arm is first compared with the formula in float64, on fresh random data; then all are timed in turn, forward (under
``no_grad``) and forward + backward. Bytes are those that must move: each input read once, each output written once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .ceilings import default_ceilings
from .environment import installed_version, write
from .kernel_case import TINY, Case, Draw, Inputs, Sizes, in_float64
from .product_cases import PRODUCT_CASES, needs_bitsandbytes
from .row_cases import ROW_CASES
from .timing import measure, rotation, size_of

CASES: tuple[Case, ...] = (*ROW_CASES, *PRODUCT_CASES)
NOT_INSTALLED = "not installed"
Results = list[Tensor]
Calls = list[Callable[[], Any]]
Rates = Mapping[str, float]


@dataclass(frozen=True)
class Options:
    """What is measured, and on what."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    repeats: int
    compiled: bool
    seed: int


def outputs_of(arm: Callable[..., Any], inputs: Inputs) -> Results:
    """The tensors that one call returns."""
    return [t for t in tree_leaves(arm(**inputs)) if isinstance(t, Tensor)]


def leaves_of(inputs: Inputs) -> list[Tensor]:
    """The inputs that require a gradient."""
    return [t for t in tree_leaves(dict(inputs)) if isinstance(t, Tensor) and t.requires_grad]


def forward_backward(arm: Callable[..., Any], inputs: Inputs, seeds: Results) -> tuple[Results, Sequence[Tensor]]:
    """Outputs, and the gradients of all leaves for the output gradients ``seeds``."""
    outputs = outputs_of(arm, inputs)
    return outputs, torch.autograd.grad(outputs, leaves_of(inputs), seeds)


def arms_of(case: Case, options: Options) -> dict[str, Callable[..., Any] | str]:
    """What can run here, by name; or why it cannot."""
    arms: dict[str, Callable[..., Any] | str] = {"weft": case.weft}
    if case.eager is not None:
        missing = needs_bitsandbytes(case) and installed_version("bitsandbytes") is None
        arms["eager"] = NOT_INSTALLED if missing else case.eager
        if options.compiled:
            arms["compile"] = NOT_INSTALLED if missing else torch.compile(case.eager, dynamic=False)
    for package, arm in case.others.items():
        arms[package] = arm if installed_version(package) is not None else NOT_INSTALLED
    return arms


def draw_for(options: Options, seed: int) -> Draw:
    """A source of random inputs."""
    return Draw(options.device, options.dtype, torch.Generator(options.device).manual_seed(seed))


def random_like(outputs: Results, draw: Draw) -> Results:
    """Output gradients."""
    return [draw(*o.shape).to(o.dtype) for o in outputs]


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest ‖got - exact‖ / ‖exact‖; NaN if anything in it is."""
    pairs = zip(got, exact, strict=True)
    shares = [(g.detach().double() - e.detach()).norm() / e.detach().norm().clamp_min(1e-300) for g, e in pairs]
    return float(torch.stack(shares).max())


def errors_of(case: Case, arm: Callable[..., Any], options: Options) -> float:
    """Error of outputs and gradients against float64, on data drawn for this check."""
    draw = draw_for(options, options.seed + 1)
    inputs = case.inputs(options.sizes, draw)
    wide = in_float64(inputs)
    if not leaves_of(inputs):
        return relative_error(outputs_of(arm, inputs), outputs_of(case.reference, wide))
    with torch.no_grad():
        seeds = random_like(outputs_of(arm, inputs), draw)
    got, grads = forward_backward(arm, inputs, seeds)
    exact, exact_grads = forward_backward(case.reference, wide, [s.double() for s in seeds])
    return relative_error([*got, *grads], [*exact, *exact_grads])


def moved_bytes(case: Case, inputs: Inputs, outputs: Results, direction: str) -> int:
    """What must be read and written at least; frozen tensors get no gradient."""
    forward = size_of({k: v for k, v in inputs.items() if isinstance(v, Tensor | list)}) + size_of(outputs)
    if direction == "forward":
        return forward
    gradients = [leaf for name in case.writes for leaf in leaves_of({name: inputs[name]})]
    return forward + size_of(outputs) + sum(size_of(inputs[name]) for name in case.reads) + size_of(gradients)


def calls_for(
    case: Case, arm: Callable[..., Any], options: Options, direction: str
) -> tuple[list[Callable[[], Any]], int]:
    """Calls that do the same on different data, and the bytes that each must move."""
    draw = draw_for(options, options.seed + 2)
    first = case.inputs(options.sizes, draw)
    sets = [first, *(case.inputs(options.sizes, draw) for _ in range(rotation(first, options.device) - 1))]
    with torch.no_grad():
        outputs = outputs_of(arm, first)
    moved = moved_bytes(case, first, outputs, direction)
    if direction == "forward":
        return [torch.no_grad()(lambda inputs=inputs: arm(**inputs)) for inputs in sets], moved
    seeds = [random_like(outputs, draw) for _ in sets]
    pairs = zip(sets, seeds, strict=True)
    return [lambda inputs=inputs, seeds=seeds: forward_backward(arm, inputs, seeds) for inputs, seeds in pairs], moved


def rates(case: Case, options: Options, direction: str, moved: int, us: float, limits: Rates) -> dict[str, Any]:
    """Bandwidth or arithmetic rate, whichever bounds the operator, and its share of what was measured."""
    if case.flops is None:
        reached = moved / us / 1e6
        return {"bytes": moved, "tb_s": round(reached, 4), "share": round(reached / limits["copy_tb_s"], 4)}
    forward, backward = case.flops(options.sizes)
    operations = forward if direction == "forward" else forward + backward
    reached = operations / us / 1e6
    share = round(reached / limits["matmul_tflop_s"], 4)
    return {"bytes": moved, "flops": operations, "tflop_s": round(reached, 3), "share": share}


def run_arm(case: Case, arm: Callable[..., Any], options: Options, limits: Rates) -> dict[str, Any]:
    """Error and times of one arm."""
    found: dict[str, Any] = {"error": errors_of(case, arm, options)}
    directions = ("forward", "forward+backward") if case.writes else ("forward",)
    for direction in directions:
        calls, moved = calls_for(case, arm, options, direction)
        timing = measure(calls, options.device, options.repeats)
        found[direction] = {
            "us": round(timing.us, 2), "host_us": round(timing.host_us, 2), "host_bound": timing.host_bound,
            **rates(case, options, direction, moved, timing.us, limits),
        }  # fmt: skip
    return found


def run_case(case: Case, options: Options, limits: Rates) -> dict[str, Any]:
    """All arms of one operator. An arm that raises is recorded with what it raised: the others still count."""
    found: dict[str, Any] = {}
    for name, arm in arms_of(case, options).items():
        torch._dynamo.reset()
        if isinstance(arm, str):
            found[name] = {"missing": arm}
            continue
        try:
            found[name] = run_arm(case, arm, options, limits)
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"case": case.name, "arms": found, "problem": problem_of(found, options.dtype)}


def problem_of(arms: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """Why weft's result does not count: it raised, or its error exceeds twice eager's and half a rounding step."""
    ours = arms["weft"]
    if "failed" in ours:
        return ours["failed"]
    allowed = max(2 * arms.get("eager", {}).get("error", 0.0), torch.finfo(dtype).eps / 2)
    return None if ours["error"] <= allowed else f"relative error {ours['error']:.3g}, allowed {allowed:.3g}"


def show(record: Mapping[str, Any]) -> None:
    """One line a direction and arm."""
    for arm, found in record["arms"].items():
        for direction in ("forward", "forward+backward"):
            timed = found.get(direction)
            if timed is not None:
                rate = f"{timed['tb_s']:8.3f} TB/s" if "tb_s" in timed else f"{timed['tflop_s']:6.0f} TFLOP/s"
                late = "  host-bound" if timed["host_bound"] else ""
                label = f"{record['case']:28} {direction:17} {arm:13}"
                print(f"{label} {timed['us']:10.1f} µs {rate} {timed['share']:7.1%}  error {found['error']:.1e}{late}")
        for reason in ("failed", "missing"):
            if reason in found:
                print(f"{record['case']:28} {arm:13} {reason}: {found[reason]}")
    if record["problem"]:
        print(f"{record['case']:28} PROBLEM: {record['problem']}")
    sys.stdout.flush()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="result file, rewritten after each operator")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the cases' names; all if none")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="sizes at which the program can be tried out on a CPU")
    return parser.parse_args()


def main() -> int:
    """Runs the cases; 1 if one of weft's operators failed or was inexact."""
    given = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = TINY if given.tiny else Sizes()
    options = Options(sizes, device, getattr(torch, given.dtype), given.repeats, not given.no_compile, given.seed)
    limits = default_ceilings(device)
    print(f"copy {limits['copy_tb_s']} TB/s, matrix product {limits['matmul_tflop_s']} TFLOP/s")
    records = []
    for case in CASES:
        if not given.only or case.name.startswith(tuple(given.only)):
            records.append(run_case(case, options, limits))
            show(records[-1])
            write(given.out, "kernels", ceilings=limits, sizes=vars(sizes), dtype=given.dtype, cases=records)
    return int(not records or any(record["problem"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
