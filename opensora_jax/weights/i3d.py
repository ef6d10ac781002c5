"""I3D of the FVD metric: i3d_pretrained_400.pt (piergiaj/pytorch-i3d's names)."""

from opensora_jax.weights.engine import Rule, conv, copy, drop, norm


def _unit(source: str, ours: str) -> list[Rule]:
    return [
        *conv(f"{source}.conv3d", f"{ours}/conv3d"),
        *norm(f"{source}.bn", f"{ours}/bn"),
        copy(f"{source}.bn.running_mean", f"{ours}/bn/mean"),
        copy(f"{source}.bn.running_var", f"{ours}/bn/var"),
        drop(f"{source}.bn.num_batches_tracked"),
    ]


RULES: list[Rule] = [
    *_unit("{stage:Conv3d_1a_7x7|Conv3d_2b_1x1|Conv3d_2c_3x3}", "{stage}"),
    *_unit("{stage:Mixed_[345][b-f]}.{branch:b0|b1a|b1b|b2a|b2b|b3b}", "{stage}/{branch}"),
    *conv("logits.conv3d", "logits"),
]


def recognise(shapes, config: dict) -> bool:
    return "Conv3d_1a_7x7.conv3d.weight" in shapes and "logits.conv3d.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    return {
        "num_classes": shapes["logits.conv3d.weight"][0],
        "in_channels": shapes["Conv3d_1a_7x7.conv3d.weight"][1],
    }
