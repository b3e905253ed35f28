"""Lossless codecs for tensors."""
