"""The captioner against a real HTTP server with the OpenAI schema that misbehaves in every way a server can."""

import base64
import collections
import contextlib
import email.utils
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest
from PIL import Image

from data_pipelines import files, pipeline, synthetic
from data_pipelines.caption import Client, cost_of, retry_after
from data_pipelines.pipeline import Options
from data_pipelines.stage import configure, find
from opensora_jax.common.errors import UserError
from tests.data_pipelines.steps import step

TROUBLES = ("429", "500", "timeout", "not json", "no choices", "null", "no text", "empty", "cut", "none")


class Server(ThreadingHTTPServer):
    """Each clip (told apart by the mean colour of its first frame) meets its own trouble once, then is answered."""

    def __init__(self, troubles=TROUBLES):
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles, self.requests, self.met = list(troubles), [], {}
        self.lock = threading.Lock()
        self.forever: str | None = None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def trouble(self, clip):
        with self.lock:
            if self.forever:
                return self.forever
            if clip not in self.met and self.troubles:
                self.met[clip] = self.troubles.pop()
                return self.met[clip]
            return "none"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][0]["content"]
        images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        first = Image.open(io.BytesIO(base64.b64decode(images[0].split(",")[1])))
        self.server.requests.append(
            {"path": self.path, "auth": self.headers["Authorization"], "time": time.monotonic()}
        )
        self.server.requests[-1] |= {"body": body, "images": len(images), "size": first.size}
        trouble = self.server.trouble(hash(images[0]))
        good = {
            "choices": [
                {
                    "message": {"role": "assistant", "content": f" a clip with {len(images)} frames "},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
        }
        if trouble == "timeout":
            time.sleep(0.6)
        status = int(trouble) if trouble.isdigit() else 200
        answers = {
            "not json": b"<html>busy</html>",
            "no choices": b'{"choices": []}',
            "null": b"null",
            "cut": b'{"choices"',
        }
        if trouble in ("empty", "no text"):
            good["choices"][0]["message"]["content"] = "  " if trouble == "empty" else None
        data = answers.get(trouble) or json.dumps(good if status == 200 else {"error": {"message": "not now"}}).encode()
        self.send_response(status)
        if trouble == "429":
            self.send_header("Retry-After", "0.2")
        self.send_header("Content-Length", str(len(data) + (50 if trouble == "cut" else 0)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)


@pytest.fixture
def server():
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    synthetic.plain(str(folder), len(TROUBLES))
    paths = [str(p) for p in sorted(folder.iterdir())]
    ids = [f"clip{k}" for k in range(len(paths))]
    return pa.table({"id": ids, "path": paths, "num_frames": [24] * len(paths)})


def captioner(server, **options):
    patience = {"pause_seconds": 0.01, "timeout_seconds": 0.3, "side": 48, "concurrency": 3}
    return step("caption", base_url=server.url, model="eye", **{**patience, **options})


def test_every_kind_of_trouble_is_survived_and_answers_are_kept(server, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    plan = captioner(server, frames=3, dollars_per_million_in=2.5, dollars_per_million_out=10.0)
    output = Options(str(tmp_path / "out"), quiet=True)
    made = pipeline.run([plan], clips, output)
    assert made["text"].to_pylist() == ["a clip with 3 frames"] * len(TROUBLES)
    assert set(made["caption_finish"].to_pylist()) == {"stop"}
    assert sorted(server.met.values()) == sorted(TROUBLES), "each trouble was met"
    assert len(server.requests) == 2 * len(TROUBLES) - 1
    asked = server.requests[0]
    assert asked["path"] == "/v1/chat/completions" and asked["auth"] == "Bearer sesame" and asked["size"] == (48, 48)
    assert asked["body"]["model"] == "eye" and asked["body"]["temperature"] == 0
    dollars = len(TROUBLES) * (1000 * 2.5 + 100 * 10) / 1e6
    placed = pipeline.placed(plan, str(tmp_path / "out")).config
    assert cost_of(placed)["dollars"] == pytest.approx(dollars)
    assert f"${dollars:.4f}" in capsys.readouterr().err
    # Parts lost but the cache there, with a line that a kill cut off: nothing is asked again.
    for name in files.listing(str(tmp_path / "out" / "meta"), (".parquet",)):
        files.remove(name)
    cache = files.listing(str(tmp_path / "out" / "caption"), (".jsonl",))[0]
    with open(cache, "a") as handle:
        handle.write('{"id": "clip0", "prompt": "cu')
    asked = len(server.requests)
    assert pipeline.run([plan], clips, output).equals(made) and len(server.requests) == asked


def test_what_never_works_is_an_error_of_the_row_or_of_the_user(server, clips, tmp_path):
    server.forever = "500"
    with pytest.raises(UserError, match=r"10 of 10 rows failed.*no good answer from http.* in 2 tries; the last.*500"):
        pipeline.run([captioner(server, retries=1)], clips, Options(str(tmp_path / "a"), quiet=True))
    assert len(server.requests) == 2 * len(TROUBLES)
    server.forever = "400"  # our request is wrong: another try would not better it
    client = Client(configure(find("caption"), {"base_url": server.url, "model": "eye", "pause_seconds": 0.01}))
    asked = len(server.requests)
    message = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "," + pixel()}}]}]
    with pytest.raises(Exception, match="HTTP 400"):
        client.ask(message)
    assert len(server.requests) == asked + 1
    server.forever = "401"
    with pytest.raises(UserError, match="says 401 for eye"):
        client.ask(message)
    server.forever = None
    client.spent, client.config = (
        1.5,
        configure(find("caption"), {"base_url": server.url, "model": "eye", "most_dollars": 1}),
    )
    with pytest.raises(UserError, match=r"\$1.50 spent"):
        client.ask(message)


