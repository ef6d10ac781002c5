"""Tables of the data side of 1.x: bucket assignment, frame masks and prompt handling."""

import math
import random

from opensora_jax.common import prompts
from opensora_jax.common.aspect import aspect_table
from opensora_jax.common.errors import UserError
from opensora_jax.data.buckets import BucketTable
from opensora_jax.data.masks import MaskGenerator
from opensora_jax.verify.case import Adapter, Case


def version(case: Case) -> str:
    major_minor = case.family.rsplit("_v", 1)[1]
    return f"{major_minor[0]}.{major_minor[1:]}"


def buckets(case: Case):
    for name, (pixels, sizes) in case.data.get("aspect_ratios", {}).items():
        found, table = aspect_table(name, version(case))
        yield f"sizes/{name}", [found, {key: list(size) for key, size in table.items()}], [pixels, sizes]
    for name, table in case.data["tables"].items():
        for kind in sorted(set(table) - {"bucket_config", "num_bucket"}):
            config = table["bucket_config"] if kind.startswith("original") else _kept(table["bucket_config"])
            ours = BucketTable(config, version(case), aspect_first="ar_first" in kind)
            # Where the reference itself crashes (it looks "4.0" up where its key is "4.00") nothing is recorded.
            rows = [row for row in table[kind] if not isinstance(row[1], str)]
            yield f"{name}/{kind}", [_row(ours, row[0]) for row in rows], rows
            yield f"{name}/num_bucket", ours.num_buckets, table["num_bucket"]


def _kept(config: dict) -> dict:
    """Every probability above zero made one, zero left, as the recording of `keep_prob_1` did."""
    first = lambda keep: keep[0] if isinstance(keep, list) else keep
    return {
        name: {frames: (float(first(keep) > 0), size) for frames, (keep, size) in cells.items()}
        for name, cells in config.items()
    }


def _row(table: BucketTable, clip: list) -> list:
    bucket = table.assign(*clip, seed=1234)
    if bucket is None:
        return [clip, None, None, None]
    return [clip, [bucket.resolution, bucket.num_frames, bucket.aspect], list(bucket.shape), bucket.batch_size]


def masks(case: Case):
    for number, example in enumerate(case.data["examples"]):
        draw = MaskGenerator({example["name"]: 1.0})
        ours = draw(example["num_frames"], random.Random(example["seed"]))
        label = f"{example['name']}/{example['num_frames']}f/{number}"
        yield label, ours.astype(int).tolist(), example["mask"]
    order = case.data.get("ratio_order_example")
    if order:
        draw = MaskGenerator(order["ratios"])
        for uniform, name in order["uniform_draw_to_name"]:
            plain = name.removeprefix("mask_")
            yield f"pick/{uniform}", draw.pick(uniform), "identity" if plain == "no" else plain


def prompt_tables(case: Case):
    serve = _prompt_functions(version(case))
    for name, pairs in case.data["pairs"].items():
        for number, (*given, recorded) in enumerate(pairs):
            raises = isinstance(recorded, dict) and "raises" in recorded
            try:
                ours = serve[name](*given)
            except UserError:
                ours = "raises"
            yield f"{name}/{number}", ours, "raises" if raises else recorded


def _prompt_functions(release: str) -> dict:
    def save_path(options):
        names = {"sample_idx": "index", "sample_name": "name", "prompt_as_path": "prompt_as_name", "k": "sample"}
        names |= {"num_sample": "num_samples", "prompt": "prompt"}
        return "out/" + prompts.save_name(**{names[key]: value for key, value in options.items()})

    def json_suffix(prompt):
        text, extra = prompts.split_json(prompt, opening="{[" if release == "1.1" else "{")
        if release == "1.1":
            return [[text], [extra]]
        return [[text], [extra.get("reference_path", "r0")], [extra.get("mask_strategy", "m0")]]

    def merged(prompt):
        texts, loops = prompts.split_prompt(prompt)
        return prompts.merge_prompt([prompts.text_preprocessing(text) for text in texts], loops)

    def sizes(args):
        network, batch, size, frames, fps = args
        kind = "pixart_ms" if network.startswith("PixArt") else "stdit"
        return _float32(prompts.size_conditions(tuple(size), frames, fps, batch=batch, kind=kind))

    return {
        "text_preprocessing": prompts.text_preprocessing,
        "text_preprocessing_off": lambda text: prompts.text_preprocessing(text, clean=False),
        "clean_caption_once": prompts.clean_caption,
        "basic_clean": prompts.basic_clean,
        "process_prompts": lambda text, loops: [prompts.prompts_per_loop(text, loops)],
        "extract_json_from_prompts": json_suffix,
        "append_score_to_prompts": lambda text, scores: [prompts.append_scores(text, version=release, **scores)],
        "split_prompt": lambda text: list(prompts.split_prompt(text)),
        "merge_after_split_and_clean": merged,
        "extract_prompts_loop": lambda text, loop: [prompts.prompt_for_loop(text, loop)],
        "dframe_to_frame": prompts.pixel_frames,
        "get_save_path_name": save_path,
        "prepare_multi_resolution_info": sizes,
    }


def _float32(value):
    """Numbers as the recording's float32 tensors printed them."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _float32(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_float32(item) for item in value]
    return float(np.float32(math.nan if value is None else value))


FAMILIES = {
    **{f"buckets_v1{minor}": Adapter("buckets", tables=buckets) for minor in (1, 2, 3)},
    **{f"mask_generator_v1{minor}": Adapter("masks", tables=masks) for minor in (1, 2, 3)},
    **{f"prompt_utils_v1{minor}": Adapter("prompts", tables=prompt_tables) for minor in (1, 2, 3)},
}
