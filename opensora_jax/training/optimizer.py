"""AdamW as the references run it: clip by global norm, warm-up, constant or cosine, frozen parameters left alone."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from opensora_jax.common.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
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
    adam = optax.adamw(
        learning_rate(cfg, total_steps), b1=cfg.betas[0], b2=cfg.betas[1], eps=cfg.eps, weight_decay=cfg.weight_decay
    )
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    labels = jax.tree.map(lambda yes: "train" if yes else "keep", trainable)
    return optax.partition({"train": optax.chain(clip, adam), "keep": optax.set_to_zero()}, labels)


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
