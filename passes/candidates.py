"""The weights of a model that could be stored in fewer bits, in every format that each can take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.error_measures import output_error, weight_error
from ..quant.errors import QuantizationError
from ..quant.formats import DTYPES, FORMATS, Format, dequantize, quantize
from ..quant.modules import acts_as
from .prefix import Prefix
from .sensitivity import Candidate
from .survey import Survey, Use

HEAD = "the head and the embeddings stay as they are unless asked for: other libraries read their weights"
TRAINED = "it is trained"


def find_candidates(
    model: nn.Module, root: nn.Module, uses: Mapping[str, Use], blocks: Sequence[nn.Module], formats: Sequence[str],
    head: bool,
) -> list[Candidate]:  # fmt: skip
    """Every parameter that a product reads, in the model's order, with the formats that it can take.

    Args:
        head: whether embeddings and the head may be changed, too.
    """
    kept = set() if head else {id(p) for m in _embeddings(root) for p in m.parameters()}
    partly = any(not p.requires_grad for p in model.parameters())
    owners = {id(p): b for b in blocks for p in b.parameters()}
    found = []
    for name, parameter in model.named_parameters():
        if name not in uses:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        layout = acts_as(owner, name.rpartition(".")[2])
        pinned = HEAD if id(parameter) in kept else TRAINED if partly and parameter.requires_grad else ""
        possible = (
            () if pinned else tuple(f for f in formats if _fits(FORMATS[f], parameter, layout, uses[name].layout))
        )
        if not pinned and not [f for f in possible if FORMATS[f].kind != "dense"]:
            pinned = f"a weight of shape {tuple(parameter.shape)} and {parameter.dtype} fits no other format"
        block = owners.get(id(parameter))
        found.append(Candidate(uses[name], block, layout or "rows", () if pinned else possible, pinned))
    return found


def _embeddings(root: nn.Module) -> Iterable[nn.Module]:
    """Modules that turn classes into vectors or back, as transformers names them, and torch's own."""
    named = [getattr(root, f"get_{kind}_embeddings", lambda: None) for kind in ("input", "output")]
    for getter in named:
        try:
            found = getter()
        except NotImplementedError:
            continue
        if isinstance(found, nn.Module):
            yield found
    yield from (m for m in root.modules() if isinstance(m, nn.Embedding))


def _fits(format: Format, parameter: nn.Parameter, layout: str | None, used: str) -> bool:
    """4-bit blocks must not run over the end of a row: bitsandbytes' CPU kernel reads other scales there.

    Args:
        layout: in which the parameter's module acts as a linear; None: it is no linear.
        used: in which products read the parameter.
    """
    if format.kind == "dense":
        return True
    if parameter.dtype not in DTYPES or (layout is not None and layout != used):
        return False
    in_features = parameter.shape[-2 if layout == "columns" else -1]
    if layout is None and (format.kind == "int8" or format.feedback):
        return False
    return format.kind == "int8" or in_features % format.block_size == 0


def store_candidates(
    candidates: Sequence[Candidate], survey: Survey, prefixes: Sequence[Prefix], each: Callable[[], object]
) -> None:
    """Quantize every candidate in each of its formats, block by block, weighted by what its input was.

    Raises:
        QuantizationError: a weight holds NaN or infinity; it names the parameter.
    """
    groups: dict[nn.Module | None, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.block, []).append(candidate)
    for block, group in groups.items():
        wanted = [c.name for c in group if any(FORMATS[f].feedback for f in c.formats)]
        if wanted:
            survey.watch(lambda block=block: _run(prefixes, block), wanted, hessians=True)
        for candidate in group:
            _store(candidate)
            candidate.use.statistics.forget_hessian()
            each()


def _run(prefixes: Sequence[Prefix], block: nn.Module | None) -> None:
    for prefix in prefixes:
        if block is None:
            prefix.record(results=False)
        else:
            prefix.run_until(block)


def _store(candidate: Candidate) -> None:
    weight, statistics = candidate.matrix(), candidate.use.statistics
    along_rows = candidate.layout == candidate.use.layout  # the input's channels run along the stored rows
    for name in candidate.formats:
        silent = FORMATS[name].feedback and not statistics.mean_square.any()  # no input, no error to make good
        if FORMATS[name].kind == "dense" or silent:
            continue
        try:
            stored = quantize(weight, FORMATS[name], candidate.use.calibration if along_rows else None)
        except QuantizationError as error:
            raise QuantizationError(f"{candidate.name}: {error}") from error
        approximation = dequantize(stored, weight.dtype)
        pair = (weight, approximation) if along_rows else (weight.mT, approximation.mT)
        candidate.errors[name] = output_error(*pair, candidate.use.calibration), weight_error(weight, approximation)
        candidate.stored[name] = stored.to("cpu")


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those that share memory once, with what quantized ones keep beside."""
    return sum({(t.device, t.data_ptr()): t.nbytes for t in held_tensors(model) if t.numel()}.values())


def held_tensors(model: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers, and the tensors that bitsandbytes keeps beside a quantized parameter."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.data
        state = getattr(tensor, "quant_state", None)
        nested = getattr(state, "state2", None)
        beside: list[Any] = [getattr(tensor, "CB", None), getattr(tensor, "SCB", None)]
        beside += [getattr(state, n, None) for n in ("absmax", "code", "offset")]
        beside += [getattr(nested, n, None) for n in ("absmax", "code")]
        yield from (t for t in beside if isinstance(t, Tensor) and t.device != torch.device("meta"))
