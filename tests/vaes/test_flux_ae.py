"""FLUX.1's autoencoder: its published names and count, and where they lead."""

import numpy as np

from opensora_jax.nn.params import Network
from opensora_jax.vaes import flux_ae
from opensora_jax.weights import engine
from opensora_jax.weights import flux_ae as table
from tests.checks import check_round_trip, ours, random_params


def named(cfg, values):
    """Arrays under the published names."""
    net = Network.of(lambda rngs: flux_ae.build(cfg, rngs=rngs))
    return net, dict(engine.reference_arrays(ours(net), values(net), table.RULES))


def test_full_size_names_and_count():
    hollow = lambda net: lambda path: np.broadcast_to(np.int8(0), ours(net)[path])
    net, back = named(flux_ae.PRESETS["flux-ae"], hollow)
    assert len(back) == 244 and net.count() == 83_819_683  # ae.safetensors
    shapes = {key: array.shape for key, array in back.items()}
    assert table.recognise(shapes, {})
    assert flux_ae.Config(**table.config_from(shapes, {})) == flux_ae.PRESETS["flux-ae"]
    # The decoder counts from full size: its last "up" is the first to run.
    assert shapes["decoder.up.3.block.0.conv1.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert "decoder.up.0.upsample.conv.weight" not in shapes and "encoder.down.3.downsample.conv.weight" not in shapes
    assert shapes["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)


def test_round_trip():
    cfg = flux_ae.Config(
        **vars(flux_ae.PRESETS["flux-ae"]) | {"block_out_channels": (4, 8, 8, 8), "norm_num_groups": 2}
    )
    _, weights = named(cfg, lambda net: engine.flatten(random_params(net)).__getitem__)
    check_round_trip(
        {key: np.asarray(array) for key, array in weights.items()}, "vaes", "flux_ae", {"norm_num_groups": 2}
    )
