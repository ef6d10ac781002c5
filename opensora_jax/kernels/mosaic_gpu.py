"""Flash attention for Hopper GPUs: wgmma products on tiles that TMA brings (Pallas, Mosaic GPU lowering).

Three warpgroups make a block. One only loads: it keeps `stages` tiles of the operands that stream past on their way. The
two others hold 64 rows each; in the forward pass they take turns, so that one multiplies while the other is at its
softmax. Forward holds queries and streams keys and values; backward runs once holding queries (dq) and once holding keys
(dk, dv): nothing is added atomically, results are the same in every run.

Arrays are read and written as [B, L, N*H], without transposes. TMA addresses them in tiles of 8 rows and 64 columns, and a
copy that begins within a tile ends with it: so heads are 64 or 128 wide, and lengths that are no multiple of 8 are padded.
No tile that is written overhangs its array: the last one begins early, and the rows that it shares with its neighbour
get the same values twice.

`interpret` takes the parameters of Pallas' interpreter, for tests. It knows neither products with an operand in registers
nor layouts: `Ops` does these few things in plain jax there. Everything else is the same code.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from opensora_jax.kernels import blocks as block_table
from opensora_jax.kernels import spec
from opensora_jax.kernels.pallas_gpu import LOG2E
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.visible import visible_first
from opensora_jax.kernels.xla import HIDDEN

GROUPS = 2  # warpgroups that compute
ROWS = 64  # that one of them holds: the height of a wgmma tile
HELD = GROUPS * ROWS
TILE = (8, 64)  # rows and columns: 128 bytes of half precision, as wgmma reads them
LOADER_REGISTERS, WORKER_REGISTERS = 40, 232  # of 3 x 168


class Blocks(NamedTuple):
    """Rows of a tile that streams past, and how many such tiles are on their way or in use."""

    rows: int
    stages: int


class Options(NamedTuple):
    """The static part of a call."""

    heads: int
    head_dim: int
    scale: float
    keys: int
    ragged: bool  # some of them are hidden
    blocks: tuple[tuple[str, Blocks], ...]  # instead of the table's, by pass
    interpret: Any  # False, or the interpreter's parameters

    def block(self, stage: str) -> Blocks:
        chosen = dict(self.blocks).get(stage)
        return chosen or Blocks(*block_table.find("mosaic_gpu", stage, self.head_dim, self.keys))


def supports(call: Call) -> None:
    if spec.chip() != "hopper":
        raise Unsupported("needs a Hopper GPU")
    if call.dtype not in ("bfloat16", "float16"):
        raise Unsupported(f"serves bfloat16 and float16, not {call.dtype}")
    if call.head_dim not in (64, 128):
        raise Unsupported(f"heads of {call.head_dim} are not whole tiles: 64 and 128 are served")
    if min(call.queries, call.keys) < HELD:
        raise Unsupported(f"fewer than {HELD} queries or keys do not fill a block")
    call.refuse("bias", "segment_ids", "causal")


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
    blocks=(),
    interpret=False,
):
    """`blocks` instead of the table's, by pass: (("forward", Blocks(...)), ...)."""
    batch, queries, heads, head_dim = q_btnh.shape
    keys = k_bsnh.shape[1]
    scale = head_dim**-0.5 if scale is None else float(scale)
    if scale < 0:
        raise Unsupported("mosaic_gpu: a negative scale would turn the largest score into the smallest")
    if kv_mask is not None:
        k_bsnh, v_bsnh, kv_lengths = visible_first(k_bsnh, v_bsnh, kv_mask, kv_lengths)
    ragged = kv_lengths is not None or keys % TILE[0] != 0
    lengths = jnp.full((batch,), keys, jnp.int32) if kv_lengths is None else jnp.clip(kv_lengths, 0, keys)
    options = Options(heads, head_dim, scale, keys, ragged, tuple(blocks), interpret)
    q, k, v = (_flat(x) for x in (q_btnh, k_bsnh, v_bsnh))
    out = _flash(q, k, v, lengths.astype(jnp.int32), options)
    return out[:, :queries].reshape(q_btnh.shape)


def _flat(x_blnh):
    """[B, L, N*H]; TMA wants whole tiles of 8 rows, so other lengths are copied to the next multiple."""
    x = x_blnh.reshape(*x_blnh.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE[0]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, lengths, options):
    return forward(q, k, v, lengths, options)[0]


def _flash_forward(q, k, v, lengths, options):
    out, lse = forward(q, k, v, lengths, options)
    return out, (q, k, v, lengths, out, lse)


