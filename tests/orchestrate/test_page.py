"""The page, in a real browser: sign in, fill the form, see the run go green, follow it.

Screenshots stay in .state/screenshots/ of this repository, to be looked at.
"""

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from orchestrate.place import GREEN, Airflow
from playwright.sync_api import Page, expect, sync_playwright
from world import ROOT

from pipelines.orchestrate import local

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = ROOT / ".state" / "screenshots"
# Nothing but the page itself is asked for: a browser at rest calls its makers.
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
# The servers share the machine with the other tests.
PATIENCE = 60_000  # milliseconds
pytestmark = [
    pytest.mark.airflow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium (Debian: chromium)"
    ),
]


@pytest.fixture
def page() -> Iterator[Page]:
    shutil.rmtree(SHOTS, ignore_errors=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        opened = browser.new_page(viewport={"width": 1400, "height": 900})
        opened.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        yield opened
        browser.close()


def _shot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def test_from_the_form_to_the_log_and_the_asset(airflow: Airflow, page: Page) -> None:
    page.goto(airflow.url)
    page.fill("input[name=username]", local.USER)
    page.fill("input[name=password]", airflow.password)
    _shot(page, "1-sign-in")
    page.get_by_role("button", name="Sign in").click()
    expect(page).not_to_have_url(re.compile("login"))

    page.goto(f"{airflow.url}/dags/retrain")
    page.get_by_role("button", name="Trigger").first.click()
    page.fill("#element_as_of", "2013-05-01")
    page.fill("input[name=element_max_epochs]", "1")
    page.fill("#element_reason", "asked on the page")
    _shot(page, "2-form")
    page.get_by_role("dialog").get_by_role("button", name="Trigger").click()
    expect(page.get_by_role("dialog")).to_be_hidden()

    asked = next(
        run
        for run in airflow.api.call("GET", "/dags/retrain/dagRuns?order_by=-id")["dag_runs"]
        if run["conf"].get("reason") == "asked on the page"
    )
    assert asked["conf"] == {
        "as_of": "2013-05-01", "max_epochs": 1, "reason": "asked on the page", "force": False,
    }  # fmt: skip
    run = asked["dag_run_id"]
    page.goto("about:blank")  # a page that nobody looks at asks on and on
    assert airflow.wait("retrain", run) == GREEN, airflow.tasks("retrain", run)

    page.goto(f"{airflow.url}/dags/retrain/runs/{run}")
    expect(page.get_by_text("Success").first).to_be_visible()
    _shot(page, "3-green")
    page.goto(f"{airflow.url}/dags/retrain/runs/{run}/tasks/register")
    expect(page.get_by_text(re.compile(r"register: flights version \d+")).first).to_be_visible()
    _shot(page, "4-log")

    page.goto(f"{airflow.url}/assets")
    page.get_by_role("link", name="models/bundle").first.click()
    page.locator(".codicon-folding-collapsed").first.click(force=True)  # the event's content
    event = page.locator(".view-lines").first
    expect(event).to_contain_text("md5")
    _shot(page, "5-asset")
    made = airflow.fragment("retrain", run, "package")["lock"]["outs"]
    bundle = next(out["md5"] for out in made if out["path"] == "models/bundle")
    assert bundle in re.sub(r"\s", "", event.inner_text())
