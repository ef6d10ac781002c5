"""Video DC-AE: hpcai-tech/Open-Sora-v2-Video-DC-AE (F32T4C128_AE.safetensors), MIT's own image checkpoints, and diffusers'
AutoencoderDC, which splits and renames them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from opensora_jax.common.errors import UserError
from opensora_jax.weights.engine import Rule, Shape, conv, count_layers, norm, within
from opensora_jax.weights.layouts import POINTWISE, Join, joins

BLOCK = [  # what stages are made of
    *conv("main.{part:conv1|conv2}.conv", "main/{part}/conv"),
    *norm("main.conv2.norm", "main/conv2/norm"),
    *conv("context_module.main.{part:qkv|proj}.conv", "context_module/main/{part}/conv"),
    *norm("context_module.main.proj.norm", "context_module/main/proj/norm"),
    *conv("context_module.main.aggreg.{i}.{j}", "context_module/main/aggreg/{i}/{j}"),
    *conv("local_module.main.{part:inverted_conv|depth_conv|point_conv}.conv", "local_module/main/{part}/conv"),
    *norm("local_module.main.point_conv.norm", "local_module/main/point_conv/norm"),
]
HALF = "{half:encoder|decoder}."
RULES: list[Rule] = [
    *within(HALF + "stages.{s}.op_list.{k}.", "{half}/stages/{s}/{k}/", BLOCK),
    *conv(HALF + "project_out.op_list.{k}.conv", "{half}/project_out/layers/{k}/conv"),
    *conv(HALF + "project_out.op_list.{k}.conv.conv", "{half}/project_out/layers/{k}/conv/conv"),
    *conv("encoder.project_out.main.op_list.{k}.conv", "encoder/project_out/main/layers/{k}/conv"),
    *norm("decoder.project_out.op_list.{k}", "decoder/project_out/layers/{k}"),
]
for place, ours in (
    (HALF + "stages.{s}.op_list.{k}", "{half}/stages/{s}/{k}"),
    (HALF + "project_in", "{half}/project_in"),
):
    for residual in (".main", ""):  # with a shortcut around it, or without
        for nested in ("", ".conv"):  # a bare convolution, or one inside an interpolation or a pixel shuffle
            RULES += conv(f"{place}{residual}{nested}.conv", f"{ours}{residual}{nested}/conv".replace(".", "/"))

IN_A_BLOCK = {  # diffusers' name → MIT's, of weight and bias
    "conv1": "main.conv1.conv", "conv2": "main.conv2.conv", "norm": "main.conv2.norm",
    "attn.norm_out": "context_module.main.proj.norm",
    "attn.to_qkv_multiscale.{i}.proj_in": "context_module.main.aggreg.{i}.0",
    "attn.to_qkv_multiscale.{i}.proj_out": "context_module.main.aggreg.{i}.1",
    "conv_out.conv_inverted": "local_module.main.inverted_conv.conv",
    "conv_out.conv_depth": "local_module.main.depth_conv.conv",
    "conv_out.conv_point": "local_module.main.point_conv.conv", "conv_out.norm": "local_module.main.point_conv.norm",
}  # fmt: skip


def of_diffusers(shapes) -> bool:
    return any(re.match(r"encoder\.down_blocks\.\d+\.\d+\.", name) for name in shapes)


def layout(shapes, config: dict) -> list[Join]:
    if not of_diffusers(shapes):
        return []
    if "downsample_block_type" not in config:
        raise UserError("dc_ae: diffusers' layout needs the config.json beside the weights")
    down = "conv.conv" if config["downsample_block_type"] == "pixel_unshuffle" else "conv"
    shortcut = lambda key: "main." if config.get(key, True) else ""
    table = [
        *joins("encoder.project_in.conv", "encoder.conv_in"),
        *joins(f"encoder.project_in.{down}", "encoder.conv_in.conv"),  # without a first stage
        *joins(f"encoder.project_out.{shortcut('encoder_out_shortcut')}op_list.0.conv", "encoder.conv_out"),
        *joins(f"decoder.project_in.{shortcut('decoder_in_shortcut')}conv", "decoder.conv_in"),
        *joins("decoder.project_out.op_list.0", "decoder.norm_out"),
        *joins("decoder.project_out.op_list.2.conv", "decoder.conv_out"),
        *joins("decoder.project_out.op_list.2.conv.conv", "decoder.conv_out.conv"),
    ]
    for half, blocks, change in (("encoder", "down_blocks", down), ("decoder", "up_blocks", "conv.conv")):
        ours, theirs = f"{half}.stages.{{s}}.op_list.{{k}}.", f"{half}.{blocks}.{{s}}.{{k}}."
        table += joins(f"{ours}main.{change}", f"{theirs}conv")
        for source, target in IN_A_BLOCK.items():
            table += joins(ours + target, theirs + source)
        attention = f"{ours}context_module.main"
        qkv = tuple(f"{theirs}attn.to_{part}.weight" for part in "qkv")
        table.append(Join(f"{attention}.qkv.conv.weight", qkv, POINTWISE))
        table.append(Join(f"{attention}.proj.conv.weight", (f"{theirs}attn.to_out.weight",), POINTWISE))
    return table


def said_by_diffusers(config: dict) -> dict:
    """AutoencoderDC's config.json in the form of MIT's."""
    if config.get("attention_head_dim", 32) != 32:
        raise UserError(f"dc_ae: attention_head_dim={config['attention_head_dim']} is not served; heads are 32 wide")
    listed = lambda value: value if isinstance(value, str) else tuple(value)
    norms = config.get("decoder_norm_types", "rms_norm")
    renamed = lambda name: {"rms_norm": "rms2d"}.get(name, name)
    kinds = {"pixel_unshuffle": "ConvPixelUnshuffle", "pixel_shuffle": "ConvPixelShuffle"}
    encoder = {"downsample_block_type": kinds.get(config["downsample_block_type"], "Conv")}
    decoder = {
        "upsample_block_type": kinds.get(config.get("upsample_block_type", "pixel_shuffle"), "InterpolateConv"),
        "norm": renamed(norms) if isinstance(norms, str) else tuple(map(renamed, norms)),
        "act": listed(config.get("decoder_act_fns", "silu")),
        "out_act": config.get("decoder_conv_act_fn", "relu"),
    }
    if not config.get("encoder_out_shortcut", True):
        encoder["out_shortcut"] = None
    if not config.get("decoder_in_shortcut", True):
        decoder["in_shortcut"] = None
    scale = config.get("scaling_factor") or 1.0  # diffusers multiplies latents by it, MIT divides
    return {"encoder": encoder, "decoder": decoder} | ({"scaling_factor": 1 / scale} if scale != 1 else {})


def recognise(shapes, config: dict) -> bool:
    return of_diffusers(shapes) or (
        any(name.startswith("encoder.stages.0.op_list.") for name in shapes)
        and any(name.startswith("decoder.project_in.") for name in shapes)
    )


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.dc_ae.Config: sizes and kinds of blocks from shapes; what is not in them (where time is halved,
    scale, tiles) from a config in the reference's form or diffusers', or else as released."""
    if "encoder_block_types" in config:
        config = said_by_diffusers(config)
    halves = {name: HalfOf(shapes, name, config.get(name) or {}) for name in ("encoder", "decoder")}
    first = shapes[next(name for name in shapes if name.startswith("encoder.project_in.") and name.endswith(".weight"))]
    last = next(name for name in shapes if name.startswith("decoder.project_in.") and name.endswith(".weight"))
    found = dict(
        in_channels=first[1],
        latent_channels=shapes[last][1],
        encoder=halves["encoder"].fields(),
        decoder=halves["decoder"].fields(),
        is_video=len(first) == 5,
        double_latent=bool((config.get("encoder") or {}).get("double_latent")),
        spatial_compression_ratio=2 ** (len(halves["encoder"].stages) - 1),
    )
    if not found["is_video"]:
        found["time_compression_ratio"] = 1
    spoken = (
        "time_compression_ratio", "spatial_compression_ratio", "scaling_factor", "use_spatial_tiling",
        "use_temporal_tiling", "spatial_tile_size", "temporal_tile_size", "tile_overlap_factor",
    )  # fmt: skip
    return found | {key: config[key] for key in spoken if config.get(key) is not None}


