"""Plans in files: lossless, and nothing damaged is taken for a plan."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.quant.budget import PrecisionBudget
from weft.quant.errors import PlanError
from weft.quant.plan import PrecisionPlan
from weft.quant.plan_file import to_text
from weft.quant.planner import make_plan

from .plans import additive, any_plans, model_layers

many = settings(max_examples=int(os.environ.get("WEFT_EXAMPLES", "200")), derandomize=True, deadline=None)
LAYERS = model_layers(2)
PLAN = make_plan(LAYERS, 1000, PrecisionBudget(memory="300KB"), lambda c: additive(LAYERS, c), 6, ["dröge Sätze"])
TEXT = to_text(PLAN)


@many
@given(any_plans())
def test_nothing_is_lost(plan: PrecisionPlan) -> None:
    assert PrecisionPlan.from_dict(plan.to_dict()) == plan
    assert PrecisionPlan.from_json(to_text(plan)) == plan


def test_files_are_read_back(tmp_path: Path) -> None:
    PLAN.to_json(tmp_path / "plan.json")
    assert (
        PrecisionPlan.from_json(tmp_path / "plan.json") == PLAN == PrecisionPlan.from_json(str(tmp_path / "plan.json"))
    )
    assert PrecisionPlan.from_json((tmp_path / "plan.json").read_text(encoding="utf-8")) == PLAN
    assert (tmp_path / "plan.json").read_text(encoding="utf-8").count("\n") < len(LAYERS) + len(PLAN.measured) + 20


@many
@given(st.integers(0, len(TEXT.rstrip()) - 1))
def test_a_file_that_was_cut_off_is_refused(end: int) -> None:
    with pytest.raises(PlanError):
        PrecisionPlan.from_json(TEXT[:end])


@many
@given(st.integers(0, len(TEXT) - 1), st.characters(codec="utf-8"))
def test_a_file_with_another_character_is_refused(place: int, character: str) -> None:
    damaged = TEXT[:place] + character + TEXT[place + 1 :]
    try:
        found = PrecisionPlan.from_json(damaged)
    except PlanError:
        return
    assert found == PLAN, "the change was one of white space"


@many
@given(st.integers(0, len(TEXT.encode()) - 1), st.integers(1, 255))
def test_a_file_with_flipped_bits_is_refused(tmp_path_factory: pytest.TempPathFactory, place: int, mask: int) -> None:
    raw = bytearray(TEXT.encode())
    raw[place] ^= mask
    path = tmp_path_factory.getbasetemp() / "flipped.json"
    path.write_bytes(raw)
    try:
        found = PrecisionPlan.from_json(path)
    except PlanError as error:
        assert str(path) in str(error)
        return
    assert found == PLAN, "the change was one of white space"


json_data = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**80) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index in ``data``."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [p for key, entry in inside for p in [(*prefix, key), *places(entry, (*prefix, key))]]


@many
@given(st.data())
def test_entries_of_other_types_are_refused_without_a_checksum_too(data: st.DataObject) -> None:
    plain = PLAN.to_dict()
    del plain["checksum"]
    *parents, last = data.draw(st.sampled_from(places(plain)))
    holder = plain
    for key in parents:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[last] = data.draw(json_data)
    else:
        del holder[last]
    try:
        found = PrecisionPlan.from_dict(plain, "some.json")
    except PlanError as error:
        assert str(error).startswith("some.json: ")
        return
    assert PrecisionPlan.from_json(to_text(found)) == found


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"layers": []}', "[" * 100_000, '{"a": ' * 100_000, "\x00"])
def test_foreign_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(PlanError, match=r"other\.json: "):
        PrecisionPlan.from_json(tmp_path / "other.json")


def edited(**changes: Any) -> str:
    """The plan's text with entries replaced."""
    return json.dumps(PLAN.to_dict() | changes)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="version 2: this weft reads version 1"):
        PrecisionPlan.from_json(edited(weft_precision_plan=2))
    with pytest.raises(PlanError, match="damaged, or edited"):
        PrecisionPlan.from_json(edited(fixed_bytes=7))
    with pytest.raises(PlanError, match="unknown entry 'colour'"):
        PrecisionPlan.from_json(edited(colour=7))
    plain = PLAN.to_dict()
    del plain["checksum"]
    plain["layers"][2]["paths"] = []
    with pytest.raises(PlanError, match="layer 2 has no paths"):
        PrecisionPlan.from_dict(plain)
    for missing in (tmp_path / "none.json", tmp_path, ""):
        with pytest.raises(PlanError, match="cannot be read as a plan"):
            PrecisionPlan.from_json(missing)
    (tmp_path / "latin.json").write_bytes(TEXT.encode("latin-1", "replace"))
    with pytest.raises(PlanError, match=r"latin\.json: cannot be read as a plan"):
        PrecisionPlan.from_json(tmp_path / "latin.json")


def test_a_plan_may_be_edited_by_hand() -> None:
    plain = PLAN.to_dict()
    del plain["checksum"]
    plain["layers"][0]["format"] = "16-bit"
    plain["kl"] = None
    assert PrecisionPlan.from_dict(plain).choice[LAYERS[0].path] == "16-bit"
    plain["layers"][0]["format"] = "fp4"
    with pytest.raises(PlanError, match="fp4 was chosen, which is none of nf4, nf4-feedback, int8, 16-bit"):
        PrecisionPlan.from_dict(plain)
