"""Lower bounds on the words that attention moves, for algorithms that multiply matrices the usual way.

Sources: arXiv 2402.07443 (red-blue pebble game; section 3), and for products of matrices Smith, Lowery, Langou,
van de Geijn: "A Tight I/O Lower Bound for Matrix Multiplication" (arXiv 1702.02017). Constants are carried through the
proofs; they hold for every N, d and M, however weak for small ones.
"""

from __future__ import annotations

from math import sqrt


def trivial(n: int, d: int) -> int:
    """4 N d: Q, K and V are read, O is written."""
    return 4 * n * d


def large_cache(n: int, d: int, memory: int) -> float:
    """N^2 d^2 / (M + 4 d^2) - M: Theta(N^2 d^2 / M) for M >= d^2 (2402.07443, section 3, lower bound for large caches).

    In a phase that moves M words at most 2M words are at hand. 2M of Q and K complete at most (M/d)^2 products of rows,
    by I + J >= 2 sqrt(I J), and what else is at hand is worth 4M scores more.
    """
    return n * n * d * d / (memory + 4 * d * d) - memory


def small_cache(n: int, d: int, memory: int) -> float:
    """2 N^2 d / sqrt(M) - 2 M - N^2, for M < d^2; 0 otherwise.

    An attention that also wrote S = Q K^T, N^2 words, would have multiplied matrices, and that takes
    2 N^2 d / sqrt(M) - 2M (2402.07443, section 3, lower bound for small caches, with the constant of 1702.02017).
    """
    return 2 * n * n * d / sqrt(memory) - 2 * memory - n * n if memory < d * d else 0.0


def lower_bound(n: int, d: int, memory: int) -> float:
    """The best of them, in words."""
    return max(float(trivial(n, d)), large_cache(n, d, memory), small_cache(n, d, memory))
