"""What to watch while training: tokens per second, peak memory, and the first NaN or infinity.

``TrainingMonitor`` is a callback of ``transformers.Trainer`` (and TRL's trainers); ``FiniteGuard`` is its guard, for loops of
one's own. Neither needs an optimized model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from transformers import TrainerCallback

from weft.errors import WeftError


class NonFiniteError(WeftError, FloatingPointError):
    """The loss or a gradient became NaN or infinite; ``step``, ``module_path`` and ``parameter`` say when and where."""

    def __init__(self, message: str, step: int, module_path: str = "", parameter: str = "") -> None:
        super().__init__(message)
        self.step, self.module_path, self.parameter = step, module_path, parameter


@dataclass(frozen=True)
class Finding:
    """What was not finite in one step: the losses, and the first gradient, in the order in which backward came to it."""

    losses: tuple[float, ...]
    parameter: str = ""
    value: float = 0.0
    others: int = 0

    @property
    def module_path(self) -> str:
        """The module that the parameter belongs to."""
        return self.parameter.rpartition(".")[0]

    def error(self, step: int) -> NonFiniteError:
        """In words."""
        loss = f"the loss is {self.losses[0]}" if self.losses else "the loss is finite"
        text = f"step {step}: {loss}"
        if self.parameter:
            more = f" and of {self.others} parameters after it" if self.others else ""
            text += (
                f"; the first gradient that is not finite, in the order of the backward pass, is that of "
                f"{self.parameter} in module {self.module_path or '(top)'} (largest value: {self.value}){more}"
            )
        remedy = (
            "; no weight was changed by this step: look at its batch (are all labels -100?), at the learning rate of "
            "the steps before it, and at what that module computes"
        )
        return NonFiniteError(text + remedy, step, self.module_path, self.parameter)


class FiniteGuard:
    """Remembers, without waiting for the device, whether losses and gradients were finite.

    ::

        with FiniteGuard(model) as guard:
            for step, batch in enumerate(batches):
                model(**batch).loss.backward()
                guard.check(step)      # raises NonFiniteError, before the optimizer changes a weight
                optimizer.step()

    Gradients are looked at once a backward pass, before anything clips them: clipping by a norm that is NaN makes all of
    them NaN.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._reached: list[nn.Parameter] = []
        self._found: list[tuple[list[str], Tensor]] = []
        self._losses: list[Tensor] = []
        self._handles: list[Any] = [p.register_post_accumulate_grad_hook(self._note) for p in self._names]
        self._handles.append(model.register_forward_hook(self._note_loss))

    def __enter__(self) -> FiniteGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finding(self) -> Finding | None:
        """What was not finite since the last call; None where everything was. Waits for the device."""
        found, losses = self._found, self._losses
        self._found, self._losses = [], []
        bad_losses = tuple(v for x in losses for v in x.float().reshape(-1).tolist() if not _finite(v))
        names = [name for part, _ in found for name in part]
        values = [v for _, sizes in found for v in sizes.tolist()]
        bad = [i for i, v in enumerate(values) if not _finite(v)]
        if bad:
            return Finding(bad_losses, names[bad[0]], values[bad[0]], len({names[i] for i in bad}) - 1)
        return Finding(bad_losses) if bad_losses else None

    def check(self, step: int) -> None:
        """Look at all losses and gradients since the last call.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        finding = self.finding()
        if finding is not None:
            raise finding.error(step)

    def _note_loss(self, model: nn.Module, _: Any, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if model.training and isinstance(loss, Tensor) and torch.is_grad_enabled():
            self._losses.append(loss.detach())

    def _note(self, parameter: nn.Parameter) -> None:
        if not self._reached:
            # measuring here would cost a launch or two for every parameter, and the processor is what small steps wait for
            Variable._execution_engine.queue_callback(self._measure)  # pyright: ignore[reportAttributeAccessIssue]
        self._reached.append(parameter)

    def _measure(self) -> None:
        reached, self._reached = self._reached, []
        pairs = [(self._names[p], _local(p.grad)) for p in reached if p.grad is not None]
        pairs = [(name, grad) for name, grad in pairs if grad.numel()]
        if pairs:
            sizes = torch._foreach_norm([grad for _, grad in pairs], float("inf"))  # pyright: ignore[reportPrivateImportUsage]
            where = sizes[0].device
            self._found.append(([name for name, _ in pairs], torch.stack([s.float().to(where) for s in sizes])))


def _local(gradient: Tensor) -> Tensor:
    """This process' part of a sharded gradient."""
    to_local = getattr(gradient, "to_local", None)
    return gradient.detach() if to_local is None else to_local().detach()


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


