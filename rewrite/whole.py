"""Captures a whole model: installs its regions, has it run on examples, and tries the next rung where nothing was captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import nn
from torch._dynamo.exc import TorchDynamoException

from .capture import Session
from .cuda_graphs import Recordings
from .errors import first_line
from .install import Installation
from .ladder import noting_calls, outside, unreached
from .pipeline import Pass
from .regions import Plan, Site, plan_sites
from .report import RewriteReport
from .step_memory import Limit, StepMemory


def capture_model(
    model: nn.Module,
    root: nn.Module,
    passes: Sequence[Pass],
    run: Callable[[], None],
    mode: str,
    verify: bool = True,
    memory: Limit | None = None,
    cuda_graphs: bool = True,
) -> Installation:
    """Replace the forwards of ``root``'s regions by captured and rewritten ones.

    Where Dynamo captured nothing of a module that ran, capturing starts over with torch.fx there: a forward replaced inside a
    captured region would have it captured twice.

    Args:
        model: what the user calls, whose parameter names the report uses.
        root: ``model`` or the module inside it that is captured.
        passes: run over each graph.
        run: calls ``model`` on example inputs, without lasting effects. Called several times.
        mode: as the report states it.
        verify: replay every rewrite.
        memory: the limit of a training step, within which is planned what the blocks save; None: they save all.
        cuda_graphs: record the blocks of small training steps; only where steps are planned.

    Raises:
        Exception: what ``run`` raises; every forward has then been given back.
    """
    prefix = next(path for path, module in model.named_modules() if module is root)
    plan = plan_sites(root, prefix)
    recordings = Recordings(model.parameters) if cuda_graphs and memory != "min" and on_gpu(model) else None
    if recordings is not None and memory != "free":
        recordings.share = 1.0  # where memory is short, only what is slower without: recordings keep some
    steps = None if memory is None else StepMemory(plan.blocks, model, memory, recordings)
    installation = Installation(_session(model, passes, mode, verify, steps))
    _run_plan(installation, plan, [], run)
    missing = unreached(root, prefix, installation.session.reached)
    if not missing:
        return installation
    installation.remove_all()
    with noting_calls(missing) as called:
        run()
    again = Installation(_session(model, passes, mode, verify, steps))
    _run_plan(again, plan, [s for s in missing if s.path in called], run)
    return again


def on_gpu(model: nn.Module) -> bool:
    """Whether a parameter of ``model`` is on a GPU."""
    return any(p.device.type == "cuda" for p in model.parameters())


def _session(model: nn.Module, passes: Sequence[Pass], mode: str, verify: bool, memory: StepMemory | None) -> Session:
    modules = [path for path, _ in model.named_modules(remove_duplicate=False)]
    report = RewriteReport(mode, parameters={n: p.numel() for n, p in model.named_parameters()}, modules=modules)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    return Session(list(passes), report, verify, names, memory=memory)


def _run_plan(installation: Installation, plan: Plan, traced: list[Site], run: Callable[[], None]) -> None:
    """Install and run; on an error, no forward is left replaced."""
    memory = installation.session.memory
    try:
        with installation.session.keeping_weights(), nullcontext() if memory is None else memory.trying():
            for site in [*traced, *outside(plan.first, traced)]:
                installation.install(site)
            run()
            root = outside([plan.root], traced) if plan.root and installation.inline_blocks_keep_type() else None
            if root is None or not _captured_around(installation, root, run):
                rest = outside(plan.instead, traced)
                for site in rest:
                    installation.install(site)
                if rest:
                    run()
    except BaseException:  # interrupted by hand, too
        installation.remove_all()
        raise


def _captured_around(installation: Installation, root: list[Site], run: Callable[[], None]) -> bool:
    """Install and run the forward around the blocks; False where Dynamo cannot have them as calls in its graph, such as inside a
    transform of ``torch.func``."""
    for site in root:
        installation.install(site)
    try:
        if root:
            run()
    except TorchDynamoException as error:
        for site in root:
            installation.remove(site.path)
            where = site.path or type(site.module).__name__
            installation.session.report.notes.append(f"{where}: no graph around the blocks: {first_line(error)}")
        return False
    return True
