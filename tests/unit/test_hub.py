"""The hub's client against a small hub of our own on loopback: what is fetched, what is not, and how it fails."""

import json
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from mqinfer import checkpoint, hub
from mqinfer.errors import PlanError

COMMIT = "c0ffee" + "0" * 34
WEIGHT_BYTES = 1_000_000


def safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [WEIGHT_BYTES], "data_offsets": [0, WEIGHT_BYTES]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(WEIGHT_BYTES)


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(),
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"pickle",
}


class Hub(ThreadingHTTPServer):
    """One repository, org/tiny; its files, and how many bytes of each were served."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.served = dict.fromkeys(FILES, 0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path in ("api/models/org/tiny", "api/models/org/tiny/revision/v1"):
            self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT}).encode())
        elif path == f"api/models/org/tiny/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": "0" * 40}
                for name, body in self.server.files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith(f"org/tiny/resolve/{COMMIT}/"):
            self.file(path.partition(f"{COMMIT}/")[2])
        else:
            self.refuse(path)

    do_HEAD = do_GET

    def file(self, name: str) -> None:
        if name not in self.server.files:
            self.answer(b"", status=404, code="EntryNotFound")
            return
        body = self.server.files[name]
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            body = body[int(first) : int(last) + 1]
        if self.command == "GET":
            self.server.served[name] += len(body)
        self.answer(body)

    def refuse(self, path: str) -> None:
        if "gated" in path:
            self.answer(b"", status=403, code="GatedRepo")
        elif "broken" in path:
            self.answer(b"", status=400)
        elif "/revision/" in path:
            self.answer(b"", status=404, code="RevisionNotFound")
        else:
            self.answer(b"", status=404, code="RepoNotFound")

    def answer(self, body: bytes, *, status: int = 200, code: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with Hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        thread = Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_branch_or_tag_is_pinned_to_its_commit(server: Hub) -> None:
    assert hub.commit("org/tiny", "") == hub.commit("org/tiny", "v1") == COMMIT


def test_a_commit_is_itself_and_nobody_is_asked() -> None:
    assert hub.commit("org/none", COMMIT) == COMMIT


def test_headers_are_read_without_the_weights(server: Hub) -> None:
    tensors = hub.headers("org/tiny", COMMIT)
    assert tensors["a"].shape == (WEIGHT_BYTES,)
    assert 0 < server.served["model.safetensors"] < WEIGHT_BYTES / 5


def test_a_tokenizer_is_fetched_without_the_weights(server: Hub) -> None:
    folder = checkpoint.resolve_tokenizer("org/tiny", COMMIT)
    assert names(folder) == ["config.json", "tokenizer.json"]
    assert server.served["model.safetensors"] == 0


def test_a_checkpoint_is_fetched_with_safetensors_only(server: Hub) -> None:
    folder = checkpoint.resolve("org/tiny", COMMIT)
    assert names(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert folder.name == COMMIT


def test_what_is_fetched_already_is_not_fetched_again(server: Hub) -> None:
    first = checkpoint.resolve("org/tiny", COMMIT)
    served = dict(server.served)
    assert checkpoint.resolve("org/tiny", COMMIT) == first
    assert server.served == served


def test_a_repository_without_safetensors_is_refused(server: Hub) -> None:
    del server.files["model.safetensors"]
    with pytest.raises(PlanError, match="org/tiny has no safetensors weights on the hub"):
        hub.headers("org/tiny", COMMIT)


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("org/none", "", "org/none is neither a folder here nor on the hub"),
        ("org/gated", "", "org/gated is gated: accept its terms"),
        ("org/tiny", "v9", "org/tiny has no revision 'v9' on the hub"),
        ("org/broken", "", "the hub refuses org/broken: "),
        ("./models/tiny", "", "./models/tiny is neither a folder here nor a Hugging Face hub id"),
    ],
)
def test_what_the_hub_refuses_is_told_in_our_words(server: Hub, model: str, revision: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        hub.commit(model, revision)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_a_hub_that_can_not_be_reached_is_told(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PlanError, match="org/tiny is no folder here, and the hub can't be asked for it: "):
        hub.commit("org/tiny", "")


def test_offline_only_what_was_fetched_before_is_there(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = checkpoint.resolve("org/tiny", COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint.resolve("org/tiny", COMMIT) == folder
    with pytest.raises(PlanError, match="the hub can't be asked for it: "):
        checkpoint.resolve("org/other", COMMIT)
    with pytest.raises(PlanError, match="the hub can't be asked for it: "):
        hub.commit("org/tiny", "")
