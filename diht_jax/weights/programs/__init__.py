"""Towers as programs that run without this package: StableHLO and ONNX.

Both have the same two functions, with their weights in them: pictures uint8 [b, size, size, 3] and
ids of texts int32 [b, context_length] become unit vectors, float32 [b, d], for any b.
"""
