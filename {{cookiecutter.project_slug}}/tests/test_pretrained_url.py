"""Pretrained weights from a URL (--pretrained URL#sha256=...), from a server of this machine."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from models import plain_model
from processes import run_ranks
from torch import nn

from batteries.core.errors import UserError
from batteries.distributed.connectivity import find_free_port
from batteries.training.pretrained import load_pretrained


class Server(ThreadingHTTPServer):
    """Serves a directory and counts the requests."""

    def __init__(self, directory: Path) -> None:
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(directory)))


class Handler(SimpleHTTPRequestHandler):
    """Serve files without logging."""

    def log_message(self, *arguments: object) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "served").mkdir()
    torch.save(plain_model().state_dict(), tmp_path / "served/weights.pth")
    made = Server(tmp_path / "served")
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def url_of(server: Server, name: str = "weights.pth") -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


def digest_of(tmp_path: Path) -> str:
    return hashlib.sha256((tmp_path / "served/weights.pth").read_bytes()).hexdigest()


def load(source: str) -> list[float]:
    model = plain_model()
    nn.init.zeros_(model[1].weight)
    assert load_pretrained(model, source) == ([], [])
    return model[1].weight.flatten().tolist()


def test_file_is_downloaded_once_for_all_ranks_and_then_read_from_the_cache(server, tmp_path):
    source = f"{url_of(server)}#sha256={digest_of(tmp_path)}"
    expected = plain_model()[1].weight.flatten().tolist()
    assert run_ranks(2, lambda: load(source)) == [expected] * 2
    assert len(server.requests) == 1
    server.shutdown()
    assert load(source.replace(digest_of(tmp_path), digest_of(tmp_path).upper())) == expected


def test_changed_file_in_the_cache_is_downloaded_again(server, tmp_path):
    source = f"{url_of(server)}#sha256={digest_of(tmp_path)}"
    expected = load(source)
    [cached] = (tmp_path / "home/hub/checkpoints").iterdir()
    cached.write_bytes(cached.read_bytes()[:-1])
    assert load(source) == expected
    assert len(server.requests) == 2


def message(source: str) -> str:
    with pytest.raises(UserError) as error:
        load_pretrained(plain_model(), source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_file_with_another_checksum_is_not_loaded_and_not_kept(server, tmp_path):
    found = message(f"{url_of(server)}#sha256={'0' * 64}")
    assert found == f"--pretrained {url_of(server)} has another sha256 than {'0' * 64}; nothing was loaded."
    assert list((tmp_path / "home/hub/checkpoints").iterdir()) == []


@pytest.mark.parametrize("suffix", ["", "#sha256=12ab", "#sha256="])
def test_url_without_a_checksum_is_rejected(server, suffix):
    assert message(url_of(server) + suffix).startswith(f"--pretrained {url_of(server)}{suffix} needs the checksum of ")
    assert not server.requests


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("{server}/gone.pth", "HTTP Error 404: File not found"),
        ("http://127.0.0.1:{port}/weights.pth", "refused"),
        ("http:///weights.pth", "no host given"),
        ("zzz://example.org/weights.pth", "unknown url type"),
    ],
)
def test_url_that_cannot_be_downloaded_is_rejected(server, url, reason):
    url = url.format(server=url_of(server, "").rstrip("/"), port=find_free_port())
    found = message(f"{url}#sha256={'0' * 64}")
    assert found.startswith(f"--pretrained {url} cannot be downloaded (")
    assert reason in found
    assert found.endswith("); on a machine without network, give a file.")
