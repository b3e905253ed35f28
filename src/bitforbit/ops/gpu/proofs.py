"""Orders of summation that were proven to be those of torch's own linear, on a GPU, with these libraries.

As on a CPU (:mod:`bitforbit.ops.proven`): in exact mode a product straight from tiles is allowed only where its order
has given torch's bits in a probe (:mod:`bitforbit.ops.gpu.order_probe`): for this device, driver, versions and
settings, these sizes, this very number of tokens. Libraries choose another kernel for another number of tokens, so
nothing is concluded from one to the next. Verdicts are kept in memory and on disk.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import torch
from torch.nn import functional

from bitforbit.cachedir import directory
from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.sources import text
from bitforbit.errors import BitforbitError, OrderMismatchError, UsageError
from bitforbit.ops import proven, proven_cache
from bitforbit.ops.gpu import order_probe
from bitforbit.ops.gpu.order_probe import ALIGNMENT, Product
from bitforbit.ops.probe import Linear

LEAST_ROWS, LEAST_COLS = 16, 64
"""Below, there is nothing to gain."""

_VERSION = 1
_SETTINGS = (
    "CUBLAS",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_BLAS",
    "DISABLE_ADDMM_CUDA_LT",
    "TORCH_CUBLAS",
    "PYTORCH_TUNABLEOP",
)

Key = tuple[str | int | bool, ...]
Verdicts = dict[Key, Order | None]


@dataclass
class _State:
    verdicts: Verdicts = field(default_factory=dict)
    file: Path | None = None
    """Where they were read from: that of the environment, which does not change in a process but for tests."""
    uses: Counter[Key] = field(default_factory=Counter)
    linears: list[Linear] = field(default_factory=list)
    """Of tests, in the place of torch's."""


_state = _State()
_lock = threading.RLock()


