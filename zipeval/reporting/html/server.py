"""Serve the page of a results directory on this machine, with its questions in pages. Imports no torch.

Only names that the directory itself has are looked up: no part of a request ever becomes a path. Whoever can reach the
address can read what it serves, and so it is this machine's own unless another is asked for by name. A foreign page
that this machine's browser shows cannot read it either: its requests name another host, or come from another origin.
"""

from __future__ import annotations

import errno
import gc
import ipaddress
import json
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from zipeval import __version__
from zipeval.errors import UsageError
from zipeval.reporting.html import browser
from zipeval.reporting.html.live import LiveResults

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
JSON, HTML, TEXT = (
    "application/json",
    "text/html; charset=utf-8",
    "text/plain; charset=utf-8",
)
JPEG, SVG = "image/jpeg", "image/svg+xml"
# In place of a picture that is not on this machine: of an image that is missing a browser would complain.
NO_PICTURE = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# The page has its policy in its head, where the file of `zipeval report` has one too.
POLICIES = {HTML: "frame-ancestors 'none'"}
NO_SOURCES = "default-src 'none'; frame-ancestors 'none'"
MOST_PARAMETERS = 32

Parameters = dict[str, str]
Answer = tuple[str, bytes]  # its type and its body


class Handler(BaseHTTPRequestHandler):
    """Answer one request."""

    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"zipeval/{__version__}", ""

    def do_GET(self) -> None:
        """Answer with what the path names; nothing else is served."""
        try:
            address = urlsplit(self.path)
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            parameters = dict(parse_qsl(address.query, max_num_fields=MOST_PARAMETERS))
        except ValueError:
            return self._refuse(HTTPStatus.BAD_REQUEST, "This is no address.")
        if address.netloc or not self.server.is_allowed(host):
            return self._refuse(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"This server is {self.server.url}, and answers requests that name it so.",
            )
        route = ROUTES.get(address.path)
        if route is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
        try:
            kind, body = route(self.server.results, parameters)
        except (KeyError, ValueError) as error:
            return self._refuse(
                HTTPStatus.NOT_FOUND, f"There is nothing here by that name: {error}."
            )
        except UsageError as error:  # the page shows it
            kind, body = JSON, _json({"problem": str(error)})
        self._send(HTTPStatus.OK, kind, body)

    def _only_get(self) -> None:
        self.close_connection = True  # a body may follow, which nobody reads
        self._refuse(
            HTTPStatus.METHOD_NOT_ALLOWED,
            "Nothing can be changed here.",
            {"Allow": "GET"},
        )

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = (
        do_CONNECT
    ) = _only_get

    def _refuse(
        self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None
    ) -> None:
        self._send(status, TEXT, f"{text}\n".encode(), headers)

    def _send(
        self,
        status: HTTPStatus,
        kind: str,
        body: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        content_headers = {"Content-Type": kind, "Content-Length": str(len(body))}
        content_headers["Content-Security-Policy"] = POLICIES.get(kind, NO_SOURCES)
        for name, value in {**HEADERS, **content_headers, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing of requests."""


class ViewServer(ThreadingHTTPServer):
    """The server of a results directory.

    Args:
        results: what it serves.
        host, port: where it listens; port 0 is any that is free.

    Raises:
        OSError: if it cannot listen there.
    """

    daemon_threads = True  # Ctrl-C waits for no browser

    def __init__(self, results: LiveResults, host: str, port: int):
        self.results, self.host = results, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """Return the address for a browser."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/"

    def is_allowed(self, host: str) -> bool:
        """Return whether a request may name a host.

        A foreign page can make its own name point to this machine (DNS rebinding), but it cannot take away that its
        requests bear this name. An address is no name.
        """
        if host in (*LOCAL_HOSTS, self.host):
            return True
        if self.host in LOCAL_HOSTS:
            return False
        return host in (
            socket.gethostname().lower(),
            socket.getfqdn().lower(),
        ) or _is_address(host)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless a browser only left."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(results: str, host: str = LOCAL_HOSTS[0], port: int = 0) -> None:
    """Serve a results directory until Ctrl-C.

    Args:
        host: another than this machine's own addresses lets others read the results.
        port: 0 takes a free one.

    Raises:
        UsageError: for a directory that is not there, and an address at which it cannot listen.
    """
    live = LiveResults(results)
    try:
        server = ViewServer(live, host, port)
    except OSError as error:
        raise _cannot_listen(error, host, port) from error
    with server:
        if host not in LOCAL_HOSTS:
            print(
                f"host={host}: whoever reaches this machine can read {results}.",
                file=sys.stderr,
            )
        print(f"{server.url} shows {results}. Ctrl-C ends it.", flush=True)
        # Samples are very many small objects without cycles. Python's search for cycles takes a sixth of the time in
        # which they are read.
        gc.set_threshold(100_000)
        live.read_ahead()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _cannot_listen(error: OSError, host: str, port: int) -> UsageError:
    """Return the refusal of an address."""
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"port={port}: something else listens there. Leave it out, and a free one is taken."
        )
    if error.errno == errno.EACCES:
        return UsageError(
            f"port={port}: this user may not listen there. Choose one from 1024 up, or leave it out."
        )
    return UsageError(
        f"host={host}: cannot listen there ({error.strerror or error}). Leave it out for this machine alone."
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _json(data: Any) -> bytes:
    return json.dumps(
        data, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    ).encode()


def _page(results: LiveResults, parameters: Parameters) -> Answer:
    text = results.page()
    results.read_ahead()
    return HTML, text.encode()


def _report(results: LiveResults, parameters: Parameters) -> Answer:
    try:
        return HTML, results.report().encode()
    except UsageError as error:
        return HTML, results.page(str(error)).encode()


def _sections(results: LiveResults, parameters: Parameters) -> Answer:
    return JSON, _json(
        {
            "sections": [
                browser.section_data(section) for section in results.now.sections()
            ]
        }
    )


def _rows(results: LiveResults, parameters: Parameters) -> Answer:
    """Return a page of the questions that a query wants, and how many there are."""
    snapshot = results.now
    section = snapshot.section(parameters.get("table", ""))
    selection = snapshot.select(
        section.identity, browser.checked_query(section, parameters)
    )
    start = max(0, int(parameters.get("page", "1")) - 1) * browser.PAGE
    rows = [
        browser.row_data(section.benchmarks[task], row, selection.runs)
        for task, row in selection.places[start : start + browser.PAGE]
    ]
    return JSON, _json(
        {"total": len(selection.places), "runs": selection.runs, "rows": rows}
    )


def _sample(results: LiveResults, parameters: Parameters) -> Answer:
    """Return a question with what became of its visual tokens, and its neighbours among those that a query wants."""
    snapshot = results.now
    section = snapshot.section(parameters.get("table", ""))
    questions, document = section.benchmarks[parameters["task"]], parameters["document"]
    if document not in questions.row_of:  # an old link; the page says so
        raise UsageError(f"There is no question {document} of {questions.task} here.")
    row = questions.row_of[document]
    selection = snapshot.select(
        section.identity, browser.checked_query(section, parameters)
    )
    place = (questions.task, row)
    position = selection.places.index(place) if place in selection.places else -1
    picture = snapshot.picture(section.identity, questions.task, document)
    try:
        tokens = browser.token_data(questions, row)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The samples changed meanwhile ({error}). Reload the page."
        ) from error
    return JSON, _json(
        {
            "row": browser.row_data(questions, row, selection.runs),
            "tokens": tokens,
            "pictured": picture is not None,
            "position": position,
            "total": len(selection.places),
            "neighbours": [
                _named(section, selection, position + step) if position >= 0 else None
                for step in (-1, 1)
            ],
        }
    )


def _named(
    section: browser.Section, selection: browser.Selection, position: int
) -> list[str] | None:
    """Return the task and the document of a question of a selection; None beyond its ends."""
    if not 0 <= position < len(selection.places):
        return None
    task, row = selection.places[position]
    return [task, section.benchmarks[task].documents[row]]


def _picture(results: LiveResults, parameters: Parameters) -> Answer:
    snapshot = results.now
    section = snapshot.section(parameters.get("table", ""))
    picture = snapshot.picture(
        section.identity, parameters["task"], parameters["document"]
    )
    return (SVG, NO_PICTURE) if picture is None else (JPEG, picture)


ROUTES: dict[str, Callable[[LiveResults, Parameters], Answer]] = {
    "/": _page,
    "/report": _report,
    "/api/sections": _sections,
    "/api/rows": _rows,
    "/api/sample": _sample,
    "/picture": _picture,
}
