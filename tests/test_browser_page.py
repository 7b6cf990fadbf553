"""The browser of questions as a person uses it: headless Chromium shows the file of a report, and `zipeval view`.

Both have to say the same, so every test runs with both. Without Playwright or Chromium they are skipped.
"""

from __future__ import annotations

import re
import shutil
import time

import pytest
from PIL import Image
from test_browser import GAINED, LOST, RIGHT, asked, serving
from test_report import HOSTILE, put, sample

from zipeval.reporting.html.report import report
from zipeval.reporting.tables import tables
from zipeval.results import records

playwright = pytest.importorskip(
    "playwright.sync_api", reason="`pip install 'zipeval[browser]'` installs Playwright"
)
CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: `apt-get install chromium`"
)
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
)
SWITCHES += ("--disable-sync", "--no-first-run")
COUNT = 120  # questions of a benchmark: three pages
PLAIN, NARROW = {"width": 1280, "height": 800}, {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*SWITCHES])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two benchmarks under vanilla and three runs; of the second one, few questions and a hostile model."""
    directory = tmp_path_factory.mktemp("page") / "runs"
    for (method, tokens), right in RIGHT.items():
        samples = [asked(i, i in right or i >= 12, tokens) for i in range(COUNT)]
        put(directory, method, tokens, "zipeval_shapes", samples, pictures=(0, 1))
        hostile = [
            sample(
                i,
                float(not tokens),
                question=text,
                prediction=text,
                target=text,
                choices=[text, "b"],
            )
            for i, text in enumerate(HOSTILE)
        ]
        put(directory, method, tokens, "gqa", hostile)
    for path in directory.glob("*/*.images/*.jpg"):
        Image.new("RGB", (64, 64), (40, 90, 200)).save(path)
    return directory


@pytest.fixture(scope="module", params=["file", "view"])
def address(request, results, tmp_path_factory):
    """The address of a page."""
    if request.param == "file":
        path = tmp_path_factory.mktemp("file") / "report.html"
        report(str(results), path)
        yield path.as_uri()
    else:
        with serving(results) as server:
            yield server.url


class Page:
    """A page, and what a test looks at. Nothing may be said in the console, and nothing be asked of another server."""

    def __init__(self, context, address: str):
        self.address, self.own = address, address.rpartition("/")[0]
        self.said, self.requests = [], []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, state: str = "") -> None:
        self.page.goto("about:blank")
        self.page.goto(self.address + state)
        self.wait()

    def wait(self) -> None:
        """Until the page shows what its address says."""
        self.until(
            "document.querySelector('#questions').dataset.shown === location.hash"
        )

    def until(self, condition: str) -> None:
        """Until a condition holds. Playwright's own way would be stopped by the page's policy."""
        deadline = time.monotonic() + 20
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.wait()

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"#questions select[name={name}]").select_option(value)
        self.wait()

    def search(self, text: str) -> None:
        self.page.locator("#questions input[name=text]").fill(text)
        self.page.wait_for_timeout(300)
        self.wait()

    @property
    def state(self) -> str:
        return self.page.evaluate("location.hash")

    @property
    def count(self) -> str:
        return self.page.locator("#count").inner_text()

    @property
    def rows(self) -> list[str]:
        """The documents of the rows that are shown."""
        texts = self.page.locator("#rows tbody .question small").all_inner_texts()
        return [text.split("#")[1].split(",")[0] for text in texts]

    @property
    def current(self) -> str | None:
        rows = self.page.locator("#rows tr[aria-current]")
        return (
            rows.locator(".question small").inner_text().split("#")[1].split(",")[0]
            if rows.count()
            else None
        )

    def visible(self, selector: str) -> bool:
        return self.page.locator(selector).is_visible()


@pytest.fixture
def page(chromium, address):
    context = chromium.new_context(viewport=PLAIN)
    shown = Page(context, address)
    shown.open()
    yield shown
    assert shown.said == []
    foreign = [
        url
        for url in shown.requests
        if not url.startswith((shown.own, "data:", "about:"))
    ]
    assert foreign == []
    context.close()


def test_a_number_of_the_table_opens_the_questions_behind_it(page, results):
    (table,) = tables(str(results), statistics=True)
    for row in table.rows[1:]:
        name = f"{row.label} {row.tokens}"
        page.open()
        link = page.page.locator(
            f"a[href*='benchmark=zipeval_shapes&lost={name.replace(' ', '+')}']"
        )
        assert "%" in link.inner_text()
        link.click()
        page.wait()
        lost = row.cells["zipeval_shapes"].comparison.lost
        assert lost == LOST[name]
        assert page.count == f"{lost} of 123 questions, lost by {name}"
        assert len(page.rows) == lost
        assert (
            page.page.locator(f"#rows td.answer.lost[data-run='{name}']").count()
            == lost
        )
    page.open()
    page.page.locator("a[href*='benchmark=zipeval_shapes&wrong=vanilla']").click()
    page.wait()
    assert page.rows == ["10", "11"]


def test_an_average_opens_those_of_all_benchmarks(page):
    page.page.locator("a[href='#questions?lost=visionzip+4']").click()
    page.wait()
    assert (
        page.count
        == f"{LOST['visionzip 4'] + len(HOSTILE)} of 123 questions, lost by visionzip 4"
    )


def test_filters_and_the_link_of_every_state(page):
    page.open("#questions")
    assert page.count == "123 of 123 questions"
    page.choose("outcome", "gained")
    page.choose("run", "visionzip 4")
    page.choose("benchmark", "zipeval_shapes")
    assert page.rows == ["10", "11"] and len(page.rows) == GAINED["visionzip 4"]
    page.choose("kind", "shape")
    assert page.rows == ["11"]
    assert (
        page.state
        == "#questions?benchmark=zipeval_shapes&kind=shape&gained=visionzip+4"
    )
    page.choose("budget", "8")
    header = page.page.locator("#rows thead").inner_text().split()
    assert header.count("visionzip") == 1 and "vanilla" in header
    state, count = page.state, page.count
    page.open(state)
    assert (page.count, page.rows) == (count, ["11"])
    assert page.page.locator("select[name=kind]").input_value() == "shape"
    page.page.locator("#clear").click()
    page.wait()
    assert page.count == "123 of 123 questions"


def test_sorted_by_how_many_runs_fail(page):
    page.open("#questions?benchmark=zipeval_shapes")
    assert page.rows[:3] == ["0", "1", "2"]
    page.choose("sort", "most-fail")
    counts = [
        int(text.split()[0])
        for text in page.page.locator("#rows tbody .fails").all_inner_texts()
    ]
    assert counts == sorted(counts, reverse=True)
    worst = sorted(
        range(12), key=lambda i: -sum(i not in right for right in RIGHT.values())
    )
    assert page.rows[:7] == [str(i) for i in worst[:7]]
    page.choose("sort", "fewest-fail")
    assert page.page.locator("#rows tbody .fails").first.inner_text() == "0 of 4"


def test_search(page):
    page.open("#questions")
    page.press("/")
    page.page.keyboard.type("Picture 11")
    page.page.wait_for_timeout(300)
    page.wait()
    assert page.rows == ["11", *map(str, range(110, 120))]
    assert page.page.locator("#rows mark").first.inner_text() == "picture 11"
    assert page.state == "#questions?text=Picture+11"
    page.search("nonsense 7")
    assert page.rows == ["7"]
    page.search("#5")
    assert page.rows == ["5"]
    page.search("zebra")
    assert page.count == "0 of 123 questions. Clear a filter to see more."
    page.page.go_back()  # of one search, one entry
    page.wait()
    assert page.state == "#questions" and page.count == "123 of 123 questions"


def test_keyboard(page):
    page.open("#questions?benchmark=zipeval_shapes&lost=visionzip+8")
    page.press("j")
    assert page.current == "7"
    page.press("j", "j", "j")
    assert page.current == "9"
    page.press("k")
    assert page.current == "8"
    page.press("Enter")
    assert (
        page.visible("#sample")
        and page.page.locator("#sample-title").inner_text()
        == "zipeval_shapes #8, colour"
    )
    assert page.page.locator("#sample-place").inner_text() == "2 of 3"
    page.press("j")
    assert page.page.locator("#sample-title").inner_text() == "zipeval_shapes #9, shape"
    page.press("j", "k", "k")
    assert page.page.locator("#sample-title").inner_text() == "zipeval_shapes #7, shape"
    page.press("Escape")
    assert not page.visible("#sample") and page.rows == ["7", "8", "9"]
    page.press("/")
    assert page.page.evaluate("document.activeElement.name") == "text"
    page.page.keyboard.type("j")
    page.press("Escape")
    assert page.page.evaluate("document.activeElement.name || ''") == ""
    page.open("#questions")
    page.press("Escape")
    assert page.state == "" and page.visible("main") and not page.visible("#questions")


def test_pages_are_turned_by_key_and_by_button(page):
    page.open("#questions?benchmark=zipeval_shapes")
    assert page.rows[-1] == "49"
    page.press("k")
    assert page.current == "49"
    page.press("j")
    assert page.state.endswith("page=2") and page.current == "50"
    page.press("k")
    assert page.current == "49"
    page.page.locator("#page-after").click()
    page.wait()
    page.page.locator("#page-after").click()
    page.wait()
    assert page.rows == [*map(str, range(100, 120))]
    assert page.page.locator("#page-after").is_disabled()
    page.press("j", "Enter")
    assert page.page.locator("#sample-place").inner_text() == "101 of 120"
    page.page.locator("#sample-before").click()
    page.wait()
    page.press("Escape")
    assert page.state.endswith("page=2") and page.current == "99"
    page.open(
        "#questions?benchmark=zipeval_shapes&open=zipeval_shapes/70"
    )  # a link that somebody sent
    page.press("Escape")
    assert page.state.endswith("page=2") and page.current == "70"


def test_the_back_button(page):
    page.page.evaluate("window.scrollTo(0, 200)")
    page.page.locator(
        ".scores a[href*='benchmark=zipeval_shapes&lost=visionzip+4']"
    ).click()
    page.wait()
    page.page.locator("#rows tbody tr").nth(1).click()
    page.wait()
    assert (
        page.page.locator("#sample-title").inner_text().startswith("zipeval_shapes #4")
    )
    page.page.go_back()
    page.wait()
    assert page.visible("#question-list") and page.current == "4"
    page.page.go_forward()
    page.wait()
    assert page.visible("#sample")
    page.press("Escape")
    assert page.visible("#question-list")
    page.page.go_back()
    page.wait()
    assert page.visible("main") and page.page.evaluate("window.scrollY") == 200
    page.page.locator(
        ".scores a[href*='benchmark=zipeval_shapes&lost=visionzip+4']"
    ).click()
    page.wait()
    scrolled = page.page.evaluate("window.scrollY")
    page.press(
        "Escape"
    )  # leads to the scores by another way, and to the same place of them
    assert (
        scrolled == 0
        and page.visible("main")
        and page.page.evaluate("window.scrollY") == 200
    )


def test_a_question_with_what_each_method_kept(page):
    page.open("#questions?open=zipeval_shapes/1")
    assert (
        page.page.locator("#sample-question").inner_text()
        == "What is in picture 1?\nAnswer briefly."
    )
    cards = page.page.locator("#sample .card")
    assert cards.count() == 4
    assert cards.nth(0).locator("path.dropped").count() == 0  # vanilla keeps all
    card = page.page.locator("#sample .card[data-run='visionzip 8']")
    assert "3 kept + 1 merged" in card.inner_text()
    assert "Visual tokens in layer 1: 16, layer 2: 8" in card.inner_text()
    dropped = "M2 0h2v1h-2zM0 1h1v1h-1zM2 1h2v1h-2zM0 2h4v1h-4zM0 3h3v1h-3z"  # all but 0, 1, 5 and 15
    assert card.locator("path.dropped").get_attribute("d") == dropped
    assert card.locator("path.merged").get_attribute("d") == "M3.1 3.1h.8v.8h-.8z"
    image = card.locator("image")
    assert image.get_attribute("preserveAspectRatio") == "xMidYMid meet"
    assert (
        page.page.evaluate("document.querySelector('#sample-picture img').naturalWidth")
        == 64
    )
    assert card.locator(".verdict").inner_text() == "right"
    page.open("#questions?open=zipeval_shapes/8")
    card = page.page.locator("#sample .card[data-run='visionzip 8']")
    assert card.locator(".verdict").all_inner_texts() == ["wrong", "lost"]
    assert not page.page.locator("#sample-picture img").count()
    if page.address.startswith("file:"):
        assert "zipeval view results=" in page.page.locator("#sample-note").inner_text()
    else:
        assert card.locator("path.dropped").get_attribute("d") == dropped
        assert (
            "The picture is not on this machine."
            in page.page.locator("#sample-note").inner_text()
        )


def test_pictures_stand_beside_their_questions(page):
    page.open("#questions?benchmark=zipeval_shapes")
    page.until("document.querySelectorAll('#rows img').length === 2")
    sizes = page.page.evaluate(
        "[...document.querySelectorAll('#rows img')].map((image) => image.naturalWidth)"
    )
    assert sizes == [64, 64]
    page.open("#questions?benchmark=gqa")
    page.until("!document.querySelector('#questions.pictured')")
    assert not page.visible("#rows thead .picture")


def test_what_a_model_says_stays_text(page):
    page.open("#questions?benchmark=gqa")
    for text in HOSTILE:
        assert page.page.locator("#rows td.answer", has_text=text).count() == 4
        assert page.page.locator("#rows .question a", has_text=text).count() == 1
    page.search("<IMG")
    assert page.rows == ["1"]
    assert page.page.locator("#rows mark").first.inner_text() == "<img"
    page.open("#questions?benchmark=gqa&open=gqa/1")
    for place in (
        "#sample-question",
        "#sample-target",
        "#sample-choices li:first-child",
    ):
        assert page.page.locator(place).text_content() == HOSTILE[1]
    assert page.page.locator("#sample .said", has_text=HOSTILE[1]).count() == 4
    assert not page.page.locator("#questions script, #questions img[src=x]").count()


def test_a_link_of_other_results_says_so(page):
    page.open("#questions?lost=nobody+16")
    assert "There is no run “nobody 16” here." in page.count
    page.page.locator("#clear").click()
    page.wait()
    assert page.count == "123 of 123 questions"
    page.open("#questions?open=gqa/99")
    assert "99" in page.count


def rgb_of(shown, name):
    """A colour of the page's body."""
    return map(
        int,
        re.findall(
            r"\d+", shown.page.evaluate(f"getComputedStyle(document.body).{name}")
        )[:3],
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PLAIN, NARROW], ids=["wide", "narrow"])
def test_nothing_is_cut_and_everything_can_be_read(chromium, address, viewport, scheme):
    """The page is never wider than its window, and no text is as dark as what is behind it."""
    context = chromium.new_context(viewport=viewport, color_scheme=scheme)
    shown = Page(context, address)
    for state in (
        "",
        "#questions",
        "#questions?lost=visionzip+4&sort=most-fail",
        "#questions?open=zipeval_shapes/0",
    ):
        shown.open(state)
        assert (
            shown.page.evaluate("document.documentElement.scrollWidth")
            <= viewport["width"]
        ), state
        if (
            viewport is NARROW
        ):  # a row is a card, and nothing of it is beside the screen
            rows = "document.querySelector('#questions .rows')"
            assert (
                shown.page.evaluate(f"{rows}.scrollWidth - {rows}.clientWidth") == 0
            ), state
        ink, paper = (sum(rgb_of(shown, name)) for name in ("color", "backgroundColor"))
        assert abs(ink - paper) > 400
    assert shown.said == []
    context.close()


