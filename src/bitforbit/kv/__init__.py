"""Quantized key-value caches after KIVI (arXiv 2402.02750). Lossy, so nothing here happens unless it is asked for."""