@dataclass
class HalfOf:
    """What names and shapes tell of the encoder or the decoder."""

    shapes: Mapping[str, Shape]
    name: str
    config: dict

    @property
    def stages(self) -> list[list[str]]:
        """The kind of each block, by stage."""
        found: list[list[str]] = []
        count = count_layers(self.shapes, f"{self.name}.stages")
        for stage in range(len(self.config.get("width_list") or ()) or count):
            found.append([])
            while kind := self._kind(f"{self.name}.stages.{stage}.op_list.{len(found[-1]) + self._skip(stage)}."):
                found[-1].append(kind)
        return found

    def _skip(self, stage: int) -> int:
        """In the decoder the layer that changes the size comes first."""
        return int(self._kind(f"{self.name}.stages.{stage}.op_list.0.") is None)

    def _kind(self, prefix: str) -> str | None:
        if prefix + "main.conv1.conv.weight" in self.shapes:
            return "ResBlock"
        if prefix + "context_module.main.qkv.conv.weight" in self.shapes:
            several = prefix + "context_module.main.aggreg.0.0.weight" in self.shapes
            return "EViTS5_GLU" if several else "EViT_GLU"
        return None

    def _width(self, stage: int) -> int:
        prefix = f"{self.name}.stages.{stage}.op_list.{self._skip(stage)}."
        for tail in ("main.conv1.conv.weight", "context_module.main.qkv.conv.weight"):
            if prefix + tail in self.shapes:
                return self.shapes[prefix + tail][1]
        return self.config["width_list"][stage]

    def fields(self) -> dict:
        stages, config = self.stages, self.config
        encoder = self.name == "encoder"
        count = len(stages)
        video = len(self.shapes[next(key for key in self.shapes if key.endswith("conv1.conv.weight"))]) == 5
        default_norm = "rms3d" if video else "rms2d"
        temporal = tuple(video and count - 3 <= i < count - 1 for i in range(count))  # as released
        listed = lambda value: tuple(value) if isinstance(value, list) else value
        said = lambda key, default: listed(config[key]) if key in config else default
        kind = "downsample" if encoder else "upsample"
        outer = "out_shortcut" if encoder else "in_shortcut"
        return dict(
            width_list=tuple(self._width(i) for i in range(count)),
            depth_list=tuple(len(blocks) for blocks in stages),
            block_type=tuple(blocks[0] if len(set(blocks)) == 1 else tuple(blocks) or "ResBlock" for blocks in stages),
            norm=said("norm", default_norm),
            act=said("act", "silu"),
            pixel_shuffle="Pixel" in said(f"{kind}_block_type", ""),
            match_channel=said(f"{kind}_match_channel", True),
            shortcut=said(f"{kind}_shortcut", True) is not None,
            latent_shortcut=said(outer, True) is not None,
            out_norm=said("out_norm", None if encoder else default_norm),
            out_act=said("out_act", None if encoder else "relu"),
            temporal=said(f"temporal_{kind}", temporal),
        )
