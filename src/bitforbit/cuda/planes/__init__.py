"""The ``planes`` codec on GPUs: decoding straight from its parts."""
