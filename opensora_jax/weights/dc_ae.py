"""Video DC-AE: hpcai-tech/Open-Sora-v2-Video-DC-AE (F32T4C128_AE.safetensors) and MIT's own image checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass

from opensora_jax.weights.engine import Rule, Shape, conv, norm, within

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


def recognise(shapes, config: dict) -> bool:
    return any(name.startswith("encoder.stages.0.op_list.") for name in shapes) and any(
        name.startswith("decoder.project_in.") for name in shapes
    )


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.dc_ae.Config: sizes and kinds of blocks from shapes; what is not in them (where time is halved,
    scale, tiles) from a config in the reference's form, or else as released."""
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
        count = 1 + max(int(key.split(".")[2]) for key in self.shapes if key.startswith(f"{self.name}.stages."))
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
