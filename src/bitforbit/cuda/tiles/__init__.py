"""The tile layout of BF16 matrices in GPU memory."""
