"""Prefill at static shapes, captured as CUDA graphs."""
