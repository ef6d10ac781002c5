"""The steps that the tests run, and how a result is compared."""

from pathlib import Path

from data_pipelines.pipeline import Step
from data_pipelines.stage import configure, find


def step(label, stage=None, **options):
    cls = find(stage or label)
    return Step(label, cls, configure(cls, options))


def curation(*, ocr=True):
    """The steps of the tests: everything that needs no weights and no server."""
    return [
        step("probe"),
        step("usable", "filter", keep=("status == 'ok'",)),
        step("scene_cut", detectors=("adaptive", "threshold"), crf=14, preset="ultrafast"),
        step("quality"),
        step("visible", "filter", keep=("not black", "not frozen", "black_bars < 0.05")),
        step("fingerprint"),
        step("dedup"),
        step("flow", compute_height=120),
        step("camera_motion"),
        *([step("ocr"), step("legible", "filter", keep=("ocr_area < 0.05",))] if ocr else []),
        step("pack", records_per_shard=7),
    ]


def tree(folder):
    """Every file of an output that a reader uses, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and "meta" not in path.parts and not path.name.startswith(".")
    }
