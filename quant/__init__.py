"""Number formats, packing and error measures."""
