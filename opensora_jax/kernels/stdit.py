"""Self-attention of the STDiT family over its own layout: projected activations in, attended activations out.

    out_btsc = stdit_attention(qkv_btsc, num_heads=16, mode="temporal", q_scale=..., k_scale=..., rope=(cos, sin))

`qkv_btsc` [B, T, S, 3*C] is what the fused projection wrote, in the order (q k v, head, head_dim). Spatial mode attends
over S for each frame, temporal mode over T for each position. Fused back ends split heads, normalise, rotate and attend
in fast memory; the others go through `attention`.
"""

import functools
from types import ModuleType

import jax.numpy as jnp

from opensora_jax.kernels import attention as dispatch
from opensora_jax.kernels import spec, stdit_gpu, stdit_tpu, xla
from opensora_jax.kernels.sharded import over_mesh
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.parallel import pieces as in_pieces
from opensora_jax.parallel import shard

FUSED: dict[str, ModuleType] = {"pallas_tpu": stdit_tpu, "pallas_gpu": stdit_gpu}
PREFERENCE: dict[str, tuple[str, ...]] = {"tpu": ("pallas_tpu",)}  # fastest first, by platform
COMPOSED = "composed"


AXES = {"spatial": ("batch", "frames", None), "temporal": ("batch", None, "space")}
ROW = {"spatial": 2, "temporal": 1}  # the dimension that is attended over


class _Anything:
    """Stands for the composed path at the end of the preference."""

    supports = staticmethod(lambda call: None)


def stdit_attention(
    qkv_btsc,
    *,
    num_heads: int,
    mode: str = "spatial",
    q_scale=None,
    k_scale=None,
    rope=None,
    norm_before_rope: bool = True,
    kv_mask=None,
    pieces: int = 1,
    name: str | None = None,
    implementation: str | None = None,
):
    """[B, T, S, C].

    q_scale, k_scale: [head_dim] weights of the RMS norm over each head (eps 1e-6), or None for no norm.
    rope: (cos, sin), each [row, head_dim], for interleaved pairs; row is S in spatial and T in temporal mode.
    norm_before_rope: False for Open-Sora 1.1, which rotates first. kv_mask: [B, row] bool, True = visible.
    pieces: rows lie in so many pieces, each of all samples [pieces * B, T, S, 3C] (parallel/pieces.py); so does the result.
    name: by which policies of jax.checkpoint may keep the result, with what else a kernel's backward pass asks for.
    """
    if mode not in ("spatial", "temporal"):
        raise ValueError(f"stdit_attention: mode={mode!r} is unknown; choose spatial or temporal")
    b, t, s, c3 = qkv_btsc.shape
    head_dim = c3 // (3 * num_heads)
    if head_dim * 3 * num_heads != c3:
        raise ValueError(f"stdit_attention: {c3} channels are not 3 x {num_heads} heads of equal size")
    row = pieces * qkv_btsc.shape[ROW[mode]]
    for name, table in zip(("cos", "sin"), rope or ()):
        if table.shape != (row, head_dim):
            raise ValueError(f"stdit_attention: {name} has shape {table.shape}, expected {(row, head_dim)}")
    if kv_mask is not None and kv_mask.shape != (b // pieces, row):
        raise ValueError(f"stdit_attention: kv_mask has shape {kv_mask.shape}, expected {(b // pieces, row)}")
    if (q_scale is None) != (k_scale is None):
        raise ValueError("stdit_attention: give q_scale and k_scale, or neither")
    optional = {"norm": q_scale, "rope": rope, "kv_mask": kv_mask}
    extras = frozenset(name for name, value in optional.items() if value is not None)
    call = Call(mode, b * t * s // row, row, row, num_heads, head_dim, str(qkv_btsc.dtype), extras)
    fused = _fused(call, implementation)
    arrays = {"q_scale": q_scale, "k_scale": k_scale, "rope": rope, "kv_mask": kv_mask}
    static = {"num_heads": num_heads, "mode": mode, "norm_before_rope": norm_before_rope, "name": name}
    if pieces > 1 and (fused is None or not fused.takes_pieces(call, pieces)):
        whole = in_pieces.join(qkv_btsc, pieces, ROW[mode])
        out = stdit_attention(whole, implementation=implementation, **static, **arrays)
        return in_pieces.cut(out, pieces, ROW[mode])
    if fused is None:
        return composed(qkv_btsc, implementation=implementation, **static, **arrays)
    # What does not attend to each other is shared out: frames in spatial mode, positions in temporal mode.
    axes = (*AXES[mode], None)
    whole = {"q_scale": (None,), "k_scale": (None,), "rope": ((None, None),) * 2, "kv_mask": ("batch", None)}
    static |= {"pieces": pieces} if pieces > 1 else {}
    run = functools.partial(fused.stdit_attention, **static)
    return over_mesh(run, {"qkv_btsc": qkv_btsc, **arrays}, {"qkv_btsc": axes, **whole}, (b, t, s, c3 // 3), axes)


def _fused(call: Call, implementation: str | None) -> ModuleType | None:
    """The fused back end to use, or None when the call goes through `attention` (which has its own choice)."""
    if implementation is not None:
        if implementation not in FUSED:
            return None
        try:
            return FUSED[dispatch.choose(call, FUSED, PREFERENCE, implementation)]
        except Unsupported:
            dispatch.choose(call.through_attention(), dispatch.BACKENDS, {}, implementation)  # raises its own reason
            return None
    order = PREFERENCE.get(spec.platform(), ())
    if not order:
        return None
    name = dispatch.choose(call, FUSED | {COMPOSED: _Anything}, {spec.platform(): (*order, COMPOSED)}, None)
    return FUSED.get(name)


def composed(
    qkv_btsc, *, num_heads, mode, q_scale, k_scale, rope, norm_before_rope, kv_mask=None, name=None, implementation=None
):
    """The same through XLA's split, norm and rotation and one of `attention`'s back ends."""
    b, t, s, c3 = qkv_btsc.shape
    # Pinned, with its cotangent: left to propagation, the gradient of the projection misses devices of `context`.
    qkv_btsc = shard.constrain(qkv_btsc, *AXES[mode], "heads")
    qkv = qkv_btsc.swapaxes(1, 2) if mode == "temporal" else qkv_btsc
    outer, row = qkv.shape[1:3]
    # Cut into whole channels first: kernels that take them as they lie then split no heads.
    q, k, v = (x.reshape(b * outer, row, num_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
    q = xla.prepare(q, q_scale, rope, norm_before_rope)
    k = xla.prepare(k, k_scale, rope, norm_before_rope)
    mask = None if kv_mask is None else jnp.repeat(kv_mask, outer, axis=0)
    out = dispatch.attention(q, k, v, kv_mask=mask, implementation=implementation)
    out = out.reshape(b, outer, row, c3 // 3)
    return spec.named(out.swapaxes(1, 2) if mode == "temporal" else out, name)
