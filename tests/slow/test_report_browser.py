"""report.html in headless Chromium: no errors, hover and slider work, and it fits a phone, light and dark."""

import shutil

import pytest
from report_runs import make_run

from fcn_jax.training.report import write_report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOOLTIP = "e => e.shadowRoot.querySelector('.bk-tooltip-content').textContent"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_works_in_a_browser(width, scheme, tmp_path):
    runs = [make_run(tmp_path / "a", 0.1), make_run(tmp_path / "b", 0.2)]
    file = write_report(runs, tmp_path / "report.html")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        messages = []
        page.on("console", lambda message: message.type in ("error", "warning") and messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
        page.goto(file.as_uri())
        page.locator(".bk-Figure canvas").first.wait_for()
        assert page.locator(".bk-Figure").count() == 5  # three curves and a confusion matrix of each run
        assert page.evaluate("document.documentElement.scrollWidth") == width

        box = page.locator(".bk-Figure").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.4)
        page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + box["height"] * 0.5)
        tooltip = page.locator(".bk-Tooltip:visible").first
        tooltip.wait_for()
        assert "step: 60 training loss: 0.0017" in tooltip.evaluate(TOOLTIP)  # 0.1 / 60
        assert page.locator(".bk-Tooltip:visible").count() == 2  # one for each run

        matrix = page.locator(".bk-Figure").nth(3)
        matrix.scroll_into_view_if_needed()
        box = matrix.bounding_box()
        for at in (0.6, 0.65):  # in the row of background, at the top
            page.mouse.move(box["x"] + box["width"] * at, box["y"] + box["height"] * 0.15)
        tooltip.wait_for()
        assert "truth: background predicted: <b>disc of the class: 5.0% pixels: 5000" in tooltip.evaluate(TOOLTIP)

        prediction, slider = page.locator(".maps img").nth(1), page.locator("input[type=range]").first
        for value in ("20", "90"):
            slider.fill(value)
            clipped = prediction.evaluate("e => getComputedStyle(e).clipPath")
            assert clipped == f"inset(0px 0px 0px {value}%)"

        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        text_colour = page.evaluate("getComputedStyle(document.body).color")
        dark = sum(map(int, background.strip("rgb()").split(","))) < sum(
            map(int, text_colour.strip("rgb()").split(","))
        )
        assert dark == (scheme == "dark") and not messages
        browser.close()
