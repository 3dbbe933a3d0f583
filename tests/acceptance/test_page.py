"""The page at `/` in a real browser: content, actions and safety."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.acceptance.command import REPOSITORY, environment

IMAGE = REPOSITORY / "manifests" / "images" / "boat.jpg"  # 768 x 512
HOSTILE = "<img src=x onerror=alert(1)>"
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PLAIN_NUMBER = re.compile(r"[1-9]\d*")


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium")
    if found is None:
        sentence = "no chromium on this machine: install Debian's package chromium to test the page in a browser"
        if os.environ.get("CI") == "true":
            pytest.fail(sentence)
        pytest.skip(sentence)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def server(data_dir, *options):
    """The endpoint in a separate process; yields its URL."""
    command = [sys.executable, "-m", "batch.server", "--data-dir", data_dir, "--with-parent", *options]
    with (
        (Path(data_dir) / "server.log").open("wb") as log,
        subprocess.Popen(
            [str(part) for part in command],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as process,
    ):
        try:
            said = process.stdout.readline()
            assert said, (Path(data_dir) / "server.log").read_text()
            yield json.loads(said)["url"]
        finally:
            process.stdin.close()
            process.wait(20)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with server(tmp_path_factory.mktemp("page"), "--engine", "preview") as url:
        yield url


class Visit:
    """A page in a fresh browser context that records forbidden events."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", self._on_request)
        self.page.goto(url)

    def _on_console(self, message):
        if message.type in {"error", "warning"}:
            self.complaints.append(f"{message.type}: {message.text}")

    def _on_dialog(self, dialog):
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _on_request(self, request):
        if not request.url.startswith(("blob:", "data:")) and urlsplit(request.url).netloc != urlsplit(self.url).netloc:
            self.foreign.append(request.url)

    def restyle(self, prompt, image=IMAGE):
        """Fill the form by its labels, like a user, and submit it."""
        if image is not None:
            self.page.get_by_label("Image file").set_input_files(image)
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_role("button", name="Restyle", exact=True).click()

    def done(self):
        """Wait for the result."""
        expect(self.page.get_by_role("status")).to_have_text("Done", timeout=30_000)

    def card(self, prompt):
        """Return the newest recent request with that prompt."""
        return self.page.get_by_role("listitem").filter(has_text=prompt).first


@pytest.fixture
def visit(browser):
    visits = []

    def start(url, **options):
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield start
    for one in visits:
        one.context.close()
    assert [complaint for one in visits for complaint in one.complaints] == []
    assert [request for one in visits for request in one.foreign] == []


def natural_size(image):
    """Return width and height of the decoded image."""
    expect(image).to_be_visible()
    return image.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")


