"""vLLM: models that stay compressed in memory, under tensor and pipeline parallelism.

vLLM calls ``plugin.register`` in each of its processes. ``weights`` gives its loader the original tensors of a
compressed directory, not read yet (``lazy``); vLLM fuses and shards them; ``linear``, ``embedding`` and ``experts``
compress what a process keeps, layer by layer while the model loads, with ``parameter``, and multiply by it. ``config``
decides which layers.
"""

from __future__ import annotations

MODE_VARIABLE = "BITFORBIT_VLLM_MODE"
"""Environment variable that sets the mode, whatever the model's ``config.json`` says."""
