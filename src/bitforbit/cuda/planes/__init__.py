"""The ``planes`` format on a GPU (docs/format.md, section 3)."""
