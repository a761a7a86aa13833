"""Measurements of weft and its peers. Each module runs by itself: ``python -m benchmarks.kernels --out FILE``."""

import sys
from pathlib import Path

# `python -m` puts the checkout first, where the folder kernels/ would shadow the Hugging Face package of that name
_CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != _CHECKOUT]
