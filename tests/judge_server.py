"""A judge on this machine: a real HTTP server whose replies a test chooses.

    python tests/judge_server.py

serves a judge for judge.url= that likes every answer, to try everything without a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread


class Judge:
    """What it is asked is kept.

    Attributes:
        reply: (prompt) -> its text, or (status, text of the error); (200, what is sent in place of a reply).
        prompts, paths, keys, models: of every request.
    """

    def __init__(self, url: str, reply: Callable[[str], str | tuple[int, str]]):
        self.url, self.reply = url, reply
        self.prompts: list[str] = []
        self.paths: list[str] = []
        self.keys: list[str] = []
        self.models: list[str] = []


def kind(prompt: str) -> str:
    """Which protocol asks."""
    if "find which option is most similar" in prompt:
        return "mmbench"
    if "gpt_query_prompt | Ground truth" in prompt:
        return "mmvet"
    return "llava_bench" if prompt.startswith("[Context]") else "videoqa"


def likes_all(prompt: str) -> str:
    return {
        "mmbench": "A",
        "mmvet": "1.0",
        "llava_bench": "8 8\nBoth are fine.",
        "videoqa": LIKED,
    }[kind(prompt)]


LIKED = "{'pred': 'yes', 'score': 5}"


@contextmanager
def serving(reply: Callable[[str], str | tuple[int, str]]) -> Iterator[Judge]:
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with lock:
                judge.prompts.append(prompt)
                judge.paths.append(self.path)
                judge.keys.append(self.headers["Authorization"])
                judge.models.append(body["model"])
            said = judge.reply(prompt)
            status, text = said if isinstance(said, tuple) else (200, said)
            if status != 200:
                # As some servers do, it repeats whatever it was sent.
                answer = {
                    "error": {"message": f"{text} {self.headers['Authorization']}"}
                }
            else:
                message = {"role": "assistant", "content": text}
                choices = [{"index": 0, "finish_reason": "stop", "message": message}]
                answer = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "m",
                    "choices": choices,
                }
            whole = isinstance(said, tuple) and status == 200
            content = (text if whole else json.dumps(answer)).encode(
                errors="surrogateescape"
            )
            with suppress(ConnectionError):  # who asked did not wait
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge = Judge(f"http://127.0.0.1:{server.server_port}/v1", reply)
        Thread(target=server.serve_forever, daemon=True).start()
        yield judge
        server.shutdown()


if __name__ == "__main__":
    with serving(likes_all) as running:
        print(f"judge.url={running.url} judge.model=any", flush=True)
        Event().wait()
