"""This checkout is the package ``weft``: its folders are importable as ``weft.rewrite``, ``weft.kernels`` and so on."""
