"""Judging videos: `python -m opensora_jax.evaluate` (flags and report: __main__, files: videos, metrics: scores)."""
