"""Plans for the tests: of models made up, and of anything at all."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from hypothesis import strategies as st

from weft.quant.budget import PrecisionBudget
from weft.quant.plan import Layer, LayerOption, Measured, PrecisionPlan
from weft.quant.stored import FORMATS

HARM = {"nf4": 1.0, "nf4-feedback": 0.6, "int8": 0.05, "16-bit": 0.0}
SIZE = {"nf4": 0.516, "nf4-feedback": 0.516, "int8": 1.002, "16-bit": 2.0}
PARTS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.up_proj": (256, 64),
    "mlp.down_proj": (64, 256),
}


def layer(path: str, shape: tuple[int, ...], harm: float) -> Layer:
    """A linear with the usual four formats."""
    size = math.prod(shape)
    options = (LayerOption(f, int(size * SIZE[f]), harm * HARM[f], HARM[f] / 10, HARM[f] / 12) for f in HARM)
    return Layer((path,), shape, "bfloat16", tuple(options), outliers=len(path) % 3)


def model_layers(blocks: int, seed: int = 0, planted: Mapping[str, float] | None = None) -> tuple[Layer, ...]:
    """A decoder's linears, with a head that is pinned; ``planted`` sets the harm of some."""
    rng, found = random.Random(seed), []
    for i in range(blocks):
        for part, shape in PARTS.items():
            path = f"model.layers.{i}.{part}"
            harm = rng.lognormvariate(-6, 0.5)
            found.append(layer(path, shape, (planted or {}).get(path, harm)))
    head = LayerOption("16-bit", 64 * 1000 * 2, 0.0)
    return (*found, Layer(("lm_head", "model.embed"), (1000, 64), "bfloat16", (head,), pinned="read by others"))


def additive(layers: tuple[Layer, ...], choice: Mapping[str, str], factor: float = 1.0) -> float:
    """The divergence of a model in which harm adds up."""
    return factor * math.fsum(la.option(choice[la.path]).sensitivity for la in layers)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
positive = st.floats(0, 1e6)
sizes = st.integers(0, 10**12)


@st.composite
def any_layers(draw: st.DrawFn) -> tuple[Layer, ...]:
    """Layers of any names, shapes and numbers."""
    paths = iter(draw(st.lists(names, min_size=0, max_size=8, unique=True)))
    found = []
    for path in paths:
        own = (path, *([extra] if draw(st.booleans()) and (extra := next(paths, None)) is not None else []))
        formats = draw(st.lists(st.sampled_from([*FORMATS]), min_size=1, unique=True))
        errors = st.none() | positive
        options = [LayerOption(f, draw(sizes), draw(positive), draw(errors), draw(errors)) for f in formats]
        shape = tuple(draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=3)))
        dtype = draw(st.sampled_from(["float32", "bfloat16"]))
        found.append(Layer(own, shape, dtype, tuple(options), draw(st.integers(0, 99)), draw(names)))
    return tuple(found)


@st.composite
def any_plans(draw: st.DrawFn) -> PrecisionPlan:
    """Plans that contradict nothing."""
    layers = draw(any_layers())
    pick = st.tuples(*(st.sampled_from([o.format for o in la.options]) for la in layers))
    kls = st.floats(0, 100) | st.just(math.inf)
    measured = draw(st.lists(st.builds(Measured, pick, kls), max_size=3, unique_by=lambda m: m.formats))
    formats = tuple(draw(st.lists(st.sampled_from([*FORMATS]), min_size=1, unique=True)))
    memory = st.none() | st.sampled_from(["6GB", "5.5 GiB"]) | st.integers(1, 10**12)
    budget = draw(st.none() | st.builds(PrecisionBudget, memory, st.floats(0, 9), st.just(formats)))
    notes = tuple(draw(st.lists(names, max_size=2)))
    return PrecisionPlan(layers, draw(pick), draw(sizes), draw(st.none() | kls), tuple(measured), notes, budget)
