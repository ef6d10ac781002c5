"""Backward kernels of modulated_tpu.py: from the gradient of what a product gave to that of its stream, in one pass.

Each reads the stream and the incoming gradient once, multiplies by the transposed weights and goes back through the
norm, the activation or the gate. Nothing of the forward pass is kept but its inputs: what else is needed is computed again
here, in fast memory. Weights' gradients are products of two large arrays, which XLA does well; their operands leave the
kernels as they lie there. Gradients of vectors and biases are sums over the positions of a frame, taken on the way.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import modulated_tpu as forward
from opensora_jax.kernels import spec
from opensora_jax.kernels.modulated_tpu import COLUMNS, each_slice
from opensora_jax.kernels.tpu_lanes import ROWS_BY_ROWS, dot

SLICES = 3  # of columns, in one turn of the loop over hidden activations


def linear(x, shift, scale, kernel, bias, d_y, d_x, *, eps, interpret=None):
    """Gradients of x, shift, scale, kernel and bias; d_x: what else flows into x, added on the way."""
    run = functools.partial(_linear_kernel, eps=eps, normalised=scale is not None, shifted=shift is not None)
    channels, width = kernel.shape
    given = {"shift": shift, "scale": scale}
    sums = {"bias": width} | {name: channels for name, vector in given.items() if vector is not None}
    kept = {} if scale is None else {"h": channels}
    streams = {"d_y": d_y, "d_x": d_x} | ({} if scale is None else {"x": x})
    out = _call(
        "linear", run, streams, (shift, scale), {"kernel": kernel},
        {"x": channels} | kept, sums, (channels,), interpret,
    )  # fmt: skip
    h = out.get("h", x if shift is None else x + shift.astype(x.dtype))
    d_kernel, d_bias = _weights(h, d_y, kernel), _total(out["sum_bias"], bias)
    return out["x"], _total_like(out, "shift", shift), _total_like(out, "scale", scale), d_kernel, d_bias


def project(x, a, gate, kernel, bias, d_y, *, interpret=None):
    """Gradients of x, a, gate, kernel and bias."""
    gated, channels = gate is not None, x.shape[-1]
    run = functools.partial(_project_kernel, gated=gated)
    out = _call(
        "project", run, {"a": a, "d_y": d_y}, (gate,), {"kernel": kernel},
        {"a": a.shape[-1]} | ({"d_h": channels} if gated else {}),
        {"d_y": channels} | ({"gate": channels} if gated else {}), (), interpret,
    )  # fmt: skip
    d_gate, d_bias = _gate_and_bias(out, gate, bias)
    return d_y, out["a"], d_gate, _weights(a, out.get("d_h", d_y), kernel), d_bias


def mlp(x, shift, scale, gate, first, second, d_y, *, eps, interpret=None):
    """Gradients of x, shift, scale, gate and of (kernel, bias) twice."""
    gated, channels, hidden = gate is not None, x.shape[-1], first[0].shape[1]
    run = functools.partial(_mlp_kernel, eps=eps, gated=gated)
    out = _call(
        "mlp", run, {"x": x, "d_y": d_y}, (shift, scale, gate),
        {"kernel1": first[0], "bias1": first[1], "kernel2": second[0]},
        {"x": channels, "h": channels, "hidden": hidden, "d_product": hidden} | ({"d_h": channels} if gated else {}),
        {"shift": channels, "scale": channels, "bias1": hidden, "d_y": channels} | ({"gate": channels} if gated else {}),
        (channels,), interpret,
    )  # fmt: skip
    d_gate, d_bias2 = _gate_and_bias(out, gate, second[1])
    d_first = (_weights(out["h"], out["d_product"], first[0]), _total(out["sum_bias1"], first[1]))
    d_second = (_weights(out["hidden"], out.get("d_h", d_y), second[0]), d_bias2)
    return out["x"], _total_like(out, "shift", shift), _total_like(out, "scale", scale), d_gate, d_first, d_second


def _weights(a, d, kernel):
    """a^T d over all rows."""
    return jnp.einsum("btsi,btso->io", a, d, preferred_element_type=kernel.dtype)


def _total(sums, bias):
    return sums.sum((0, 1, 2)).astype(bias.dtype)


def _total_like(out, name, vector):
    """Of sums by sample and frame to one for each that a vector has."""
    if vector is None:
        return None
    axes = [axis for axis in (0, 1) if vector.shape[axis] == 1]
    return out[f"sum_{name}"].sum(axes, keepdims=True).astype(vector.dtype)


def _gate_and_bias(out, gate, bias):
    """y = x + gate (p + bias): from the sums of d_y and of d_y p."""
    d_y = out["sum_d_y"]
    if gate is None:
        return None, _total(d_y, bias)
    d_gate = {"sum_gate": out["sum_gate"] + d_y * bias.astype(jnp.float32)}
    return _total_like(d_gate, "gate", gate), _total(gate.astype(jnp.float32) * d_y, bias)


def _call(name, kernel, streams, vectors, weights, outputs, sums, scratch, interpret):
    """kernel(streams, vectors, weights, outputs, sums, scratch), dictionaries of references but for the lists of vectors
    and scratch. outputs, sums: widths; scratch: of float32 for the rows of a block. Returns one dictionary."""
    streams = {key: a for key, a in streams.items() if a is not None}
    some = next(iter(streams.values()))
    batch, frames, positions, _ = some.shape
    block = forward.Block.of(frames, positions)
    vectors = [v.astype(jnp.float32) for v in vectors if v is not None]
    weights = {key: a.astype(jnp.float32)[None] if a.ndim == 1 else a for key, a in weights.items()}
    rows = lambda width: pl.BlockSpec((1, block.frames, block.positions, width), lambda b, i, j: (b, i, j, 0))
    by_frame = lambda width: pl.BlockSpec((1, block.frames, 1, width), lambda b, i, j: (b, i, 0, 0))
    whole = lambda a: pl.BlockSpec(a.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1))
    shape = lambda width: jax.ShapeDtypeStruct((batch, frames, positions, width), some.dtype)
    sum_shape = lambda width: jax.ShapeDtypeStruct((batch, frames, 1, width), jnp.float32)
    ragged = positions if positions % block.positions else 0
    found = pl.pallas_call(
        functools.partial(_with_sums, kernel, ragged),
        grid=(batch, -(-frames // block.frames), -(-positions // block.positions)),
        in_specs=[
            {key: rows(a.shape[-1]) for key, a in streams.items()},
            [forward.vector_spec(v, block) for v in vectors],
            {key: whole(a) for key, a in weights.items()},
        ],
        out_specs=[jax.tree.map(rows, outputs), jax.tree.map(by_frame, sums)],
        out_shape=[jax.tree.map(shape, outputs), jax.tree.map(sum_shape, sums)],
        scratch_shapes=[pltpu.VMEM((block.rows, width), jnp.float32) for width in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=forward.VMEM_LIMIT
        ),
        interpret=spec.platform() != "tpu" if interpret is None else interpret,
        name=f"modulated_{name}_backward",
    )(streams, vectors, weights)
    return found[0] | {f"sum_{key}": total for key, total in found[1].items()}


def _with_sums(kernel, ragged, streams, vectors, weights, outputs, sums, *scratch):
    """Sums begin at zero with the first positions of a frame; `ragged`: positions, where the last block has fewer."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in sums.values():
            ref[...] = jnp.zeros_like(ref)

    def read(name):
        """[frames, positions, width], zeros beyond the edge."""
        x = streams[name][0]
        if not ragged:
            return x
        position = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + pl.program_id(2) * x.shape[1]
        return jnp.where(position < ragged, x, jnp.zeros_like(x))

    kernel({name: functools.partial(read, name) for name in streams}, vectors, weights, outputs, sums, *scratch)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _add_up(sums, name, at, x):
    """Over positions; x [frames, positions, columns] float32."""
    sums[name][0, :, :, at] += x.sum(1, keepdims=True)


