"""The hooks that transformers calls while it loads a model.

Works with 5.17 to 5.23, whose hooks differ: ``update_weight_conversions`` gained an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer

from bitforbit.errors import UsageError
from bitforbit.integrations import runtime
from bitforbit.integrations.transformers.config import BitforbitConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps, WeightTransform

    from bitforbit.integrations.transformers.loading import Load
    from bitforbit.integrations.transformers.ties import Ties

# Modules of ours that need transformers.core_model_loading are imported in functions: this one is imported while
# transformers.quantizers still is.


class BitforbitQuantizer(HfQuantizer):
    """Compressed models in transformers. One object serves one model, which refers to it as ``hf_quantizer``."""

    requires_calibration = False
    quantization_config: BitforbitConfig
    pre_quantized: bool

    def __init__(self, quantization_config: BitforbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._load: Load | None = None
        self._planned = False
        self._ahead = quantization_config.ahead
        self.ties: Ties | None = None

    # --- before the weights are loaded ---------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises UsageError for a device map that does not go with the runtime, or names other devices than the CPU,
        NVIDIA GPUs and the disk, GpuUnavailableError for a GPU that cannot be used.
        """
        places = runtime.devices(device_map)
        if device_map is None and self.quantization_config.runtime != "df11":
            places = [torch.device("cpu")]  # a DFloat11 model may be moved to a GPU later
        runtime.check_devices(places, self.quantization_config.runtime)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element to be reserved for a parameter that is to be loaded, as far as is known of it."""
        from bitforbit.integrations import names

        size = float(param.element_size())
        module, _, own = param_name.rpartition(".")
        _, _, name = own.partition("__")
        spec = names.spec_of(model, f"{module}.{name}" if module else name) if name else None
        if spec is not None:
            if self.quantization_config.runtime == "planes":
                return size
            parts = model.get_submodule(module)._bitforbit_parts(name)
            return size * runtime.tiles_share(spec, sum(part.numel() for part in parts))
        if self._load is not None and self._load.will_compress(param_name):
            return runtime.compressed_element_size(param)
        return size

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Leaves room on GPUs for weights that are decoded before they are multiplied, and for streamed blocks."""
        if self._load is None:
            return max_memory
        # Limits that were balanced between GPUs may be fractions: sizes of parameters are.
        on_gpu = {place: limit for place, limit in max_memory.items() if isinstance(place, int)}
        scratch = self._load.scratch_bytes() if on_gpu else 0
        limits: dict[Any, Any] = {
            **max_memory, **{place: max(0, int(limit) - scratch) for place, limit in on_gpu.items()}
        }  # fmt: skip
        if self._ahead is None:
            return limits
        from bitforbit.integrations.transformers import offload

        model = self._load.model
        tensors = [*model.named_parameters(), *model.named_buffers()]
        sizes = {name: t.numel() * self.param_element_size(model, name, t) for name, t in tensors}
        roomy: Any
        roomy, self._ahead = offload.leave_room(model, limits, sizes, self._ahead)
        return dict(roomy)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's dtype as it is: what does not fit is refused when the files are open."""
        # With "auto" and no dtype in config.json transformers takes that of the first tensor, which may be a part.
        return dtype if dtype is None or dtype.is_floating_point else torch.bfloat16

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        from bitforbit.integrations.transformers.loading import Load

        self._load = Load(model, self.quantization_config, dtype or model.dtype, checkpoint_files)
        self._planned = False
        self.ties = self._load.installer.ties
        if self.pre_quantized and not self._load.from_compressed:
            raise UsageError(
                f"{self._load.where}: expected weights compressed by bitforbit, as config.json says, got others; files "
                "of two models are mixed, or quantization_config is to be removed from config.json"
            )
        # A checkpoint that is compressed already must not be cast, nor compressed again, by the loader.
        self.pre_quantized = self._load.from_compressed

    def update_weight_conversions(
        self, weight_conversions: Sequence[WeightTransform], *args: Any
    ) -> list[WeightTransform]:
        """The loader's rules for names and conversions; the model gets its compressed parameters here."""
        if self._load is None or self._planned:
            return list(weight_conversions)
        self._planned = True
        return self._load.plan(weight_conversions)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of an ordinary checkpoint is compressed as it loads."""
        return self._load is not None and not self.pre_quantized and self._load.needs_compression(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """The last operation on such a parameter."""
        from bitforbit.integrations.transformers.transforms import Compress

        assert self._load is not None
        return Compress(self._load)

    # --- after they are loaded -----------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from bitforbit.integrations.transformers.saving import attach
        from bitforbit.nn import siblings

        load, self._load = self._load, None
        if load is None or (load.from_compressed and not self._planned):
            raise UsageError("this version of transformers loads weights in another way; install one of 5.17 to 5.23")
        load.close()
        self.pre_quantized = True
        attach(model)
        siblings.find(model)
        if self._ahead is not None and {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
            from bitforbit.integrations.transformers import offload

            offload.stream(model, self._ahead)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes, by ``model.save_pretrained``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are; transformers itself refuses to train the rest."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model on its own account: with a static cache, on a GPU."""
        return self.quantization_config.compile

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """For saving adapters only. Raises UsageError for the model, whose files need more than these two."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        raise UsageError("a compressed model is saved by its own model.save_pretrained; do not call the class's")

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from bitforbit.nn.model import decompress_model

        if getattr(model, "hf_device_map", None) is None:
            decompress_model(model)
        else:
            from bitforbit.integrations.transformers import offload

            with offload.brought_back(model):
                decompress_model(model)
        self.forget(model)
        return model if dtype is None or dtype == model.dtype else model.to(dtype)

    def forget(self, model: PreTrainedModel) -> None:
        """Undo what is unusual about a model in which nothing is compressed any more."""
        from bitforbit.integrations.transformers.saving import detach

        if self.ties is not None:
            self.ties.restore(model)
        detach(model)
