"""LPIPS: a whole state dict (`net.sliceN.*`, `linN.*`), or torchvision's `features.*` joined with the file of channel
weights that richzhang/PerceptualSimilarity and taming-transformers publish (vgg.pth, alex.pth)."""

from opensora_jax.weights.engine import Rule, conv, drop, reshape, tied

CONVS = {  # torchvision's index → slice
    "vgg": {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5},
    "alex": {0: 1, 3: 2, 6: 3, 8: 4, 10: 5},
}
PER_CHANNEL = reshape("per_channel", lambda a: a.reshape(-1), lambda a: a.reshape(1, -1, 1, 1))
BACKBONE = sorted({(number, index) for table in CONVS.values() for index, number in table.items()})

RULES: list[Rule] = [
    *(rule for s, i in BACKBONE for rule in conv(f"net.slice{s}.{i}", f"slices/{s - 1}/{i}")),
    Rule("lin{k}.model.1.weight", "lin/{k}/weight", PER_CHANNEL),
    tied("lins.{k}.model.1.weight", "lin/{k}/weight", PER_CHANNEL),
    drop("scaling_layer.{which:shift|scale}"),
]


def recognise(shapes, config: dict) -> bool:
    return "lin0.model.1.weight" in shapes and ("net.slice1.0.weight" in shapes or "features.0.weight" in shapes)


def config_from(shapes, config: dict) -> dict:
    first = shapes.get("net.slice1.0.weight") or shapes["features.0.weight"]
    return {"net": "alex" if first[-1] == 11 else "vgg"}


def joined(tensors: dict) -> dict:
    """torchvision's names become those of the whole; its classifier is left out."""
    if "features.0.weight" not in tensors:
        return dict(tensors)
    table = CONVS[config_from({name: tensor.shape for name, tensor in tensors.items()}, {})["net"]]
    out = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "features":
            index, _, kind = rest.partition(".")
            out[f"net.slice{table[int(index)]}.{index}.{kind}"] = tensor
        elif part != "classifier":
            out[name] = tensor
    return out
