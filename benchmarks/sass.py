"""Instructions of a kernel from its disassembly, by source line and by pipe. Needs nvdisasm."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitforbit.cuda import sources

PIPES = ("integer", "fma", "memory", "other")
"""integer: the integer ALU (MOV, SEL and PRMT too); fma: the pipe of IMAD, FFMA, HMUL2, ...; memory: loads, stores,
atomics and shuffles, which go through the load/store unit; other: branches, barriers, POPC, tensor cores, the uniform
datapath."""

_NAMES = {
    "integer": "BMSK FMNMX FSEL FSETP HMNMX2 IABS IADD IADD3 IMNMX ISCADD ISETP LEA LOP LOP3 MOV P2R PLOP3 PRMT R2P "
    "SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3",
    "fma": "FADD FFMA FMUL HADD2 HFMA2 HMUL2 IDP IMAD IMUL",
    "memory": "ATOM ATOMG ATOMS LD LDG LDGSTS LDL LDS LDSM RED REDG SHFL ST STG STL STS STSM SYNCS UBLKCP",
}
_PIPES = {name: pipe for pipe, names in _NAMES.items() for name in names.split()}

_FUNCTION = re.compile(r"^\.text\.(\w+):$")
_LABEL = re.compile(r"^(\.L_x_\d+):$")
_INSTRUCTION = re.compile(r"^/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_LOCATION = re.compile(r'File "([^"]+)", line (\d+)')

_AROUND = "around: "

Lines = frozenset[tuple[str, int]]
"""Lines of kernel texts: file, number from 1."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    opcode: str
    """With its modifiers: ``LDG.E.128``."""
    lines: Lines
    """Where it comes from: a line, and the lines from which that was inlined."""
    target: str = ""
    """Label that it branches to."""

    @property
    def pipe(self) -> str:
        """One of PIPES."""
        return _PIPES.get(self.opcode.split(".")[0], "other")


@dataclass(frozen=True)
class Function:
    """An entry point's instructions, and the index of the instruction that each label stands before."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def usual(self) -> tuple[Instruction, ...]:
        """Without what follows the last EXIT: loops that stand in for shuffles where lanes are not in step."""
        exits = (at for at, i in enumerate(self.instructions) if i.opcode.split(".")[0] in ("EXIT", "RET"))
        return self.instructions[: max(exits, default=len(self.instructions)) + 1]

    def loops(self) -> list[range]:
        """Indices from the target of each backward branch to the branch."""
        ends = enumerate(self.usual)
        return [range(self.labels[i.target], at + 1) for at, i in ends if self.labels.get(i.target, at + 1) <= at]


def nvdisasm() -> str | None:
    """Path of the disassembler: on the PATH, or that of NVIDIA's wheel."""
    package = importlib.util.find_spec("nvidia")
    places = [] if package is None else list(package.submodule_search_locations or [])
    wheels = (str(path) for place in places for path in sorted(Path(place).glob("*/bin/nvdisasm")))
    return shutil.which("nvdisasm") or next(wheels, None)


def disassemble(cubin: bytes) -> dict[str, Function]:
    """The functions of a binary that was compiled with line numbers (``-lineinfo``)."""
    tool = nvdisasm()
    if tool is None:
        raise FileNotFoundError("expected nvdisasm, got none: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-gi", "-c", file.name], capture_output=True, text=True, check=True).stdout
    functions: dict[str, tuple[list[Instruction], dict[str, int]]] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: set[tuple[str, int]] = set()
    in_locations = False
    for line in map(str.strip, listing.splitlines()):
        if found := _FUNCTION.match(line):
            instructions, labels, lines = [], {}, set()
            functions[found[1]] = instructions, labels
        elif line.startswith("//##"):
            lines = lines if in_locations else set()
            lines |= {(Path(name).name, int(number)) for name, number in _LOCATION.findall(line)}
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[2]) if found[1].startswith("BRA") else None
            instructions.append(Instruction(found[1], frozenset(lines), target[1] if target else ""))
        in_locations = line.startswith("//##")
    return {name: Function(_without_end(code), labels) for name, (code, labels) in functions.items()}


def _without_end(code: list[Instruction]) -> tuple[Instruction, ...]:
    """Every function ends with a branch to itself and NOPs."""
    return tuple(code[: max((at for at, i in enumerate(code) if i.opcode.split(".")[0] == "BRA"), default=len(code))])


def block_lines(file: str, text: str) -> Lines:
    """Lines of a block of a kernel text: the one that begins at the only line that starts with ``text``.

    ``around: text`` is the innermost block in braces around that line. Raises ValueError unless there is one such line.
    """
    lines = (sources.KERNELS / file).read_text().splitlines()
    around, text = text.startswith(_AROUND), text.removeprefix(_AROUND)
    starts = [number for number, line in enumerate(lines, 1) if line.strip().startswith(text)]
    if len(starts) != 1:
        raise ValueError(f"expected one line that starts with {text!r} in {file}, got {len(starts)}")
    start, depth = starts[0], 0
    while around and depth >= 0:
        start -= 1
        depth += lines[start - 1].count("}") - lines[start - 1].count("{")
    end = start + _first_end("\n".join([lines[start - 1].strip().removeprefix("}"), *lines[start:]]))
    return frozenset((Path(file).name, number) for number in range(start, end + 1))


def _first_end(text: str) -> int:
    """Lines before the one in which the first block in braces ends, or the first statement if that comes before."""
    braces = parentheses = 0
    for at, character in enumerate(text):
        parentheses += {"(": 1, ")": -1}.get(character, 0)
        braces += {"{": 1, "}": -1}.get(character, 0)
        if braces == 0 and (character == "}" or (character == ";" and parentheses == 0)):
            return text.count("\n", 0, at)
    return text.count("\n")


def counted(function: Function, lines: Lines, loop: bool, without: Iterable[Lines] = ()) -> dict[str, int]:
    """Instructions per pipe of a block: of its loop, or of all that comes from its lines.

    A loop is the outermost one of machine instructions that come from the block, but for a seventh (the first such
    loop, where the compiler made several). Instructions from the lines of ``without`` are not counted.
    """
    code: Sequence[Instruction] = function.usual
    if loop:
        mostly = [r for r in function.loops() if 7 * sum(not code[i].lines & lines for i in r) <= len(r)]
        outer = [r for r in mostly if not any(r != o and o.start <= r.start and r.stop <= o.stop for o in mostly)]
        if not outer:
            raise ValueError(f"expected a loop among the instructions of lines {sorted(lines)[:2]}..., got none")
        code = code[outer[0].start : outer[0].stop]
    else:
        code = [instruction for instruction in code if instruction.lines & lines]
    left_out = frozenset[tuple[str, int]]().union(*without)
    counts = Counter(instruction.pipe for instruction in code if not instruction.lines & left_out)
    return {pipe: counts[pipe] for pipe in PIPES}