def _flash_backward(options, residuals, d_out):
    q, k, v, lengths, out, lse = residuals
    batch, queries, channels = q.shape
    by_head = (batch, queries, options.heads, channels // options.heads)
    delta = jnp.einsum(
        "btnh,btnh->bnt", d_out.reshape(by_head), out.reshape(by_head), preferred_element_type=jnp.float32
    )
    # Rows beyond the last query, of which the last streamed tile has some, weigh nothing.
    lse = jnp.where(jnp.arange(lse.shape[-1]) < queries, lse, -HIDDEN)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[-1] - queries)))
    (d_q,) = backward_queries(q, k, v, d_out, lse, delta, lengths, options)
    d_k, d_v = backward_keys(q, k, v, d_out, lse, delta, lengths, options)
    return d_q, d_k, d_v, None


_flash.defvjp(_flash_forward, _flash_backward)


class Ops(NamedTuple):
    """Products, loads and constants of a warpgroup; on the device they carry the layout of wgmma's accumulators."""

    interpret: bool

    def full(self, shape, value):
        x = jnp.full(shape, value, jnp.float32)
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def iota(self, shape, axis):
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def vector(self, ref, axis):
        """Of fast memory, to lie along `axis` of scores."""
        return ref[...] if self.interpret else plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(1 - axis))

    def scores(self, *pairs, meanwhile=lambda: None):
        """[m, n] a b^T of each pair of tiles; `meanwhile` runs while the tensor cores do."""
        if self.interpret:
            meanwhile()
            return [_dot(a[...], b[...].T) for a, b in pairs]

        def issue(*sums):
            for total, (a, b) in zip(sums, pairs):
                plgpu.wgmma(total, a, plgpu.transpose_ref(b, (1, 0)))
            meanwhile()
            return [total[...] for total in sums]

        shapes = [plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in pairs]
        return pl.run_scoped(issue, *shapes)

    def accumulate(self, *terms):
        """sum + weights tile for each (sum, weights in registers, tile)."""
        if self.interpret:
            return [total + _dot(weights, tile[...]) for total, weights, tile in terms]

        def issue(refs):
            for ref, (_, weights, tile) in zip(refs, terms):
                plgpu.wgmma(ref, weights, tile)

        return pl.run_state(issue)([plgpu.ACC.init(total) for total, _, _ in terms])


def _dot(a, b):
    return lax.dot(a, b, preferred_element_type=jnp.float32)


def _along(axis, vector, like):
    return lax.broadcast_in_dim(vector, like.shape, [axis])


class Tiles(NamedTuple):
    """What a warpgroup works with."""

    ops: Ops
    row: Any  # the first that it holds
    length: Any  # keys that this sample shows
    held: list  # its tiles
    held_rows: list  # its rows of vectors
    streamed: Any  # slot → tiles
    streamed_rows: Any  # slot → rows of vectors
    wait: Any  # (operand, slot): until it is there
    release: Any  # (operand, slot): it may be overwritten
    take_turns: Any


def forward(q, k, v, lengths, options):
    """The output, and log2 of the sum of exponentials [B, N, L], L a multiple of HELD; +1e30 for a row without keys."""
    block, scale = options.block("forward"), options.scale * LOG2E

    def work(tiles):
        ops = tiles.ops

        def step(i, carry, edge):
            peak, total, out = carry
            slot = lax.rem(i, block.stages)
            k, v = tiles.streamed(slot)
            tiles.wait(0, slot)
            (scores,) = ops.scores((tiles.held[0], k), meanwhile=tiles.take_turns)
            tiles.release(0, slot)
            if edge:
                seen = ops.iota(scores.shape, 1) < tiles.length - i * block.rows
                scores = jnp.where(seen, scores, HIDDEN)
            higher = jnp.maximum(peak, scores.max(axis=1) * scale)
            fade = jnp.exp2(peak - higher)
            weights = jnp.exp2(scores * scale - _along(0, higher, scores))
            total = total * fade + weights.sum(axis=1)
            out = out * _along(0, fade, out)
            weights = weights.astype(q.dtype)
            # What follows the turn's end must not move before it, nor the softmax behind it.
            out, total, higher, weights = lax.optimization_barrier((out, total, higher, weights))
            tiles.take_turns()
            tiles.wait(1, slot)
            (out,) = ops.accumulate((out, weights, v))
            tiles.release(1, slot)
            return higher, total, out

        whole = lax.div(tiles.length, block.rows)
        start = (ops.full((ROWS,), HIDDEN * scale), ops.full((ROWS,), 0.0), ops.full((ROWS, options.head_dim), 0.0))
        group = lax.axis_index("group")
        pl.when(group == 1)(tiles.take_turns)
        carry = lax.fori_loop(0, whole, functools.partial(step, edge=False), start)
        steps = _ceil_div(tiles.length, block.rows)
        peak, total, out = lax.fori_loop(whole, steps, functools.partial(step, edge=True), carry)
        pl.when(group == 0)(tiles.take_turns)
        safe = jnp.where(total > 0, total, 1.0)
        lse = jnp.where(total > 0, peak + jnp.log(safe) * LOG2E, -HIDDEN)
        return [out / _along(0, safe, out)], [lse]

    return _run("forward", work, (q,), (), (k, v), (), lengths, options, lse=True)


