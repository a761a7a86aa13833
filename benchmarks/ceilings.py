"""The two rates that bound everything else: bytes through device memory, and bf16 matrix products.

python -m benchmarks.ceilings          prints one line of JSON
"""

from __future__ import annotations

import json

import torch

from .timing import measure


def copy_bandwidth(device: torch.device, size: int = 2**32) -> float:
    """TB/s of a device-to-device copy of ``size`` bytes, those read and those written both counted."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / measure([lambda: target.copy_(source)], device).us * 1e6 / 1e12


def matmul_rate(device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of a square matrix product on random data: on zeros it runs faster than any real one."""
    pairs = [[torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
    out = torch.empty(size, size, device=device, dtype=dtype)
    calls = [lambda left=left, right=right: torch.mm(left, right, out=out) for left, right in pairs]
    return 2 * size**3 / measure(calls, device).us * 1e6 / 1e12


def ceilings(device: torch.device, copy_bytes: int = 2**32, matmul_size: int = 8192) -> dict[str, float]:
    """Both rates, measured now."""
    return {
        "copy_tb_s": round(copy_bandwidth(device, copy_bytes), 4),
        "matmul_tflop_s": round(matmul_rate(device, matmul_size), 3),
    }


def default_ceilings(device: torch.device) -> dict[str, float]:
    """Both rates at sizes that fit the device: a CPU's are only there to try the programs out."""
    return ceilings(device) if device.type == "cuda" else ceilings(device, 2**26, 512)


def main() -> None:
    """Prints the rates of the first CUDA device, or of the CPU."""
    print(json.dumps(default_ceilings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))


if __name__ == "__main__":
    main()
