"""Kill -9 at every step and every moment of a part file, in a child process: the end is that of an unbroken run."""

import os
import subprocess
import sys
from pathlib import Path

from data_pipelines import synthetic
from tests.data_pipelines.steps import tree

# A parent imports everything once and forks a child for each kill: three seconds for all of them.
SCRIPT = """
import os, signal, sys
from data_pipelines import files, parts, pipeline, tables
from data_pipelines.pipeline import Options
from tests.data_pipelines.steps import step
import cv2, scenedetect, array_record.python.array_record_module, opensora_jax.data.records

videos, output = sys.argv[1:]
steps = [step("probe"), step("usable", "filter", keep=("status == 'ok'",)),
         step("scene_cut", preset="ultrafast", detectors=("content",)), step("fingerprint"), step("dedup"),
         step("pack", records_per_shard=2)]
real_perform, real_replace = parts.perform, os.replace

def run(victim, moment):
    def perform(stage, batch, folder):
        name = type(stage).__module__.rsplit(".")[-1]
        deadly = name == victim
        if deadly and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        def replace(source, target):
            part = "/part-" in str(target)
            if deadly and part and moment == "during":
                os.kill(os.getpid(), signal.SIGKILL)
            real_replace(source, target)
            if deadly and part and moment == "after":
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
        result = real_perform(stage, batch, folder)
        with open(output + ".log", "a") as log:
            log.writelines(f"{name} {k}\\n" for k in batch["id"].to_pylist())
        return result
    parts.perform = perform
    pipeline.run(steps, tables.read_input(videos), Options(output=output, workers=1, batch_size=2, quiet=True))

kills = [(stage, moment) for stage in ("probe", "scene_cut", "fingerprint", "pack")
         for moment in ("before", "during", "after")]
for victim, moment in [*kills, (None, None)]:
    child = os.fork()
    if child == 0:
        try:
            run(victim, moment)
        finally:
            os._exit(0 if victim is None else 9)
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert died == (victim is not None), (victim, moment, status)
    leftovers = [f for _, _, names in os.walk(output) for f in names if f.startswith("part-") and f.endswith(".tmp")]
    assert not leftovers
"""


def test_killed_at_every_step_the_result_is_that_of_an_unbroken_run(tmp_path):
    videos = str(tmp_path / "videos")
    synthetic.plain(videos, 5)
    Path(videos, "broken.mp4").write_bytes(b"nothing")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    # The unbroken run has the same output path (paths are in the table) and moves away.
    results = []
    for script in (SCRIPT.replace("[*kills, (None, None)]", "[(None, None)]"), SCRIPT):
        done = subprocess.run(
            [sys.executable, "-c", script, videos, str(tmp_path / "out")], env=env, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        results.append(tree(tmp_path / "out"))
        log = (tmp_path / "out.log").read_text().split("\n")[:-1]
        os.rename(tmp_path / "out", tmp_path / f"out{len(results)}")
        os.rename(tmp_path / "out.log", tmp_path / f"log{len(results)}")
    assert results[0].keys() == results[1].keys() and any("array_record" in name for name in results[0])
    assert results[0] == results[1]
    assert len(log) == len(set(log)), "finished work was repeated"