def _linear_kernel(streams, vectors, weights, outputs, sums, d_h_ref, *, eps, normalised, shifted):
    frames, positions, _ = outputs["x"].shape[1:]
    d_y = streams["d_y"]()
    flat = _flat(d_y)
    normed = _Norm.of(streams["x"](), vectors[1], eps=eps) if normalised else None
    if normed is not None:
        outputs["h"][0] = normed.modulated(vectors[0]).astype(outputs["h"].dtype)

    def columns(at):
        d_h = dot(flat, weights["kernel"][at, :], ROWS_BY_ROWS)
        d_h_ref[:, at] = d_h
        if shifted:
            _add_up(sums, "shift", at, d_h.reshape(frames, positions, -1))

    each_slice(weights["kernel"].shape[0], columns)
    each_slice(d_y.shape[-1], lambda at: _add_up(sums, "bias", at, d_y[:, :, at].astype(jnp.float32)))
    d_h = d_h_ref[...].reshape(frames, positions, -1)
    if normed is not None:
        sums["scale"][0] += (d_h * normed.x).sum(1, keepdims=True)
        d_h = normed.backward(d_h)
    if "d_x" in streams:
        d_h = d_h + streams["d_x"]().astype(jnp.float32)
    outputs["x"][0] = d_h.astype(outputs["x"].dtype)


