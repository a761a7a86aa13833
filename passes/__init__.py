"""One file per pass or rule; ``defaults.py`` is the visible list of them."""
