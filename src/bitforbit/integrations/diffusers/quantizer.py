"""The hooks that diffusers calls while it loads a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer

from bitforbit.errors import UsageError
from bitforbit.integrations import runtime
from bitforbit.integrations.diffusers import config
from bitforbit.integrations.options import Options

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from bitforbit.integrations.diffusers.loading import Load

# Modules of ours that need diffusers.models are imported in functions: this one is imported while
# diffusers.quantizers still is.


class BitforbitQuantizer(DiffusersQuantizer):
    """Compressed models in diffusers. One object serves one model, which refers to it as ``hf_quantizer``."""

    requires_calibration = False
    use_keep_in_fp32_modules = True
    """As with plain models: what a model wants in FP32 is loaded, and compressed, in FP32."""

    quantization_config: Options
    pre_quantized: bool

    def __init__(self, quantization_config: Options, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config.check(quantization_config)
        self._dtype: torch.dtype | None = None
        self._load: Load | None = None

    # --- before the weights are loaded ---------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises UsageError for a device map that does not go with the runtime, or names other devices than the CPU,
        NVIDIA GPUs and the disk, GpuUnavailableError for a GPU that cannot be used.
        """
        places = [torch.device("cpu")] if device_map is None else runtime.devices(device_map)
        runtime.check_devices(places, self.quantization_config.runtime)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that was asked for, as with plain models. Raises UsageError for dtypes that nothing computes in."""
        if isinstance(torch_dtype, torch.dtype) and torch_dtype.itemsize < 2:
            raise UsageError(
                f"expected dtype to be one that models compute in, got {torch_dtype}; compressed weights are "
                "exact, so load in torch.bfloat16, or whatever dtype the checkpoint has"
            )
        self._dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[Any]) -> list[str]:
        """Opens the files; the list is changed later, when the model is there."""
        from bitforbit.integrations.diffusers.loading import Load

        self._load = Load(self.quantization_config, self._dtype, checkpoint_files, loaded_keys)
        if self.pre_quantized and not self._load.from_compressed:
            raise UsageError(
                f"{self._load.where}: expected weights compressed by bitforbit, as config.json says, got others; files "
                "of two models are mixed, or quantization_config is to be removed from config.json"
            )
        self.pre_quantized = self._load.from_compressed
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: ModelMixin, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        self._loading.plan(model, keep_in_fp32_modules)

    @property
    def _loading(self) -> Load:
        if self._load is None:  # from_single_file names no files
            from bitforbit.integrations.diffusers.loading import Load

            self._load = Load(self.quantization_config, self._dtype, (), [])
            self.pre_quantized = False
        return self._load

    # --- while they are loaded -----------------------------------------------------------------------------------

    @property
    def supports_parallel_loading(self) -> bool:
        """No: modules change their parameters as tensors arrive. Decoding and compressing use all CPUs anyway."""
        return False

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors of one file under the names of parameters, decoded where they are not wanted as stored."""
        return self._loading.arriving(state_dict)

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a tensor is compressed as it arrives."""
        return self._loading.needs_compression(param_name)

    def create_quantized_param(
        self, model: ModelMixin, param_value: torch.Tensor, param_name: str, target_device: Any, *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Compress a tensor and make it the model's parameter of that name."""
        self._loading.compress(param_name, param_value, target_device)

    # --- after they are loaded -----------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        from bitforbit.integrations.diffusers.saving import attach
        from bitforbit.nn import siblings

        self._loading.close()
        self._load = None
        self.pre_quantized = True
        attach(model)
        siblings.find(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """Yes, by ``model.save_pretrained``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether the model may be compiled: the operators can be traced."""
        return True

    def get_cuda_warm_up_factor(self) -> int:
        """diffusers reserves GPU memory for the model divided by half of this, or so; compressed weights are 0.7."""
        return 4

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Raises UsageError: a model's files need more than these two."""
        raise UsageError("a compressed model is saved by its own model.save_pretrained; do not call the class's")

    def _dequantize(self, model: ModelMixin) -> ModelMixin:
        from bitforbit.integrations.diffusers.saving import detach
        from bitforbit.nn.model import decompress_model

        decompress_model(model)
        detach(model)
        return model
