"""Captions from any server that speaks the OpenAI schema: vLLM, SGLang, Ollama, llama.cpp, hosted services.

    python -m data_pipelines.caption --input=WORK/table.parquet --output=DIR \\
        --base_url=http://localhost:8000/v1 --model=NAME

Frames are sampled from the clip (three for GPT-4 in the reports, four for PLLaVA, 32 for LLaVA-Next), sent as JPEG data
URLs with the prompt. 429, 5xx, time-outs and malformed answers are tried again with growing pauses; Retry-After is
obeyed. Every answer goes to a JSONL cache under (clip, prompt, model), so nothing is paid for twice. The key is read
from the environment variable `key_env`. Cost is counted from the server's own token counts.
"""

import base64
import dataclasses
import email.utils
import hashlib
import http.client
import io
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from data_pipelines import entry, files
from data_pipelines.caption_prompts import PROMPTS
from data_pipelines.decode import frames_at, spread
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError


class Caption(Stage):
    columns_in = ("path", "num_frames")
    columns_out = {
        "text": pa.string(),
        "caption_model": pa.string(),
        "caption_tokens": pa.int64(),
        "caption_finish": pa.string(),  # stop, or length where max_tokens cut it off
    }
    resources = Resources(num_cpus=0.25, max_workers=2)  # the server sets the pace; requests have threads of their own
    batch_size = 32
    pace = ("base_url", "key_env", "concurrency", "requests_per_minute", "timeout_seconds", "retries", "pause_seconds")
    pace += ("dollars_per_million_in", "dollars_per_million_out", "most_dollars")

    @dataclasses.dataclass(frozen=True)
    class Config:
        base_url: str  # of the server, for example http://localhost:8000/v1
        model: str  # its name on the server
        folder: str = ""  # of the cache
        prompt: str = "video"  # a name from caption_prompts.py, or the words themselves
        frames: int = 4  # sent of each clip
        side: int = 512  # longer side of the frames that are sent
        key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
        max_tokens: int = 300  # of an answer
        temperature: float = 0.0  # 0: the likeliest words
        concurrency: int = 8  # requests at a time
        requests_per_minute: int = 0  # 0: no limit
        timeout_seconds: float = 120.0  # of a request
        retries: int = 6  # of a request that failed
        pause_seconds: float = 1.0  # before the first retry; doubles each time
        dollars_per_million_in: float = 0.0  # price of tokens sent
        dollars_per_million_out: float = 0.0  # price of tokens received
        most_dollars: float = 0.0  # stop when the run has cost this much; 0: no limit

    @classmethod
    def check(cls, config):
        if not config.base_url.startswith(("http://", "https://")):
            raise UserError(f"caption.base_url must start with http:// or https://, not {config.base_url!r}")
        if "api.openai.com" in config.base_url and not os.environ.get(config.key_env):
            raise UserError(f"caption: {config.base_url} wants a key; put it in the environment as {config.key_env}")

    def __init__(self, config):
        super().__init__(config)
        self.prompt = PROMPTS.get(config.prompt, config.prompt)
        self.cache = Cache(
            config.folder, hashlib.sha1(f"{self.prompt}\0{config.frames}".encode()).hexdigest()[:12], config.model
        )
        self.client = Client(config)
        self.pool = ThreadPoolExecutor(config.concurrency)

    def rows(self, rows):
        return list(self.pool.map(self.one, rows))

    def one(self, row):
        try:
            answer = self.cache.get(row["id"])
            if answer is None:
                answer = self.client.ask(self.messages(row))
                self.cache.put(row["id"], answer)
            tokens = answer["tokens_in"] + answer["tokens_out"]
            return {
                "id": row["id"],
                "text": answer["text"],
                "caption_model": self.config.model,
                "caption_tokens": tokens,
                "caption_finish": answer.get("finish"),
            }
        except UserError:
            raise
        except Exception as error:
            return {"id": row["id"], "error": f"{type(error).__name__}: {error}"[:500]}

    def messages(self, row) -> list[dict]:
        images = frames_at(row["path"], spread(row["num_frames"], self.config.frames), longer=self.config.side)
        parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        return [{"role": "user", "content": [{"type": "text", "text": self.prompt}, *parts]}]

    @classmethod
    def finish(cls, table, config):
        report = cost_of(config)
        if report["requests"]:
            print(
                f"caption: {report['requests']} answers, {report['tokens_in']} + {report['tokens_out']} tokens, "
                f"${report['dollars']:.4f} (all runs on this output)",
                file=sys.stderr,
            )


