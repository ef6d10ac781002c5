"""MMDiT of Open-Sora 2.0 (hpcai-tech/Open-Sora-v2, one safetensors file) and of FLUX.1 (flux1-dev.safetensors, or
diffusers' transformer/ folder, whose tensors are joined to FLUX.1's own)."""

from math import isqrt

from opensora_jax.common.errors import UserError
from opensora_jax.weights.engine import Rule, copy, count_layers, linear
from opensora_jax.weights.layouts import SWAPPED, Join, joins, two_layers

DOUBLE, OUR_DOUBLE = "double_blocks.{layer}.{stream:img|txt}_", "double_blocks/{stream}/"
SINGLE, OUR_SINGLE = "single_blocks.{layer}.", "single_blocks/"

RULES: list[Rule] = [
    *linear("{part:img|txt|cond}_in", "{part}_in"),
    *linear("{part:time|guidance|vector}_in.in_layer", "{part}_in/fc1"),
    *linear("{part:time|guidance|vector}_in.out_layer", "{part}_in/fc2"),
    *linear(DOUBLE + "mod.lin", OUR_DOUBLE + "mod"),
    *linear(DOUBLE + "attn.{part:qkv|q_proj|k_proj|v_proj|proj}", OUR_DOUBLE + "attn/{part}"),
    copy(DOUBLE + "attn.norm.{part:query|key}_norm.scale", OUR_DOUBLE + "attn/{part}_norm/scale"),
    *linear(DOUBLE + "mlp.0", OUR_DOUBLE + "mlp/fc1"),
    *linear(DOUBLE + "mlp.2", OUR_DOUBLE + "mlp/fc2"),
    *linear(SINGLE + "{part:linear1|q_proj|k_proj|v_mlp|linear2}", OUR_SINGLE + "{part}"),
    copy(SINGLE + "norm.{part:query|key}_norm.scale", OUR_SINGLE + "{part}_norm/scale"),
    *linear(SINGLE + "modulation.lin", OUR_SINGLE + "modulation"),
    *linear("final_layer.linear", "final_layer/linear"),
    *linear("final_layer.adaLN_modulation.1", "final_layer/adaln"),
]

_BLOCK, _OURS = "transformer_blocks.{n}.", "double_blocks.{n}."
_SINGLE, _OUR_SINGLE = "single_transformer_blocks.{n}.", "single_blocks.{n}."
JOINS: list[Join] = [  # diffusers' FluxTransformer2DModel
    *joins("img_in", "x_embedder"),
    *joins("txt_in", "context_embedder"),
    *joins("final_layer.linear", "proj_out"),
    *joins("final_layer.adaLN_modulation.1", "norm_out.linear", merge=SWAPPED),  # scale before shift
    *joins(_OUR_SINGLE + "modulation.lin", _SINGLE + "norm.linear"),
    *joins(
        _OUR_SINGLE + "linear1", *(f"{_SINGLE}{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    ),
    *joins(_OUR_SINGLE + "linear2", _SINGLE + "proj_out"),
]
for _theirs, _part in (
    ("timestep_embedder", "time_in"),
    ("guidance_embedder", "guidance_in"),
    ("text_embedder", "vector_in"),
):
    JOINS += two_layers(_part, f"time_text_embed.{_theirs}", "in_layer", "out_layer")
for _stream, _norm, _qkv, _out, _mlp, _qk in (
    ("img", "norm1", "to_{}", "to_out.0", "ff", "norm_{}"),
    ("txt", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "norm_added_{}"),
):
    JOINS += joins(f"{_OURS}{_stream}_mod.lin", f"{_BLOCK}{_norm}.linear")
    JOINS += joins(f"{_OURS}{_stream}_attn.qkv", *(f"{_BLOCK}attn.{_qkv.format(part)}" for part in "qkv"))
    JOINS += joins(f"{_OURS}{_stream}_attn.proj", f"{_BLOCK}attn.{_out}")
    JOINS += joins(f"{_OURS}{_stream}_mlp.0", f"{_BLOCK}{_mlp}.net.0.proj")
    JOINS += joins(f"{_OURS}{_stream}_mlp.2", f"{_BLOCK}{_mlp}.net.2")
    for _which in ("query", "key"):
        _scale = f"attn.{_qk.format(_which[0])}.weight"
        JOINS.append(Join(f"{_OURS}{_stream}_attn.norm.{_which}_norm.scale", (_BLOCK + _scale,)))
        if _stream == "img":
            JOINS.append(Join(f"{_OUR_SINGLE}norm.{_which}_norm.scale", (_SINGLE + _scale,)))

AXES = {128: (16, 56, 56)}  # the released head; others must say


def recognise(shapes, config: dict) -> bool:
    return "double_blocks.0.img_mod.lin.weight" in shapes or "single_transformer_blocks.0.proj_mlp.weight" in shapes


def layout(shapes, config: dict) -> list[Join]:
    return JOINS


def config_from(shapes, config: dict) -> dict:
    """Arguments of models.mmdit.Config. Weights do not tell the rotary layout: released files with fused qkv are
    FLUX.1's own (pairs), those without are rearranged for Open-Sora 2.0 (halves)."""
    hidden, channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    fused = "double_blocks.0.img_attn.qkv.weight" in shapes
    axes = config.get("axes_dim") or config.get("axes_dims_rope") or AXES.get(head)
    if axes is None:
        raise UserError(f"mmdit: heads of {head} channels; the config must give axes_dim, three numbers with that sum")
    found = dict(
        in_channels=channels,
        vec_in_dim=shapes["vector_in.in_layer.weight"][1],
        context_in_dim=shapes["txt_in.weight"][1],
        hidden_size=hidden,
        mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        num_heads=hidden // head,
        depth=count_layers(shapes, "double_blocks"),
        depth_single_blocks=count_layers(shapes, "single_blocks"),
        axes_dim=tuple(axes),
        theta=config.get("theta", 10000.0),
        qkv_bias=f"double_blocks.0.img_attn.{'qkv' if fused else 'q_proj'}.bias" in shapes,
        guidance_embed="guidance_in.in_layer.weight" in shapes,
        cond_embed="cond_in.weight" in shapes,
        fused_qkv=fused,
        rope="halves" if config.get("use_liger_rope", not fused) else "pairs",
        patch_size=2 if "axes_dims_rope" in config else config.get("patch_size", 2),  # diffusers packs outside
    )
    if found["cond_embed"]:
        found["patch_size"] = isqrt(shapes["cond_in.weight"][1] - channels)
    return found
