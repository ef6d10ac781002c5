"""`make demo` in short: few clips, few steps, four prompts."""

import json

from PIL import Image

from tools import demo


def test_the_demo_ends_with_pictures_and_figures(tmp_path, monkeypatch, capfd):
    orange, known = demo.prompts()
    assert len(orange) == 24 and all("orange" in text for text in orange)
    assert len(known) == 24 and not any("orange" in text for text in known)
    monkeypatch.setenv("XLA_FLAGS", demo.QUICK["XLA_FLAGS"])  # the suite's own has eight devices
    monkeypatch.setattr(demo, "prompts", lambda: (orange[:2], known[:2]))
    out = tmp_path / "demo"
    demo.demo(out, minutes=0.1)
    said = capfd.readouterr()
    assert "orange prompts, all" in said.out and "(interrupting the run" in said.out and "resumed step" in said.err
    assert {path.name for path in out.iterdir()} >= {"before_after.png", "loss.png", "judged.json", "pipeline"}
    assert len(list((out / "videos/after").glob("*.mp4"))) == 2
    assert Image.open(out / "before_after.png").height > 240  # one scene, before and after
    judged = json.loads((out / "judged.json").read_text())
    assert judged["before"]["known"]["colour"] == 1 and judged["before"]["orange"]["colour"] == 0
