"""An analysis: how far the model's predictions move when one weight, or several, are stored in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.formats import Stored, dequantize
from ..rewrite.errors import CalibrationError
from .divergence import divergence, is_finite, logits_of, mask_of, predictions
from .prefix import Prefix
from .survey import Use


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

    def alone(
        self, layers: Sequence[Candidate], each: Callable[[], object] = lambda: None
    ) -> dict[str, dict[str, float]]:
        """For each layer and stored format, the divergence where that layer alone is stored so, in nats a prediction.

        Args:
            each: called after every layer of every batch, for progress.

        Raises:
            CalibrationError: the model itself predicts NaN or infinity, or one number, or a mask keeps no prediction.
        """
        totals = {layer.name: dict.fromkeys(layer.stored, 0.0) for layer in layers}
        count = 0
        for inputs in self.batches:
            prefix = Prefix(self.model, list(self.blocks), inputs)
            before = _finite(logits_of(prefix.record()))
            self.forwards += 1
            mask = mask_of(inputs, before)
            count += _counted(before, mask)
            for layer in layers:
                start = _start(prefix, layer)
                for name in layer.stored:
                    with _exchanged(layer, name):
                        after = logits_of(prefix.run_from(start))
                    self.forwards += 1 - start / max(1, len(prefix.calls))
                    totals[layer.name][name] += divergence(before, after, mask)
                each()
        return {name: {f: total / max(1, count) for f, total in found.items()} for name, found in totals.items()}

    @contextmanager
    def together(self, layers: Sequence[Candidate]) -> Iterator[Callable[[Mapping[str, str]], float]]:
        """A function that measures the divergence where every layer is stored as a choice says, in nats a prediction.

        Weights that are exchanged wait in the host's memory, as do the predictions of the model as it was: the device holds
        one copy of each weight.
        """
        references = [_finite(logits_of(self._run(inputs))).cpu() for inputs in self.batches]
        originals = dict[str, Tensor]()
        current = {layer.name: "" for layer in layers}

        def put(layer: Candidate, name: str) -> None:
            parameter = layer.use.parameter
            if layer.name not in originals:
                originals[layer.name] = parameter.data.cpu()
            stored = name in layer.stored
            parameter.data = layer.put(name) if stored else originals[layer.name].to(parameter.device)
            current[layer.name] = name

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
            return total / max(1, count)

        try:
            yield measure
        finally:
            for layer in layers:
                if layer.name in originals:
                    put(layer, "")

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        self.forwards += 1
        with torch.no_grad():
            return self.model(**inputs)


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
    """The weight as ``format_name`` stores it, meanwhile."""
    parameter = layer.use.parameter
    kept, parameter.data = parameter.data, layer.put(format_name)
    try:
        yield
    finally:
        parameter.data = kept
