"""Compress a large model on a Ray cluster whose machines share a file system.

    python examples/ray_compress.py SRC DST [--address auto] [--cpus 2] [--parts N] [--retries 3]

Without --address Ray is started on this machine alone. One task compresses one part of the files; Ray starts it anew,
elsewhere if need be, when its worker dies, and finished files are kept. The same command continues after anything
else. bitforbit must be installed on every machine, in the same version. Needs ray (pip install ray).
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path

import ray

import bitforbit


def compress_part(src: str, dst: str, part: tuple[int, int], threads: int, overwrite: bool) -> dict[str, object]:
    """One part, on some machine: the report, and where it was made."""
    report = bitforbit.compress(src, dst, part=part, threads=threads, overwrite=overwrite)
    return {**report.to_json(), "worker": f"{socket.gethostname()}, process {os.getpid()}"}


def compress_all(options: argparse.Namespace) -> list[str]:
    """Run every part and say how far it is. Returns the errors of the parts that failed for good."""
    slots = max(1, int(ray.cluster_resources().get("CPU", 1)) // options.cpus)
    count = options.parts or 4 * slots  # several for each, so that a slow machine takes fewer
    print(f"{count} parts, {slots} at a time on {len(ray.nodes())} machine(s)", flush=True)
    # max_retries is for workers that die; of our own errors, only those of the file system are worth another try.
    task = ray.remote(
        num_cpus=options.cpus,
        max_retries=options.retries,
        retry_exceptions=[OSError],
        scheduling_strategy="SPREAD",
    )(compress_part)
    parts = {
        task.remote(options.src, options.dst, (i, count), options.cpus, options.overwrite): i
        for i in range(1, count + 1)
    }
    errors = []
    begin, nbytes, waiting = time.perf_counter(), 0, list(parts)
    while waiting:
        (done, *_), waiting = ray.wait(waiting)
        try:
            report = ray.get(done)
        except ray.exceptions.RayError as error:
            errors.append(f"part {parts[done]}/{count}: {str(error).strip().splitlines()[-1]}")
            print(errors[-1], flush=True)
            continue
        nbytes += report["original_bytes"]
        seconds = time.perf_counter() - begin
        print(
            f"part {parts[done]}/{count} done by {report['worker']} ({report['resumed_files']} of {report['files']} "
            f"files were there); {len(waiting)} parts left, {nbytes / 1e9:.2f} GB in {seconds:.1f} s",
            flush=True,
        )
    return errors


def main(arguments: list[str] | None = None) -> int:
    """Compress the parts, then merge; the status is 1 if a part failed for good."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("src", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("dst", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--address", help="of the cluster, such as auto; without it, this machine alone")
    parser.add_argument("--cpus", type=int, default=2, help="of one task")
    parser.add_argument("--parts", type=int, help="to cut the model into; four for each task that fits the cluster")
    parser.add_argument("--retries", type=int, default=3, help="of one part")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args(arguments)
    ray.init(address=options.address, include_dashboard=None if options.address else False, log_to_driver=False)
    try:
        errors = compress_all(options)
    finally:
        ray.shutdown()
    if errors:
        print(f"{len(errors)} part(s) failed; run the same command again: finished files are kept")
        return 1
    report = bitforbit.merge(options.src, options.dst, overwrite=options.overwrite)
    print(
        f"{options.dst}: {report.files} files, {report.original_bytes / 1e9:.2f} GB -> "
        f"{report.compressed_bytes / 1e9:.2f} GB, {report.bits_per_weight:.2f} bits/weight"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