def backward_queries(q, k, v, d_out, lse, delta, lengths, options):
    """[dq]."""
    block = options.block("dq")

    def work(tiles):
        ops, (q, d_out) = tiles.ops, tiles.held
        lse, delta = (ops.vector(x, 0) for x in tiles.held_rows)

        def step(i, carry, edge):
            slot = lax.rem(i, block.stages)
            k, v = tiles.streamed(slot)
            tiles.wait(0, slot)
            tiles.wait(1, slot)
            scores, d_weights = ops.scores((q, k), (d_out, v))
            tiles.release(1, slot)
            weights = jnp.exp2(scores * (options.scale * LOG2E) - _along(0, lse, scores))
            if edge:
                seen = ops.iota(scores.shape, 1) < tiles.length - i * block.rows
                weights = jnp.where(seen, weights, 0.0)
            slope = weights * (d_weights - _along(0, delta, scores))
            (carry,) = ops.accumulate((carry, slope.astype(q_dtype), k))
            tiles.release(0, slot)
            return carry

        whole, steps = lax.div(tiles.length, block.rows), _ceil_div(tiles.length, block.rows)
        d_q = lax.fori_loop(0, whole, functools.partial(step, edge=False), ops.full((ROWS, options.head_dim), 0.0))
        d_q = lax.fori_loop(whole, steps, functools.partial(step, edge=True), d_q)
        return [d_q * options.scale], []

    q_dtype = q.dtype
    return _run("dq", work, (q, d_out), (lse, delta), (k, v), (), lengths, options)


def backward_keys(q, k, v, d_out, lse, delta, lengths, options):
    """[dk, dv]."""
    block, dtype = options.block("dkv"), q.dtype

    def work(tiles):
        ops, (k, v) = tiles.ops, tiles.held

        def step(i, carry):
            d_k, d_v = carry
            slot = lax.rem(i, block.stages)
            q, d_out = tiles.streamed(slot)
            tiles.wait(0, slot)
            tiles.wait(1, slot)
            lse, delta = (ops.vector(x, 1) for x in tiles.streamed_rows(slot))
            scores, d_weights = ops.scores((k, q), (v, d_out))
            weights = jnp.exp2(scores * (options.scale * LOG2E) - _along(1, lse, scores))
            if options.ragged:
                weights = jnp.where(ops.iota(scores.shape, 0) < tiles.length - tiles.row, weights, 0.0)
            slope = weights * (d_weights - _along(1, delta, scores))
            d_v, d_k = ops.accumulate((d_v, weights.astype(dtype), d_out), (d_k, slope.astype(dtype), q))
            tiles.release(0, slot)
            tiles.release(1, slot)
            return d_k, d_v

        steps = _ceil_div(q.shape[1], block.rows)
        zeros = ops.full((ROWS, options.head_dim), 0.0)
        d_k, d_v = lax.fori_loop(0, steps, step, (zeros, zeros))
        return [d_k * options.scale, d_v], []

    return _run("dkv", work, (k, v), (), (q, d_out), (lse, delta), lengths, options)


