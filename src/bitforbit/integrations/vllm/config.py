"""The quantization method ``bitforbit`` of vLLM: which layers stay compressed, and how they multiply."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from bitforbit.errors import UsageError
from bitforbit.format.spec import QUANT_METHOD
from bitforbit.integrations.transformers.config import BitforbitConfig
from bitforbit.integrations.vllm import MODE_VARIABLE
from bitforbit.integrations.vllm.embedding import BitforbitEmbeddingMethod
from bitforbit.integrations.vllm.experts import BitforbitExpertsMethod
from bitforbit.integrations.vllm.linear import BitforbitLinearMethod
from bitforbit.ops import MODES


class BitforbitQuantizationConfig(QuantizationConfig):
    """vLLM's view of ``quantization_config`` in ``config.json``; without arguments that of a plain checkpoint.

    Members as in :class:`bitforbit.integrations.transformers.config.BitforbitConfig`; of them, ``mode`` and
    ``modules_to_not_convert`` count. Raises UsageError for values out of range, UnsupportedVersionError.
    """

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.options = BitforbitConfig.from_dict(options or {})
        self.mode = os.environ.get(MODE_VARIABLE) or self.options.mode
        if self.mode not in MODES:
            raise UsageError(f"{MODE_VARIABLE}: expected a mode among {', '.join(MODES)}, got {self.mode!r}")

    def get_name(self) -> str:
        """See vLLM."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """See vLLM."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See vLLM."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: ``--quantization bitforbit`` compresses a plain checkpoint while it loads."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitforbitQuantizationConfig:
        """See vLLM."""
        return cls(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How a layer stores and uses its weights; None: as without compression."""
        if isinstance(layer, LinearBase):
            # Routers are small, and vLLM multiplies by them with kernels of their own.
            if isinstance(layer, GateLinear) or self.options.keeps(prefix):
                return UnquantizedLinearMethod()
            return BitforbitLinearMethod(self.mode, prefix)
        if self.options.keeps(prefix):
            return None
        if isinstance(layer, VocabParallelEmbedding):
            return BitforbitEmbeddingMethod(self.mode, prefix)
        if isinstance(layer, RoutedExperts):
            return BitforbitExpertsMethod(layer.moe_config, prefix)
        return None


def register() -> None:
    """Tell vLLM of the method, once per process."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(BitforbitQuantizationConfig)
