"""Words moved between levels of memory, by attention and by models: exact counts, lower bounds, the best algorithm."""

from bitforbit.iomodel.algorithms import ALGORITHMS, Algorithm, count, simulate
from bitforbit.iomodel.bounds import lower_bound
from bitforbit.iomodel.memory import TwoLevelMemory
from bitforbit.iomodel.tiles import Tiles

__all__ = ["ALGORITHMS", "Algorithm", "Tiles", "TwoLevelMemory", "count", "lower_bound", "simulate"]
