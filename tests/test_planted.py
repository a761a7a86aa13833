"""A layer that is known to suffer from four bits is the one that stays in 16 (``benchmarks/planted.py`` at full size)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.passes.divergence import logits_of


def _benchmarks(name: str) -> Any:
    """A module of the checkout's ``benchmarks``, without the checkout on the path: its other folders would be found too."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if "benchmarks" not in sys.modules:
        places = [str(folder)]
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=places
        )
        assert spec is not None and spec.loader is not None
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.{name}")


planted = _benchmarks("planted")
SUBJECTS, LAYERS = planted.SUBJECTS, planted.LAYERS
CASES = {(c.subject.name, c.place): c for c in planted.all_cases(24)}


def test_cases_cover_every_architecture_layer_and_budget() -> None:
    cases = planted.all_cases(24)
    assert {c.subject.name for c in cases} == {s.name for s in SUBJECTS}
    assert {c.layer for c in cases} == set(range(LAYERS))
    assert {c.layers_of_room for c in cases} == {1, 2}


@pytest.mark.parametrize("case", [CASES["llama", 2], CASES["gpt2", 0], CASES["by hand", 1]])
def test_the_planted_layer_is_found(case: Any) -> None:
    outcome = planted.run_case(case)
    assert outcome.moved <= planted.UNCHANGED
    assert outcome.found and outcome.rank == len(outcome.planted)
    assert not outcome.found_before, "the layer would be kept anyway: the case shows nothing"
    assert outcome.kl <= outcome.kl_planted_only * 1.001
    assert outcome.kl_alone > 10 * outcome.kl_alone_before


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_planting_leaves_the_function_and_changes_the_weights(subject: Any) -> None:
    model, (batch, *_) = subject.model(0), subject.batches(0)
    for layer in (0, LAYERS - 1):
        for place in subject.places(model, layer):
            with torch.no_grad():
                before = logits_of(model(**batch))
                weights = [t.clone() for t in place.grown]
                planted.plant(place, torch.Generator().manual_seed(layer))
                after = logits_of(model(**batch))
            assert float((after - before).abs().max() / before.abs().max()) <= planted.UNCHANGED
            ratios = [(new / old).abs().max() for new, old in zip(place.grown, weights, strict=True)]
            assert all(16 <= ratio <= 64.1 for ratio in ratios)
