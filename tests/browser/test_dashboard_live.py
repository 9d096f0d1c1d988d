"""A real run in a real browser: it is seen while it trains, and its mixture is changed from the page."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import child_process
import pytest
from dashboard_process import TOKEN, dashboard
from small_run import maker

from data_scheduler import DataConfig, Journal
from data_scheduler.replay import trace
from pretrain.train import train

STEPS = 100_000


@pytest.fixture
def live_run(data_config: Callable[..., DataConfig], tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "runs"
    config = maker(data_config, root)("live", train__steps=STEPS, checkpoint__every=20)
    (root / "live").mkdir(parents=True)
    pid = child_process.start(lambda: train(config), tmp_path / "train.log")
    yield root
    os.kill(pid, signal.SIGTERM)
    assert child_process.wait(pid) == 4, (tmp_path / "train.log").read_text()


def step_shown(page: Any) -> int:
    text = page.locator(".headline p").inner_text()
    return int(text.partition("step ")[2].split()[0].replace(",", ""))


def until_step(page: Any, step: int) -> None:
    for _ in range(600):
        if step_shown(page) >= step:
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"step {step} was not shown; it is {step_shown(page)}")


def take(page: Any, path: Path) -> None:
    page.evaluate("() => scrollTo(0, 0)")
    page.screenshot(path=path, full_page=True)


def signed_in(page: Any, url: str) -> Any:
    page.goto(url)
    page.get_by_label("The dashboard's token").fill(TOKEN)
    page.get_by_role("button", name="Open").click()
    return page.get_by_role("link", name="live")


@pytest.mark.slow
def test_a_live_run_is_followed_and_its_mixture_changed(
    new_page: Any, live_run: Path, tmp_path: Path, pictures: Path
) -> None:
    run = live_run / "live"
    with dashboard(live_run, TOKEN, tmp_path) as url:
        page = new_page(1000, 700)
        signed_in(page, url).click()
        page.locator(".headline .status.training").wait_for()
        before = step_shown(page)
        until_step(page, before + 4)  # without a reload

        page.get_by_role("link", name="Control", exact=True).click()
        slider = page.get_by_label("Share of a")
        slider.focus()
        page.keyboard.press("End")  # all of it
        outputs = page.locator(".sliders output")
        assert outputs.all_inner_texts() == ["100.0 %", "0.0 %", "0.0 %", "0.0 %"]
        page.keyboard.press("Home")
        shares = [float(text.split()[0]) for text in outputs.all_inner_texts()]
        assert shares[0] == 0.0
        assert sum(shares) == pytest.approx(100.0, abs=0.2)
        page.keyboard.press("End")
        page.get_by_placeholder("for the journal").fill("from the browser")
        page.get_by_role("button", name="Apply").click()
        page.get_by_text("Accepted: event").wait_for()
        page.get_by_text("“from the browser”").wait_for()  # in the list of what people changed

        asked = [
            event for event in Journal(run / "journal.jsonl", writable=False).of("mixture") if event.data.get("why")
        ]
        assert [event.data["why"] for event in asked] == ["from the browser"]
        assert asked[0].by.startswith("user:")
        first = asked[0].step
        until_step(page, first + 3)
        assert {document.source for document in trace(run, first + 1)} == {"a"}

        page.get_by_role("button", name="Undo event").first.click()
        page.get_by_text("Accepted: event").wait_for()
        page.get_by_text("undone", exact=True).first.wait_for()
        take(page, pictures / "control-live.png")
        undone = Journal(run / "journal.jsonl", writable=False).of("undone")
        assert [event.data["event"] for event in undone] == [asked[0].seq]

        page.get_by_role("link", name="Data", exact=True).click()
        page.locator("input[name=step]").fill(str(first + 1))
        until_step(page, step_shown(page) + 2)  # what was typed stays, whatever the run does meanwhile
        page.get_by_role("button", name="Show").click()
        page.get_by_text("documents of a").wait_for()  # until then another step's may be shown
        page.locator(".document").first.wait_for()
        assert "a" in page.locator(".document strong").first.inner_text()
        take(page, pictures / "data-live.png")

        page.get_by_role("link", name="Run", exact=True).click()
        page.locator(".plot canvas").first.wait_for()
        page.wait_for_timeout(500)
        take(page, pictures / "run-live.png")


SLOW_ANSWERS = """
const quick = window.fetch;
window.fetch = async (...asked) => {
  await new Promise((resolve) => setTimeout(resolve, 4000));
  return quick(...asked);
};
"""


@pytest.mark.slow
def test_a_run_that_writes_faster_than_the_server_answers_is_seen(
    new_page: Any, live_run: Path, tmp_path: Path
) -> None:
    with dashboard(live_run, TOKEN, tmp_path) as url:
        page = new_page(1000, 700)
        signed_in(page, url).wait_for()
        page.add_init_script(SLOW_ANSWERS)
        page.goto(f"{url}/#/data?run=live")
        page.reload()
        page.locator(".plot canvas").first.wait_for()
        shown = step_shown(page)
        until_step(page, shown + 2)
        page.locator("input[name=step]").fill(str(shown + 1))  # which the first answer did not know of
        page.get_by_role("button", name="Show").click()
        page.locator(".document").first.wait_for()
