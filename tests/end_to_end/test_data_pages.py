"""docs/data.md and docs/curation.md as a newcomer goes through them: every `bash` command, in order, in one folder.

The caption server of the pages is a stand-in that speaks the OpenAI schema. A command that both pages have runs once.
"""

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opensora_jax.data.sources import open_source
from tests.data_pipelines.test_caption import Server

ROOT = Path(__file__).parents[2]
SERVER = "http://localhost:8000/v1"


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return [line for block in blocks for line in block.strip().split("\n")]


class Newcomer:
    """Someone who types commands into a shell that stands in `folder`; remembers what each said."""

    def __init__(self, folder: Path, server: str):
        self.folder, self.server = folder, server
        self.said: dict[str, str] = {}

    def follow(self, page: str) -> None:
        for line in commands(page):
            if line not in self.said:
                self.said[line] = self.type(line)

    def type(self, line: str) -> str:
        words = shlex.split(line.replace(SERVER, self.server))
        assert words[:2] == ["python", "-m"]
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", words[2:])
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        assert not end.value.code, f"{line}\n{out.getvalue()}"
        return out.getvalue()

    def heard(self, *words: str) -> str:
        """What the one command that has all these words said."""
        found = [text for line, text in self.said.items() if all(word in line for word in words)]
        assert len(found) == 1, words
        return found[0]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    server = Server(troubles=())
    yield Newcomer(tmp_path_factory.mktemp("newcomer"), server.url)
    server.shutdown()
    server.server_close()


def test_from_a_folder_of_videos_to_a_run(newcomer):
    newcomer.follow("data.md")
    at = newcomer.folder
    assert pq.read_table(at / "WORK" / "table.parquet").num_rows == 18
    texts = pq.read_table(at / "WORDS" / "table.parquet")["text"].to_pylist()
    assert len(texts) == 18 and all(t.startswith("A clip with 4 frames. the motion strength is ") for t in texts)
    clips, latents = open_source(at / "TRAIN" / "pack"), open_source(at / "LATENTS")
    assert sorted(clips[k]["text"] for k in range(18)) == sorted(texts)
    assert "18 clips (pixels), 0 unreadable" in newcomer.heard("--source=TRAIN/pack")
    assert "4 steps an epoch" in newcomer.heard("--source=TRAIN/pack")
    for name in ("histogram.png", "samples.png"):
        assert np.asarray(Image.open(at / "REPORT" / name)).std() > 5
    assert len(latents) == 18 and {latents[k]["id"] for k in range(18)} == {clips[k]["id"] for k in range(18)}
    assert "18 clips (latents), 0 unreadable" in newcomer.heard("inspect --source=LATENTS")
    rows = [json.loads(line) for line in (at / "RUN" / "metrics.jsonl").read_text().splitlines()]
    assert any(row["step"] == 2 and np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert "8 steps an epoch" in newcomer.heard("--source=CLIPS")


def test_curation_from_top_to_bottom(newcomer):
    newcomer.follow("curation.md")
    at = newcomer.folder
    assert json.loads((at / "PACKED" / "pack" / "manifest.json").read_text())["records"] == 18
    assert pq.read_table(at / "both.parquet").num_rows > 10 and "area" in pq.read_schema(at / "named.parquet").names
    assert (at / "REPORT" / "report.html").exists()
    assert "18 rows" in newcomer.heard("table info")
