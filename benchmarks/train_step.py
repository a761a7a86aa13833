"""One LoRA training step of a Llama-3-8B shape: weft beside transformers + PEFT, ``torch.compile``, Unsloth and Liger.

    python -m benchmarks.train_step --arm weft                     one arm, in this process; prints RESULT and JSON
    python -m benchmarks.train_step --interleave hf regional weft --out train.json [--rounds 2]
                                                                   several in turn, each in a process of its own
    python -m benchmarks.train_step --interleave weft weft_fp8 --out fp8.json --rounds 2
                                                                   what products in FP8 buy, and what they cost the loss
    python -m benchmarks.train_step --interleave hf regional weft --together --rounds 2 --shape qwen1.5b --out qwen.json
                                                                   set up side by side, timed in turn: for models of which
                                                                   as many fit as there are arms
    python -m benchmarks.train_step --arm weft --lengths 1024 2048 one arm at several lengths; a line of RESULT for each

Options of both: --batch --length --steps --checkpointing --shape --layers --no-verify (see --help). Peers that are not
installed are listed as such. The loss of every step and the adapters' gradient norm in the first one show that all arms
train the same model.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields

from .arm_settings import ARMS, SHAPES, Setting, missing

PREFIX = "RESULT "


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [f"{arm}{suffix}" for arm in ARMS for suffix in ("", "_nf4")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--arm", choices=names)
    what.add_argument("--interleave", nargs="+", choices=names)
    what.add_argument("--save", action="store_true", help="only write the model that some arms load")
    parser.add_argument("--out", help="result file of --interleave")
    parser.add_argument("--rounds", type=int, default=1, help="how often --interleave runs each arm")
    parser.add_argument("--ceilings-of", help="--interleave: a result file of the same machine and hour that has them")
    parser.add_argument("--together", action="store_true", help="--interleave: all arms are there at once")
    parser.add_argument(
        "--in-turns", action="store_true", help="--arm: time steps whenever a line is read, until there is none"
    )
    parser.add_argument("--lengths", nargs="+", type=int, help="--arm: train at these in turn, in place of --length")
    parser.add_argument("--limit", type=float, default=240, help="seconds that --interleave gives an arm")
    parser.add_argument("--shape", default="llama8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, each arm in its own way")
    parser.add_argument("--memory", default="", help="optimize(memory=...), in place of --checkpointing: 24GB, or min")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="optimize(verify=False)")
    parser.add_argument("--models", default="", help="folder for saved models; the system's temporary one if not given")
    given = parser.parse_args(arguments)
    if given.interleave and not given.out:
        parser.error("--interleave needs --out")
    return given


def setting_of(given: argparse.Namespace, arm: str) -> Setting:
    """The setting of one arm on a command line."""
    return Setting(arm, **{f.name: getattr(given, f.name) for f in fields(Setting) if f.name != "arm"})


def main() -> int:
    """Runs one arm, or hands several to the runner."""
    given = parse()
    if given.interleave:
        from .train_runner import interleave

        return interleave(given)
    if given.save:
        from .arms import save

        print(save(setting_of(given, "hf")))
        return 0
    package = missing(given.arm)
    if package:
        print(f"{given.arm} needs {package}, which is not installed", file=sys.stderr)
        return 2
    setting = setting_of(given, given.arm)
    if setting.base == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]  (it patches what is imported after it)
    from .training import run_arm, run_lengths

    for found in run_lengths(setting, given.lengths) if given.lengths else [run_arm(setting)]:
        print(PREFIX + json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