def test_without_javascript_the_scores_are_there(chromium, address):
    context = chromium.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto(address)
    assert shown.locator("table.scores").is_visible()
    assert not shown.locator("#questions").is_visible()
    context.close()


def test_a_file_without_its_questions_says_how_to_see_them(
    chromium, results, tmp_path, monkeypatch
):
    monkeypatch.setattr("zipeval.reporting.html.report.MOST_DATA", 1000)
    report(str(results), tmp_path / "report.html")
    context = chromium.new_context(viewport=PLAIN)
    shown = Page(context, (tmp_path / "report.html").as_uri())
    shown.open("#questions")
    assert (
        f"zipeval view results={results}"
        in shown.page.locator("#questions .problem").first.inner_text()
    )
    assert not shown.visible("#question-list") and shown.said == []
    context.close()


def test_several_tables(chromium, tmp_path):
    """A link names its table, and the choice of another one keeps nothing that it may not have."""
    for prompt in ("hf", "vicuna_v1"):
        for method, tokens in (("vanilla", None), ("fastv", 8)):
            samples = [
                asked(i, not tokens or i < 10 - len(prompt), tokens) for i in range(12)
            ]
            put(tmp_path / "runs", method, tokens, "gqa", samples, prompt=prompt)
    report(str(tmp_path / "runs"), tmp_path / "report.html")
    context = chromium.new_context(viewport=PLAIN)
    shown = Page(context, (tmp_path / "report.html").as_uri())
    shown.open()
    links = shown.page.locator("a[href*='lost=fastv+8']")
    lost = []
    for number in range(links.count()):
        shown.open()
        links.nth(number).click()
        shown.wait()
        lost.append(int(shown.count.split()[0]))
    assert sorted(lost) == [12 - 8, 12 - 1]
    options = shown.page.locator("select[name=table] option").all_inner_texts()
    assert len(options) == 2 and "prompt=vicuna_v1" in "".join(options)
    other = shown.page.locator("select[name=table] option:not(:checked)").get_attribute(
        "value"
    )
    shown.choose("table", other)
    assert shown.count == "12 of 12 questions"
    assert shown.said == []
    context.close()


def test_the_results_are_as_they_were_written(results):
    """The tests above read records of the newest schema that questions have."""
    record = records.read(next(results.glob("*/gqa.json")))
    assert (
        records.read_samples(results / record["run_id"], record)[0]["choices"][1] == "b"
    )
