"""Trains one arm of :mod:`benchmarks.train_step` for a few steps and says how long they took."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

import torch

from .arm_settings import READY, Setting
from .arms import build, device


def run_arm(setting: Setting) -> dict[str, Any]:
    """Build one arm and train it: ``setting.warmup`` steps, then ``setting.steps`` timed ones in each turn."""
    model, optimizer, found = _set_up(setting)
    found |= _train(model, optimizer, setting)
    found["first_s"] = round(found["first_step_s"] + found.get("optimize_s", 0.0), 3)
    if setting.base == "weft":
        found |= _report(model)
    return found


def run_lengths(setting: Setting, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Build one arm and train it as :func:`run_arm` does at each length of its rows, the shortest first.

    Where memory runs out, longer ones are not tried. Steps go on from the adapters that shorter rows have trained.
    """
    model, optimizer, _ = _set_up(replace(setting, length=max(lengths)))
    failed = dict[str, Any]()
    for length in sorted(lengths):
        _let_go(optimizer)
        found = failed or _at_length(model, optimizer, replace(setting, length=length))
        failed = found if "failed" in found else {}
        yield {"length": length} | found


def _let_go(optimizer: Any) -> None:
    """Of what former steps, or one that ended for lack of memory, have left."""
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    _empty_cache()


def _at_length(model: Any, optimizer: Any, setting: Setting) -> dict[str, Any]:
    found = dict[str, Any]()
    with suppress(torch.OutOfMemoryError):
        found = _train(model, optimizer, setting)
    if not found:
        return {"failed": "out of memory"}
    kept = {name: found[name] for name in ("peak_gib", "step_s", "tokens_per_s", "gradient_norm")}
    kept["loss"] = found["losses"][0]
    return kept | ({"memory": _memory(model.rewrite_report.memory)} if setting.base == "weft" else {})


def _set_up(setting: Setting) -> tuple[Any, Any, dict[str, Any]]:
    """The model of an arm, optimized where that is weft; its optimizer; what both took."""
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
    return model, torch.optim.AdamW(trainable, lr=1e-4, fused=True), found


def _optimize(model: Any, setting: Setting) -> dict[str, Any]:
    """In the same autocast as the training, so that the examples capture the graphs that the training runs."""
    from weft import optimize
    from weft.passes.defaults import default_passes

    started, passes = time.perf_counter(), default_passes("train", products=setting.products)
    with _autocast():
        optimize(model, mode="train", verify=setting.verify, memory=setting.memory or None, passes=passes)
    _wait()
    return {"optimize_s": round(time.perf_counter() - started, 3)}


def _report(model: Any) -> dict[str, Any]:
    """What was rewritten by the end of the training, in figures."""
    report = model.rewrite_report
    return {
        "rewrites": dict(Counter(r.rule for r in report.rewrites)),
        "refusals": dict(Counter(f"{r.rule}: {r.reason}" for r in report.refusals)),
        "graphs": len(report.graphs),
        "notes": report.remarks[:10],
        "memory": _memory(report.memory),
    }


def _memory(plan: Any) -> dict[str, Any] | None:
    """The plan of the last step whose peak is known, in GiB, and how many blocks do what."""
    if plan is None:
        return None
    sizes = ("limit", "predicted", "measured", "resident", "working")
    plan = plan.before or plan
    gib = {name: round(value / 2**30, 3) for name in sizes if (value := getattr(plan, name)) is not None}
    return gib | {"extra_s": round(plan.extra_seconds, 4), "blocks": dict(Counter(b.choice for b in plan.blocks))}


def _train(model: Any, optimizer: Any, setting: Setting) -> dict[str, Any]:
    """Seconds of each step, losses, peaks."""
    losses, found = list[float](), dict[str, Any]()
    batches = list(_batches(model.config.vocab_size, setting))

    def look() -> None:
        found["gradient_norm"] = gradient_norm(model)

    def seconds(ids: Any) -> float:
        _wait()
        started = time.perf_counter()
        loss = train_step(model, optimizer, ids, (lambda: None) if losses else look)
        losses.append(float(loss))
        _wait()
        return time.perf_counter() - started

    found["first_step_s"], *_ = [round(seconds(ids), 3) for ids in batches[: setting.warmup]]
    found["warmup_peak_gib"] = _gib("max_memory_allocated")
    timed = list[list[float]]()
    for _ in _turns(setting):
        if setting.in_turns:
            seconds(batches[0])  # the memory that was given back is asked for anew
        _reset_peak()
        timed.append([seconds(ids) for ids in batches[setting.warmup :]])
        found["peak_gib"] = _gib("max_memory_allocated")
    steps = [s for turn in timed for s in turn]
    step = statistics.median(steps)
    return found | {
        "step_s": round(step, 5), "steps_s": [round(s, 5) for s in steps],
        "turns_s": [round(statistics.median(turn), 5) for turn in timed],
        "tokens_per_s": round(setting.batch * setting.length / step), "losses": losses,
    }  # fmt: skip


def _turns(setting: Setting) -> Iterator[None]:
    """One; or those that whoever started this process gives, a line each. Until then the device is for others."""
    if not setting.in_turns:
        yield
        return
    while True:
        _empty_cache()
        print(READY, flush=True)
        if not sys.stdin.readline():
            return
        yield


def train_step(model: Any, optimizer: Any, ids: Any, inspect: Callable[[], Any] = lambda: None) -> torch.Tensor:
    """One step on ``ids``; ``inspect`` is called when the gradients are there. Returns the loss."""
    with _autocast():
        output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    inspect()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return output.loss.detach()


def _batches(vocab: int, setting: Setting) -> Iterator[Any]:
    """Random token ids, the same for every arm."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(setting.warmup + setting.steps):
        yield torch.randint(3, vocab, (setting.batch, setting.length), generator=generator).to(device())


def gradient_norm(model: Any) -> float:
    """Norm of all adapters' gradients together."""
    grads = [
        p.grad.detach().double().norm() for n, p in model.named_parameters() if "lora_" in n and p.grad is not None
    ]
    return float(torch.stack(grads).norm())


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast(device().type, torch.bfloat16)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _gib(statistic: str) -> float | None:
    return round(getattr(torch.cuda, statistic)() / 2**30, 3) if torch.cuda.is_available() else None


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
