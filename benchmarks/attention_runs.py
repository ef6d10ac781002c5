"""What benchmarks.attention times on a case: the automatic choice, every back end, libraries' kernels, other block sizes."""

import functools
import importlib.util
import sys
from pathlib import Path

# What a call can be pinned to.
OURS = {"gpu": ("xla", "cudnn", "pallas_gpu", "mosaic_gpu"), "tpu": ("xla", "pallas_tpu")}
TUNED = ("v1.0 temporal T=16", "v1.0 temporal T=64", "v1.2 temporal T=30 480p", "DiT image 512px", "v2.0 joint 256px")


def real_cases() -> list:
    """tests/kernels/cases.py by its path: another package called tests may be installed."""
    path = Path(__file__).parents[1] / "tests" / "kernels" / "cases.py"
    spec = importlib.util.spec_from_file_location("opensora_jax_attention_cases", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


def candidates(case, extras: dict) -> dict:
    """name → function of the case's arrays: the automatic choice, what a call can be pinned to, libraries'."""
    import jax

    from opensora_jax.kernels import attention, stdit

    public = stdit.stdit_attention if case.fused else attention.attention
    platform = jax.devices()[0].platform
    out = {"auto": functools.partial(public, **extras)}
    out |= {name: functools.partial(public, implementation=name, **extras) for name in OURS[platform]}
    if not (case.fused or case.ragged or case.causal):
        out |= stock_gpu(case) if platform == "gpu" else stock_tpu(case)
    return out


def alternatives(case, extras: dict):
    """(label → function, label → blocks): other block sizes of our GPU kernels."""
    from opensora_jax.kernels import mosaic_gpu, pallas_gpu, stdit_gpu

    runs, blocks = {}, {}

    def add(kernel, stages, run, **options):
        label = f"{kernel} " + " ".join(f"{stage}={'/'.join(map(str, block))}" for stage, block in stages.items())
        runs[label], blocks[label] = functools.partial(run, **options), {"kernel": kernel} | stages

    if case.fused:
        options = {"q_scale": None, "k_scale": None, "rope": None} | extras
        for block in ((32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8)):
            if case.row <= min(stdit_gpu.MAX_ROW, block[0]):
                add("stdit_gpu", {"rows": block}, stdit_gpu.stdit_attention, blocks=block, **options)
        return runs, blocks

    def flash(module, *tried):
        for forward, dkv, dq in tried:
            stages = {"forward": forward, "dkv": dkv, "dq": dq}
            chosen = tuple((stage, module.Blocks(*block)) for stage, block in stages.items())
            name = module.__name__.rsplit(".", 1)[-1]
            add(name, stages, module.attention, scale=case.head_dim**-0.5, blocks=chosen, **extras)

    flash(
        pallas_gpu,  # queries, keys, warps, stages
        ((128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 3)),
        ((128, 64, 8, 4), (64, 128, 8, 2), (128, 64, 8, 2)),
        ((128, 64, 4, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
        ((64, 64, 4, 3), (32, 128, 4, 2), (128, 32, 4, 2)),
        ((128, 32, 4, 4), (128, 128, 8, 2), (128, 128, 8, 2)),
        ((64, 128, 4, 2), (32, 64, 4, 3), (64, 32, 4, 3)),
    )
    if case.head_dim in (64, 128):
        flash(
            mosaic_gpu,  # rows that stream past, stages
            ((64, 2), (32, 2), (32, 2)),
            ((64, 4), (64, 3), (64, 3)),
            ((96, 2), (32, 4), (96, 2)),
            ((128, 3), (96, 2), (128, 2)),
            ((160, 2), (32, 3), (64, 4)),
        )
    return runs, blocks


def stock_gpu(case):
    """Library kernels for GPUs that take this shape as it is."""
    from jax.experimental.pallas.ops.gpu import attention as triton_mha
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    scale, out = case.head_dim**-0.5, {}
    if case.queries % 128 == 0 == case.keys % 128:
        sizes = triton_mha.BlockSizes(128, 64, 64, 64, 64, 64)
        out["stock mha"] = lambda q, k, v: triton_mha.mha(q, k, v, None, sm_scale=scale, block_sizes=sizes)
    if case.head_dim % 64 == 0 == case.queries % 128 and case.keys % 128 == 0:
        config = attention_mgpu.TuningConfig(
            64, 128, 2, compute_wgs_bwd=2, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64
        )  # fmt: skip
        # Its fast memory is float16 whatever the operands are, so it is given that.
        half = lambda x: x.astype("float16")
        out["stock mosaic gpu (float16)"] = lambda q, k, v: attention_mgpu.attention(
            half(q * scale), half(k), half(v), config
        ).astype(q.dtype)
    return out


def stock_tpu(case):
    """Library kernels for TPUs, heads first as they want them, with the largest blocks up to 1024 that divide."""
    import jax
    from jax.experimental.pallas.ops.tpu import flash_attention as flash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if case.queries % 128 or case.keys % 128:
        return {}
    scale, flip = case.head_dim**-0.5, lambda x: x.swapaxes(1, 2)
    fit = lambda length: next(block for block in (1024, 512, 256, 128) if length % block == 0)
    q, k = fit(case.queries), fit(case.keys)
    sizes = splash.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=min(k, 512), block_q_dkv=q, block_kv_dkv=k,
        block_kv_dkv_compute=min(k, 512), block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((case.queries, case.keys))] * case.heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    return {
        "stock splash": lambda q, k, v: flip(jax.vmap(kernel)(flip(q * scale), flip(k), flip(v))),
        "stock flash": lambda q, k, v: flip(flash.flash_attention(flip(q), flip(k), flip(v), sm_scale=scale)),
    }