def pixel():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_failed_rows_are_tried_again_when_asked(server, clips, tmp_path):
    server.troubles = []
    server.forever = "500"
    plan = [captioner(server, retries=0)]
    with pytest.raises(UserError):
        pipeline.run(plan, clips, Options(str(tmp_path), quiet=True))
    server.forever = None
    with pytest.raises(UserError):
        pipeline.run(plan, clips, Options(str(tmp_path), quiet=True))
    made = pipeline.run(plan, clips, Options(str(tmp_path), quiet=True, retry_errors=True))
    assert collections.Counter(made["text"].to_pylist()) == {"a clip with 4 frames": len(TROUBLES)}
    assert not (tmp_path / "rejected" / "00_caption.parquet").exists()


def test_a_resumed_run_may_change_its_patience_but_not_its_question(server, clips, tmp_path):
    server.troubles, options = [], Options(str(tmp_path), quiet=True)
    first = pipeline.run([captioner(server)], clips, options)
    asked = len(server.requests)
    patient = captioner(server, concurrency=1, timeout_seconds=9, requests_per_minute=5)
    assert pipeline.run([patient], clips, options).equals(first) and len(server.requests) == asked
    with pytest.raises(UserError, match=r"another setting of caption\.frames"):
        pipeline.run([captioner(server, frames=2)], clips, options)


def test_requests_keep_the_pace(server, clips, tmp_path):
    server.troubles = []
    pipeline.run([captioner(server, requests_per_minute=1200)], clips, Options(str(tmp_path), quiet=True))
    times = sorted(request["time"] for request in server.requests)
    assert times[-1] - times[0] >= 0.9 * (len(TROUBLES) - 1) * 60 / 1200


def test_how_long_a_server_asks_to_wait():
    assert retry_after(None) is None and retry_after("soon") is None
    assert retry_after("2.5") == 2.5 and retry_after("-3") == 0 and retry_after("9999") == 300
    assert 50 < retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60


def test_wrong_flags_are_told_before_anything_starts(clips, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    run = lambda plan: pipeline.run([plan], clips, Options(str(tmp_path), quiet=True))
    with pytest.raises(UserError, match="must start with http"):
        run(step("caption", base_url="localhost:8000", model="m"))
    with pytest.raises(UserError, match="wants a key; put it in the environment as OPENAI_API_KEY"):
        run(step("caption", base_url="https://api.openai.com/v1", model="m"))
    with pytest.raises(UserError, match="needs --base_url"):
        step("caption", model="m")
    with pytest.raises(UserError, match="give --model=FOLDER"):
        run(step("caption_local"))
