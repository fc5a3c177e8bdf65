"""Backbones: loading, random-weight shapes, synthetic inputs, the table of verified families."""
