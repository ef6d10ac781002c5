"""PatchGAN discriminators: `main.N.*`, alone or as `discriminator.*` of a loss."""

from opensora_jax.weights.engine import Rule, conv, copy, drop, norm, reshape

MOST = 30  # layers, of every kind
CONVS = "{i:" + "|".join(map(str, [0, *range(2, MOST, 3)])) + "}"
NORMS = "{i:" + "|".join(map(str, range(3, MOST, 3))) + "}"


def _per_channel(rank: int):
    """[1, C, 1, 1] ↔ [C]."""
    return reshape("per_channel", lambda a: a.reshape(-1), lambda a: a.reshape(1, -1, *[1] * rank))


RULES: list[Rule] = [
    *conv(f"main.{CONVS}", "main/{i}"),
    *norm(f"main.{NORMS}", "main/{i}"),
    copy(f"main.{NORMS}.running_mean", "main/{i}/mean"),
    copy(f"main.{NORMS}.running_var", "main/{i}/var"),
    drop(f"main.{NORMS}.num_batches_tracked"),
    Rule(f"main.{NORMS}.loc", "main/{i}/shift", _per_channel(2)),
    Rule(f"main.{NORMS}.scale", "main/{i}/gain", _per_channel(2)),
    drop(f"main.{NORMS}.initialized"),
]


def recognise(shapes, config: dict) -> bool:
    return "main.0.weight" in shapes and "main.2.weight" in shapes and len(shapes["main.0.weight"]) in (4, 5)


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.discriminator.Config. Kernel 3 in clips is Open-Sora 1.3's, which halves time twice."""
    features, channels, *kernel = shapes["main.0.weight"]
    last = max(n for n in range(MOST) if f"main.{n}.weight" in shapes)
    return dict(
        in_channels=channels,
        features=features,
        layers=(last - 2) // 3,
        rank=len(kernel),
        kernel=kernel[0],
        time_strides=2 if kernel[0] == 3 else 1,
        norm="actnorm" if "main.3.loc" in shapes else "batch",
    )
