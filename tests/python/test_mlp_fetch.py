"""The download of examples/mlp, against a file server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlp import fetch

CONTENTS = {
    name: f"contents of {name}, long enough for several packets: ".encode() * 2000
    for name in fetch.MNIST_MD5
}
FILES = {name: gzip.compress(contents) for name, contents in CONTENTS.items()}
CHECKSUMS = {name: hashlib.md5(contents).hexdigest() for name, contents in CONTENTS.items()}
FIRST, SECOND, *_ = FILES

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Serves FILES below /data/; `answers` replaces the answer for a file name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.answers: dict[str, Answer] = {}
        self.stopping = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/data/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        folder, _, name = self.path.rpartition("/")
        self.server.asked.append(name)
        if answer := self.server.answers.get(name):
            answer(self)
        elif folder == "/data" and name in FILES:
            send(self, FILES[name])
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def send(
    handler: BaseHTTPRequestHandler, contents: bytes, announced: int | str | None = None
) -> None:
    handler.send_response(200)
    length = len(contents) if announced is None else announced
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(contents)
    handler.wfile.flush()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # A proxy set for this machine must not be asked for 127.0.0.1.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        # shutdown() waits for the next poll.
        loop = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        loop.start()
        yield running
        running.stopping.set()
        running.shutdown()
        loop.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "not" / "yet" / "there"


def run(server: Server, cache: Path, **options: object) -> Path:
    return fetch.fetch_mnist(
        server.url, cache, **{"checksums": CHECKSUMS, "progress": False, **options}
    )


def refusal(server: Server, cache: Path, **options: object) -> str:
    """The message of the FetchError, which must be one line that names the first file."""
    with pytest.raises(fetch.FetchError) as raised:
        run(server, cache, **options)
    message = str(raised.value)
    assert message.startswith(f"{server.url}{FIRST}: ")
    assert "\n" not in message
    return message


def stored(cache: Path) -> dict[str, bytes]:
    """Everything in the cache, temporary or not."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*")}


def test_fetches_once(server: Server, cache: Path) -> None:
    assert run(server, cache) == cache
    assert stored(cache) == FILES
    assert server.asked == list(FILES)
    assert run(server, cache) == cache
    assert server.asked == list(FILES)


def test_address_without_a_slash_at_its_end(server: Server, cache: Path) -> None:
    server.url = server.url.rstrip("/")
    run(server, cache)
    assert stored(cache) == FILES


def test_asks_for_the_file_as_it_is_stored(server: Server, cache: Path) -> None:
    accepted = []

    def note(handler: BaseHTTPRequestHandler) -> None:
        accepted.append(handler.headers["Accept-Encoding"])
        send(handler, FILES[FIRST])

    server.answers[FIRST] = note
    run(server, cache)
    assert accepted == ["identity"]


def test_the_container_may_differ(server: Server, cache: Path) -> None:
    plain = CONTENTS[FIRST]
    other = gzip.compress(plain, 1, mtime=1)
    assert other != FILES[FIRST]
    server.answers = {
        FIRST: lambda handler: send(handler, other),
        SECOND: lambda handler: send(handler, CONTENTS[SECOND]),
    }
    run(server, cache)
    assert stored(cache) == FILES | {FIRST: other, SECOND: CONTENTS[SECOND]}


@pytest.mark.parametrize(
    "damaged",
    [gzip.compress(b"wrong"), FILES[SECOND][:-1], b"", b"\x1f\x8bnot gzip"],
    ids=["wrong", "cut", "empty", "corrupt"],
)
def test_replaces_only_what_is_wrong_in_the_cache(
    server: Server, cache: Path, damaged: bytes
) -> None:
    run(server, cache)
    server.asked.clear()
    (cache / SECOND).write_bytes(damaged)
    run(server, cache)
    assert server.asked == [SECOND]
    assert stored(cache) == FILES


def test_a_failed_fetch_deletes_no_file_of_the_user(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / FIRST).write_bytes(b"another file")
    server.answers[FIRST] = lambda handler: handler.send_error(404)
    refusal(server, cache)
    assert stored(cache) == {FIRST: b"another file"}


def test_wrong_contents_are_deleted(server: Server, cache: Path) -> None:
    server.answers[FIRST] = lambda handler: send(handler, gzip.compress(b"wrong"))
    message = refusal(server, cache)
    assert hashlib.md5(b"wrong").hexdigest() in message
    assert CHECKSUMS[FIRST] in message
    assert stored(cache) == {}


