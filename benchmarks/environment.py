"""What a measurement ran on: written into every result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "unsloth", "unsloth_zoo",
    "liger_kernel", "trl", "datasets",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Hardware, driver, package versions (None: not installed), revision of the checkout, and the date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": gpu(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: installed_version(name) for name in PACKAGES},
        "weft_revision": revision(),
    }


def gpu() -> dict[str, Any] | None:
    """The first CUDA device, None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def driver_version() -> str | None:
    """As ``nvidia-smi`` reports it, None where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None


def cpu_model() -> str:
    """The processor's name."""
    described = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", described.read_text()) if described.exists() else None
    return found.group(1).strip() if found else platform.processor()


def installed_version(package: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """Commit of the checkout, marked where files differ from it; ``WEFT_REVISION`` names it where there is no git."""
    given = os.environ.get("WEFT_REVISION")
    folder = Path(__file__).resolve().parent.parent
    if given or shutil.which("git") is None:
        return given
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def slug(text: str) -> str:
    """``text`` as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(path: str | Path, kind: str, **content: Any) -> None:
    """One result file: what kind it is, the environment, and the content."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"kind": kind, "environment": environment(), **content}, indent=1) + "\n")
