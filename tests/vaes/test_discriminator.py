"""Discriminators: recorded cases, the manifest, batch statistics that move, ActNorm's start."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opensora_jax.nn.params import Network
from opensora_jax.vaes import discriminator
from tests.checks import check_case, check_manifest, check_round_trip, existing


@pytest.mark.parametrize("case", ["osp_discriminator2d", "v12_ndisc3d_a", "v13_ndisc3d_a"])
def test_recorded_cases(goldens, case):
    check_case(goldens, case)


def test_the_plan_s_over_clips(goldens, tmp_path):
    """Its network is that of 1.2, whose recorded activations stand in for its own."""
    source = existing(goldens / "v12_ndisc3d_a")
    shutil.copy(source / "weights.safetensors", tmp_path)
    x = load_file(source / "inputs.safetensors")["a/x"]
    save_file({"r0/real": x, "r0/fake": x}, tmp_path / "inputs.safetensors")
    names = {"r0/eval_logits": "a/out", "r0/train_logits": "a/train_mode_out"}
    recorded, said = load_file(source / "outputs.safetensors"), json.loads((source / "case.json").read_text())
    save_file({ours: recorded[theirs] for ours, theirs in names.items()}, tmp_path / "outputs.safetensors")
    case = {"case": "clips", "family": "osp_discriminator", "config": said["config"], "runs": {"r0": {}}}
    case |= {"outputs": {ours: said["outputs"][theirs] for ours, theirs in names.items()}}
    (tmp_path / "case.json").write_text(json.dumps(case))
    check_case(tmp_path, ".")


def test_manifest(goldens):
    check_manifest(goldens, "NLayerDiscriminator3D_v1.2", "vaes", "discriminator", preset="v1.2")


def network(**options):
    cfg = discriminator.Config(features=4, layers=2, rank=2, **options)
    net = Network.of(lambda rngs: discriminator.build(cfg, rngs=rngs))
    return net, net.init(jax.random.key(0))


def test_statistics_move_toward_those_of_the_batch():
    net, params = network()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 24, 24, 3)), jnp.float32)
    step = jax.jit(lambda params: net(params, x, method="train_step"))
    logits, moved = step(params)
    assert set(moved["main"]) == {"3", "6"} and set(moved["main"]["3"]) == {"mean", "var"}
    for _ in range(200):  # the first variance, 1, is large beside those of small weights
        params = params | {"main": {i: part | moved["main"].get(i, {}) for i, part in params["main"].items()}}
        _, moved = step(params)
    np.testing.assert_allclose(net(params, x), logits, atol=1e-2)
    assert logits.shape == (6, 4, 4, 1)


def test_actnorm_starts_standardised():
    net, params = network(norm="actnorm")
    x = jnp.asarray(np.random.default_rng(1).normal(2, 3, size=(1, 2, 24, 24, 3)), jnp.float32)
    start = net(params, x, method="started")["main"]
    params = params | {"main": {i: part | start.get(i, {}) for i, part in params["main"].items()}}
    module = net.module(params)
    h = module.main[3](module.main[2](jax.nn.leaky_relu(module.main[0](x[0]), 0.2)))
    np.testing.assert_allclose(h.reshape(-1, 8).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(h.reshape(-1, 8).std(0, ddof=1), 1, atol=1e-3)


def test_actnorm_weights_keep_their_names():
    rng = np.random.default_rng(2)
    sizes = {0: (4, 3), 2: (8, 4), 5: (1, 8)}
    weights = {f"main.{i}.weight": rng.normal(size=(*size, 4, 4)).astype("f4") for i, size in sizes.items()}
    weights |= {f"main.{i}.bias": rng.normal(size=size[0]).astype("f4") for i, size in sizes.items()}
    weights |= {f"main.3.{name}": rng.normal(size=(1, 8, 1, 1)).astype("f4") for name in ("loc", "scale")}
    check_round_trip(weights | {"main.3.initialized": np.uint8(1)[None]}, "vaes", "discriminator", {})


def test_dropout_needs_a_key():
    net, params = network(dropout=0.5)
    x = jnp.ones((1, 1, 24, 24, 3))
    base = net(params, x)
    np.testing.assert_array_equal(base, net(params, x))
    assert np.abs(base - net(params, x, key=jax.random.key(1))).max() > 1e-4
