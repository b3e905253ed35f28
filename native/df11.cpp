// DFloat11: Huffman-coded exponents.
