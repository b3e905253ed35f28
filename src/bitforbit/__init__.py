"""Lossless compression of model weights."""

__version__ = "0.1.0"