def _ceil_div(a, b):
    return -(-a // b) if isinstance(a, int) else lax.div(a + (b - 1), b)


def _run(stage, work, held, held_rows, streamed, streamed_rows, lengths, options, lse=False):
    """One pass. `work(tiles)` gives the results [ROWS, head_dim] (at most one for each held operand) of the rows that a
    warpgroup holds, and vectors of those rows. Vectors are [B, N, L]; each streamed operand has its own."""
    block = options.block(stage)
    batch, count, _ = held[0].shape
    ops, dtype = Ops(bool(options.interpret)), held[0].dtype
    results = len(held) if stage == "dkv" else 1

    def body(*refs):
        operands, outputs, scratch = refs[: len(arrays)], refs[len(arrays) : -1], refs[-1]
        held_ref, held_rows_ref, streamed_ref, streamed_rows_ref, (lengths_ref,) = _split(operands, groups)
        spaces, row_spaces, stream, row_stream, vectors, barriers = scratch
        here, there, free, turn = barriers
        sample, head, index = (lax.axis_index(name) for name in ("batch", "heads", "rows"))
        group, length = lax.axis_index("group"), lengths_ref[sample]
        rows_of = lambda ref, row, rows: ref.at[
            sample, pl.ds(row, rows), pl.ds(head * options.head_dim, options.head_dim)
        ]
        steps = _ceil_div(streamed[0].shape[1] if stage == "dkv" else length, block.rows)

        @pl.when(group == GROUPS)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            @pl.loop(0, steps)
            def _(i):
                slot, row = lax.rem(i, block.stages), i * block.rows
                for n, ref in enumerate(streamed_ref):
                    pl.when(i >= block.stages)(lambda n=n: plgpu.barrier_wait(free[n].at[slot]))
                    plgpu.copy_gmem_to_smem(rows_of(ref, row, block.rows), stream[n].at[slot], there[n].at[slot])
                    if streamed_rows_ref:
                        source = streamed_rows_ref[n].at[sample, head, pl.ds(row, block.rows)]
                        plgpu.copy_gmem_to_smem(source, row_stream[n].at[slot], there[n].at[slot])

            @pl.loop(lax.max(steps - block.stages, 0), steps)
            def _(i):  # a block ends when its barriers are at rest
                for barrier in free:
                    plgpu.barrier_wait(barrier.at[lax.rem(i, block.stages)])

        @pl.when(group < GROUPS)
        def _work():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            row = lax.min(index * HELD, count - HELD) + group * ROWS
            mine = [space.at[group] for space in spaces]
            for ref, tile in zip(held_ref, mine):
                plgpu.copy_gmem_to_smem(rows_of(ref, row, ROWS), tile, here.at[group])
            for ref, space in zip(held_rows_ref, row_spaces):
                plgpu.copy_gmem_to_smem(ref.at[sample, head, pl.ds(row, ROWS)], space.at[group], here.at[group])
            plgpu.barrier_wait(here.at[group])

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            tiles = Tiles(
                ops, row, length, mine, [x.at[group] for x in row_spaces],
                lambda slot: [x.at[slot] for x in stream],
                lambda slot: [x.at[slot] for x in row_stream],
                lambda n, slot: plgpu.barrier_wait(there[n].at[slot]),
                lambda n, slot: plgpu.barrier_arrive(free[n].at[slot]),
                take_turns,
            )  # fmt: skip
            tiles_out, vectors_out = work(tiles)
            for space, x in zip(mine, tiles_out):
                space[...] = x.astype(dtype)
            for space, x in zip(vectors, vectors_out):
                space.at[group][...] = x
            plgpu.commit_smem()
            for space, ref in zip(mine, outputs[:results]):
                plgpu.copy_smem_to_gmem(space, rows_of(ref, row, ROWS))
            for space, ref in zip(vectors, outputs[results:]):
                plgpu.copy_smem_to_gmem(space.at[group], ref.at[sample, head, pl.ds(row, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    groups = (held, held_rows, streamed, streamed_rows, (lengths,))
    arrays = [x for group in groups for x in group]
    swizzled = (plgpu.TilingTransform(TILE), plgpu.SwizzleTransform(128))
    tile_space = lambda *rows: plgpu.SMEM((*rows, options.head_dim), dtype, transforms=swizzled)
    vector = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    padded = pl.cdiv(count, HELD) * HELD
    out_type = [jax.ShapeDtypeStruct(held[0].shape, dtype)] * results
    out_type += [jax.ShapeDtypeStruct((batch, options.heads, padded), jnp.float32)] if lse else []
    scratch = (
        [tile_space(GROUPS, ROWS) for _ in held],
        [vector(GROUPS, ROWS) for _ in held_rows],
        [tile_space(block.stages, block.rows) for _ in streamed],
        [vector(block.stages, block.rows) for _ in streamed_rows],
        [vector(GROUPS, ROWS)] if lse else [],
        (
            plgpu.Barrier(num_arrivals=len(held) + len(held_rows), num_barriers=GROUPS),
            [plgpu.Barrier(num_arrivals=1 + bool(streamed_rows), num_barriers=block.stages) for _ in streamed],
            [plgpu.Barrier(num_arrivals=GROUPS, num_barriers=block.stages) for _ in streamed],
            plgpu.Barrier(num_arrivals=GROUPS),
        ),
    )

    def entry(*refs):
        pl.run_scoped(lambda scratch: body(*refs, scratch), scratch, collective_axes="group")

    return plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(options.heads, padded // HELD, batch),
        grid_names=("heads", "rows", "batch"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"mosaic_{stage}",
        interpret=options.interpret,
    )(*arrays)


def _split(refs, groups):
    out = []
    for group in groups:
        out.append(refs[: len(group)])
        refs = refs[len(group) :]
    return out
