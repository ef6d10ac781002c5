"""One update: loss and gradients over micro-batches, a guard against non-finite values, AdamW, EMA.

step = make_step(loss_fn, tx, StepConfig(...), learning_rate)
state, metrics = step(state, batch, frozen)            # jitted by the caller; state is donated
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class StepConfig:
    seed: int = 42
    ema_decay: float = 0.9999
    ema_start_steps: int = 0  # until then the EMA simply follows the parameters
    accumulate_steps: int = 1


same = lambda tree: tree


def make_step(
    loss_fn: Callable, tx, cfg: StepConfig, schedule: Callable, *, cut: Callable = same, fetch: Callable = same
) -> Callable:
    """loss_fn(params, batch, key, frozen) → (scalar, metrics); frozen: parameters of encoders that are not trained.
    cut: lays gradients out like the optimizer state; fetch: brings that state to the devices."""

    def step(state, batch, frozen):
        key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
        grad_fn = _cut_gradients(loss_fn, cut)
        (loss, metrics), grads = _gradients(grad_fn, state["params"], batch, key, frozen, cfg.accumulate_steps)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        moments = fetch(state["opt"])
        updates, opt = tx.update(grads, moments, state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = jnp.where(state["step"] < cfg.ema_start_steps, 0.0, cfg.ema_decay)
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(e.dtype) - e), state["ema"], params)
        # A step with a non-finite loss or gradient leaves everything as it was; the loop counts it and gives up in time.
        choose = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        new = {
            "params": choose(params, state["params"]),
            "ema": choose(ema, state["ema"]),
            "opt": choose(opt, moments),
            "step": state["step"] + 1,
        }
        scalars = {name: value for name, value in metrics.items() if jnp.ndim(value) == 0}
        learning_rate = jnp.asarray(schedule(state["step"]), jnp.float32)
        return new, scalars | {"loss": loss, "grad_norm": norm, "finite": finite, "learning_rate": learning_rate}

    return step


def _cut_gradients(loss_fn, cut):
    def value_and_grad(params, batch, key, frozen):
        out, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key, frozen)
        return out, cut(grads)

    return value_and_grad


def _gradients(value_and_grad, params, batch, key, frozen, parts: int):
    if parts == 1:
        return value_and_grad(params, batch, key, frozen)

    # Strided, so that every micro-batch keeps the batch's sharding over devices.
    split = jax.tree.map(lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def body(total, part):
        index, micro = part
        out = value_and_grad(params, micro, jax.random.fold_in(key, index), frozen)
        scalars = {name: value for name, value in out[0][1].items() if jnp.ndim(value) == 0}
        out = ((out[0][0], scalars), out[1])
        return jax.tree.map(lambda a, b: a + b / parts, total, out), None

    first = jax.tree.map(lambda a: a[0], split)
    shapes = jax.eval_shape(value_and_grad, params, first, key, frozen)
    scalars = {name: value for name, value in shapes[0][1].items() if value.ndim == 0}
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), ((shapes[0][0], scalars), shapes[1]))
    return jax.lax.scan(body, zeros, (jnp.arange(parts), split))[0]