def data_url(image) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class Cache:
    """Answers as JSON lines, one file a worker process; a line that a kill cut off is not an answer."""

    def __init__(self, folder: str, prompt: str, model: str):
        self.key = {"prompt": prompt, "model": model}
        self.lock = threading.Lock()
        self.answers = {a["id"]: a for a in stored(folder) if a["prompt"] == prompt and a["model"] == model}
        if files.is_remote(folder):  # an object store cannot append: part files alone remember there
            self.handle = None
            return
        files.make_folder(folder)
        self.handle = open(files.join(folder, f"answers-{os.getpid()}-{time.time_ns()}.jsonl"), "a")  # noqa: SIM115

    def get(self, name: str) -> dict | None:
        return self.answers.get(name)

    def put(self, name: str, answer: dict) -> None:
        with self.lock:
            self.answers[name] = answer
            if self.handle:
                self.handle.write(json.dumps({"id": name, **self.key, **answer}) + "\n")
                self.handle.flush()


def stored(folder: str):
    if not files.exists(folder):
        return
    for name in files.listing(folder, (".jsonl",)):
        for line in files.read_bytes(name).decode(errors="replace").splitlines():
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            if {"id", "prompt", "model", "text", "tokens_in", "tokens_out"} <= answer.keys():
                yield answer


def cost_of(config) -> dict:
    answers = list(stored(config.folder))
    tokens_in, tokens_out = (sum(a[k] for a in answers) for k in ("tokens_in", "tokens_out"))
    dollars = (tokens_in * config.dollars_per_million_in + tokens_out * config.dollars_per_million_out) / 1e6
    return {"requests": len(answers), "tokens_in": tokens_in, "tokens_out": tokens_out, "dollars": dollars}


class Refused(Exception):
    """An answer that another try will not better."""


class Client:
    """POST /chat/completions with patience."""

    def __init__(self, config):
        self.config = config
        self.gate = Gate(config.requests_per_minute)
        self.lock = threading.Lock()
        self.spent = cost_of(config)["dollars"] if config.most_dollars else 0.0

    def ask(self, messages: list[dict]) -> dict:
        config = self.config
        if config.most_dollars and self.spent >= config.most_dollars:
            raise UserError(
                f"caption: ${self.spent:.2f} spent, the limit caption.most_dollars={config.most_dollars} is reached"
            )
        body = {
            "model": config.model,
            "messages": messages,
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
        }
        data = json.dumps(body).encode()
        trouble: Exception | None = None
        for attempt in range(config.retries + 1):
            self.gate.wait()
            try:
                answer = self.post(data)
                with self.lock:
                    self.spent += answer["tokens_in"] * config.dollars_per_million_in / 1e6
                    self.spent += answer["tokens_out"] * config.dollars_per_million_out / 1e6
                return answer
            except urllib.error.HTTPError as error:
                detail = error.read(300).decode(errors="replace")
                trouble = Refused(f"HTTP {error.code}: {detail}")
                if error.code in (401, 403, 404):
                    raise UserError(
                        f"caption: {config.base_url} says {error.code} for {config.model}: {detail}"
                    ) from error
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise trouble from error
                asked = retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, IndexError) as error:
                trouble, asked = error, None
            if attempt < config.retries:
                time.sleep(asked if asked is not None else min(60.0, config.pause_seconds * 2**attempt))
        last = f"the last: {type(trouble).__name__}: {trouble}"
        raise Refused(f"no good answer from {config.base_url} in {config.retries + 1} tries; {last}")

    def post(self, data: bytes) -> dict:
        config = self.config
        headers = {"Content-Type": "application/json"}
        if os.environ.get(config.key_env):
            headers["Authorization"] = f"Bearer {os.environ[config.key_env]}"
        request = urllib.request.Request(config.base_url.rstrip("/") + "/chat/completions", data, headers)
        with urllib.request.urlopen(request, timeout=config.timeout_seconds) as response:
            answer = json.loads(response.read())
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError("an empty caption")
        usage = answer.get("usage") or {}
        counts = {"tokens_in": "prompt_tokens", "tokens_out": "completion_tokens"}
        facts = {"text": text.strip(), "finish": choice.get("finish_reason")}
        return facts | {ours: int(usage.get(theirs) or 0) for ours, theirs in counts.items()}


def retry_after(value: str | None) -> float | None:
    """Seconds, or a date; what is neither says nothing."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(300.0, max(0.0, seconds))


class Gate:
    """Lets requests through evenly, so many a minute."""

    def __init__(self, per_minute: int):
        self.gap = 60.0 / per_minute if per_minute else 0.0
        self.lock = threading.Lock()
        self.next = 0.0

    def wait(self) -> None:
        if not self.gap:
            return
        with self.lock:
            now = time.monotonic()
            due = max(now, self.next)
            self.next = due + self.gap
        time.sleep(max(0.0, due - now))


STAGE = Caption

if __name__ == "__main__":
    sys.exit(entry.stage(Caption))