def sideways(page):
    """Return by how many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_a_person_restyles_a_image_and_finds_it_among_the_recent_ones(visit, url):
    """Form, progress, result next to the input, and the same images in the list; a hostile prompt is shown as text."""
    here = visit(url)
    expect(here.page.get_by_text("preview: filters, no model runs")).to_be_visible()
    expect(here.page.get_by_text("not checked")).to_be_visible()
    here.restyle(HOSTILE)
    here.done()
    result, source = here.page.locator("#result-image"), here.page.locator("#input-image")
    assert natural_size(result) == natural_size(source) == [768, 512]
    assert result.get_attribute("src") != source.get_attribute("src")
    expect(here.page.locator("#made-text")).to_contain_text(re.compile(r"768 . 512 · seed \d+ · [\d.]+ s engine time"))
    card = here.card(HOSTILE)
    expect(card).to_contain_text("done")
    assert [natural_size(image) for image in card.locator("img").all()] == [[768, 512]] * 2
    expect(card.locator(".prompt")).to_have_text(HOSTILE)
    expect(here.page.locator("#finished")).to_have_text(PLAIN_NUMBER)
    expect(here.page.locator("#per-minute")).to_have_text(PLAIN_NUMBER)


def test_the_settings_of_the_form_reach_the_server(visit, url):
    """Strength, steps, guidance, a 63-bit seed and the format; the list can load all of them into the form."""
    here = visit(url)
    page, seed = here.page, str(2**63 - 2)
    page.get_by_label("Strength").fill("0.4")
    page.get_by_label("Steps").fill("12")
    page.get_by_label("Guidance").fill("7.5")
    page.get_by_label("Seed").fill(seed)
    page.get_by_text("png", exact=True).click()
    here.restyle("settings of all kinds")
    here.done()
    expect(page.locator("#made-text")).to_contain_text(f"seed {seed}")
    assert page.locator("#result-image").get_attribute("src").endswith(".png")
    page.reload()
    here.card("settings of all kinds").get_by_role("button", name="Reuse").click()
    expect(page.get_by_label("Prompt")).to_have_value("settings of all kinds")
    expect(page.get_by_label("Seed")).to_have_value(seed)
    assert [page.get_by_label(label).input_value() for label in ("Strength", "Steps", "Guidance")] == [
        "0.4",
        "12",
        "7.5",
    ]
    assert natural_size(page.locator("#input-image")) == [768, 512]
    first = page.locator("#result-image")
    here.restyle("settings of all kinds", image=None)
    here.done()
    assert natural_size(first) == [768, 512]


def test_what_other_clients_send_shows_up_by_itself(visit, url):
    """The page updates without a reload."""
    here = visit(url)
    expect(here.page.locator("#waiting")).to_have_text("0")
    body = {"image_url": "data:image/png;base64,AAAA", "prompt": "sent by a script"}
    answer = here.context.request.post(f"{url}/fal-ai/flux/dev/image-to-image", data=body)
    assert answer.ok
    card = here.card("sent by a script")
    expect(card).to_contain_text("failed")
    expect(card.locator(".error")).to_contain_text("image_url")


def test_the_form_says_what_is_missing(visit, url):
    """By accessible messages, with the focus on the field to fix; nothing is sent."""
    here = visit(url)
    status = here.page.get_by_role("status")
    here.restyle("a prompt", image=None)
    expect(status).to_have_text("Choose an image or enter its URL.")
    here.restyle("   ")
    expect(status).to_contain_text("prompt")
    expect(here.page.get_by_label("Prompt")).to_be_focused()
    here.page.get_by_label("Seed").fill("1e5")
    here.restyle("a prompt")
    expect(status).to_contain_text("integer")


def test_a_request_that_fails_says_why(visit, url):
    """The server's own message as text; the page itself never loads an image from another server."""
    here = visit(url)
    here.page.get_by_label("or image URL").fill("http://127.0.0.1:9/cat.png")
    expect(here.page.get_by_text("Image on another server")).to_be_visible()
    here.restyle("a cat from elsewhere", image=None)
    expect(here.page.get_by_role("status")).to_contain_text("http://127.0.0.1:9/cat.png could not be fetched")
    expect(here.card("a cat from elsewhere")).to_contain_text("failed")
    # The browser logs the 422 of the result; nothing else may be logged.
    (note,) = here.complaints
    assert "422" in note
    here.complaints.clear()


