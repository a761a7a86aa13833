"""An analysis: how far the model's predictions move when one weight, or several, are stored in fewer bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..quant.formats import Stored, dequantize
from ..rewrite.errors import CalibrationError
from .divergence import divergence, is_finite, logits_of, mask_of, predictions
from .prefix import Prefix
from .survey import Use

MOST_OPERATIONS = 3e16
"""Floating-point operations that measuring every weight alone may take: a minute or two of a large GPU."""

ROUNDING = "rounding"
ATTENTION: Any = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention") for kind in ("efficient", "flash", "cudnn")
)
"""Counted here: torch 2.11 raises where keys have fewer heads than queries."""


@dataclass
class Candidate:
    """One weight whose format is to be chosen, as it would be in each format.

    ``block``: the block that it is in, None outside of all. ``stored``: by name of the format, in the host's memory.
    ``pinned``: why it stays as it is, if it does.
    """

    use: Use
    block: nn.Module | None
    layout: str
    """As the matrix is stored: ``"rows"`` as the parameter lies, ``"columns"`` transposed."""
    formats: tuple[str, ...]
    pinned: str = ""
    stored: dict[str, Stored] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """For each format, the relative error of the product's output, and of the weight."""

    @property
    def name(self) -> str:
        """The parameter's."""
        return self.use.name

    def matrix(self) -> Tensor:
        """The weight as it is stored: a linear's as (out_features, in_features), any other as it lies."""
        return _turned(self.use.parameter.detach(), self.layout)

    def put(self, format_name: str) -> Tensor:
        """The weight as it is after storing it in a format, in the parameter's dtype, layout and device."""
        parameter = self.use.parameter
        stored = self.stored[format_name].to(parameter.device)
        return _turned(dequantize(stored, parameter.dtype), self.layout)


def _turned(weight: Tensor, layout: str) -> Tensor:
    return weight if layout == "rows" else weight.transpose(-1, -2)


