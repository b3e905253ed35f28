"""Attention: over quantized caches, and references of the algorithms."""