def test_a_damaged_file_is_deleted(server: Server, cache: Path) -> None:
    server.answers[FIRST] = lambda handler: send(handler, FILES[FIRST][:-9])
    assert "damaged download: cut or corrupt gzip" in refusal(server, cache)
    assert stored(cache) == {}


@pytest.mark.parametrize("status", [404, 503])
def test_the_servers_refusal(server: Server, cache: Path, status: int) -> None:
    server.answers[FIRST] = lambda handler: handler.send_error(status)
    assert str(status) in refusal(server, cache)
    assert stored(cache) == {}


def test_an_answer_that_is_not_http(server: Server, cache: Path) -> None:
    server.answers[FIRST] = lambda handler: send(handler, FILES[FIRST], "many")
    assert "'many'" in refusal(server, cache)
    assert stored(cache) == {}


def test_a_later_failure_keeps_what_was_right(server: Server, cache: Path) -> None:
    server.answers[SECOND] = lambda handler: handler.send_error(404)
    with pytest.raises(fetch.FetchError, match=SECOND):
        run(server, cache)
    assert stored(cache) == {FIRST: FILES[FIRST]}
    server.answers.clear()
    server.asked.clear()
    run(server, cache)
    assert server.asked == list(FILES)[1:]
    assert stored(cache) == FILES


def test_a_transfer_that_breaks_off(server: Server, cache: Path) -> None:
    # The contents are complete, so that only the announced length tells.
    contents = FILES[FIRST]
    server.answers[FIRST] = lambda handler: send(handler, contents, len(contents) + 10)
    assert "10 more expected" in refusal(server, cache)
    assert stored(cache) == {}


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced"])
def test_the_download_is_bounded(server: Server, cache: Path, announced: bool) -> None:
    def pour(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if announced:
            handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        # The client goes away; 64 MiB end the test should it not.
        for _ in range(1 << 10):
            try:
                handler.wfile.write(bytes(1 << 16))
            except OSError:
                return

    server.answers[FIRST] = pour
    assert "larger than the 100000 bytes" in refusal(server, cache, max_bytes=100_000)
    assert stored(cache) == {}


@pytest.mark.parametrize("part", [None, 0, 100], ids=["no answer", "no body", "half a body"])
def test_a_server_that_hangs(server: Server, cache: Path, part: int | None) -> None:
    def hang(handler: BaseHTTPRequestHandler) -> None:
        if part is not None:
            send(handler, FILES[FIRST][:part], len(FILES[FIRST]))
        server.stopping.wait(30)

    server.answers[FIRST] = hang
    begin = time.monotonic()
    assert "timed out" in refusal(server, cache, timeout=0.2)
    # Far above the timeout on a busy machine, far below the 30 s of the server.
    assert time.monotonic() - begin < 10
    assert stored(cache) == {}


def test_an_interrupted_download_leaves_nothing(server: Server, cache: Path) -> None:
    def interrupt(handler: BaseHTTPRequestHandler) -> None:
        send(handler, FILES[FIRST][:100], len(FILES[FIRST]))
        # Until the client waits for the rest: inside open() even a with block loses the file.
        server.stopping.wait(0.2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        server.stopping.wait(30)

    server.answers[FIRST] = interrupt
    # A process started in the background of a shell ignores the signal.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(server, cache, timeout=30)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert stored(cache) == {}


def test_nothing_listens(tmp_path: Path) -> None:
    with socket.socket() as held:
        # Bound but not listening: the port is ours and refuses.
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/"
        with pytest.raises(fetch.FetchError, match="Connection refused"):
            fetch.fetch_mnist(url, tmp_path, progress=False)
    assert stored(tmp_path) == {}


@pytest.mark.parametrize("url", ["", "nonsense", "file:///tmp/", "http://[::bad/"])
def test_an_address_that_is_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(fetch.FetchError, match=FIRST):
        fetch.fetch_mnist(url, tmp_path, progress=False)


def test_a_cache_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(server, tmp_path / "file" / "cache")
    assert server.asked == []


def test_the_progress_bar(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(server, cache, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(name[:12] in printed.err for name in FILES)
    run(server, cache, progress=True)
    assert capsys.readouterr().err == ""


def test_default_cache_is_the_users(server: Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetch.pooch, "os_cache", lambda project: tmp_path / project)
    found = fetch.fetch_mnist(server.url, checksums=CHECKSUMS, progress=False)
    assert found == tmp_path / "torch_bn" / "mnist"
    assert stored(found) == FILES


def test_md5_of_bounded_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(1 << 22)))
    monkeypatch.setattr(fetch.idx, "MAX_BYTES", 1000)
    with pytest.raises(fetch.idx.IdxError, match="more than 1000 bytes"):
        fetch.content_md5(path)
