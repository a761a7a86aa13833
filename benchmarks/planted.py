"""Does the planner find the layer that suffers from four bits, where it is known which one that is?

    python -m benchmarks.planted [--cases 24] [--seed 0] [--out FILE]

In a model whose function is left as it was, one layer (or two that read one norm) is made hard to store: some of its
input channels are scaled up by 16 to 64, and what produces them down (:mod:`.planted_models`). The planner gets room for
that layer in 16 bits, in every other case also for the largest layer there is, and must spend it on the planted one. The
same model is planned before anything is planted, with the same room: what it would have kept anyway.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft import PrecisionBudget, PrecisionPlan, plan_precision
from weft.passes.divergence import divergence, logits_of, predictions
from weft.quant.formats import FORMATS as STORED
from weft.quant.formats import dequantize, quantize
from weft.quant.modules import acts_as

from .environment import write
from .planted_models import LAYERS, SUBJECTS, Place, Subject

FORMATS = ("nf4", "16-bit")
FACTORS = (16.0, 64.0)
RUN = 32
"""One channel of this many is planted: two of each block of 64 where channels and columns are one to one."""
UNCHANGED = 1e-4
"""How far rounding may move a prediction, relative to the largest."""
MEASUREMENTS = 6
ROUNDING = 1e-3
"""Of a divergence, computed in another order."""


@dataclass(frozen=True)
class Case:
    """Where to plant in which model."""

    subject: Subject
    place: int
    layer: int
    seed: int
    layers_of_room: int


@dataclass
class Outcome:
    """One case. Ranks are by sensitivity in NF4, 1 the largest; of two planted layers the worse one's.

    ``kl_planted_only``: with everything in NF4 but the planted weights; the plan must not be worse.
    """

    model: str
    kind: str
    layer: int
    seed: int
    planted: tuple[str, ...]
    channels: int
    room: int
    moved: float
    kept: list[str]
    found: bool
    rank: int
    kl_alone: float
    kl_uniform: float
    kl: float
    kl_planted_only: float
    kept_before: list[str]
    found_before: bool
    rank_before: int
    kl_alone_before: float


def all_cases(count: int, seed: int = 0) -> list[Case]:
    """Every kind of place in turn, each time in another layer and from another seed, counted from ``seed``."""
    kinds = [(s, i) for s in SUBJECTS for i in range(len(s.places(s.model(0), 0)))]
    turns = [divmod(i, len(kinds)) for i in range(count)]
    return [Case(*kinds[k], (k + 3 * t + seed) % LAYERS, seed + 100 * t + k, 1 + (k + t) % 2) for t, k in turns]


def plant(place: Place, generator: torch.Generator) -> int:
    """Scale one channel of every run of ``RUN``, in place, so that no block is spared; returns how many."""
    factors = torch.ones(place.shape)
    starts = torch.arange(0, factors.numel(), RUN)
    chosen = starts + torch.randint(RUN, starts.shape, generator=generator)
    low, high = FACTORS
    factors.view(-1)[chosen] = low + (high - low) * torch.rand(len(starts), generator=generator)
    for tensor in place.shrunk:
        tensor.div_(factors)
    for tensor in place.grown:
        tensor.mul_(factors)
    return len(starts)


def run_case(case: Case) -> Outcome:
    """Plan, plant, check that nothing moved, plan again."""
    model, batches = case.subject.model(case.seed), case.subject.batches(case.seed)
    place = case.subject.places(model, case.layer)[case.place]
    room = _room(model, batches, place, case.layers_of_room)
    budget = PrecisionBudget(memory=room, formats=FORMATS)
    before, predicted = (
        plan_precision(model, batches, budget=budget, measurements=MEASUREMENTS),
        _logits(model, batches),
    )
    channels = plant(place, torch.Generator().manual_seed(case.seed))
    moved = float((_logits(model, batches) - predicted).abs().max() / predicted.abs().max())
    plan = plan_precision(model, batches, budget=budget, measurements=MEASUREMENTS)
    ranks, ranks_before = _ranks(plan), _ranks(before)
    kept, kept_before = _kept(plan), _kept(before)
    smallest = tuple(la.smallest.format for la in plan.layers)
    uniform = next(m.kl for m in plan.measured if m.formats == smallest)
    return Outcome(
        model=case.subject.name, kind=place.kind, layer=case.layer, seed=case.seed, planted=place.paths,
        channels=channels, room=room, moved=moved, kept=kept, found=set(place.paths) <= set(kept),
        rank=max(ranks[p][0] for p in place.paths), kl_alone=min(ranks[p][1] for p in place.paths),
        kl_uniform=uniform, kl=plan.kl if plan.kl is not None else float("nan"),
        kl_planted_only=_kl_of_planted_only(model, batches, place, plan), kept_before=kept_before,
        found_before=set(place.paths) <= set(kept_before), rank_before=max(ranks_before[p][0] for p in place.paths),
        kl_alone_before=min(ranks_before[p][1] for p in place.paths),
    )  # fmt: skip


def _room(model: nn.Module, batches: list[dict[str, Tensor]], place: Place, layers: int) -> int:
    """Bytes of everything in NF4, but the planted weights in 16 bits, and the largest other one too if ``layers`` is 2."""
    plan = plan_precision(model, batches[:1], formats=FORMATS, measurements=1)
    more = {la.path: la.option("16-bit").bytes - la.smallest.bytes for la in plan.layers}
    others = [count for path, count in more.items() if path not in place.paths]
    return plan.smallest_bytes + sum(more[p] for p in place.paths) + (max(others) if layers == 2 else 0)


def _kl_of_planted_only(model: nn.Module, batches: list[dict[str, Tensor]], place: Place, plan: PrecisionPlan) -> float:
    """Computed without the planner: every weight that is smaller in NF4 goes there and back, but for the planted ones."""
    stored = copy.deepcopy(model)
    paths = {la.path for la in plan.layers if la.smallest.format == "nf4"} - set(place.paths)
    for name, parameter in stored.named_parameters():
        if name.removesuffix(".weight") in paths:
            owner, _, attribute = name.rpartition(".")
            turned = acts_as(stored.get_submodule(owner), attribute) == "columns"
            matrix = parameter.data.t() if turned else parameter.data
            back = dequantize(quantize(matrix, STORED["nf4"]))
            parameter.data = back.t() if turned else back
    before, after = _logits(model, batches), _logits(stored, batches)
    return divergence(before, after) / predictions(before, None)


def _ranks(plan: PrecisionPlan) -> dict[str, tuple[int, float]]:
    """By path, the rank by sensitivity and the sensitivity, of the layers that have a choice."""
    alone = {la.path: la.option("nf4").sensitivity for la in plan.layers if len(la.options) > 1}
    order = sorted(alone, key=lambda p: -alone[p])
    return {path: (order.index(path) + 1, alone[path]) for path in alone}


def _kept(plan: PrecisionPlan) -> list[str]:
    """The layers that could be smaller, and are not."""
    chosen = zip(plan.layers, plan.formats, strict=True)
    return [la.path for la, f in chosen if la.option(f).bytes > la.smallest.bytes]


def _logits(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([logits_of(model(**inputs)) for inputs in batches])


def describe(outcome: Outcome) -> str:
    """One line."""
    o = outcome
    said = "found" if o.found else f"NOT FOUND, kept {', '.join(o.kept)}"
    where = f"{o.model:8} {o.kind:8} {', '.join(o.planted):60}"
    return (
        f"{where} rank {o.rank_before:>2} → {o.rank}  KL {o.kl_uniform:.3f} → {o.kl:.3f}  moved {o.moved:.0e}  {said}"
    )


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts over all cases, and what was asked for."""
    return {
        "cases": len(outcomes),
        "found": sum(o.found for o in outcomes),
        "ranked_first": sum(o.rank == len(o.planted) for o in outcomes),
        "no_worse_than_planted_only": sum(o.kl <= o.kl_planted_only * (1 + ROUNDING) for o in outcomes),
        "found_before_planting": sum(o.found_before for o in outcomes),
        "largest_change_of_predictions": max(o.moved for o in outcomes),
        "formats": FORMATS, "factors": FACTORS, "measurements": MEASUREMENTS,
    }  # fmt: skip


def main() -> int:
    """Run every case, print one line each, write the result file; the exit status is 1 if a planted layer was not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/planted.json")
    options = parser.parse_args()
    started, outcomes = time.perf_counter(), list[Outcome]()
    for case in all_cases(options.cases, options.seed):
        outcomes.append(run_case(case))
        print(describe(outcomes[-1]), flush=True)
    found = summary(outcomes) | {"seed": options.seed, "seconds": round(time.perf_counter() - started, 1)}
    write(options.out, "planted", summary=found, outcomes=[asdict(o) for o in outcomes])
    print(
        f"found {found['found']} of {len(outcomes)}; before planting {found['found_before_planting']} were kept anyway"
    )
    unchanged = found["largest_change_of_predictions"] <= UNCHANGED
    return 0 if unchanged and found["found"] == found["no_worse_than_planted_only"] == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
