"""The class under which every error can be caught that weft raises on purpose.

It stands by itself, and imports nothing, so that folders which may not import each other have it in common.
"""


class WeftError(Exception):
    """Base of all errors raised by weft."""
