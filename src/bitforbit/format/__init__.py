"""The bitforbit file format: safetensors headers, checksums, records."""
