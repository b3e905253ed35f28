"""Attention beyond what torch brings: references of FlashAttention, block-sparse attention, quantized caches."""
