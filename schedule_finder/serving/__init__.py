"""Serving check: vLLM with and without a schedule on a run's held-out samples, before it is deployed."""
