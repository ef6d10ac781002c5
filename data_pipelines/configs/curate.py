"""Raw videos → clean clips → shards, with nothing but what pip installs: no weights, no caption server.

    python -m data_pipelines.run --config=data_pipelines/configs/curate.py --input=VIDEOS --output=WORK

About 15 clips a second and core at 240p; the text detector takes half of it. Thresholds on flow are ours: DIS is not
UniMatch (see flow.py), so look at WORK with `python -m data_pipelines.analyze` before you raise them.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.steps = (
        "probe",
        "usable",
        "scene_cut",
        "quality",
        "visible",
        "fingerprint",
        "dedup",
        "flow",
        "camera_motion",
        "ocr",
        "good",
        "pack",
    )
    config.usable = {"stage": "filter", "keep": ("status == 'ok'",)}
    config.scene_cut = {"detectors": ("adaptive", "threshold"), "min_seconds": 1.0, "max_seconds": 16.0, "shorter": 720}
    config.visible = {"stage": "filter", "keep": ("not black", "not frozen", "black_bars < 0.05")}
    config.good = {"stage": "filter", "keep": ("flow >= 0.5", "ocr_area < 0.05")}
    config.pack = {"records_per_shard": 1024}
    return config
