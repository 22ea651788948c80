"""Which index torch comes from, as uv resolves what was rendered.

PyTorch's own index is not needed: a server of this machine stands in for it and for PyPI, with empty packages. That the
real one still has each build is not shown here.
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
OF_PYTORCH = ("torch", "torchvision", "triton-rocm")
pytestmark = pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH; make test brings it along")


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *arguments: object) -> None:
        pass


def put_package(index: Path, name: str, version: str) -> None:
    """An empty wheel, and the page that lists it."""
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
    """PyPI at /pypi, PyTorch's index at /pytorch; everything is in both, and the versions say whose it is."""
    root = tmp_path_factory.mktemp("indexes")
    wanted = set()
    for tracker in CHOICES["tracker"]:
        project = tomllib.loads((render(tracker=tracker) / "pyproject.toml").read_text(encoding="utf-8"))
        wanted |= {*project["project"]["dependencies"], *project["dependency-groups"]["dev"]}
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
def test_uv_takes_torch_from_the_chosen_index_and_all_else_from_yours(render, server, tmp_path, build):
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
    own, yours = f"/pytorch/whl/{build}", "/pypi"
    for name, found in indexes.items():
        if build == "default" or name not in OF_PYTORCH:
            assert found == {yours}, name
        elif name == "triton-rocm":
            assert found == {own}, name
        else:
            assert found == {own, yours}, name  # yours on systems that the build is not made for
    assert ("triton-rocm" in indexes) == build.startswith("rocm")


def test_the_builds_are_asked_at_pytorchs_own_address(render):
    for build in CHOICES["torch"]:
        uv = tomllib.loads((render(torch=build) / "pyproject.toml").read_text(encoding="utf-8"))["tool"].get("uv")
        if build == "default":
            assert uv is None
        else:
            assert uv["index"] == [{"name": "pytorch", "url": f"{PYTORCH}/whl/{build}", "explicit": True}]
