"""A PyTorch network of small random weights, and ours made from them."""

import numpy as np
import torch

from opensora_jax.verify.case import load_network


def weights_of(model, seed: int = 0) -> dict[str, np.ndarray]:
    """Randomises every parameter (also those that begin at zero or one), and gives them as a checkpoint would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.eval()
    return tensors(model)


def tensors(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def ours(model, room: str, stem: str, config: dict | None = None, weights: dict | None = None):
    """Our network and parameters from the model's weights, which are drawn unless they are given; config: what its
    config.json would say."""
    known = dict(getattr(model, "config", {}) or {}) if config is None else config
    net, params, _ = load_network(room, stem, weights_of(model) if weights is None else weights, known)
    return net, params


def normal(*shape, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(ours_, theirs, tolerance: float = 2e-5) -> None:
    """Relative to the size of the recorded tensor, as float32 of two frameworks can agree."""
    theirs = theirs.detach().numpy()
    ours_ = np.asarray(ours_)
    assert ours_.shape == theirs.shape
    assert np.linalg.norm(ours_ - theirs) <= tolerance * np.linalg.norm(theirs)
