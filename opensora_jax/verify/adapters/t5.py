"""T5's encoder as transformers runs it."""

import jax

from opensora_jax.nn import taps
from opensora_jax.verify.case import Adapter, Case


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("text", "t5")
    given = case.tensors(run)

    @jax.jit
    def forward(params, ids, mask):
        with taps.record() as seen:
            out = net(params, ids, mask)
        return out, dict(seen)

    out, seen = forward(params, given["input_ids"].astype("int32"), given.get("attention_mask"))
    blocks = {f"inter.block_{i}": seen[f"{i}/block"] for i in range(cfg.num_layers)}
    return {"last_hidden_state": out, "inter.embed": seen["embed"]} | blocks


FAMILIES = {"t5_encoder": Adapter("t5", replay)}
