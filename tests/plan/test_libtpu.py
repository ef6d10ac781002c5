"""The compiler's environment: a plan compiles with the flags of a run, and every chip's compiler takes them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_jax.parallel import overlap
from opensora_jax.plan import libtpu

REPO = Path(__file__).parents[2]
EVERY_CHIP = """
from opensora_jax.plan import chips, libtpu
libtpu.prepare()
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
    mesh = Mesh(np.array(libtpu.devices(chips.parse(name))), ("x",), axis_types=(AxisType.Auto,))
    array = lambda shape, *cut: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*cut)))
    layers = lambda h, w: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, w)[0]
    program, text = libtpu.compiled(jax.jit(layers).lower(array((1024, 256), "x"), array((4, 256, 256), None, "x")))
    assert "all-gather" in text, name
"""


def test_a_plan_compiles_with_the_flags_of_a_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        os, "environ", {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=false", "TPU_LOG_DIR": "here"}
    )
    libtpu.prepare("--more")
    given = os.environ["LIBTPU_INIT_ARGS"].split()
    wanted = overlap.with_flags({}, overlap.TPU).split()
    assert "--xla_enable_async_all_gather=false" in given and given[-1] == "--more"
    assert set(wanted) - set(given) == {"--xla_enable_async_all_gather=true"}


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra aot)")
def test_every_chip_takes_the_flags():
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_CHIP], cwd=REPO, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-1000:]
