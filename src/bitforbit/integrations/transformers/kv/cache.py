"""The cache that is passed as ``past_key_values``. KIVI (arXiv 2402.02750), section 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from bitforbit.errors import KvCacheError
from bitforbit.integrations.transformers.kv import plan
from bitforbit.integrations.transformers.kv.handle import KvHandle
from bitforbit.kv.spec import KiviSpec
from bitforbit.kv.state import KvState

_OFFLOAD = (
    "a quantized cache stays where its layer computes, expected no offloading; to keep a cache in the host's memory "
    "use DynamicCache(offloading=True)"
)


SINK = 4
"""First tokens that a cache keeps exact unless told: their keys are outliers, which would spoil their groups' scales.

KIVI itself has none, and so has a KiviSpec of its own.
"""


class KiviLayer(CacheLayerMixin):
    """One layer's quantized keys and values: a :class:`bitforbit.kv.state.KvState`, made when the first tokens come."""

    is_sliding = False
    is_compileable = False

    def __init__(self, spec: KiviSpec, index: int = 0) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.state: KvState | None = None
        self._open: KvHandle | None = None
        self._recording = False
        self.padding_is_known = False

    def __repr__(self) -> str:
        spec = self.spec
        bits = "exact" if spec.residual is None else f"k{spec.k_bits}v{spec.v_bits}"
        return f"KiviLayer({bits}, {self.get_seq_length()} tokens)"

    # --- a call: update(), then attention, which calls attended() -----------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the state for tensors ``[B, H, any, D]``. Raises KvCacheError or KvSpecError."""
        if key_states.shape != value_states.shape:
            raise KvCacheError(
                f"layer {self.index}: expected keys and values of one shape, got {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)}; use the model's own cache"
            )
        batch, heads, _, head_dim = key_states.shape
        self.spec = plan.fitted(self.spec, head_dim)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.state = KvState(
            self.spec, batch=batch, heads=heads, head_dim=head_dim, dtype=self.dtype, device=self.device,
            name=f"layer {self.index}",
        )  # fmt: skip
        self.is_initialized = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KvHandle, KvHandle]:
        """Add keys and values ``[B, H, q, D]``; what is returned is for the attention ``bitforbit_kivi`` alone.

        Raises KvCacheError where gradients are wanted, or for tensors that do not fit those before.
        """
        self._settle()
        if key_states.requires_grad or value_states.requires_grad:
            raise KvCacheError(
                "a quantized cache has no gradients, expected none to be asked for; compute under torch.no_grad(), or "
                "train without a cache (use_cache=False)"
            )
        if self.state is None:
            self.lazy_initialization(key_states, value_states)
        if torch.is_autocast_enabled(key_states.device.type):  # keys and values may then differ in dtype
            key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        self._check(key_states, value_states)
        state = self._state
        first = state.slots == 0
        state.append(key_states, value_states)
        self._open = KvHandle(self, key_states, value_states, first=first)
        return self._open, self._open

    def attended(self) -> None:
        """Attention has run: quantize what has left the window, unless tokens may be taken back (see :meth:`crop`)."""
        handle, self._open = self._open, None
        if handle is None or handle.handle_keys is None:
            return
        tokens = handle.handle_keys.shape[-2]
        handle.finish()
        if tokens == 1 or not self._recording:
            self._flush()

    def _settle(self) -> None:
        if self._open is not None:
            raise KvCacheError(
                f"layer {self.index}: expected the attention bitforbit_kivi to run after each update, but it did not "
                "after the last one; make the cache with bitforbit.kivi_cache(model), and begin with a new cache"
            )
        self._flush()

    def _flush(self) -> None:
        if self.state is not None and self.state.flushed != self.state.slots:
            self.state.flush()

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        state = self._state
        expected = (state.batch, state.heads, state.head_dim, self.dtype, self.device)
        for tensor in (keys, values):
            batch, heads, _, head_dim = tensor.shape
            got = (batch, heads, head_dim, tensor.dtype, tensor.device)
            if got != expected:
                raise KvCacheError(
                    f"layer {self.index}: expected rows, heads, head dimension, dtype and device as before, "
                    f"{_words(expected)}, got {_words(got)}; use a new cache for another batch or model"
                )

    @property
    def _state(self) -> KvState:
        if self.state is None:
            raise KvCacheError(f"layer {self.index}: expected a cache with tokens in it, got an empty one")
        return self.state

    # --- what transformers asks ---------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        """Whether a rollback leaves no trace: what was quantized comes back as what it was rounded to."""
        return self.spec.residual is None

    @property
    def batch_size(self) -> int:
        """Rows; AttributeError before the first tokens, as transformers' layers do."""
        if self.state is None:
            raise AttributeError("batch_size")
        return self.state.batch

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return 0 if self.state is None else self.state.nbytes

    def get_seq_length(self) -> int:
        """Columns of the batch so far, padding included."""
        return 0 if self.state is None else self.state.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for the next ``query_length`` tokens must cover."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    # --- what generate() does with a cache ----------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens."""
        self.state = self._open = None
        self.is_initialized = self.padding_is_known = False

    def activate_past_recording(self) -> None:
        """From now on, tokens that come several at a time are quantized only after a :meth:`crop`, or the next call."""
        self._recording = True

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (transformers counts them negative).

        What was quantized and comes back into the exact window has the values it was rounded to.
        """
        count = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if count > 0:
            raise KvCacheError(f"crop: expected 0 or less, the negative number of tokens to take back, got {count}")
        if self.state is None:
            return
        if count < 0:
            self.state.crop(max(0, self.state.slots + count))
            self.padding_is_known = False  # a row may be empty now
        self._settle()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        if self.state is not None:
            self.state.reorder(beam_idx.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, one after the other."""
        if self.state is not None:
            self.state.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        if self.state is not None:
            self.state.select(indices.to(self.device))

    def offload(self) -> None:
        """Raises KvCacheError."""
        raise KvCacheError(_OFFLOAD)

    def prefetch(self) -> None:
        """Raises KvCacheError."""
        raise KvCacheError(_OFFLOAD)


