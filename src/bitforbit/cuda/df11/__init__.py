"""DFloat11 units in GPU memory: their layout there, and the kernels that decode them."""

from bitforbit.cuda.df11.decode import KERNELS, decode, decode_config, rows, rows_config
from bitforbit.cuda.df11.geometry import PARTS, Df11Geometry, geometry_of
from bitforbit.cuda.df11.prepare import prepare

__all__ = [
    "KERNELS",
    "PARTS",
    "Df11Geometry",
    "decode",
    "decode_config",
    "geometry_of",
    "prepare",
    "rows",
    "rows_config",
]
