"""A converted network on a mesh: each tensor is read once and cut on its way to the devices."""

import numpy as np

from opensora_jax import convert
from opensora_jax.config import part
from opensora_jax.parallel.shard import shardings
from opensora_jax.pipeline import load_params
from opensora_jax.weights import engine, store
from tests.parallel.conftest import layout_of


def test_a_converted_network_lies_as_the_mesh_says(goldens, tmp_path, monkeypatch):
    assert convert.main([f"--from={goldens / 'dit_orig' / 'weights.safetensors'}", f"--to={tmp_path / 'ours'}"]) == 0
    folder = store.Folder(tmp_path / "ours")
    network = part("models", folder.config, "config.json").network()
    read, once = [], store.Folder.read
    monkeypatch.setattr(store.Folder, "read", lambda self, name: (read.append(name), once(self, name))[1])

    layout = layout_of("fsdp")
    params = engine.flatten(load_params(tmp_path / "ours", network, layout))
    assert sorted(read) == sorted(params)
    where = engine.flatten(shardings(network.abstract, network.axes, layout))
    cut = 0
    for name, array in params.items():
        assert array.sharding == where[name]
        np.testing.assert_array_equal(np.asarray(array), once(folder, name))
        if not array.sharding.is_fully_replicated:
            cut += 1
            assert all(piece.data.nbytes * 4 == array.nbytes for piece in array.addressable_shards)
    assert cut > 5
