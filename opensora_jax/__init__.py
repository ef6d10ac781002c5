"""Open video generation on JAX: the Open-Sora family, trained, sampled, converted and served."""

__version__ = "0.1.0"
