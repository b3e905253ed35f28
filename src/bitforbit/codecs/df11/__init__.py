"""The DFloat11 format (DF11): Huffman-coded BF16 exponents with an index for parallel decoding.

Written and read for exchange with the DFloat11 package; files are those of its release 0.5.0, byte for byte.
The package's GPU kernel needs 4 bytes of shared memory per thread and 2 per weight of a block: a unit of which some
block codes its exponents in less than about 1.4 bits each is a correct file that this kernel may fail to launch on.
"""

from bitforbit.codecs.df11.decode import check_unit, decode_unit, matrix_bounds
from bitforbit.codecs.df11.encode import encode_unit
from bitforbit.codecs.df11.unit import TENSOR_NAMES, Df11Unit

__all__ = ["TENSOR_NAMES", "Df11Unit", "check_unit", "decode_unit", "encode_unit", "matrix_bounds"]
