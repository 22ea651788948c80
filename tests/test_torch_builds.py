"""uv resolves torch of a generated repository from the chosen index.

PyTorch's index is not needed: a local server with empty packages replaces it and PyPI. Whether the real index still has
each build is not tested.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from options import CHOICES

PYTORCH = "https://download.pytorch.org"
PYTORCH_PACKAGES = ("torch", "torchcodec", "torchvision", "triton-rocm")
pytestmark = pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH; make test installs it")


class Quiet(SimpleHTTPRequestHandler):
    """Serve files without logging."""

    def log_message(self, *arguments: object) -> None:
        pass


def put_package(index: Path, name: str, version: str) -> None:
    """Write an empty wheel, and the index page that lists it."""
    page = index / name
    page.mkdir(parents=True)
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(page / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    (page / "index.html").write_text(f'<a href="{stem}-py3-none-any.whl">{stem}</a>')


@pytest.fixture(scope="module")
def server(render, tmp_path_factory) -> Iterator[str]:
    """PyPI at /pypi and PyTorch's index at /pytorch; both have every package, in different versions."""
    root = tmp_path_factory.mktemp("indexes")
    wanted = set()
    for tracker in CHOICES["tracker"]:
        project = tomllib.loads((render(tracker=tracker) / "pyproject.toml").read_text(encoding="utf-8"))
        wanted |= {*project["project"]["dependencies"], *project["dependency-groups"]["dev"]}
        wanted |= {*project["project"].get("optional-dependencies", {}).get("sweep", [])}
    for name in {re.split(r"[<>=; ]", dependency)[0].lower() for dependency in wanted}:
        put_package(root / "pypi", name, "9999.0")
        for build in CHOICES["torch"]:
            put_package(root / "pytorch/whl" / build, name, f"99999.0+{build}")
    for build in CHOICES["torch"]:
        put_package(root / "pytorch/whl" / build, "triton-rocm", f"99999.0+{build}")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("build", CHOICES["torch"])
def test_only_torch_comes_from_the_chosen_index(render, server, tmp_path, build):
    text = (render(torch=build) / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text.replace(PYTORCH, f"{server}/pytorch"), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    environment |= {"UV_DEFAULT_INDEX": f"{server}/pypi", "NO_PROXY": "127.0.0.1", "UV_NO_CACHE": "1"}
    done = subprocess.run(
        ["uv", "lock", "--python", sys.executable], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    locked = tomllib.loads((tmp_path / "uv.lock").read_text(encoding="utf-8"))["package"]
    indexes: dict[str, set[str]] = {}
    for package in locked:
        indexes.setdefault(package["name"], set()).add(package["source"].get("registry", "here").removeprefix(server))
    assert indexes.pop("my-experiment") == {"here"}
    chosen = f"/pytorch/whl/{build}"
    default = "/pypi"
    for name, found in indexes.items():
        if build == "default" or name not in PYTORCH_PACKAGES:
            assert found == {default}, name
        elif name == "triton-rocm":
            assert found == {chosen}, name
        elif name == "torchcodec":
            assert found == {"/pytorch/whl/cpu", default}, name
        else:
            assert found == {chosen, default}, name  # the default on systems without this build
    assert ("triton-rocm" in indexes) == build.startswith("rocm")


def test_the_index_of_a_build_has_pytorchs_address(render):
    for build in CHOICES["torch"]:
        uv = tomllib.loads((render(torch=build) / "pyproject.toml").read_text(encoding="utf-8"))["tool"].get("uv")
        if build == "default":
            assert uv is None
        else:
            of_cpu = {"name": "pytorch-cpu", "url": f"{PYTORCH}/whl/cpu", "explicit": True}
            of_torch = {"name": "pytorch", "url": f"{PYTORCH}/whl/{build}", "explicit": True}
            assert uv["index"] == [of_torch] if build == "cpu" else [of_torch, of_cpu]
