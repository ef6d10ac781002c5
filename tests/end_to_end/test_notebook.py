"""notebooks/sample.ipynb from top to bottom in a kernel of its own."""

import os
from pathlib import Path

import nbclient
import nbformat

REPO = Path(__file__).parents[2]


def test_the_notebook_runs_and_shows_videos(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as on a laptop
    notebook = nbformat.read(REPO / "notebooks/sample.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs do not belong in the repository"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    videos = [data["text/html"].count("data:video/mp4;base64,") for data in shown if "text/html" in data]
    assert videos == [1, 4], videos
    assert any("image/png" in data for data in shown)
