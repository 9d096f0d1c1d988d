"""Headless Chromium, a page that tolerates no error and no foreign address, and where pictures go.

Skipped where there is no Chromium: `apt-get install chromium`. Pictures of every page are written to
`$HEADRACE_SCREENSHOTS` (default: `artifacts/dashboard`).
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
PATIENCE_MS = 120_000
"""How long a page may take on a busy machine; none of it is waited for on a quiet one."""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Any]:
    """Opens pages; at the end none of them may have had an error or asked another host."""
    contexts, wrong, asked = [], [], set()

    def open_page(width: int = 1200, height: int = 900, scheme: str = "light") -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert asked <= {"127.0.0.1"}


@pytest.fixture(scope="session")
def pictures() -> Path:
    folder = Path(os.environ.get("HEADRACE_SCREENSHOTS", "artifacts/dashboard"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
