"""diffusers: ``from_pretrained`` and ``save_pretrained`` of compressed models and pipelines.

``config`` is what users write, ``quantizer`` what diffusers calls, ``register`` makes the two known. ``loading`` takes
tensors from files to parameters of the model; saving is ``saving``, with ``originals``.
"""