@dataclass
class Sensitivity:
    """Measures divergences of one model on some batches. Weights are exchanged in place, and given back.

    Args:
        model: takes the batches' items as keyword arguments.
        blocks: between which calls are remembered (:mod:`.prefix`).
        batches: on the model's device.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    batches: Sequence[Mapping[str, Any]]
    forwards: float = 0.0
    """How many forwards were run, partial ones counted by their share of the blocks."""
    noise: dict[str, float] = field(default_factory=dict)
    """For each layer, what :meth:`alone` took off: the divergence that rounding alone causes."""

    def sample(self, layers: Sequence[Candidate], operations: float | None = None) -> Sequence[Mapping[str, Any]]:
        """As many of the batches, evenly spaced, as :meth:`alone` can measure in so many operations; one at least.

        None stands for :data:`MOST_OPERATIONS`.

        Of the first batch the products are counted, and the others taken to be alike.
        """
        if len(self.batches) < 2:
            return self.batches
        prefix = Prefix(self.model, list(self.blocks), self.batches[0])
        with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(ATTENTION, attention_operations)) as counter:
            prefix.record(results=False)
        self.forwards += 1
        shares = [(1 - _start(prefix, la) / max(1, len(prefix.calls))) * len(_changes(la)) for la in layers]
        count = int((operations or MOST_OPERATIONS) / max(1.0, sum(shares) * counter.get_total_flops()))
        whole = len(self.batches)
        count = min(max(count, 1), whole)
        return [self.batches[i * whole // count] for i in range(count)]

    def alone(
        self, layers: Sequence[Candidate], each: Callable[[], object] = lambda: None,
        batches: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, dict[str, float]]:  # fmt: skip
        """For each layer and stored format, the divergence where that layer alone is stored so, in nats a prediction.

        It is infinite where predictions become NaN. A model in 16 bits rounds anew after every change, which moves its
        predictions by itself, as far as NF4 in many a layer does. What a :func:`nudged` weight does is just that, and is
        taken off: :attr:`noise`.

        Args:
            each: called after every layer of every batch, for progress.
            batches: of :attr:`batches`, those to measure on; None: all.

        Raises:
            CalibrationError: the model itself predicts NaN or infinity, or one number, or a mask keeps no prediction.
        """
        totals = {layer.name: dict.fromkeys(_changes(layer), 0.0) for layer in layers}
        count = 0
        for inputs in self.batches if batches is None else batches:
            prefix = Prefix(self.model, list(self.blocks), inputs)
            before = _finite(logits_of(prefix.record()))
            self.forwards += 1
            mask = mask_of(inputs, before)
            count += _counted(before, mask)
            for layer in layers:
                start = _start(prefix, layer)
                for name in totals[layer.name]:
                    with _exchanged(layer, name):
                        after = logits_of(prefix.run_from(start))
                    self.forwards += 1 - start / max(1, len(prefix.calls))
                    totals[layer.name][name] += divergence(before, after, mask)
                each()
        noise = {name: found.pop(ROUNDING, 0.0) for name, found in totals.items()}
        self.noise = {name: total / max(1, count) for name, total in noise.items()}
        return {
            name: {f: _beyond(total, noise[name]) / max(1, count) for f, total in found.items()}
            for name, found in totals.items()
        }

    @contextmanager
    def together(self, layers: Sequence[Candidate]) -> Iterator[Callable[[Mapping[str, str]], float]]:
        """A function that measures the divergence where every layer is stored as a choice says, in nats a prediction.

        Weights are written over in place, and wait in the host's memory, as do the predictions of the model as it was: the
        device holds one copy of each weight, whoever else refers to it.
        """
        references = [_finite(logits_of(self._run(inputs))).cpu() for inputs in self.batches]
        originals = {layer.name: layer.use.parameter.data.to("cpu", copy=True) for layer in layers}
        current = dict.fromkeys(originals, "")

        def put(layer: Candidate, name: str) -> None:
            wanted = layer.put(name) if name in layer.stored else originals[layer.name]
            current[layer.name] = name
            with torch.inference_mode():  # tensors made in it can be written to nowhere else
                layer.use.parameter.data.copy_(wanted)

        def measure(choice: Mapping[str, str]) -> float:
            for layer in layers:
                if current[layer.name] != choice[layer.name]:
                    put(layer, choice[layer.name])
            total, count = 0.0, 0
            for inputs, reference in zip(self.batches, references, strict=True):
                after = logits_of(self._run(inputs))
                before = reference.to(after.device)
                mask = mask_of(inputs, before)
                total += divergence(before, after, mask)
                count += predictions(before, mask)
            return _beyond(total, 0.0) / max(1, count)

        try:
            yield measure
        finally:
            for layer in layers:
                if current[layer.name]:
                    put(layer, "")

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        self.forwards += 1
        with torch.no_grad():
            return self.model(**inputs)


def _beyond(total: float, noise: float) -> float:
    """What is left of a divergence without that of rounding; infinity where it is no number: predictions became NaN."""
    return max(0.0, total - noise) if math.isfinite(total) else math.inf


def attention_operations(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the two products, from the operands' shapes (batch, heads, length, head_dim)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (key[-1] + value[-1])


def _changes(layer: Candidate) -> list[str]:
    """What is done to a layer alone: each format, and where weights are in 16 bits the least change."""
    return [*layer.stored, *([ROUNDING] if layer.use.parameter.itemsize == 2 else [])]


def nudged(weight: Tensor) -> Tensor:
    """A weight in 16 bits, of an eighth of whose values the last bit is flipped.

    In bfloat16 that is a relative change of 0.2 %, a quarter of what int8 does: enough for all that follows to be rounded
    otherwise, too little for more.
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    chosen = torch.randint(8, weight.shape, generator=generator, device=weight.device, dtype=torch.uint8) == 0
    return (weight.view(torch.int16) ^ chosen.to(torch.int16)).view(weight.dtype)


def _counted(logits: Tensor, mask: Tensor | None) -> int:
    """How many predictions of a batch count; a divergence of none, or of what knows one outcome, is zero whatever is done."""
    if logits.shape[-1] < 2:
        raise CalibrationError(
            f"the model predicts one number, {tuple(logits.shape)}: a divergence needs logits of two classes or more"
        )
    count = predictions(logits, mask)
    if not count:
        raise CalibrationError("a calibration batch holds no prediction, or its attention mask keeps none")
    return count


def _finite(logits: Tensor) -> Tensor:
    if not is_finite(logits):
        raise CalibrationError(
            "the model itself predicts NaN or infinity on a calibration batch: check its data and dtype"
        )
    return logits


def _start(prefix: Prefix, layer: Candidate) -> int:
    if layer.block is not None:
        return prefix.position(layer.block)
    owners = [m for m in prefix.first_use if any(p is layer.use.parameter for p in m.parameters(recurse=False))]
    return min((prefix.first_use[m] for m in owners), default=0)


@contextmanager
def _exchanged(layer: Candidate, format_name: str) -> Iterator[None]:
    """The weight as ``format_name`` stores it, or nudged, meanwhile."""
    parameter = layer.use.parameter
    kept = parameter.data
    parameter.data = nudged(kept) if format_name == ROUNDING else layer.put(format_name)
    try:
        yield
    finally:
        parameter.data = kept
