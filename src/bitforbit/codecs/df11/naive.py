"""DF11 in its plainest form: bit strings, one symbol at a time. The tests compare the fast codec with this one.

Codes and streams are Python strings of "0" and "1". EOF, the end mark, is -1, so that it sorts below every exponent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.df11.unit import Df11Unit

EOF = -1


def encode_unit(matrices: Sequence[npt.NDArray[np.uint16]]) -> Df11Unit:
    """Encode matrices of BF16 bit patterns whose exponents are below 240."""
    words = np.concatenate([matrix.reshape(-1) for matrix in matrices])
    exponents = [int(word) >> 7 & 0xFF for word in words]
    codes = code_table(Counter(exponents))

    starts, position = [], 0  # the bit at which every code starts
    for exponent in exponents:
        starts.append(position)
        position += len(codes[exponent])
    stream = "".join(codes[exponent] for exponent in exponents)
    if position % 8:
        starts.append(position)  # the end mark counts as a code
        room = -position % 8
        stream += codes[EOF][:room].ljust(room, "0")

    num_bytes = len(stream) // 8
    num_blocks = -(-num_bytes // 4096)
    first_in_window: dict[int, int] = {}
    first_in_block: dict[int, int] = {}
    for element, start in enumerate(starts):
        first_in_window.setdefault(start // 64, start % 64)
        first_in_block.setdefault(start // 32768, element)
    gaps = "".join(f"{first_in_window.get(window, 0):05b}" for window in range(512 * num_blocks))
    positions = [*first_in_block.values(), len(words)]
    splits = np.cumsum([matrix.size for matrix in matrices], dtype=np.int64)[:-1]
    return Df11Unit(
        luts=lookup_tables(codes),
        encoded_exponent=pack(stream),
        sign_mantissa=((words >> 8 & 0x80) | (words & 0x7F)).astype(np.uint8),
        output_positions=np.array(positions, "<u4").view(np.uint8),
        gaps=pack(gaps),
        split_positions=splits,
    )


def decode_unit(unit: Df11Unit) -> npt.NDArray[np.uint16]:
    """Decode a well-formed unit from its first bit to its last, without its index."""
    stream = "".join(f"{byte:08b}" for byte in unit.encoded_exponent) + "0" * 32
    *tables, lengths = unit.luts.tolist()
    words = np.empty(unit.num_weights, np.uint16)
    bit = 0
    for element, sign_mantissa in enumerate(unit.sign_mantissa.tolist()):
        table, level = 0, 0
        while (value := tables[table][int(stream[bit + 8 * level : bit + 8 * level + 8], 2)]) >= 240:
            table, level = 256 - value, level + 1
        bit += lengths[value]
        words[element] = (sign_mantissa & 0x80) << 8 | value << 7 | sign_mantissa & 0x7F
    return words


def code_table(counts: Counter[int]) -> dict[int, str]:
    """Code of every exponent and of EOF, in the order of the leaves of the tree."""
    if len(counts) == 1:
        return {**dict.fromkeys(counts, "00"), EOF: "01"}
    codes = limited_codes(counts)
    floor = 2
    while len(prefixes(codes)) > 17:
        codes = limited_codes(Counter({value: max(count, floor) for value, count in counts.items()}))
        floor *= 2
    return codes


def limited_codes(counts: Counter[int]) -> dict[int, str]:
    """Huffman code; while it has codes above 32 bits, the 2, 3, 4, ... rarest exponents count as 1."""
    codes = huffman(counts)
    values = sorted(counts)
    rarest = 2
    while max(map(len, codes.values())) > 32:
        chosen = np.argpartition([counts[value] for value in values], rarest)[:rarest]
        codes = huffman(Counter({**counts, **{values[i]: 1 for i in chosen}}))
        rarest += 1
    return codes


def huffman(counts: Counter[int]) -> dict[int, str]:
    """Join the two smallest nodes, compared by (count, first symbol), until one is left; the smaller takes bit 0."""
    nodes = [(1, EOF, {EOF: ""})] + [(count, value, {value: ""}) for value, count in counts.items()]
    while len(nodes) > 1:
        nodes.sort(key=lambda node: node[:2])
        (count_0, first, codes_0), (count_1, _, codes_1), *nodes = nodes
        codes = {s: "0" + code for s, code in codes_0.items()} | {s: "1" + code for s, code in codes_1.items()}
        nodes.append((count_0 + count_1, first, codes))
    return nodes[0][2]


def prefixes(codes: dict[int, str]) -> list[str]:
    """The tables: all whole bytes before a code's last byte, for the root none."""
    found = [""] + [code[: (len(code) - 1) // 8 * 8] for value, code in codes.items() if value != EOF]
    return sorted(dict.fromkeys(found), key=len)


def lookup_tables(codes: dict[int, str]) -> npt.NDArray[np.uint8]:
    """Decode tables and the row of code lengths."""
    tables = prefixes(codes)
    luts = np.zeros((len(tables) + 1, 256), np.uint8)
    fill = -1
    for row, prefix in zip(luts, tables, strict=False):
        known = {}
        for value, code in codes.items():
            if value != EOF and code.startswith(prefix) and len(code) > len(prefix):
                rest = code[len(prefix) :]
                pointer = len(rest) > 8
                known[int(rest[:8].ljust(8, "0"), 2)] = (
                    256 - tables.index(code[: len(prefix) + 8]) if pointer else value
                )
        if fill < 0:
            fill = known[min(known)]
        for byte in range(256):
            fill = known.get(byte, fill)
            row[byte] = fill
    for value, code in codes.items():
        if value != EOF:
            luts[-1, value] = len(code)
    return luts


def pack(bits: str) -> npt.NDArray[np.uint8]:
    """Bytes of a bit string, most significant bit first."""
    return np.packbits(np.frombuffer(bits.encode(), np.uint8) - ord("0"))
