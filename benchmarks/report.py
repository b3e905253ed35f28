"""Render the README's tables from ``benchmarks/results``: ``python -m benchmarks.report [--write]``.

The README holds each table between ``<!-- benchmark: NAME -->`` and ``<!-- end -->``; --write replaces what is between
them. A benchmark without a result file renders as "not measured".
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.common import RESULTS, ROOT, table

Result = dict[str, Any]


def where(result: Result) -> str:
    """One line that names machine, versions and commit."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if name != "bitforbit")
    return (
        f"{m['cpu']}, {m['cpus']} CPUs, {' / '.join(m['instruction_sets'])}; Python {m['python']}, {versions}; "
        f"commit {m['commit']}, {m['date']} (`benchmarks/results/{result['benchmark']}.json`)"
    )


def codec(result: Result) -> str:
    """Speeds on the first source, sizes on all of them."""
    first, *_ = sources = result["sources"]
    peer, copy = first["codecs"]["ZipNN"], first["codecs"]["copy"]
    speeds = [
        [
            label,
            f"{c['encode_gb_per_s']:.2f}",
            f"{c['encode_gb_per_s'] / peer['encode_gb_per_s']:.1f}x",
            f"{c['decode_gb_per_s']:.2f}",
            f"{c['decode_gb_per_s'] / peer['decode_gb_per_s']:.1f}x",
            f"{c['decode_gb_per_s'] / copy['decode_gb_per_s']:.2f}x",
        ]
        for label, c in first["codecs"].items()
    ]
    headers = ["one thread", "encode GB/s", "vs ZipNN", "decode GB/s", "vs ZipNN", "vs memory copy"]
    labels = [label for label in first["codecs"] if not label.startswith("planes") and label != "copy"]
    sizes = [
        [s["source"], *(f"{s['codecs'][label]['bits_per_weight']:.2f}" for label in ("planes avx2", *labels))]
        for s in sources
    ]
    return "\n".join(
        [
            f"{first['source']} weights in BF16, from memory to memory:",
            "",
            table(headers, speeds),
            "",
            table(["bits/weight", "planes", *labels], sizes),
            "",
            where(result),
        ]
    )


def archive(result: Result) -> str:
    """Time and memory of whole models."""
    seconds = result["seconds"]
    rows = [
        [
            name,
            f"{seconds[name]:.1f} s",
            f"{result['model_bytes'] / seconds[name] / 1e9:.2f}",
            f"{result[f'{name}_over_codec_and_copy']:.2f}x",
            f"{result[f'{name}_peak_mib']} MiB",
        ]
        for name in ("compress", "verify", "decompress")
    ]
    headers = ["", "time", "GB/s", "time / (codec + plain copy)", "peak memory"]
    intro = (
        f"{result['model_bytes'] / 1e9:.2f} GB model, {result['threads']} threads, {result['bits_per_weight']:.2f} "
        f"bits/weight on disk, everything included; largest tensor {result['largest_tensor_bytes'] / 2**20:.0f} MiB. "
        f"In the same run a plain copy took {seconds['copy']:.1f} s, SHA-256 alone {seconds['sha256']:.1f} s."
    )
    return "\n".join([intro, "", table(headers, rows), "", where(result)])


def df11(result: Result) -> str:
    """The DF11 codec."""
    rows = []
    for source in result["sources"]:
        speeds = {key: value for key, value in source.items() if "threads" in key}
        rows.append(
            [
                source["source"],
                f"{source['df11_bits_per_weight']:.2f}",
                f"{source['planes_bits_per_weight']:.2f}",
                *(f"{speeds[key]:.2f}" for key in ("write, 1 threads", "read, 1 threads")),
            ]
        )
    headers = ["weights", "DF11 bits/weight", "planes bits/weight", "DF11 write GB/s", "DF11 read GB/s"]
    return "\n".join([table(headers, rows), "", "One thread. " + where(result)])


def cpu_linear(result: Result) -> str:
    """Products of every linear of Llama-3.1-8B."""
    labels = list(result["products"][0]["gb_per_s"])
    rows = [
        [
            r["name"],
            f"{r['rows']} x {r['cols']}",
            str(r["tokens"]),
            str(r["threads"]),
            *(f"{r['gb_per_s'][label]:.1f} ({r['speedup'][label]:.2f}x)" for label in labels),
        ]
        for r in result["products"]
    ]
    intro = "GB/s of BF16 weights multiplied, and how many times torch's speed that is; no weights in any cache:"
    return "\n".join([intro, "", table(["linear", "N x K", "tokens", "threads", *labels], rows), "", where(result)])


SECTIONS: dict[str, Callable[[Result], str]] = {
    "codec": codec,
    "df11": df11,
    "archive": archive,
    "cpu_linear": cpu_linear,
}


def render(name: str) -> str:
    """One table, or "not measured"."""
    path = RESULTS / f"{name}.json"
    return SECTIONS[name](json.loads(path.read_text())) if path.exists() else "not measured"


def main(arguments: list[str]) -> int:
    """Print all tables, or write them into the README."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name in SECTIONS:
        rendered = render(name)
        if "--write" in arguments:
            pattern = rf"(<!-- benchmark: {name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, body=rendered: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
        else:
            print(f"== {name}\n\n{rendered}\n")
    if "--write" in arguments:
        readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
