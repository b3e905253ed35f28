"""Words moved between levels of memory, by attention and by models: exact counts, lower bounds, the best algorithm."""

from bitforbit.iomodel.algorithms import ALGORITHMS, Algorithm, count, simulate
from bitforbit.iomodel.bounds import lower_bound
from bitforbit.iomodel.chooser import Choice, Prediction, choose, crossover
from bitforbit.iomodel.machine import Level, Machine, find_machine, this_cpu
from bitforbit.iomodel.memory import TwoLevelMemory
from bitforbit.iomodel.tiles import Tiles
from bitforbit.iomodel.traffic import ModelShape, StepTraffic, bytes_by_level, predict_seconds, step_traffic

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Choice",
    "Level",
    "Machine",
    "ModelShape",
    "Prediction",
    "StepTraffic",
    "Tiles",
    "TwoLevelMemory",
    "bytes_by_level",
    "choose",
    "count",
    "crossover",
    "find_machine",
    "lower_bound",
    "predict_seconds",
    "simulate",
    "step_traffic",
    "this_cpu",
]