def test_every_control_can_be_reached_and_has_a_name(visit, url):
    """Tab moves through the form in order; each control has a label, each image a text."""
    here = visit(url)
    names = [
        "Image file", "or image URL", "Prompt", "Strength", "Steps", "Guidance", "Seed", "jpeg", "Restyle",
    ]  # fmt: skip
    here.page.get_by_label("Image file").focus()
    for name in names:
        focused = here.page.locator(":focus")
        assert name in (focused.evaluate("e => e.ariaLabel ?? e.labels?.[0]?.textContent.trim() ?? ''") or
                        focused.text_content()), name  # fmt: skip
        here.page.keyboard.press("Tab")
    here.restyle("named images")
    here.done()
    expect(here.card("named images")).to_contain_text("done")
    assert here.page.evaluate("[...document.images].filter(image => !image.hasAttribute('alt')).length") == 0
    expect(here.page.get_by_role("img", name="Result of: named images").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_s_colors(visit, url, scheme):
    """The contrast of text is at least 7:1 in both themes (WCAG AAA), of soft text 4.5:1."""
    here = visit(url, color_scheme=scheme)
    text, ground, soft = (here.page.evaluate(LUMINANCE, name) for name in ("--text", "--ground", "--soft"))
    assert (ground > text) == (scheme == "light")
    assert contrast(text, ground) >= 7
    assert contrast(soft, ground) >= 4.5


LUMINANCE = """name => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number)
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  probe.remove();
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""


def contrast(one, other):
    """Return WCAG's contrast ratio of two relative luminances."""
    light, dark = max(one, other), min(one, other)
    return (light + 0.05) / (dark + 0.05)


def test_a_phone_never_scrolls_sideways(visit, url):
    """380 px, with a result, a long word in a prompt and an error in the list."""
    here = visit(url, viewport={"width": 380, "height": 800}, has_touch=True)
    assert sideways(here.page) == 0
    here.restyle("x" * 300)
    here.done()
    expect(here.card("xxx")).to_contain_text("done")
    assert sideways(here.page) == 0
    box = here.page.locator("#result-image").bounding_box()
    assert box["width"] > 100


def test_a_waiting_request_shows_its_place_and_can_be_cancelled(visit, tmp_path):
    """Progress by the status stream; a cancelled request is shown as cancelled. The badge shows the missing model."""
    with server(tmp_path, "--engine", "echo", "--slots", "1", "--service-time", "60") as url:
        here = visit(url)
        expect(here.page.get_by_text("echo: test cards, no model runs")).to_be_visible()
        here.restyle("the one that runs")
        expect(here.page.get_by_role("status")).to_contain_text("Running")
        expect(here.page.get_by_role("progressbar")).to_be_visible()
        other = visit(url)
        other.restyle("the one that waits")
        expect(other.page.get_by_role("status")).to_have_text("Queued, next to run")
        expect(here.page.locator("#waiting")).to_have_text("1")
        expect(here.page.locator("#running")).to_have_text("1")
        other.page.get_by_role("button", name="Cancel").click()
        expect(other.page.get_by_role("status")).to_have_text("Request was cancelled")
        expect(here.card("the one that waits")).to_contain_text("cancelled")
        expect(here.card("the one that runs")).to_contain_text("running")
        (note,) = other.complaints  # the browser's own, of the result's status
        assert "499" in note
        other.complaints.clear()
        other.context.close()
        here.context.close()


def test_with_keys_the_page_asks_for_one_and_shows_its_owner_s_requests(visit, tmp_path):
    """A wrong key is refused with a message; a good one is stored per tab and sent with every request of the page."""
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name}:{hashlib.sha256(b'secret').hexdigest()}\n" for name in ("ann", "bob")))
    with server(tmp_path, "--engine", "echo", "--keys", str(keys)) as url:
        here = visit(url)
        page, field = here.page, here.page.get_by_label("API key required")
        expect(field).to_be_focused()
        field.fill("ann:wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_text("Key rejected")).to_be_visible()
        field.fill("ann:secret")
        field.press("Enter")
        expect(field).to_be_hidden()
        here.restyle("of ann")
        here.done()
        expect(here.card("of ann")).to_contain_text("done")
        assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
        page.reload()
        expect(here.card("of ann")).to_be_visible()
        other = visit(url)
        other.page.get_by_label("API key required").fill("bob:secret")
        other.page.get_by_role("button", name="Sign in").click()
        expect(other.page.get_by_text("No requests yet.")).to_be_visible()
        for one in (here, other):
            assert {complaint.rpartition(" status of ")[2] for complaint in one.complaints} == {"401 (Unauthorized)"}
            one.complaints.clear()
            one.context.close()
