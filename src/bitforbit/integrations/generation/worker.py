"""``python -m bitforbit.integrations.generation.worker``: one variant, alone in a process, for ``bitforbit bench``.

Reads one JSON object from standard input (path, mode, workload, threads, place) and prints one: the result, or the
error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitforbit import errors
from bitforbit.errors import BitforbitError, WorkerError

if TYPE_CHECKING:
    from bitforbit.integrations.generation.load import Mode
    from bitforbit.integrations.generation.measure import Alone, Workload
    from bitforbit.integrations.generation.place import Place


def measure_in_process(path: Path, mode: Mode, workload: Workload, threads: int | None, place: Place) -> Alone:
    """:func:`measure.measure_alone` in a process of its own, whose memory is that variant's.

    Raises WorkerError, or the error that ended it.
    """
    from bitforbit.integrations.generation.measure import Alone

    task = {"path": str(path), "mode": mode, "workload": vars(workload), "threads": threads, "place": vars(place)}
    source = str(Path(__file__).resolve().parents[3])
    search = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        check=False,
    )
    lines = done.stdout.splitlines()
    try:
        value: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    except ValueError:
        value = {}
    if "result" in value:
        return Alone.from_json(value["result"])
    if "error" in value:
        raise getattr(errors, value["type"], WorkerError)(value["error"])
    if done.returncode < 0:
        reason = f"signal {-done.returncode}; perhaps the memory does not suffice: bench a smaller model"
    else:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    raise WorkerError(f"{path}, {mode}: expected figures from the measuring process, it ended with: {reason}")


def main() -> int:
    """Measure what standard input asks for."""
    task = json.load(sys.stdin)
    from bitforbit.integrations.generation.measure import Workload, measure_alone
    from bitforbit.integrations.generation.place import Place

    try:
        result = measure_alone(
            task["path"], task["mode"], Workload(**task["workload"]), task["threads"], Place(**task["place"])
        )
    except BitforbitError as e:
        print(json.dumps({"type": type(e).__name__, "error": str(e)}))
        return 0
    print(json.dumps({"result": result.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
