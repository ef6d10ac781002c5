"""Every family's random weights under the reference's names, through `convert` and back, the source deleted in between:
every tensor the same to the bit. (tests/test_convert.py does the same with what the references saved.)"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opensora_jax import convert
from opensora_jax.nn.params import Network
from opensora_jax.weights import engine
from tests.checks import modules, ours

TINY = dict(hidden_size=24, depth=2, num_heads=2, mlp_ratio=2.0)
TEXT = dict(caption_channels=8, model_max_length=5)
SMALL_CLIP = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=1)
DEEP = dict(width_list=(32, 32, 32), depth_list=(1, 1, 1), block_type=("ResBlock", "ResBlock", "EViTS5_GLU"))
DEEP |= dict(temporal=(True, True, False))
SMALL: dict[str, dict] = {  # the arguments of each family's Config
    "clip": dict(vocab_size=11, max_position_embeddings=7, projection_dim=6, **SMALL_CLIP),
    "clip_vision": dict(image_size=8, patch_size=4, projection_dim=6, **SMALL_CLIP),
    "causal_vae": dict(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1),
    "dc_ae": dict(encoder=DEEP, decoder=DEEP | dict(out_norm="rms3d", out_act="relu"), latent_channels=8),
    "discriminator": dict(features=4),
    "dit": dict(condition="label_6", patch_size=(2, 2), no_temporal_pos_emb=True, **TINY),
    "flux_ae": dict(
        block_out_channels=(32,) * 4, layers_per_block=1, use_quant_conv=False, use_post_quant_conv=False
    ),
    "hunyuan_vae": dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=4),
    "i3d": dict(num_classes=3),
    "latte": dict(condition="none", patch_size=(2, 2), **TINY),
    "latte_t2v": dict(hidden_size=24, depth=2, num_heads=2, caption_channels=8, caption_tokens=5, num_classes=3),
    "lpips": dict(net="alex"),
    "mmdit": dict(
        in_channels=8, vec_in_dim=6, context_in_dim=10, hidden_size=24, num_heads=2, depth=2, depth_single_blocks=2,
        axes_dim=(4, 4, 4), mlp_ratio=2.0,
    ),
    "pixart": dict(micro_condition=True, kv_compress_layers=(1,), kv_compress_factor=2, **TEXT, **TINY),
    "sd_vae": dict(block_out_channels=(32, 32), layers_per_block=1),
    "stdit": TEXT | TINY,
    "stdit2": TEXT | TINY,
    "stdit3": TEXT | TINY,
    "stdit3_v13": TEXT | TINY,
    "svd_vae": dict(block_out_channels=(32, 32), layers_per_block=1),
    "t5": dict(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2),
    "video_vae": dict(
        spatial=dict(block_out_channels=(32, 32), layers_per_block=1), filters=32, num_res_blocks=1,
        channel_multipliers=(1, 2), temporal_downsample=(True,),
    ),
    "video_vae_v13": dict(
        ch=32, z_channels=4, encoder=dict(widths=(32, 32), num_res_blocks=1, time_levels=(0,)),
        decoder=dict(widths=(32, 32), num_res_blocks=1, time_levels=(1,)),
    ),
    "vqvae": dict(embedding_dim=4, n_codes=8, n_hiddens=4, n_res_layers=1, downsample=(2, 4, 2)),
}  # fmt: skip
CONFIG = {"mmdit": {"axes_dim": [4, 4, 4], "patch_size": 2}}  # what config.json must say beside the weights
BESIDE = {  # tensors of the reference that we derive or share
    "clip": {"text_model.embeddings.position_ids": np.arange(7)[None], "logit_scale": np.full((), 4.6, np.float32)},
    "clip_vision": {"vision_model.embeddings.position_ids": np.arange(5)[None]},
    "dit": {"pos_embed": np.ones((1, 16, 24), np.float32)},
    "i3d": {"Conv3d_1a_7x7.bn.num_batches_tracked": np.full((), 3)},
    "latte": {"pos_embed": np.ones((1, 16, 24), np.float32), "temp_embed": np.ones((1, 4, 24), np.float32)},
    "lpips": {"scaling_layer.shift": np.ones((1, 3, 1, 1), np.float32)},
    "pixart": {"pos_embed": np.ones((1, 16, 24), np.float32)},
    "stdit": {"pos_embed": np.ones((1, 16, 24), np.float32)},
    "vqvae": {},
}
SHARED = {  # one tensor under a second name
    "lpips": {"lins.0.model.1.weight": "lin0.model.1.weight"},
    "t5": {"encoder.embed_tokens.weight": "shared.weight"},
}


def reference(family: str) -> dict[str, np.ndarray]:
    """Weights as the reference would save them, its dtypes mixed."""
    room, table = convert.tables()[family]
    model, _ = modules(room, family)
    network = Network.of(lambda rngs: model.build(model.Config(**SMALL[family]), rngs=rngs))
    shapes, rng = ours(network), np.random.default_rng(0)
    draw = lambda path: rng.normal(size=shapes[path]).astype(np.float32)
    weights = dict(engine.reference_arrays(shapes, draw, table.RULES)) | BESIDE.get(family, {})
    return weights | {name: weights[other] for name, other in SHARED.get(family, {}).items()}


@pytest.mark.parametrize("family", SMALL)
def test_there_and_back(family, tmp_path):
    weights = reference(family)
    (tmp_path / "theirs").mkdir()
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    config = CONFIG.get(family, {})
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    assert convert.main([f"--from={tmp_path / 'theirs'}", f"--to={tmp_path / 'ours'}"]) == 0
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["family"] == family
    shutil.rmtree(tmp_path / "theirs")
    assert convert.main(["--to-torch", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert back[name].dtype == np.asarray(value).dtype, name
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_every_family_has_its_round_trip():
    """Here, or (a new network is three files, no edits elsewhere) in its own test."""
    tests = Path(__file__).parents[1]
    for family, (room, _) in convert.tables().items():
        own = tests / room / f"test_{family}.py"
        assert family in SMALL or "check_round_trip" in own.read_text(), f"{family} has no round trip"
