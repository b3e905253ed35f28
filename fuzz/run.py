"""Run every fuzz target for an equal share of the time. The status is 1 if one of them found something.

Corpora live in fuzz/corpus/<target> and grow from run to run; what crashes a target goes to fuzz/crashes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import seeds

FUZZ = Path(__file__).parent
RSS_LIMIT_MB = 2048
INPUT_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class Target:
    """A libFuzzer program: its name, its command, the longest input, whether the inputs are JSON."""

    name: str
    command: list[str]
    max_len: int
    json: bool = False

    @classmethod
    def native(cls, build: Path, name: str) -> Target:
        """A target of fuzz/CMakeLists.txt."""
        return cls(name, [str(build / f"fuzz_{name}")], 4096)

    @classmethod
    def python(cls, name: str) -> Target:
        """A target that is a script."""
        return cls(name, [sys.executable, str(FUZZ / f"{name}.py")], 4096, json=True)

    @property
    def exists(self) -> bool:
        """Whether the program is there."""
        return Path(self.command[-1]).exists()


def run(target: Target, seconds: int) -> int:
    """Fuzz one target; its exit status."""
    corpus, crashes = FUZZ / "corpus" / target.name, FUZZ / "crashes"
    crashes.mkdir(exist_ok=True)
    seeds.write(target.name, corpus)
    flags = [
        f"-max_total_time={seconds}",
        f"-max_len={target.max_len}",
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-timeout={INPUT_TIMEOUT_SECONDS}",
        f"-artifact_prefix={crashes / target.name}-",
        "-print_final_stats=1",
    ]
    if target.json:
        flags.append(f"-dict={FUZZ / 'json.dict'}")
    print(f"\n== fuzz {target.name}, {seconds} s", flush=True)
    command = [*target.command, *flags, str(corpus)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = result.stdout.splitlines()
    if result.returncode:
        print("\n".join([line for line in lines if not line.startswith("#")][-120:]))
        print(f"fuzz {target.name}: FAILED with status {result.returncode}; the input is in {crashes}", flush=True)
        return 1
    kept = ("DONE", "number_of_executed_units", "peak_rss_mb")
    print("\n".join(line for line in lines if any(word in line for word in kept)), flush=True)
    return 0


def main() -> int:
    """Parse the arguments, run all targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--build", type=Path, required=True, help="folder with the native targets")
    parser.add_argument("targets", nargs="*", help="names of targets; all without")
    arguments = parser.parse_args()
    targets = [
        Target.native(arguments.build, "planes_decode"),
        Target.native(arguments.build, "df11_decode"),
        Target.python("header"),
        Target.python("record"),
    ]
    if unknown := set(arguments.targets) - {t.name for t in targets}:
        parser.error(f"expected targets among {', '.join(t.name for t in targets)}, got {', '.join(sorted(unknown))}")
    targets = [t for t in targets if not arguments.targets or t.name in arguments.targets]
    if missing := [t.name for t in targets if not t.exists]:
        parser.error(f"not built: {', '.join(missing)}; run make fuzz")
    share = max(1, arguments.seconds // len(targets))
    return max(run(target, share) for target in targets)


if __name__ == "__main__":
    sys.exit(main())
