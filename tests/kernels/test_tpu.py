"""Our TPU kernels in Pallas' interpreter against float64 and the reference's gradients; their lowering to Mosaic."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax import work
from opensora_jax.kernels import attention as dispatch
from opensora_jax.kernels import (
    blocks,
    cross_tpu,
    cross_tpu_backward,
    flash_tpu,
    spec,
    stdit_tpu,
    stdit_tpu_backward,
    stdit_tpu_temporal_backward,
    tpu_rows,
    tpu_slopes,
    tpu_temporal,
)
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.spec import Unsupported
from opensora_jax.kernels.stdit import ROW, stdit_attention
from opensora_jax.kernels.tpu_lanes import Heads
from opensora_jax.parallel import pieces
from tests.kernels.cases import BY_NAME, CASES, Case
from tests.kernels.compare import FORWARD, GRADIENT, both, check, relative
from tests.kernels.reference import attention64, gradients64

# Four heads of 96 span lane tiles as sixteen of 72 do, at a quarter of the work.
SMALL = {
    "spatial": (("v1.2 spatial 360p", "float32"), ("v1.3 window T=15", "float32"), ("v1.0 spatial 64x512", "bfloat16")),
    "temporal": (
        ("v1.1 temporal T=16 360p", "float32"),
        ("v1.2 temporal T=30 480p", "float32"),
        ("v1.2 temporal T=60 720p", "bfloat16"),
        ("v1.0 temporal T=16", "bfloat16"),
    ),
}


@pytest.mark.parametrize("name, dtype", [pair for pairs in SMALL.values() for pair in pairs])
def test_fused_rows_match_float64(name, dtype):
    case = replace(BY_NAME[name].small(), batch=1, heads=4, head_dim=96)
    if case.kind == "temporal":
        # Keys hidden in some frames: every bit of a position's code is met, with and without them.
        case = replace(case, queries=min(case.queries, 24), window=name.startswith("v1.0"))
    run = functools.partial(stdit_attention, implementation="pallas_tpu")
    if name.startswith("v1.0"):  # as a stream lies that is exchanged with three other devices
        case = replace(case, keys=128) if case.kind == "spatial" else case
        assert stdit_tpu.takes_pieces(call_of(case), 4)
        run = functools.partial(through_pieces, run)
    check(case, dtype, run)


@pytest.mark.parametrize(
    "kind, keys, window",
    [("spatial", 72, False), ("spatial", 72, True), ("spatial", 300, False), ("attention", 40, False)],
)
def test_rows_of_no_whole_tiles_do_not_meet_their_neighbours(kind, keys, window):
    """Without a norm, lanes beside a head hold other heads' channels, and one of them hides what is no key. 300: more rows
    than are prepared at once, so that some are all keys."""
    case = Case(
        "", kind, 1 if keys == 300 else 2, 3 if kind == "spatial" else 48, keys, heads=4, head_dim=96, window=window
    )
    run = stdit_attention if case.fused else attention
    check(case, "float32", functools.partial(run, implementation="pallas_tpu"))


@pytest.mark.parametrize("name, frames", [("v1.1 temporal T=16 360p", 7), ("v1.2 temporal T=15 360p", 11)])
def test_frames_in_chunks_that_overlap(name, frames, monkeypatch):
    monkeypatch.setattr(tpu_temporal, "CHUNK_ROWS", 96)
    case = replace(BY_NAME[name].small(), batch=1, queries=frames, heads=4, head_dim=32)
    check(case, "float32", functools.partial(stdit_attention, implementation="pallas_tpu"))


@pytest.mark.parametrize(
    "name, older",
    [("v1.2 temporal T=120 480p", False), ("v1.2 temporal T=120 480p", True), ("v1.1 temporal T=16 360p", False)],
)
def test_rows_of_more_frames_than_a_tile(name, older, monkeypatch):
    monkeypatch.setattr(tpu_temporal, "OLDER", ("cpu",) * older)
    monkeypatch.setattr(stdit_tpu_temporal_backward, "AHEAD", 1)  # norms of k wait for the gradient of q
    case = replace(BY_NAME[name], batch=1, queries=72, keys=9, heads=4, head_dim=32)
    check(case, "bfloat16", functools.partial(stdit_attention, implementation="pallas_tpu"))


@pytest.mark.parametrize("name, frames", [("v1.1 temporal T=16 360p", 7), ("v1.2 temporal T=15 360p", 24)])
def test_frames_where_half_registers_stay_apart(name, frames, monkeypatch):
    monkeypatch.setattr(tpu_temporal, "OLDER", ("cpu",))
    case = replace(BY_NAME[name].small(), batch=1, queries=frames, heads=4, head_dim=32)
    check(case, "bfloat16", functools.partial(stdit_attention, implementation="pallas_tpu"))


@pytest.mark.parametrize("straight, parts, older", [(0, 1, False), (512, 1, False), (512, 2, False), (512, 2, True)])
def test_gradients_of_rows_in_many_tiles(straight, parts, older, monkeypatch):
    monkeypatch.setattr(stdit_tpu_backward, "STRAIGHT", straight)
    monkeypatch.setattr(stdit_tpu_backward, "OLDER", ("cpu",) * older)
    monkeypatch.setattr(tpu_slopes, "KEY_TILE", 64)
    monkeypatch.setattr(tpu_slopes, "QUERY_TILE", 32)
    keys, head_dim = (112, 96) if parts == 1 else (256, 32)
    case = replace(BY_NAME["v1.3 window T=15"], batch=1, queries=1, keys=keys, heads=4, head_dim=head_dim)
    run = functools.partial(stdit_attention, implementation="pallas_tpu")
    with blocks.trying("stdit_spatial", backward=(48,)):
        check(case, "float32", functools.partial(through_pieces, run, parts=parts) if parts > 1 else run)


@pytest.mark.parametrize(
    "extras, straight", [("norm", 0), ("rope", 512), ("norm rope", 0), ("norm rope", 512), ("rope norm", 512), ("", 0)]
)
def test_rows_prepared_in_many_chunks(extras, straight, monkeypatch):
    monkeypatch.setattr(stdit_tpu_backward, "STRAIGHT", straight)
    monkeypatch.setattr(tpu_rows, "CHUNK", 64)
    options = {"norm": "norm" in extras, "rope": "rope" in extras, "norm_before_rope": extras != "rope norm"}
    run = functools.partial(stdit_attention, implementation="pallas_tpu")
    pieces = extras == "norm rope" and straight == 0  # of 128 rows, two chunks each
    case = Case("", "spatial", 1, 1, 256 if pieces else 168, heads=4, head_dim=96, **options)
    with blocks.trying("stdit_spatial", forward=(128,), backward=(128,)):
        check(case, "float32", functools.partial(through_pieces, run, parts=2) if pieces else run)


@pytest.mark.parametrize("heads", [Heads(16, 72), Heads(32, 12), Heads(4, 32)])
def test_rows_of_a_head_come_back_to_their_lanes(heads):
    for head in range(heads.count):
        x = jax.random.normal(jax.random.key(head), (8, 128))
        rows = heads.take_rows(x.T, head)
        assert rows.shape == (heads.rows, 8)
        assert (jnp.where(heads.own(head, 8), x, 0) == heads.put_rows(rows, head).T).all()


@pytest.mark.parametrize("mode", ["spatial", "temporal"])
def test_what_is_kept_by_name_is_not_computed_again(mode):
    attend = functools.partial(stdit_attention, num_heads=4, mode=mode, implementation="pallas_tpu", name="kept")

    def forward_kernels(policy):
        again = jax.checkpoint(lambda x: jnp.sin(attend(jnp.sin(x))).sum(), policy=policy)
        with spec.target("v6e"):
            jaxpr = jax.make_jaxpr(jax.grad(again))(jax.ShapeDtypeStruct((1, 2, 128, 3 * 384), jnp.bfloat16)).jaxpr
        return results_read(jaxpr, f"stdit_{mode}")

    assert forward_kernels(jax.checkpoint_policies.nothing_saveable) == 2
    assert forward_kernels(jax.checkpoint_policies.save_only_these_names("kept")) == 1


def results_read(jaxpr, name):
    """Kernels whose results somebody reads; the compiler drops the others."""
    read = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
    params = (value for equation in jaxpr.eqns for value in equation.params.values())
    inside = (results_read(x, name) for x in (getattr(value, "jaxpr", value) for value in params) if hasattr(x, "eqns"))
    called = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call" and eqn.params["name"] == name)
    return sum(any(id(x) in read for x in equation.outvars) for equation in called) + sum(inside)


def through_pieces(run, qkv, *, mode, parts=4, **options):
    out = run(pieces.cut(qkv, parts, ROW[mode]), mode=mode, pieces=parts, **options)
    return pieces.join(out, parts, ROW[mode])


def call_of(case, **changed):
    row = {"queries": case.row, "keys": case.row} if case.fused else {"queries": case.queries, "keys": case.keys}
    call = spec.Call(case.kind, case.batch, *row.values(), case.heads, case.head_dim, "bfloat16")
    return replace(call, **changed)


@pytest.mark.parametrize("name, heads, head_dim", [("v1.0 cross 64x512 text 120", 4, 96), ("v2.0 joint 256px", 2, 128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_matches_float64(name, heads, head_dim, dtype):
    case = replace(BY_NAME[name].small(), heads=heads, head_dim=head_dim)
    if head_dim == 128:
        case = replace(case, batch=2, queries=150, keys=280, ragged=True)
    check(case, dtype, functools.partial(attention, implementation="pallas_tpu"))


@pytest.mark.parametrize("heads, head_dim, tile", [(16, 24, 96), (8, 48, 64)])
def test_texts_under_queries_in_many_tiles(heads, head_dim, tile, monkeypatch):
    """Blocks of queries with some beyond the last one, keys in no whole registers; heads that begin in the middle of one."""
    monkeypatch.setattr(cross_tpu_backward, "OLDER", ("cpu",) * (tile < 96))
    monkeypatch.setattr(cross_tpu_backward, "QUERY_TILE", tile)
    case = Case("", "attention", 2, 200, 150, heads, head_dim, ragged=True)
    with blocks.trying("cross_attention", forward=(256,), backward=(96,)), monkeypatch.context() as at:
        at.setattr(cross_tpu, "even_blocks", lambda size, most: most)
        check(case, "bfloat16" if tile == 96 else "float32", functools.partial(attention, implementation="pallas_tpu"))


FLASH = {  # heads, head size, dtype, what is hidden
    "two heads fill no tiles": (2, 72, "float32", ()),
    "lengths, one sample blind": (2, 72, "float32", ("kv_lengths",)),
    "mask": (4, 96, "bfloat16", ("kv_mask",)),
    "lengths and mask": (3, 40, "float32", ("kv_lengths", "kv_mask")),
    "whole tiles": (1, 128, "float32", ("kv_lengths",)),
    "whole tiles under a mask": (1, 128, "float32", ("kv_lengths", "kv_mask")),
}


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_matches_float64(name, monkeypatch):
    """Several blocks of queries and keys, ragged ones, gradients in several runs of queries."""
    heads, head_dim, dtype, hidden = FLASH[name]
    monkeypatch.setattr(cross_tpu, "MAX_KEYS", 128)
    monkeypatch.setattr(flash_tpu, "PART", 128)
    monkeypatch.setattr(flash_tpu, "MOST_QUERIES", 256)
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.normal(size=(2, length, heads, head_dim)), dtype) for length in (300, 280, 280, 300)
    )
    options = {"kv_lengths": np.array([0, 210]), "kv_mask": rng.random((2, 280)) < 0.6}
    options = {key: options[key] for key in hidden}
    with blocks.trying("flash_tpu", forward=(256, 128), backward=(128, 256)):
        out, found = both(functools.partial(attention, implementation="pallas_tpu", **options), cotangent, q, k, v)
    wide = [np.asarray(x, np.float32) for x in (q, k, v)]
    assert relative(out, attention64(*wide, **options)) < FORWARD[dtype]
    exact = gradients64(attention64, np.asarray(cotangent, np.float32), {}, tuple(wide), **options)[1:]
    for ours, reference in zip(found, exact, strict=True):
        assert relative(ours.astype(jnp.float32), reference) < GRADIENT[dtype]


def test_rows_too_long_for_fast_memory_take_flash_attention(monkeypatch):
    """With everything that a row brings along: norm, rotation and hidden tokens."""
    monkeypatch.setattr(blocks, "vmem", lambda: 1 << 20)
    monkeypatch.setattr(cross_tpu, "MAX_KEYS", 128)
    case = replace(BY_NAME["v1.3 window T=15"], batch=1, queries=2, keys=136, heads=4, head_dim=96)
    run = functools.partial(stdit_attention, implementation="pallas_tpu")
    jaxpr = str(jax.make_jaxpr(functools.partial(run, **case.inputs()[1]))(*case.inputs()[0]))
    assert "flash_tpu" in jaxpr and "stdit_spatial" not in jaxpr
    check(case, "float32", run)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "xla"])
def test_texts_serve_every_piece_of_a_stream(implementation):
    q, k, v = (jax.random.normal(key, (2, 24, 4, 96)) for key in jax.random.split(jax.random.key(0), 3))
    q, lengths = jnp.concatenate([q, 2 * q]), jnp.array([7, 24])

    def both(again, name):
        run = lambda q, *text: attention(q, *map(again, text), kv_lengths=again(lengths), implementation=name)
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(jnp.cos(out))

    expected = jax.jit(lambda: both(lambda a: jnp.concatenate([a, a]), "xla"))()
    for ours, exact in zip(jax.jit(lambda: both(lambda a: a, implementation))(), expected, strict=True):
        assert relative(ours, exact) < GRADIENT["float32"]


@pytest.mark.parametrize("name", ["v1.2 spatial 480p", "v1.2 temporal T=30 480p", "v1.0 temporal T=16"])
def test_lowers_to_mosaic_at_full_size(name):
    case = BY_NAME[name]
    extras = replace(case, **{"queries" if case.kind == "spatial" else "keys": 1}).inputs()[1]
    shapes = jax.eval_shape(lambda: case.inputs()[0])

    def both(x):
        out, pull = jax.vjp(functools.partial(stdit_attention, implementation="pallas_tpu", **extras), x)
        return out, pull(out)

    with spec.target("v6e"):
        text = jax.jit(both).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2


def test_automatic_choice_on_a_tpu():
    for case in CASES:
        if case.fused:
            stdit_tpu.supports(call_of(case))
    shapes = jax.ShapeDtypeStruct((1, 2, 128, 3 * 384), jax.numpy.bfloat16)
    with spec.target("v5e"):
        jaxpr = str(jax.make_jaxpr(functools.partial(stdit_attention, num_heads=4))(shapes))
    assert "stdit_spatial" in jaxpr


@pytest.mark.parametrize(
    "queries, heads, head_dim, extras, chosen",
    [
        (102400, 2, 72, (), "pallas_tpu"),
        (4096, 16, 72, ("kv_mask",), "pallas_tpu"),
        (8828, 24, 128, ("kv_lengths",), "pallas_tpu"),
        (8828, 24, 128, ("kv_mask",), "pallas_tpu"),
        (512, 2, 72, (), "xla"),
        (77, 12, 64, ("causal",), "xla"),
    ],
)
def test_short_rows_of_odd_heads_are_left_to_xla(queries, heads, head_dim, extras, chosen):
    call = spec.Call("attention", 1, queries, queries, heads, head_dim, "bfloat16", frozenset(extras))
    with spec.target("v6e"):
        assert dispatch.choose(call, dispatch.BACKENDS, dispatch.PREFERENCE, None) == chosen


def test_queries_at_once_follow_the_chip():
    call = spec.Call("spatial", 1, 4096, 4096, 16, 72, "bfloat16", frozenset({"norm"}))
    with spec.target("v6e"):
        assert stdit_tpu.most_queries(call) == (1024, 256)
    with spec.target("v5p"), pytest.raises(Unsupported, match="60 are to be had"):  # has half the fast memory
        stdit_tpu.supports(call)


def test_kernels_take_the_blocks_of_their_chip(monkeypatch):
    own = {
        "chip": "v6e",
        "kernel": "flash_tpu",
        "pass": "forward",
        "head_dim": 128,
        "length": 2048,
        "blocks": [256, 1024],
    }
    spatial = own | {"kernel": "stdit_spatial", "length": 1024, "blocks": [128]}
    rows = [own, spatial, *(row for row in blocks.table() if row["chip"] == "any")]
    monkeypatch.setattr(blocks, "table", lambda: rows)

    def grid(chip, run, *shape):
        operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * (3 if run is attention else 1)
        with spec.target(chip):
            traced = jax.make_jaxpr(lambda *given: run(*given))(
                *operands
            )  # anew: jax keeps what a function was traced to
        kernels = {kernel.name: kernel.equation.params["grid_mapping"].grid for kernel in work.count(traced).kernels}
        return kernels.get("flash_tpu") or kernels["stdit_spatial"]

    spatial = functools.partial(stdit_attention, num_heads=16)
    assert grid("v6e", attention, 1, 2048, 2, 72) == (1, 2, 8, 2)
    assert grid("v5e", attention, 1, 2048, 2, 72) == (1, 2, 4, 1)
    assert grid("v6e", spatial, 1, 2, 1024, 3456) == (2, 8)
    assert grid("v5e", spatial, 1, 2, 1024, 3456) == (2, 1)


def test_layouts_that_do_not_fit_are_refused_with_the_reason():
    for call, reason in {
        spec.Call("spatial", 4, 64, 64, 26, 72, "bfloat16"): "no whole tiles",
        spec.Call("spatial", 4, 64, 64, 16, 128, "bfloat16"): "no spare lane",
        spec.Call("spatial", 4, 20000, 20000, 16, 72, "bfloat16"): "MiB of VMEM",
        spec.Call("temporal", 4, 200, 200, 16, 72, "bfloat16"): "200 frames",
        spec.Call("temporal", 4, 16, 16, 16, 72, "float16"): "dtype float16",
    }.items():
        with pytest.raises(Unsupported, match=reason):
            stdit_tpu.supports(call)
    long = spec.Call("temporal", 1, 128, 128, 16, 72, "bfloat16", frozenset(("norm", "rope")))
    stdit_tpu.supports(long)
    with spec.target("v5p"), pytest.raises(Unsupported, match="128 frames need 61 MiB"):
        stdit_tpu.supports(long)
