"""What several tests need."""

from helpers.bits import assert_bitwise_equal, assert_same_tree, digest_tree

__all__ = ["assert_bitwise_equal", "assert_same_tree", "digest_tree"]
