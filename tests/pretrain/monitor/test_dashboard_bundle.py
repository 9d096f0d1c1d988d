"""What browsers get: complete, from these sources, and nothing in it that points elsewhere."""

import hashlib
import json
import re
from pathlib import Path

import pytest

import pretrain.monitor

HERE = Path(pretrain.monitor.__file__).parent
STATIC, FRONTEND = HERE / "static", HERE / "frontend"
NAMES = ("http://www.w3.org/",)
"""Names of XML languages; no browser asks them."""


@pytest.mark.parametrize("name", ["index.html", "app.js", "app.css", "favicon.svg"])
def test_it_names_no_outside_address(name: str) -> None:
    text = (STATIC / name).read_text()
    assert text
    found = re.findall(r"(?:https?:|wss?:)?//[a-zA-Z0-9.-]+\.[a-z]{2,}[^\s\"'`)]*", text)
    assert [address for address in found if not address.startswith(NAMES)] == []
    assert "@import" not in text
    assert "eval(" not in text


def test_it_needs_no_inline_script_or_style() -> None:
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|style=", page)


def test_it_was_built_from_these_sources() -> None:
    """`npm ci && npm run build` in pretrain/monitor/frontend builds it."""
    paths = ["src/" + path.relative_to(FRONTEND / "src").as_posix() for path in (FRONTEND / "src").rglob("*.*")]
    digest = hashlib.sha256()
    for path in sorted([*paths, "index.html", "package-lock.json"]):
        digest.update(path.encode() + b"\0" + (FRONTEND / path).read_bytes() + b"\0")
    assert (STATIC / "sources.sha256").read_text().strip() == digest.hexdigest()


def test_the_lock_names_no_package_host() -> None:
    lock = json.loads((FRONTEND / "package-lock.json").read_text())
    assert "://" not in json.dumps(lock)
    packages = [package for name, package in lock["packages"].items() if name]
    assert all(package["integrity"].startswith("sha512-") for package in packages)
