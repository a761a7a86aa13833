"""One LoRA training step of a Llama-3-8B shape: weft beside transformers + PEFT, ``torch.compile``, Unsloth and Liger.

    python -m benchmarks.train_step --arm weft                     one arm, in this process; prints RESULT and JSON
    python -m benchmarks.train_step --interleave hf regional weft --out train.json [--rounds 2]
                                                                   several in turn, each in a process of its own

Options of both: --batch --length --steps --checkpointing --shape --layers --no-verify (see --help). Peers that are not
installed are listed as such. The loss of every step and the adapters' gradient norm in the first one show that all arms
train the same model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from .arms import ARMS, SHAPES, Setting, build, device, missing, save

PREFIX = "RESULT "


def run_arm(setting: Setting) -> dict[str, Any]:
    """Build one arm and train it."""
    if setting.base == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]  (must come before torch's users)
    import torch

    started = time.perf_counter()
    model = build(setting)
    _wait()
    found: dict[str, Any] = {"arm": setting.arm, "load_s": round(time.perf_counter() - started, 2)}
    found["base_gib"] = _gib("memory_allocated")
    _reset_peak()
    if setting.base == "weft":
        found |= _optimize(model, setting)
        found["optimize_peak_gib"] = _gib("max_memory_allocated")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    found |= _train(model, optimizer, setting)
    found["first_s"] = round(found["first_step_s"] + found.get("optimize_s", 0.0), 3)
    if setting.base == "weft":
        found |= _report(model)
    return found


def _optimize(model: Any, setting: Setting) -> dict[str, Any]:
    """In the same autocast as the training, so that the examples capture the graphs that the training runs."""
    from weft import optimize

    started = time.perf_counter()
    with _autocast():
        optimize(model, mode="train", verify=setting.verify)
    _wait()
    return {"optimize_s": round(time.perf_counter() - started, 3)}


def _report(model: Any) -> dict[str, Any]:
    """What was rewritten by the end of the training, in figures."""
    report = model.rewrite_report
    return {
        "rewrites": dict(Counter(r.rule for r in report.rewrites)),
        "refusals": dict(Counter(f"{r.rule}: {r.reason}" for r in report.refusals)),
        "graphs": len(report.graphs),
        "notes": report.notes[:10],
    }


def _train(model: Any, optimizer: Any, setting: Setting) -> dict[str, Any]:
    """Seconds of each step, losses, peaks; the first ``setting.warmup`` steps are not in the median."""
    losses, seconds, found = [], [], {}
    for i, ids in enumerate(_batches(model.config.vocab_size, setting)):
        if i == setting.warmup:
            found["warmup_peak_gib"] = _gib("max_memory_allocated")
            _reset_peak()
        _wait()
        started = time.perf_counter()
        with _autocast():
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        if i == 0:
            found["gradient_norm"] = gradient_norm(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(output.loss.detach()))
        del output
        _wait()
        seconds.append(time.perf_counter() - started)
    timed = seconds[setting.warmup :]
    step = statistics.median(timed)
    return found | {
        "first_step_s": round(seconds[0], 3), "step_s": round(step, 5), "steps_s": [round(s, 5) for s in timed],
        "tokens_per_s": round(setting.batch * setting.length / step), "peak_gib": _gib("max_memory_allocated"),
        "losses": losses,
    }  # fmt: skip


def _batches(vocab: int, setting: Setting) -> Iterator[Any]:
    """Random token ids, the same for every arm."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(setting.warmup + setting.steps):
        yield torch.randint(3, vocab, (setting.batch, setting.length), generator=generator).to(device())


def gradient_norm(model: Any) -> float:
    """Norm of all adapters' gradients together."""
    import torch

    grads = [
        p.grad.detach().double().norm() for n, p in model.named_parameters() if "lora_" in n and p.grad is not None
    ]
    return float(torch.stack(grads).norm())


def _autocast() -> AbstractContextManager[Any]:
    import torch

    return torch.autocast(device().type, torch.bfloat16)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _gib(statistic: str) -> float | None:
    import torch

    return round(getattr(torch.cuda, statistic)() / 2**30, 3) if torch.cuda.is_available() else None


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [f"{arm}{suffix}" for arm in ARMS for suffix in ("", "_nf4")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--arm", choices=names)
    what.add_argument("--interleave", nargs="+", choices=names)
    what.add_argument("--save", action="store_true", help="only write the model that some arms load")
    parser.add_argument("--out", help="result file of --interleave")
    parser.add_argument("--rounds", type=int, default=1, help="how often --interleave runs each arm")
    parser.add_argument("--limit", type=float, default=240, help="seconds that --interleave gives an arm")
    parser.add_argument("--shape", default="llama8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, each arm in its own way")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="optimize(verify=False)")
    parser.add_argument("--models", default="", help="folder for saved models; the system's temporary one if not given")
    given = parser.parse_args(arguments)
    if given.interleave and not given.out:
        parser.error("--interleave needs --out")
    return given


def setting_of(given: argparse.Namespace, arm: str) -> Setting:
    """The setting of one arm on a command line."""
    fields = ("shape", "layers", "batch", "length", "steps", "warmup", "checkpointing", "verify", "models")
    return Setting(arm, **{name: getattr(given, name) for name in fields})


def main() -> int:
    """Runs one arm, or hands several to the runner."""
    given = parse()
    if given.interleave:
        from .train_runner import interleave

        return interleave(given)
    if given.save:
        print(save(setting_of(given, "hf")))
        return 0
    package = missing(given.arm)
    if package:
        print(f"{given.arm} needs {package}, which is not installed", file=sys.stderr)
        return 2
    print(PREFIX + json.dumps(run_arm(setting_of(given, given.arm))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
