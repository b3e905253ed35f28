"""The ``planes`` codec on GPUs: encoding, and decoding straight from its parts."""
