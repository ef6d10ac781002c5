"""Mask strategies of Open-Sora 1.1, 1.2 and 1.3: parsing, pasting, aligning."""

from functools import partial

import numpy as np

from opensora_jax.diffusion import mask_strategy
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last


def replay(case: Case, run: str) -> dict:
    given = case.tensors(run)
    row = next(row for row in case.data["apply"] if str(row["index"]) == run)
    z = channels_last(given["z"])
    references = [[] for _ in z]
    for name in sorted(n for n in given if n.startswith("ref_")):
        references[int(name.split("_")[1])].append(np.moveaxis(given[name], 0, -1))
    out, mask = mask_strategy.apply(z, references, row["mask_strategy"], row["loop_i"], row["align"])
    return {"z": channels_first(out), "mask": mask}


def tables(case: Case, *, parse):
    for text, recorded in case.data["parse"]:
        yield f"parse {text!r}", [list(group) for group in parse(text)], recorded
    for value, step, size, recorded in case.data.get("find_nearest_point", []):
        yield f"nearest {value}/{step}/{size}", mask_strategy.nearest_multiple(value, step, size), recorded


FAMILIES = {
    "mask_strategy_v11": Adapter("mask_strategy", replay, partial(tables, parse=mask_strategy.fields)),
    "mask_strategy_v12": Adapter("mask_strategy", replay, partial(tables, parse=mask_strategy.parse)),
    "mask_strategy_v13": Adapter("mask_strategy", replay, partial(tables, parse=mask_strategy.parse)),
}
