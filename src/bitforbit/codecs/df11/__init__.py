"""The DFloat11 format: Huffman-coded BF16 exponents (docs/format.md, section 5)."""
