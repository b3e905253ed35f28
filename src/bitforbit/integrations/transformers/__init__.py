"""transformers: ``from_pretrained`` and ``save_pretrained`` of compressed models.

``config`` is what users write, ``quantizer`` what transformers calls. Loading goes ``source`` (what the files hold) ->
``plan`` (which tensor becomes which parameter) -> ``transforms`` (what the stock loader does on the way) ->
``install`` (parameters of the model); saving is ``saving``, with ``originals`` and ``native``.
"""
