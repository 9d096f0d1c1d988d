"""Every page in a real browser: what it shows, by keyboard, on a telephone, empty, broken, and under attack."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard_process import TOKEN, dashboard, stored_run

PAGES = ("run", "data", "dynamics", "system", "control")
ATTACK = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>\';--'
LAYERS = {
    "max_attention_logit": {"0": 5.0, "1": 9.0},
    "query_norm": {"0": 3.0, "1": 3.5},
    "gradient_rms": {"embedding": 1e-3, "0": 2e-4, "1": 1e-5},
    "output_logit_mean": -0.2,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runs")
    stored_run(root / "plain", **LAYERS)
    stored_run(root / "other", steps=30)
    with dashboard(root, "", tmp_path_factory.mktemp("dashboard")) as url:
        yield url


def drawn(page: Any, selector: str) -> int:
    """Pixels of the first canvas there that have ink of a line: neither grey nor empty."""
    script = """canvas => {
      const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      let found = 0;
      for (let i = 0; i < data.length; i += 4) {
        const [r, g, b, a] = data.slice(i, i + 4);
        if (a > 128 && Math.max(r, g, b) - Math.min(r, g, b) > 60) found++;
      }
      return found;
    }"""
    return int(page.locator(selector).first.evaluate(script))


def until_drawn(page: Any, selector: str) -> None:
    for _ in range(200):
        if page.locator(selector).count() and drawn(page, selector) > 50:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"nothing is drawn in {selector}")


CARDS = {
    "run": ("Held-out text, bits per byte", "Scores of tasks"),
    "system": ("Step time", "Arithmetic", "Model FLOPs utilisation"),
}


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light")])
def test_every_page_shows_its_run(new_page: Any, site: str, pictures: Path, width: int, scheme: str) -> None:
    page = new_page(width, 900, scheme)
    page.goto(site)
    page.get_by_role("link", name="plain").wait_for()
    assert page.locator("tbody tr").count() == 2
    page.screenshot(path=pictures / f"runs-{scheme}-{width}.png", full_page=True)
    page.get_by_role("link", name="plain").click()
    for name in PAGES:
        if name != "run":
            page.get_by_role("link", name=name.capitalize(), exact=True).click()
        if name == "control":
            page.get_by_label("Share of code").wait_for()
        else:
            until_drawn(page, ".heat canvas" if name == "dynamics" else ".plot canvas")
        for title in CARDS.get(name, ()):
            until_drawn(page, f"section[aria-label='{title}'] .plot canvas")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} is too wide"
        page.screenshot(path=pictures / f"{name}-{scheme}-{width}.png", full_page=True)
    assert page.get_by_label("Share of code").is_disabled()


def test_zooming_by_mouse_and_keyboard_and_comparing(new_page: Any, site: str) -> None:
    page = new_page()
    page.goto(f"{site}/#/run?run=plain")
    until_drawn(page, ".plot canvas")
    whole = page.get_by_role("button", name="Whole run")
    assert whole.is_disabled()
    box = page.locator(".plot .u-over").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 60, steps=5)
    with page.expect_response(lambda reply: "from=" in reply.url):  # finer points are asked for
        page.mouse.up()
    whole.click()
    page.locator(".plot").first.focus()
    with page.expect_response(lambda reply: "from=" in reply.url):
        page.keyboard.press("+")
    page.keyboard.press("0")
    page.get_by_role("button", name="Whole run", disabled=True).wait_for()
    page.get_by_text("Compare").click()
    with page.expect_response(lambda reply: "run=other" in reply.url):
        page.get_by_label("other").check()
    page.locator(".u-legend", has_text="other").wait_for()
    page.get_by_label("Scale").select_option("log")
    until_drawn(page, ".plot canvas")


def test_the_chosen_colours_stay(new_page: Any, site: str) -> None:
    page = new_page()
    page.goto(site)
    page.get_by_role("button", name="Use dark colours").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    page.get_by_role("button", name="Use light colours").wait_for()


def test_folders_without_runs_and_runs_without_steps(new_page: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    with dashboard(root, "", tmp_path) as url:
        page = new_page()
        page.goto(url)
        page.get_by_text("There is no run in runs yet").wait_for()
        stored_run(root / "begun", steps=0)
        (root / "begun" / "config.yaml").unlink()
        (root / "begun" / "metrics.jsonl").write_text("")
        page.get_by_role("link", name="begun").click()  # it appears by itself
        for name, text in (
            ("run", "No step has been recorded yet"),
            ("data", "No step has been recorded yet"),
            ("dynamics", "does not measure its dynamics"),
            ("system", "There is no checkpoint yet"),
        ):
            page.goto(f"{url}/#/{name}?run=begun")
            page.get_by_text(text).first.wait_for()
        page.goto(f"{url}/#/run?run=gone")
        page.get_by_text("there is no such run here").wait_for()


def test_what_runs_say_is_text_and_nothing_else(new_page: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    folder = stored_run(root / "attack <b>x", steps=8, sources=(ATTACK, "prose"), **LAYERS)
    (folder / "config.yaml").write_text(json.dumps({"run": {"name": ATTACK}, "train": {"steps": 8}}))
    reject = {"source": ATTACK, "file": ATTACK, "record": 1, "reason": ATTACK}
    (folder / "rejects.jsonl").write_text(json.dumps(reject) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "loss": 1.0, ATTACK: 1.0, "query_norm": {ATTACK: 1.0}}) + "\n")
    (folder / "launch").mkdir()
    (folder / "launch" / "attempts.jsonl").write_text(json.dumps({ATTACK: ATTACK, "__proto__": 1}) + "\n")
    with dashboard(root, "", tmp_path) as url:
        page = new_page()
        page.goto(url)
        page.get_by_role("link", name="attack").click()
        for name in PAGES:
            page.get_by_role("link", name=name.capitalize(), exact=True).click()
            page.get_by_role("heading", name=ATTACK, exact=True).wait_for()  # shown as it is
            page.wait_for_timeout(300)
            assert page.evaluate("window.hit") is None
            assert page.locator("main img, main script").count() == 0
        page.goto(f"{url}/#/run?run={ATTACK}")
        page.get_by_text("there is no such run here").wait_for()
        assert page.evaluate("window.hit") is None


def test_a_token_is_asked_for_once(new_page: Any, tmp_path: Path) -> None:
    stored_run(tmp_path / "runs" / "plain", steps=5)
    with dashboard(tmp_path / "runs", TOKEN, tmp_path) as url:
        page = new_page()
        page.goto(f"{url}/#/run?run=plain")
        field = page.get_by_label("The dashboard's token")
        field.fill("wrong" * 5)
        page.get_by_role("button", name="Open").click()
        page.get_by_text("this is not the dashboard's token").wait_for()
        assert page.locator("nav").count() == 0
        field.fill(TOKEN)
        page.get_by_role("button", name="Open").click()
        page.get_by_role("heading", name="plain").wait_for()
        page.reload()
        page.get_by_role("heading", name="plain").wait_for()
        assert TOKEN not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