class TrainingMonitor(TrainerCallback):
    """Adds ``tokens_per_second`` and ``peak_memory_gib`` to what Trainer logs, and stops at a NaN or infinity.

    ``Trainer(model, ..., callbacks=[TrainingMonitor()])``. Tokens are counted without padding, over all processes; the time
    is that of training steps with their data, without evaluation and saving. Peak memory is the device's since training
    began (the largest of all processes), without a GPU that of the process since it began.

    Args:
        guard: raise :class:`NonFiniteError` before the optimizer takes a step with gradients that are not finite.
        overflows: with fp16 loss scaling gradients overflow as a matter of course, and such steps are skipped while the
            scale is halved: so many in a row are let pass.
    """

    def __init__(self, guard: bool = True, overflows: int = 20) -> None:
        self.guard, self.overflows = guard, overflows
        self._guard: FiniteGuard | None = None
        self._counter: Any = None
        self._tokens: list[int | Tensor] = []
        self._seconds, self._mark, self._skipped = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put the hooks on the model."""
        self._remove()
        self._counter = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._guard = FiniteGuard(model) if self.guard else None
        self._tokens, self._seconds, self._skipped = [], 0.0, 0
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._mark = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before weights are changed."""
        finding = self._guard.finding() if self._guard is not None else None
        self._skipped = 0 if finding is None else self._skipped + 1
        if finding is not None and self._skipped > (self.overflows if args.fp16 else 0):
            self._remove()
            raise finding.error(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock runs from the end of one step to the end of the next."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation is no training."""
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nor is saving."""
        self._mark = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the figures of the steps since the last log."""
        if logs is None or "loss" not in logs or not self._seconds:
            return
        counted = sum(int(t) for t in self._tokens)
        tokens, peak = _over_processes(counted, _peak(args.device), args.device)
        figures = {"tokens_per_second": round(tokens / self._seconds, 1), "peak_memory_gib": round(peak / 2**30, 3)}
        self._tokens, self._seconds = [], 0.0
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        self._remove()

    def _count(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self._tokens.append(tokens_in(kwargs, args))

    def _remove(self) -> None:
        if self._guard is not None:
            self._guard.remove()
        if self._counter is not None:
            self._counter.remove()
        self._guard = self._counter = None


def tokens_in(inputs: dict[str, Any], positional: Iterable[Any] = ()) -> int | Tensor:
    """How many tokens a forward call is given, padding left out; a tensor where the device has to count."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.detach().sum()
    ids = inputs.get("input_ids", next((a for a in positional if isinstance(a, Tensor)), None))
    if isinstance(ids, Tensor):
        return ids.numel()
    embedded = inputs.get("inputs_embeds")
    return embedded.shape[0] * embedded.shape[1] if isinstance(embedded, Tensor) else 0


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _over_processes(tokens: int, peak: int, device: torch.device) -> tuple[int, int]:
    """All processes' tokens, and the largest of their peaks."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tokens, peak
    counted, largest = (torch.tensor(value, dtype=torch.int64, device=device) for value in (tokens, peak))
    distributed.all_reduce(counted)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(counted), int(largest)
