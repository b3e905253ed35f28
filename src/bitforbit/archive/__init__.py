"""Model directories: compress, decompress, verify, inspect."""
