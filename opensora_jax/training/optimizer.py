"""AdamW as the references run it: clip by global norm, warm-up, constant or cosine, frozen parameters left alone.

`name="muon"` (Liu et al. 2025, arXiv 2502.16982) orthogonalizes the updates of the stacked layers' matrices and of
convolutions, at AdamW's learning rates; AdamW keeps the rest: embeddings, modulation, biases, the final layer.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from opensora_jax.common.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # or "muon"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15  # as in the 1.2 stages
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # global norm; 0 switches it off
    warmup_steps: int = 0
    schedule: str = "constant"  # or "cosine", down to `final_share` at the last step
    final_share: float = 0.0
    accumulate_steps: int = 1  # micro-batches summed before one update
    offload: bool = False  # keep the moments in host memory, which devices fetch for each update
    freeze: tuple[str, ...] = ()  # regular expressions over parameter paths


def learning_rate(cfg: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Warm-up rises linearly and reaches the full rate at `warmup_steps`, as the references' LinearWarmupLR does."""
    if cfg.schedule == "constant":
        after = lambda step: cfg.learning_rate
    elif cfg.schedule == "cosine":
        decay_steps = max(1, total_steps - cfg.warmup_steps)
        after = optax.cosine_decay_schedule(cfg.learning_rate, decay_steps, cfg.final_share)
    else:
        raise UserError(f"optimizer.schedule={cfg.schedule!r} is unknown; choose constant or cosine")
    warm = lambda step: cfg.learning_rate * (step + 1) / (cfg.warmup_steps + 1)
    return lambda step: jnp.where(step < cfg.warmup_steps, warm(step), after(step - cfg.warmup_steps))


def make(cfg: OptimizerConfig, total_steps: int, trainable) -> optax.GradientTransformation:
    """trainable: a tree of booleans like the parameters; the rest gets no update and no optimizer state."""
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    update = optax.chain(clip, _update(cfg, learning_rate(cfg, total_steps)))
    labels = jax.tree.map(lambda yes: "train" if yes else "keep", trainable)
    return optax.partition({"train": update, "keep": optax.set_to_zero()}, labels)


def _update(cfg: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    adamw = optax.adamw(rate, b1=cfg.betas[0], b2=cfg.betas[1], eps=cfg.eps, weight_decay=cfg.weight_decay)
    if cfg.name == "adamw":
        return adamw
    if cfg.name != "muon":
        raise UserError(f"optimizer.name={cfg.name!r} is unknown; choose adamw or muon")
    muon = optax.contrib.muon(
        rate,
        weight_decay=cfg.weight_decay,
        consistent_rms=0.2,  # an update is as large as AdamW makes it
        muon_weight_dimension_numbers=lambda params: jax.tree.map(_matrix, params),
    )
    label = lambda path, leaf: "muon" if leaf.ndim > 2 and path[-1].key == "kernel" else "adamw"
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
    return optax.partition({"muon": muon, "adamw": adamw}, labels)


def _matrix(kernel) -> optax.contrib.MuonDimensionNumbers:
    """Stacked matrices are [layers, in, out]; all of a convolution but its outputs is one side: [*window, in, out]."""
    last = kernel.ndim - 1
    return optax.contrib.MuonDimensionNumbers((1,) if last == 2 else tuple(range(last)), (last,))


def trainable(kinds_trainable, freeze: tuple[str, ...]):
    """The network's own mask without the paths that `freeze` matches; a pattern that matches nothing is an error."""
    unused = set(freeze)

    def keep(path, yes):
        name = "/".join(str(getattr(part, "key", part)) for part in path)
        hits = [pattern for pattern in freeze if re.search(pattern, name)]
        unused.difference_update(hits)
        return yes and not hits

    mask = jax.tree_util.tree_map_with_path(keep, kinds_trainable)
    if unused:
        raise UserError(f"optimizer.freeze: no parameter matches {', '.join(sorted(unused))}")
    return mask
