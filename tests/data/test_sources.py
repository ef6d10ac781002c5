"""Sources beside our own shards: tables of files, images, TFDS, several at once; and what they say about mistakes."""

import csv
import dataclasses
import json
from importlib.util import find_spec

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.data import records, shapes
from opensora_jax.data.loader import DataConfig, make_loader
from opensora_jax.data.sources import open_source
from opensora_jax.data.video_io import write_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for index in range(4):
        write_video(folder / f"{index}.mp4", rng.integers(0, 255, (20 + index, 32, 48, 3), np.uint8), 24)
    return folder


def table(path, rows, columns=("path", "text")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def test_a_csv_with_two_columns_is_enough(clips):
    source = open_source(table(clips / "clips.csv", [(f"{i}.mp4", f"clip {i}") for i in range(4)]))
    assert source.shapes.tolist() == [[20 + i, 32, 48] for i in range(4)] and source.fps.tolist() == [24.0] * 4
    loader = make_loader(DataConfig(source=str(clips / "clips.csv"), batch_size=2, num_frames=5, height=32, width=32))
    batch, info = next(loader)
    assert batch["video"].shape == (2, 5, 32, 32, 3) and sorted(batch["text"])[0].startswith("clip")


def test_parquet_equals_csv_and_known_columns_are_not_probed(clips):
    import pyarrow
    import pyarrow.parquet

    columns = ("path", "text", "num_frames", "height", "width", "fps")
    rows = [(f"elsewhere-{i}.mp4", f"clip {i}", 51, 144, 256, 25.0) for i in range(3)]
    from_csv = open_source(table(clips / "known.csv", rows, columns))
    pyarrow.parquet.write_table(
        pyarrow.table({name: list(column) for name, column in zip(columns, zip(*rows))}), clips / "known.parquet"
    )
    from_parquet = open_source(clips / "known.parquet")
    np.testing.assert_array_equal(from_csv.shapes, from_parquet.shapes)
    assert from_csv[1] == from_parquet[1] and from_csv.shapes[0].tolist() == [51, 144, 256]


def test_a_file_that_cannot_be_probed_is_counted_not_fatal(clips):
    (clips / "broken.mp4").write_bytes(b"nothing")
    path = table(clips / "some.csv", [("0.mp4", "fine"), ("broken.mp4", "broken"), ("gone.mp4", "gone")])
    config = DataConfig(source=path, batch_size=1, num_frames=5, height=32, width=32)
    assert make_loader(config).plan.rejected() == {"unreadable": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no rows"),
        ("path,text\n", "has no rows"),
        ("file,text\na.mp4,x\n", "no column `path`; its columns are file, text"),
        ("path,text\na.mp4,x\nb.mp4,\n", "row 2 has an empty `text`"),
        ("path,text,num_frames\na.mp4,x,many\n", "row 1, column `num_frames`: 'many' is not a number"),
    ],
)
def test_mistakes_in_a_table_name_row_and_column(tmp_path, content, words):
    (tmp_path / "clips.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        open_source(tmp_path / "clips.csv")


@pytest.mark.parametrize("spec", ["nowhere", "nowhere/*.array_record", "nowhere.csv", "tfds:nowhere", "x.array_record"])
def test_missing_data_is_one_sentence(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.source: .*nowhere|x\.array_record"):
        open_source(spec)


def test_images_and_videos_in_one_run(clips, shards):
    from PIL import Image

    for index in range(3):
        Image.fromarray(np.full((40, 60, 3), 80 * index, np.uint8)).save(clips / f"{index}.png")
    images = table(clips / "images.csv", [(f"{i}.png", f"image {i}") for i in range(3)])
    videos = table(clips / "videos.csv", [(f"{i}.mp4", f"clip {i}") for i in range(4)])
    buckets = {"32x32": {1: (1.0, 3), 17: (1.0, 2)}}
    loader = make_loader(DataConfig(source=(images, videos), buckets=buckets, mask_ratios={"image_head": 1.0}))
    seen = {}
    for _ in range(3):
        batch, info = next(loader)
        seen.setdefault(info.bucket.num_frames, batch)
    assert seen[1]["video"].shape == (3, 1, 32, 32, 3) and seen[1]["fps"].tolist() == [120.0] * 3
    assert seen[1]["x_mask"].all() and not seen[17]["x_mask"][:, 0].any() and seen[17]["fps"].tolist() == [24.0] * 2
    levels = sorted(round(float(row.mean() + 1) * 127.5) for row in seen[1]["video"])
    assert levels == [0, 80, 160]


def test_frame_interval_and_fps_max(clips):
    source = table(clips / "all.csv", [(f"{i}.mp4", f"clip {i}") for i in range(4)])
    config = DataConfig(source=source, batch_size=4, num_frames=5, height=32, width=32, frame_interval=4)
    assert next(make_loader(config))[0]["fps"].tolist() == [6.0] * 4
    buckets = {"32x32": {9: (1.0, 4)}}
    config = DataConfig(source=source, buckets=buckets, bucket_version="2.0", fps_max=12)
    assert next(make_loader(config))[0]["fps"].tolist() == [12.0] * 4


def test_tfds_sets_prepared_by_others(tmp_path, monkeypatch):
    """The smallest prepared set there is: what its builder writes, read back without TensorFlow."""
    import sys

    package = tmp_path / "dots"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "dots_dataset_builder.py").write_text(
        "import numpy as np\nimport tensorflow_datasets as tfds\n"
        "class Builder(tfds.core.GeneratorBasedBuilder):\n"
        "  VERSION = tfds.core.Version('1.0.0')\n"
        "  def _info(self):\n"
        "    video = tfds.features.Tensor(shape=(5, 16, 16, 3), dtype=np.uint8)\n"
        "    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict("
        "{'video': video, 'caption': tfds.features.Text()}))\n"
        "  def _split_generators(self, dl_manager):\n    return {'train': self._generate_examples()}\n"
        "  def _generate_examples(self):\n"
        "    for i in range(3):\n      yield i, {'video': np.full((5, 16, 16, 3), i, np.uint8), 'caption': f'dot {i}'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from dots.dots_dataset_builder import Builder

    builder = Builder(data_dir=tmp_path / "data", file_format="array_record")
    builder.download_and_prepare()
    source = open_source(f"tfds:{builder.data_path}?text=caption&fps=12")
    assert source.shapes.tolist() == [[5, 16, 16]] * 3 and source.fps.tolist() == [12.0] * 3
    assert {source[i]["text"] for i in range(3)} == {"dot 0", "dot 1", "dot 2"}
    loader = make_loader(
        DataConfig(source=f"tfds:{builder.data_path}?text=caption", batch_size=3, num_frames=5, height=16, width=16)
    )
    assert next(loader)[0]["video"].shape == (3, 5, 16, 16, 3)
    with pytest.raises(UserError, match="no feature `text`"):
        open_source(f"tfds:{builder.data_path}")
    assert "tensorflow" not in sys.modules


@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="with TensorFlow it is no mistake")
def test_tfds_features_that_need_tensorflow_say_so(tmp_path):
    module = "tensorflow_datasets.core.features"
    video = {"shape": {"dimensions": ["5", "16", "16", "3"]}, "encodingFormat": "png"}
    features = {"video": {"pythonClassName": f"{module}.video_feature.Video", "video": video}}
    tree = {"pythonClassName": f"{module}.features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (tmp_path / "features.json").write_text(json.dumps(tree))
    info = {"name": "dots", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"without TensorFlow .*: pip install tensorflow"):
        open_source(f"tfds:{tmp_path}")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An object store under s3:// and gs:// that lives in memory, where the real ones' drivers would answer."""
    import fsspec
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class StandIn(MemoryFileSystem):
        protocol = ("s3", "gs")
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("s3://").removeprefix("gs://"))

    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: StandIn())
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: StandIn())
    monkeypatch.setenv("OPENSORA_JAX_CACHE", str(tmp_path / "cache"))
    return StandIn


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_shards_in_a_bucket(bucket, shards, tmp_path, scheme):
    folder = f"{scheme}://bucket/clips"
    manifest = shapes.write_shapes(folder, count=48, records_per_shard=20, size=32)
    assert manifest == records.read_manifest(shards) == records.read_manifest(folder)
    assert records.verify_folder(folder) == []
    config = DataConfig(source=str(shards), batch_size=8, height=32, width=32)
    remote = make_loader(dataclasses.replace(config, source=folder))
    (batch, _), (local, _) = next(remote), next(make_loader(config))
    np.testing.assert_array_equal(batch["video"], local["video"])
    assert remote.plan_hash == make_loader(config).plan_hash, "where data lies does not change the plan"
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 3
    with records.ShardWriter(folder, prefix="shapes-train", records_per_shard=20) as writer:
        assert writer.records_done == 48


def test_videos_named_by_a_table_in_a_bucket(bucket, clips):
    bucket().pipe_file("/bucket/0.mp4", (clips / "0.mp4").read_bytes())
    bucket().pipe_file("/bucket/clips.csv", b"path,text,num_frames,height,width,fps\n0.mp4,x,20,32,48,24\n")
    config = DataConfig(source="s3://bucket/clips.csv", batch_size=1, num_frames=5, height=32, width=32)
    assert next(make_loader(config))[0]["video"].shape == (1, 5, 32, 32, 3)