def _project_kernel(streams, vectors, weights, outputs, sums, *, gated):
    frames, positions, _ = outputs["a"].shape[1:]
    d_y = streams["d_y"]()
    a, d_h = _flat(streams["a"]()), _gated(d_y, vectors, outputs) if gated else _flat(d_y)

    def columns(at):
        d = d_y[:, :, at].astype(jnp.float32)
        _add_up(sums, "d_y", at, d)
        if gated:
            product = dot(a, weights["kernel"][:, at]).reshape(frames, positions, -1)
            _add_up(sums, "gate", at, d * product)

    def rows(at):
        outputs["a"][0, :, :, at] = (
            dot(d_h, weights["kernel"][at, :], ROWS_BY_ROWS).astype(a.dtype).reshape(frames, positions, -1)
        )

    each_slice(weights["kernel"].shape[1], columns)
    each_slice(weights["kernel"].shape[0], rows)


def _mlp_kernel(streams, vectors, weights, outputs, sums, d_h_ref, *, eps, gated):
    frames, positions, _ = outputs["x"].shape[1:]
    shift, scale, *gate = vectors
    d_y = streams["d_y"]()
    normed = _Norm.of(streams["x"](), scale, eps=eps)
    h = normed.modulated(shift).astype(d_y.dtype)
    outputs["h"][0] = h
    h, d_out = _flat(h), _gated(d_y, gate, outputs) if gated else _flat(d_y)

    def hidden(at):
        product = dot(h, weights["kernel1"][:, at]) + weights["bias1"][:, at]
        value, slope = _gelu(product)
        outputs["hidden"][0, :, :, at] = value.astype(h.dtype).reshape(frames, positions, -1)
        d_product = dot(d_out, weights["kernel2"][at, :], ROWS_BY_ROWS) * slope
        d_product = d_product.reshape(frames, positions, -1)
        _add_up(sums, "bias1", at, d_product)
        outputs["d_product"][0, :, :, at] = d_product.astype(h.dtype)

    def columns(at):
        d = d_y[:, :, at].astype(jnp.float32)
        _add_up(sums, "d_y", at, d)
        if gated:
            product = dot(_flat(outputs["hidden"][0]), weights["kernel2"][:, at])
            _add_up(sums, "gate", at, d * product.reshape(frames, positions, -1))
        d_h = dot(_flat(outputs["d_product"][0]), weights["kernel1"][at, :], ROWS_BY_ROWS)
        d_h_ref[:, at] = d_h
        _add_up(sums, "shift", at, d_h.reshape(frames, positions, -1))

    each_turn(weights["kernel1"].shape[1], hidden)
    each_slice(weights["kernel2"].shape[1], columns)
    d_h = d_h_ref[...].reshape(frames, positions, -1)
    sums["scale"][0] += (d_h * normed.x).sum(1, keepdims=True)
    outputs["x"][0] = (normed.backward(d_h) + d_y.astype(jnp.float32)).astype(outputs["x"].dtype)


def each_turn(width: int, body) -> None:
    """each_slice, some slices a turn of a loop where they are many: 5% slower than all in a row, and compiled in half the
    time (v5p, v6e; libtpu 0.0.51)."""
    turn = SLICES * COLUMNS
    if width % turn or width == turn:
        return each_slice(width, body)

    def some(i, _):
        for slot in range(SLICES):
            body(pl.ds(pl.multiple_of(i * turn + slot * COLUMNS, COLUMNS), COLUMNS))

    jax.lax.fori_loop(0, width // turn, some, None)


def _gated(d_y, gate, outputs):
    """The gradient behind the gate [rows, C], which also leaves the kernel."""
    d_h = (d_y.astype(jnp.float32) * gate[0][0]).astype(d_y.dtype)
    outputs["d_h"][0] = d_h
    return _flat(d_h)


class _Norm:
    """x: of mean 0 and variance 1, float32 [frames, positions, C]; factor: 1 + scale; inverse: of the deviation."""

    def __init__(self, x, inverse, factor):
        self.x, self.inverse, self.factor = x, inverse, factor

    @classmethod
    def of(cls, x, scale, *, eps) -> "_Norm":
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
        return cls(x * inverse, inverse, 1 + scale[0])

    def modulated(self, shift):
        return self.x * self.factor + shift[0]

    def backward(self, d):
        d = d * self.factor
        along = (d * self.x).mean(-1, keepdims=True)
        return (d - d.mean(-1, keepdims=True) - self.x * along) * self.inverse


def _gelu(x):
    """The tanh form and its derivative."""
    root = (2 / jnp.pi) ** 0.5
    square = x * x
    tanh = jnp.tanh(x * (root + root * 0.044715 * square))
    half = 0.5 * (1 + tanh)
    slope = half + x * (0.5 - 0.5 * tanh * tanh) * (root + 3 * root * 0.044715 * square)
    return x * half, slope
