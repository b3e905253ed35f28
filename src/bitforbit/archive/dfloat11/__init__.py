"""Model directories in the DFloat11 layout: written, read, and turned back into plain BF16 safetensors."""

from bitforbit.archive.dfloat11.plain import write_plain
from bitforbit.archive.dfloat11.read import Df11Directory, RestoredTensor, read_directory
from bitforbit.archive.dfloat11.units import load_units_file
from bitforbit.archive.dfloat11.write import write_directory

__all__ = ["Df11Directory", "RestoredTensor", "load_units_file", "read_directory", "write_directory", "write_plain"]