class KiviCache(Cache):
    """A cache for ``generate(past_key_values=...)`` whose full-attention layers are quantized. Lossy.

    ``config``: the model's. ``k_bits``, ``v_bits``: 2, 4 or 8. ``group``: tokens (of keys) and channels (of values)
    that share a scale; ``v_group``: the channels, if other; a head dimension that ``group`` does not divide gets
    smaller ones. ``residual``: the last tokens that stay exact (None: all do). ``sink``: the first ones. ``layers``:
    exceptions by index, a :class:`bitforbit.kv.KiviSpec` or None for exact. Sliding, chunked and linear layers are
    those of transformers. The model needs the attention ``bitforbit_kivi``: :func:`bitforbit.kivi_cache` sees to that.
    Raises KvSpecError or KvCacheError.
    """

    def __init__(
        self,
        config: Any,
        k_bits: int = 4,
        v_bits: int = 4,
        group: int = 32,
        residual: int | None = 128,
        sink: int = SINK,
        v_group: int | None = None,
        layers: Mapping[int, KiviSpec | None] | None = None,
    ) -> None:
        self.spec = KiviSpec(k_bits, v_bits, group, v_group, residual, sink)
        decoder = plan.decoder_config(config)
        own = plan.own_layers(decoder)
        chosen = plan.specs(decoder, own, self.spec, layers or {})
        for index, spec in chosen.items():
            head_dim = plan.head_dim(decoder, index)
            if head_dim is not None:
                plan.fitted(spec, head_dim)
        super().__init__(layers=[KiviLayer(chosen[i], i) if i in chosen else layer for i, layer in enumerate(own)])

    @property
    def quantized_layers(self) -> list[int]:
        """Indices of the layers that are quantized."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, KiviLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those of transformers' own layers included."""
        from bitforbit.integrations.transformers.kv.figures import layer_bytes

        return sum(layer_bytes(layer) for layer in self.layers)


def _words(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
