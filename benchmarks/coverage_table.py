"""``docs/coverage.md``, made from the results of the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RULES = (
    "rms_norm", "layer_norm", "residual_norm", "rope", "attention", "gated_mlp", "lora_linear", "parallel_linears",
    "linear_cross_entropy",
)  # fmt: skip

PREAMBLE = """# Coverage

Made by `python -m benchmarks.coverage`: a tiny, randomly initialized model of every type that transformers lists, with
LoRA (rank 4, B not zero) on every linear and trainable norms, in float32 on a CPU. The plain model and
`weft.optimize(model, mode="train")` are compared on inputs of other sizes than those of the capture, without and with
padding. Equal: the largest difference over the largest entry is at most 1e-4 for logits and loss and 1e-3 for every
gradient, and after `undo` everything is bit for bit as before. A gradient is measured against its own largest entry, or
1e-5 of the model's largest where that is more; what still exceeds its limit is compared with float64, and may be twice
as far from that as the plain model's own result (gradients that should be zero are rounding in both). What still is
not equal is measured again with other inputs, since slopes and routings jump where a number is zero within rounding;
such rows are listed.""".splitlines()

Row = dict[str, Any]


def write_table(rows: list[Row], path: Path, listed: Sequence[tuple[str, str, str]] = ()) -> None:
    """Write the page; ``listed`` is every type that there is, of which those without a row are named as not run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["type"], r["model"]) for r in rows}
    missing = [(name, model) for _, name, model in listed if (name, model) not in done]
    path.write_text(page(sorted(rows, key=lambda r: (r["kind"], r["type"])), missing))


def page(rows: list[Row], missing: Sequence[tuple[str, str]] = ()) -> str:
    """Summary, table, and what is excluded or was not run."""
    ran = [r for r in rows if r["outcome"] != "excluded"]
    excluded = [r for r in rows if r["outcome"] == "excluded"]
    return "\n".join(
        [*_summary(rows, ran), "", *_table(ran), "", *_reasons(ran), "", *_excluded(excluded), *_missing(missing), ""]
    )


def _summary(rows: list[Row], ran: list[Row]) -> list[str]:
    count = {o: sum(r["outcome"] == o for r in ran) for o in ("equal", "wrong", "refused", "error")}
    decoders = [r for r in ran if r["kind"] == "decoder" and has_both(r)]
    whole = sum(is_whole(r) for r in decoders)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    equal, all_of_both = share(count["equal"], len(ran)), share(whole, len(decoders))
    return [
        *PREAMBLE,
        "",
        f"- versions: {versions}",
        f"- types: {len(rows)}, of which {len(ran)} run by themselves",
        f"- equal: **{equal}**; wrong: **{count['wrong']}**; refused: {count['refused']}; errors: {count['error']}",
        f"- decoder LMs with all norms and all LoRA linears rewritten: **{all_of_both}**",
    ]


def has_both(row: Row) -> bool:
    """Whether norms and LoRA linears ran, as the goal for decoder LMs asks."""
    return row["outcome"] != "refused" and bool(row.get("norms") and row["norms"][1] and row["adapters"][1])


def is_whole(row: Row) -> bool:
    """Whether all norms and all LoRA linears were rewritten."""
    return row["norms"][0] == row["norms"][1] and row["adapters"][0] == row["adapters"][1]


def share(part: int, whole: int) -> str:
    """A count and its percentage."""
    return f"{part} of {whole} ({100 * part / max(1, whole):.1f} %)"


def _table(rows: list[Row]) -> list[str]:
    names = ("kind", "type", "outcome", "logits", "loss", "gradient", "norms", "LoRA", *RULES)
    head = ["Rewrites / refusals per rule; norms and LoRA linears: rewritten / run.", ""]
    return [*head, _cells(names), _cells(["---"] * len(names))] + [_cells(_row(r)) for r in rows]


def _row(row: Row) -> list[str]:
    errors = [f"{row[k]:.0e}" if row.get(k) is not None else "" for k in ("logits", "loss", "gradient")]
    parts = ["/".join(map(str, row[k])) if row.get(k) else "" for k in ("norms", "adapters")]
    made, refused = row.get("rewrites", {}), row.get("refusals", {})
    rules = [f"{made.get(n, 0)}/{refused.get(n, 0)}" if made.get(n) or refused.get(n) else "" for n in RULES]
    return [row["kind"], row["type"], row["outcome"], *errors, *parts, *rules]


def _cells(cells: Any) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def _reasons(rows: list[Row]) -> list[str]:
    lines = ["## What is not equal, and what was not rewritten", ""]
    for row in rows:
        if row["outcome"] != "equal" or row["reason"].startswith("a jump"):
            lines.append(f"- `{row['type']}` ({row['model']}): {row['outcome']}: {row['reason']}")
        lines += [f"- `{row['type']}`: {text}" for text in row.get("missing", [])[:1]]
    return lines


def _excluded(rows: list[Row]) -> list[str]:
    why = "incomplete default configs, missing packages, inputs that only a processor makes"
    lines = [f"## Types that do not run by themselves: {why}", ""]
    return lines + [f"- `{r['type']}` ({r['model']}): {r['reason']}" for r in rows]


def _missing(missing: Sequence[tuple[str, str]]) -> list[str]:
    if not missing:
        return []
    return ["## Types that were not run", "", ", ".join(f"`{name}` ({model})" for name, model in missing)]
