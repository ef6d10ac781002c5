"""The debug denoiser, tiny, and meshes of the suite's eight fake devices: one for each rule preset."""

import pytest

from opensora_jax import config
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training.run import RunConfig

LATENTS_ONLY = ["--config.vae=None", "--config.text_encoder=None", "--config.text.tokenizer="]

# Every preset on a mesh where each of its axes is wider than one.
MESHES = {
    "dp": MeshConfig(data=8, rules="dp"),
    "zero": MeshConfig(data=2, fsdp=4, rules="zero"),
    "fsdp": MeshConfig(data=2, fsdp=4, rules="fsdp"),
    "fsdp_tp": MeshConfig(data=2, fsdp=2, tensor=2, rules="fsdp_tp"),
    "fsdp_context": MeshConfig(data=1, fsdp=2, context=4, rules="fsdp_context"),
    "full": MeshConfig(data=1, fsdp=2, context=2, tensor=2, rules="full"),
}


def layout_of(preset: str) -> shard.Layout:
    return shard.layout(make_mesh(MESHES[preset]), preset)


@pytest.fixture(scope="session")
def debug() -> RunConfig:
    return config.build(RunConfig, config.load("configs/debug.py", LATENTS_ONLY), "config")
