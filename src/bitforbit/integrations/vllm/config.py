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
from vllm.transformers_utils.config import get_safetensors_params_metadata

from bitforbit.errors import UsageError
from bitforbit.format.spec import QUANT_METHOD, part_name
from bitforbit.integrations.transformers.config import BitforbitConfig
from bitforbit.integrations.vllm import MODE_VARIABLE
from bitforbit.integrations.vllm.embedding import BitforbitEmbeddingMethod
from bitforbit.integrations.vllm.experts import BitforbitExpertsMethod
from bitforbit.integrations.vllm.linear import BitforbitLinearMethod
from bitforbit.nn.spec import PARTS
from bitforbit.ops import MODES

_STORED_HEAD = part_name("lm_head.weight", PARTS[0])


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
        self.untied = False
        """Whether the files hold a head of their own although the model's config ties it to the embeddings."""

    def keeps(self, prefix: str) -> bool:
        """Whether the layer of this name is to stay plain."""
        keeps: bool = self.options.keeps(prefix)
        return keeps

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

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Believe the files rather than a config that ties a head of which they hold a weight.

        vLLM does so for plain files, whose tensors it knows by name; the parts of compressed ones it does not.
        """
        if not getattr(hf_config, "tie_word_embeddings", False):
            return
        names = get_safetensors_params_metadata(model_name, revision=revision)
        self.untied = any(name.endswith(_STORED_HEAD) for name in names)
        if self.untied:
            hf_config.tie_word_embeddings = False
            hf_config.get_text_config().tie_word_embeddings = False

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How a layer stores and uses its weights; None: as without compression."""
        if isinstance(layer, LinearBase):
            # Routers are small, and vLLM multiplies by them with kernels of their own.
            if isinstance(layer, GateLinear) or self.keeps(prefix):
                return UnquantizedLinearMethod()
            return BitforbitLinearMethod(self.mode, prefix)
        if self.keeps(prefix):
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
