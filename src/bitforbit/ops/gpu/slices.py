"""Products in slices of rows, for weights too large to be decoded at once, where slicing keeps torch's bits.

Which kernel a library picks for a product, and so the order of its sums, depends on the number of rows. So slices are
used only where a probe has shown, on inputs whose outputs are nothing but rounding residue
(:mod:`bitforbit.ops.probe`), that the sliced product has the bits of the whole one: for this device, these libraries
and settings, these sizes. A probe needs the memory of one whole matrix for a moment; verdicts are kept in memory and on
disk. Products that are not proven are computed from the whole decoded matrix.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from bitforbit.cachedir import directory
from bitforbit.ops import probe, proven_cache
from bitforbit.ops.probe import Inputs, Linear

_VERSION = 1
_STEP = 256
"""Slices begin at multiples of so many rows, the largest tile of the products that libraries offer."""
_CHUNK_BYTES = 1 << 20
_TELLING = 0.2
"""Share of outputs that another order of sums must change, or the inputs prove nothing."""
_SETTINGS = ("CUBLAS", "NVIDIA_TF32_OVERRIDE", "TORCH_BLAS", "DISABLE_ADDMM_CUDA_LT")

Key = tuple[str | int | bool, ...]


class _State:
    verdicts: dict[Key, bool] | None = None


_state = _State()
_lock = threading.RLock()


def rows_of_slice(rows: int, row_bytes: int, slice_bytes: int) -> int:
    """Rows of a slice of about ``slice_bytes``; ``rows`` if the matrix is not larger."""
    wanted = max(1, slice_bytes // row_bytes)
    return rows if wanted >= rows else min(rows, max(_STEP, wanted // _STEP * _STEP))


def allowed(x: torch.Tensor, bias: torch.Tensor | None, rows: int, step: int, may_probe: bool) -> bool:
    """Whether ``functional.linear(x, weight, bias)`` may be computed in slices of ``step`` rows of the weight.

    Probes where nobody did before, unless ``may_probe`` forbids it (while a graph is being captured).
    """
    if not x.is_contiguous() or x.numel() == 0 or x.dtype is not torch.bfloat16:
        return False
    if bias is not None and (x.dim() not in (2, 3) or bias.dtype is not x.dtype or not bias.is_contiguous()):
        return False
    cols = x.shape[-1]
    tokens = x.numel() // cols
    key = _key(x.device, rows, cols, tokens, step, bias is not None)
    with _lock:
        if _state.verdicts is None:
            _state.verdicts = load(path())
        verdict = _state.verdicts.get(key)
        if verdict is None and may_probe:
            try:
                verdict = keeps_bits(functional.linear, x.device, rows, cols, tokens, step, bias is not None)
            except torch.OutOfMemoryError:
                return False  # another time, maybe
            _state.verdicts[key] = verdict
            store(path(), {key: verdict})
    return bool(verdict)


def linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    step: int,
    part: Callable[[int, int, torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """``[..., rows]`` from slices: ``part(begin, end, x, bias of these rows)`` gives ``[tokens, end - begin]``."""
    flat = x.view(-1, x.shape[-1])
    out = torch.empty((len(flat), rows), dtype=x.dtype, device=x.device)
    for begin, end in _ranges(rows, step):
        out[:, begin:end] = part(begin, end, flat, None if bias is None else bias[begin:end])
    return out.view(*x.shape[:-1], rows)


def keeps_bits(
    product: Linear, device: torch.device, rows: int, cols: int, tokens: int, step: int, has_bias: bool
) -> bool:
    """Whether ``product`` on slices of ``step`` rows gives the bits of ``product`` on the whole matrix."""
    rng = np.random.default_rng((rows, cols, tokens, step))
    count = min(rows, max(1, _CHUNK_BYTES // (2 * cols)))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for make in (probe.cancelling, probe.ordinary, probe.wide, probe.tiny):
            inputs = _repeated(make(rng, count, cols, tokens, has_bias), rows, device)
            whole = product(*_arguments(inputs)).reshape(tokens, rows)
            if make is probe.cancelling and not _tells(product, inputs, whole):
                return False
            sliced = linear(inputs.x, inputs.bias, rows, step, _slices_of(product, inputs.weight))
            if not torch.equal(whole.view(torch.int16), sliced.view(torch.int16)):
                return False
    return True


def clear() -> None:
    """Forget what is in memory, as in a new process; the file stays."""
    with _lock:
        _state.verdicts = None


def _ranges(rows: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _slices_of(
    product: Linear, weight: torch.Tensor
) -> Callable[[int, int, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    # A copy: a decoded slice begins on a boundary of its own.
    return lambda begin, end, x, bias: product(x, weight[begin:end].clone(), bias)


def _arguments(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return inputs.x, inputs.weight, inputs.bias


def _repeated(inputs: Inputs, rows: int, device: torch.device) -> Inputs:
    """Inputs of ``rows`` rows on a device, the few rows of these again and again."""
    places = torch.arange(rows, device=device) % len(inputs.weight)
    bias = None if inputs.bias is None else inputs.bias.to(device)[places]
    return Inputs(inputs.weight.to(device)[places], inputs.x.to(device), bias)


def _tells(product: Linear, inputs: Inputs, whole: torch.Tensor) -> bool:
    """Whether the inputs tell orders apart: the same products in the reverse order give other bits."""
    few = min(_STEP, len(inputs.weight))
    bias = None if inputs.bias is None else inputs.bias[:few]
    once = product(inputs.x, inputs.weight[:few].clone(), bias)
    back = product(inputs.x.flip(1).contiguous(), inputs.weight[:few].flip(1).contiguous(), bias)
    return float((once != back).float().mean()) >= _TELLING and bool(torch.isfinite(whole).all())


def _key(device: torch.device, rows: int, cols: int, tokens: int, step: int, has_bias: bool) -> Key:
    return (_device(device), rows, cols, tokens, step, has_bias)


def _device(device: torch.device) -> str:
    """What of the device and of torch's settings a product may depend on."""
    if device.type != "cuda":
        return f"{device.type} {torch.get_num_threads()} {torch._C._get_mkldnn_enabled()}"
    properties = torch.cuda.get_device_properties(device)
    matmul = torch.backends.cuda.matmul
    facts = (
        properties.name, properties.major, properties.minor, properties.multi_processor_count,
        torch.backends.cuda.preferred_blas_library(), matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(), torch.cuda.tunable.is_enabled(),
    )  # fmt: skip
    return " ".join(map(str, facts))


def path() -> Path:
    """The file of this environment."""
    name = hashlib.sha256(json.dumps(_environment()).encode()).hexdigest()[:16]
    return directory() / f"slices-{name}.json"


def load(file: Path) -> dict[Key, bool]:
    """The verdicts of a file; none if it is missing, damaged or of another environment."""
    try:
        content = json.loads(file.read_bytes())
        if content["version"] != _VERSION or content["environment"] != _environment():
            return {}
        return {tuple(entry["product"]): entry["keeps_bits"] is True for entry in content["verdicts"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def store(file: Path, verdicts: dict[Key, bool]) -> None:
    """Replace the file by its verdicts and these."""
    entries = [{"product": list(key), "keeps_bits": verdict} for key, verdict in {**load(file), **verdicts}.items()]
    content = {"version": _VERSION, "environment": _environment(), "verdicts": entries}
    proven_cache.replace_file(file, content)


def _environment() -> dict[str, str]:
    facts = {**proven_cache.environment(), "cuda": str(torch.version.cuda)}
    facts.update({name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)})
    return dict(sorted(facts.items()))
