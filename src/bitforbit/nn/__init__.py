"""Modules whose parameters stay compressed in memory, and the conversion of models to them and back."""

from bitforbit.nn.classes import Compressed, Embedding, Linear
from bitforbit.nn.gpu_specs import Df11Spec, TilesSpec
from bitforbit.nn.model import CompressedSize, compress_model, compressed_size, decompress_model, set_layout, set_mode
from bitforbit.nn.orders import prove_orders
from bitforbit.nn.parameters import (
    compress_parameter,
    compressed_parameters,
    decompress_parameter,
    install_parameter,
)
from bitforbit.nn.spec import PARTS, CompressedSpec, PlanesSpec, part_name
from bitforbit.nn.weight import CompressedWeight

__all__ = [
    "PARTS",
    "Compressed",
    "CompressedSize",
    "CompressedSpec",
    "CompressedWeight",
    "Df11Spec",
    "Embedding",
    "Linear",
    "PlanesSpec",
    "TilesSpec",
    "compress_model",
    "compress_parameter",
    "compressed_parameters",
    "compressed_size",
    "decompress_model",
    "decompress_parameter",
    "install_parameter",
    "part_name",
    "prove_orders",
    "set_layout",
    "set_mode",
]
