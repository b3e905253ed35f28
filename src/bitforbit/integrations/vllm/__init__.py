"""vLLM: models that stay compressed in memory, under tensor and pipeline parallelism.

vLLM calls ``plugin.register`` in each of its processes. ``weights`` gives its loader the original tensors of a
compressed directory; vLLM fuses and shards them; ``linear``, ``embedding`` and ``experts`` compress what a process
keeps, layer by layer while the model loads, with ``parameter``, and multiply by it. ``config`` decides which layers.
"""