def product_of(x: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Product | None:
    """What ``functional.linear(x, weight, bias)`` with a BF16 weight ``[rows, x.shape[-1]]`` is known by.

    None if no order can be proven for it: for other dtypes and strides, more tokens than kernels take, and where torch
    does not compute one ``mm`` or ``addmm`` of dense rows (ATen's native/Linear.cpp).
    """
    if x.dtype is not torch.bfloat16 or not 1 <= x.dim() <= 3 or not x.is_contiguous() or x.numel() == 0:
        return None
    if bias is not None and (
        x.dim() == 1 or bias.dtype is not torch.bfloat16 or bias.shape != (rows,) or not bias.is_contiguous()
    ):
        return None
    cols = x.shape[-1]
    product = Product(
        rows, cols, x.numel() // cols, x.dim(), alignment_of(x), 0 if bias is None else alignment_of(bias)
    )
    return product if _is_worth_it(product) else None


def lookup(device: torch.device, product: Product, prove_after: int | None) -> Order | None:
    """The order proven for a product on a device, or None.

    Probes, once, what is being used for the ``prove_after``-th time, and waits for the device then; None: never, as
    within a graph's capture.
    """
    if device.type != "cuda" and not _state.linears:
        return None  # an emulation's products have no order to be found in torch's
    key = (*_settings(device), *astuple(product))
    if _state.file is None:
        _load()
    try:
        return _state.verdicts[key]
    except KeyError:
        if prove_after is None:
            return None
    with _lock:
        _state.uses[key] += 1
        if _state.uses[key] < prove_after:
            return None
    return _prove(key, device, product)


def prove(products: Iterable[Product], device: torch.device) -> dict[Product, Order | None]:
    """The orders of torch's linear for products on a device, None for those that no kernel can follow.

    Probes those that nobody has probed before, which takes the memory of one decoded matrix at a time, and outputs.
    Raises UsageError for a CPU, GpuUnavailableError, torch.OutOfMemoryError.
    """
    if device.type != "cuda" and not _state.linears:
        raise UsageError(f"expected a CUDA device, got {device}: orders are proven on the device that has the model")
    _load()
    return {
        product: _prove((*_settings(device), *astuple(product)), device, product, may_fail=True)
        if _is_worth_it(product)
        else None
        for product in dict.fromkeys(products)
    }


def forget(device: torch.device, product: Product) -> None:
    """Withdraw a verdict: this product counts as not proven in this process, and is probed again by the next one."""
    key = (*_settings(device), *astuple(product))
    with _lock:
        _state.verdicts[key] = None
        store(path(), {}, forget=key)


def clear() -> None:
    """Forget what is in memory, as in a new process; the file stays."""
    with _lock:
        _state.verdicts, _state.file = {}, None
        _state.uses.clear()


@contextmanager
def examine(linear: Linear) -> Iterator[None]:
    """Within this context (of all threads), orders are those of ``linear``, on a CPU with an emulation. For tests."""
    _state.linears.append(linear)
    try:
        yield
    finally:
        _state.linears.remove(linear)


def recheck(device: torch.device, product: Product, got: torch.Tensor, decoded: Callable[[], torch.Tensor]) -> None:
    """Where ``BITFORBIT_PARANOID`` asks for it, compare a proven product with the decoded one, bit for bit.

    ``got`` and what ``decoded`` computes with torch are ``[..., rows]``. Waits for the device. Raises
    OrderMismatchError, and withdraws the proof, if they differ; UsageError for a setting that makes no sense.
    """
    if not os.environ.get("BITFORBIT_PARANOID") or not proven.is_due((*_settings(device), *astuple(product))):
        return
    expected = decoded()
    differing = int((got.view(torch.int16) != expected.view(torch.int16)).sum())
    if differing:
        forget(device, product)
        raise OrderMismatchError(
            f"expected the product of {product.tokens} x {product.cols} activations with a {product.rows} x "
            f"{product.cols} weight on {device} to have torch's bits, as proven before, got {differing} of "
            f"{got.numel()} outputs with others; the proof is withdrawn: run again, and please report this with the "
            "output of `bitforbit info`"
        )


def _is_worth_it(product: Product) -> bool:
    """Whether kernels take so many tokens, and there is something to gain."""
    large = product.rows >= LEAST_ROWS and product.cols >= LEAST_COLS
    return large and 1 <= product.tokens <= plans.MAX_TOKENS


def _prove(key: Key, device: torch.device, product: Product, may_fail: bool = False) -> Order | None:
    with _lock:
        if key not in _state.verdicts:
            linear = _state.linears[-1] if _state.linears else functional.linear
            try:
                order = order_probe.find_order(linear, device, product)
            except torch.OutOfMemoryError:
                if may_fail:
                    raise
                _state.uses[key] = 0
                return None  # another time, maybe
            _state.verdicts[key] = order
            store(path(), {key: order})
        return _state.verdicts[key]


def _load() -> None:
    with _lock:
        file = path()
        if _state.file != file:
            _state.verdicts, _state.file = load(file), file


def alignment_of(tensor: torch.Tensor) -> int:
    """Largest power of two, at most :data:`ALIGNMENT`, that divides a tensor's address."""
    address = int(tensor.data_ptr()) | ALIGNMENT
    return address & -address


def _settings(device: torch.device) -> Key:
    """What of the device and of torch's settings a product may depend on. Called for every product."""
    if device.type != "cuda":
        return (device.type, 0)
    matmul = torch.backends.cuda.matmul
    return (
        *_device_facts(torch.cuda.current_device() if device.index is None else device.index),
        str(torch.backends.cuda.preferred_blas_library()), str(matmul.allow_bf16_reduced_precision_reduction),
        torch.are_deterministic_algorithms_enabled(), torch.cuda.tunable.is_enabled(),
        str(getattr(torch._C, "_get_sm_carveout_experimental", lambda: None)()),
    )  # fmt: skip


@functools.cache
def _device_facts(ordinal: int) -> Key:
    properties = torch.cuda.get_device_properties(ordinal)
    return properties.name, properties.major, properties.minor, properties.multi_processor_count


# --- on disk --------------------------------------------------------------------------------------------------------


def path() -> Path:
    """The file of this environment."""
    name = hashlib.sha256(json.dumps(environment()).encode()).hexdigest()[:16]
    return directory() / f"orders-gpu-{name}.json"


def environment() -> dict[str, str]:
    """Everything that the choice of a kernel may depend on, but for what belongs to a device or a product."""
    facts = {**_libraries(), **{name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}}
    return dict(sorted(facts.items()))


@functools.cache
def _libraries() -> dict[str, str]:
    kernels = "".join(text(kernel.source) for kernel in (plans.PLAIN["BF16"], plans.KERNELS[0]))
    facts = {
        **proven_cache.environment(),
        "cuda": str(torch.version.cuda),
        "cublas": _cublas_version(),
        "kernels": hashlib.sha256(kernels.encode()).hexdigest()[:16],
    }
    with suppress(OSError):
        facts["driver"] = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return facts


def _cublas_version() -> str:
    """Of the library in this process; which file it is, if it does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            name = line.split(maxsplit=5)[-1]
            if "libcublasLt.so" in name:
                with suppress(OSError, AttributeError):
                    version = ctypes.CDLL(name).cublasLtGetVersion
                    version.restype = ctypes.c_size_t
                    return f"{version()}"
                return name
    return ""


def load(file: Path) -> Verdicts:
    """The verdicts of a file; none if it is missing, damaged or of another environment."""
    try:
        content = json.loads(file.read_bytes())
        if content["version"] != _VERSION or content["environment"] != environment():
            return {}
        return dict(_verdict(entry) for entry in content["verdicts"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError, BitforbitError):
        return {}


def store(file: Path, verdicts: Verdicts, forget: Key | None = None) -> None:
    """Replace the file by its verdicts and these, but for one to forget."""
    merged = {**load(file), **verdicts}
    merged.pop(forget, None) if forget else None
    entries = [
        {
            "product": list(key),
            "order": None if order is None else {f.name: getattr(order, f.name) for f in fields(order)},
        }
        for key, order in merged.items()
    ]
    proven_cache.replace_file(file, {"version": _VERSION, "environment": environment(), "verdicts": entries})


def _verdict(entry: dict[str, list[str | int | bool] | dict[str, str | int | bool] | None]) -> tuple[Key, Order | None]:
    """An entry of a file. Raises what :func:`load` takes for damage."""
    key, order = entry["product"], entry["order"]
    if not isinstance(key, list) or not all(isinstance(item, str | int) for item in key):
        raise TypeError("a product is named by numbers and strings")
    if order is None:
        return tuple(key), None
    if not isinstance(order, dict) or {f.name for f in fields(Order)} != set(order):
        raise TypeError("an order of another version")
    for each in fields(Order):
        if type(order[each.name]).__name__ != each.type:
            raise TypeError(f"an order whose {each.name} is no {each.type}")
    found, named = Order(**order), Product(*key[-len(fields(Product)) :])  # type: ignore[arg-type]
    if found.cols != named.cols or (found.bias_rounded and not named.has_bias):
        raise ValueError("an order of another product")
    return tuple(key), found
