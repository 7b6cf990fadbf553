"""What the hub may answer, said by a server that answers so; huggingface_hub is the real one, in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LISTING = json.dumps(
    [{"type": "file", "path": "config.json", "size": 2, "oid": COMMIT}]
).encode()


class Hub(BaseHTTPRequestHandler):
    """Every organisation of this hub has its own trouble."""

    def answer(self):
        trouble = next((t for t in TROUBLES if f"/{t}/" in self.path), "down")
        status, code, message = TROUBLES[trouble]
        if trouble == "drops":
            self.close_connection = True
            return
        listed = trouble == "gated_files" and "/tree/" in self.path
        self.send_response(200 if listed else status)
        if not listed and code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(LISTING) if listed else 0))
        self.end_headers()
        if listed:
            self.wfile.write(LISTING)

    do_GET = do_HEAD = answer

    def log_message(self, *args):
        pass


TROUBLES = {
    "stale": (404, "RevisionNotFound", "Invalid rev id"),
    "missing": (404, "RepoNotFound", "Repository not found"),
    "unknown": (
        401,
        None,
        "Invalid username or password.",
    ),  # what the hub says of missing ones to the nameless
    "gated": (401, "GatedRepo", "Access is restricted"),
    "gated_files": (403, "GatedRepo", "Access is restricted"),
    "down": (503, None, "Service Unavailable"),
    "drops": (0, None, ""),
}


@pytest.fixture(scope="module")
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def refused(root, endpoint, *arguments, offline="0"):
    """What `zipeval run` says on an empty cache."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "zipeval",
            "run",
            "model=llava15",
            "model.revision=null",
            "suite=shapes",
            *arguments,
        ],
        cwd=root,
        env={
            **os.environ,
            "HF_HOME": str(root),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": offline,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("zipeval: ")


GATED = "it is gated. Ask for access at {hub}/{id}, then run `hf auth login`."
UNKNOWN = "no such repository, or a private one. Correct it, or run `hf auth login`."


@pytest.mark.parametrize(
    "hub_id, expected",
    [
        ("missing/m", UNKNOWN),
        ("unknown/m", UNKNOWN),
        ("gated/m", GATED),
        ("gated_files/m", GATED),
    ],
)
def test_repositories_that_are_not_given(hub_id, expected, hub, tmp_path):
    said = refused(tmp_path, hub, f"model.hub={hub_id}", f"model.revision={COMMIT}")
    assert said == f"model.hub={hub_id}: {expected.format(hub=hub, id=hub_id)}"


@pytest.mark.parametrize("revision", ["v9", COMMIT])
def test_a_revision_that_is_not_there(revision, hub, tmp_path):
    said = refused(tmp_path, hub, "model.hub=stale/m", f"model.revision={revision}")
    assert said.startswith(
        f"model.revision={revision}: stale/m has no such commit, branch or tag."
    )
    assert "model.revision=null" in said


@pytest.mark.parametrize(
    "trouble, reason",
    [("down", "503"), ("drops", "disconnected"), ("nobody", "refused")],
)
def test_a_hub_that_does_not_answer(trouble, reason, hub, tmp_path):
    endpoint = (
        "http://127.0.0.1:9" if trouble == "nobody" else hub
    )  # nothing listens there
    said = refused(tmp_path, endpoint, f"model.hub={trouble}/m")
    missing = f"model=llava15: {trouble}/m is not in the Hugging Face cache and {endpoint} did not give it"
    assert said.startswith(missing)
    assert reason in said
    assert f"run `hf download {trouble}/m`" in said


def test_offline(hub, tmp_path):
    said = refused(tmp_path, hub, "model.hub=down/m", "model.revision=v1", offline="1")
    assert said.startswith(
        "model=llava15: down/m is not in the Hugging Face cache and HF_HUB_OFFLINE is set."
    )
    assert "run `hf download down/m --revision v1`" in said
