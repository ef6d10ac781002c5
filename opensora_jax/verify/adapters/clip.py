"""CLIP's text model as transformers runs it."""

import jax

from opensora_jax.nn import taps
from opensora_jax.verify.case import Adapter, Case


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("text", "clip")
    given = case.tensors(run)

    @jax.jit
    def forward(params, ids, mask):
        with taps.record() as seen:
            out = net(params, ids, mask)
        return out, dict(seen)

    out, seen = forward(params, given["input_ids"].astype("int32"), given.get("attention_mask"))
    outputs = {"last_hidden_state": out.tokens, "pooler_output": out.pooled, "inter.embeddings": seen["embeddings"]}
    outputs |= {f"inter.layer_{i}": seen[f"{i}/layer"] for i in range(cfg.num_hidden_layers)}
    return outputs if out.projected is None else outputs | {"text_embeds": out.projected}


FAMILIES = {"clip_text": Adapter("clip", replay)}
