"""Typed wrappers over the native library."""
