"""Attention: one public function, a table of back ends, one choice per shape (logged with its reason).

    out_btnh = attention(q_btnh, k_bsnh, v_bsnh, kv_lengths=text_lengths)

Every back end computes softmax(scale * q k^T + bias) v with a float32 softmax; a query that sees no key returns zeros.
`implementation` pins a back end; one that cannot serve the call raises `Unsupported` with its reason.
Fused attention over STDiT's own layout lives beside it, in stdit.py. Figures: docs/performance.md, section "Attention".
"""

import functools
import logging
from types import ModuleType

from opensora_jax.kernels import cudnn, mosaic_gpu, pallas_gpu, pallas_tpu, spec, xla
from opensora_jax.kernels.sharded import over_mesh
from opensora_jax.kernels.spec import Call, Unsupported, repeat

log = logging.getLogger("opensora_jax.kernels")

BACKENDS: dict[str, ModuleType] = {
    "xla": xla,
    "pallas_tpu": pallas_tpu,
    "cudnn": cudnn,
    "pallas_gpu": pallas_gpu,
    "mosaic_gpu": mosaic_gpu,
}
PREFERENCE = {
    "tpu": ("pallas_tpu", "xla"),
    "cuda": ("cudnn", "xla"),
}  # fastest first; other platforms take the reference
QUERY_AXES = ("batch", "tokens", "heads", None)


def attention(
    q_btnh,
    k_bsnh,
    v_bsnh,
    *,
    kv_lengths=None,
    kv_mask=None,
    segment_ids=None,
    bias=None,
    causal=False,
    scale=None,
    implementation: str | None = None,
):
    """[B, T, N, H] from queries [B, T, N, H] and keys, values [B, S, N, H]. Samples of keys, with their lengths and masks,
    may be fewer, as many as divide those of queries: sample i of the queries sees that of i modulo their number.

    kv_lengths: [B] int, keys beyond are hidden. kv_mask: [B, S] bool, True = visible. segment_ids: (q_ids [B, T],
    kv_ids [B, S]), equal ids see each other. bias: additive, broadcasts to [B, N, T, S]. causal: query i sees 0..i.
    scale: of the logits, by default 1/sqrt(H).
    """
    optional = {"kv_lengths": kv_lengths, "kv_mask": kv_mask, "segment_ids": segment_ids, "bias": bias}
    check_shapes(q_btnh, k_bsnh, v_bsnh, **optional)
    batch, queries, heads, head_dim = q_btnh.shape
    extras = {name for name, value in optional.items() if value is not None} | ({"causal"} if causal else set())
    call = Call("attention", batch, queries, k_bsnh.shape[1], heads, head_dim, str(q_btnh.dtype), frozenset(extras))
    name = choose(call, BACKENDS, PREFERENCE, implementation)
    scale = head_dim**-0.5 if scale is None else scale
    run = functools.partial(BACKENDS[name].attention, causal=causal, scale=scale)
    keyed = {"k_bsnh": k_bsnh, "v_bsnh": v_bsnh, "kv_lengths": kv_lengths, "kv_mask": kv_mask}
    operands = {"q_btnh": q_btnh, **optional, **(keyed if name == "pallas_tpu" else repeat(keyed, batch))}
    if name == "xla" or causal:  # a share of the queries does not know where it begins
        return run(**operands)
    return over_mesh(run, operands, _axes(bias), (*q_btnh.shape[:3], v_bsnh.shape[3]), QUERY_AXES)


def _axes(bias):
    """Logical axes of the operands."""
    keys = ("batch", None, "heads", None)
    ids = (("batch", "tokens"), ("batch", None))
    names = {"q_btnh": QUERY_AXES, "k_bsnh": keys, "v_bsnh": keys, "segment_ids": ids}
    names |= {"kv_lengths": ("batch",), "kv_mask": ("batch", None)}
    if bias is not None:
        wide = zip(("batch", "heads", "tokens", None), bias.shape)
        names["bias"] = tuple(axis if size > 1 else None for axis, size in wide)
    return names


def choose(call: Call, backends: dict[str, ModuleType], preference: dict, implementation: str | None) -> str:
    """The pinned back end if it can serve, else the first of the platform's preference that can."""
    if implementation is not None:
        if implementation not in backends:
            raise Unsupported(f"no back end is called {implementation!r}; choose one of {', '.join(backends)}")
        try:
            backends[implementation].supports(call)
        except Unsupported as reason:
            raise Unsupported(f"{implementation} cannot serve {call}: {reason}") from None
        return implementation
    return _first_that_serves(call, tuple(backends.items()), preference.get(spec.platform(), ("xla",)), spec.chip())


@functools.cache
def _first_that_serves(call: Call, backends: tuple, order: tuple, chip: str) -> str:
    """Cached, so that each shape is logged once."""
    refused = []
    for name in order:
        try:
            dict(backends)[name].supports(call)
        except Unsupported as reason:
            refused.append(f"{name}: {reason}")
            continue
        reasons = refused or [f"first choice on {spec.platform()}"]
        if name == "xla" and xla.score_bytes(call) > xla.MAX_SCORE_BYTES:
            reasons.append(f"queries in chunks, all scores would take {xla.score_bytes(call) >> 20} MiB")
        log.info("%s on %s: %s (%s)", call, chip, name, "; ".join(reasons))
        return name
    raise Unsupported(f"no back end serves {call}: {'; '.join(refused)}")


def check_shapes(q, k, v, *, kv_lengths, kv_mask, segment_ids, bias):
    batch, queries, heads, head_dim = q.shape
    samples, keys = k.shape[:2]
    if batch % samples or k.shape[2:] != (heads, head_dim) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit together")
    wanted = {"kv_lengths": (kv_lengths, (samples,)), "kv_mask": (kv_mask, (samples, keys))}
    if segment_ids is not None:
        wanted |= {"q ids": (segment_ids[0], (batch, queries)), "kv ids": (segment_ids[1], (batch, keys))}
    for name, (value, shape) in wanted.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"attention: {name} has shape {value.shape}, expected {shape}")
    if bias is not None and (
        bias.ndim != 4 or any(have not in (1, want) for have, want in zip(bias.shape, (batch, heads, queries, keys)))
    ):
        raise ValueError(f"attention: bias {bias.shape} does not broadcast to {(batch, heads, queries, keys)}")
