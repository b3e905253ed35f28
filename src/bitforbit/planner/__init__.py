"""Forecasts: how much memory a model takes on which GPUs, which contexts fit, and the bytes a token moves. No torch."""

from bitforbit.planner.cache import KvSetting, LayerCache
from bitforbit.planner.checkpoint import read_shape
from bitforbit.planner.families import from_config
from bitforbit.planner.gpus import GPUS, Gpu, find_gpu
from bitforbit.planner.memory import Load, Memory, Split, Stage
from bitforbit.planner.offload import Elsewhere, Offload
from bitforbit.planner.plan import Plan, make_plan
from bitforbit.planner.request import DISK, RESERVE, OffloadRow, Request, Row
from bitforbit.planner.shapes import Dimensions, Layer, Matrix, Shape
from bitforbit.planner.weights import METHODS, Storage

__all__ = [
    "DISK",
    "GPUS",
    "METHODS",
    "RESERVE",
    "Dimensions",
    "Elsewhere",
    "Gpu",
    "KvSetting",
    "Layer",
    "LayerCache",
    "Load",
    "Matrix",
    "Memory",
    "Offload",
    "OffloadRow",
    "Plan",
    "Request",
    "Row",
    "Shape",
    "Split",
    "Stage",
    "Storage",
    "find_gpu",
    "from_config",
    "make_plan",
    "read_shape",
]
