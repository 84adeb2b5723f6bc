"""Decode pipelines: which node carries which layers, and the steps between them."""
