"""The tile layout of BF16, FP16 and FP8 matrices in GPU memory."""
