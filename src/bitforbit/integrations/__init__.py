"""bitforbit inside other libraries: transformers."""
