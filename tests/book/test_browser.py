"""The built book in a real browser: one visit to each page, and one test for each thing that must hold on all of them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.sync_playwright import Axe

READY = """async () => {
    await (window.MathJax?.startup?.promise ?? Promise.resolve());
    const figures = [...document.querySelectorAll(".lossbook-figure")];
    const drawn = (figure) => figure.dataset.drawn === document.documentElement.dataset.theme;
    while (!figures.every(drawn)) await new Promise((go) => setTimeout(go, 20));
}"""
FORMULAS = """() => ({
    sources: document.querySelectorAll("span.math, div.math").length,
    typeset: [...document.querySelectorAll("span.math, div.math")].filter((m) => m.querySelector("mjx-container")).length,
    errors: document.querySelectorAll("mjx-merror").length,
})"""
FIGURES = """() => [...document.querySelectorAll(".lossbook-plot")].map((plot) => ({
    marks: plot.querySelectorAll(".main-svg path, canvas").length,
    label: plot.getAttribute("aria-label"),
}))"""
MOVE_SLIDERS = """async () => {
    const still = [];
    for (const range of document.querySelectorAll(".lossbook-figure input[type=range]")) {
        const plot = range.closest(".lossbook-figure").querySelector(".lossbook-plot");
        const before = plot.innerHTML;
        range.value = range.value === range.max ? range.min : range.max;
        range.dispatchEvent(new Event("input", { bubbles: true }));
        for (let i = 0; i < 100 && plot.innerHTML === before; i++) await new Promise((go) => setTimeout(go, 20));
        if (plot.innerHTML === before) still.push(plot.getAttribute("aria-label"));
    }
    return still;
}"""
# What repeats is looked at once, or axe takes three times as long: of the tokens of the page's code one of each class
# stays, and of the formulas those that are displayed, whose markup is that of formulas in a line.
THIN_OUT = """() => {
    document.querySelectorAll("span.math mjx-container").forEach((formula) => formula.remove());
    const seen = new Set();
    for (const token of document.querySelectorAll("pre span[class]")) {
        if (seen.has(token.className)) token.replaceWith(token.textContent);
        seen.add(token.className);
    }
}"""
FIGURE_CONTRASTS = """() => {
    const luminance = (color) => {
        const parts = color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
        const linear = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const background = (node) => {
        for (; node; node = node.parentElement) {
            const color = getComputedStyle(node).backgroundColor;
            if (!/, 0\\)$|transparent/.test(color)) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const texts = [...document.querySelectorAll(".lossbook-plot svg text")].filter((text) => text.textContent.trim());
    return texts.map((text) => {
        const [a, b] = [luminance(getComputedStyle(text).fill), luminance(background(text.closest(".lossbook-plot")))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""

# Titles and legends that run into each other, or over the edge of their figure, once the figures fit the window.
COLLISIONS = """async () => {
    const plots = [...document.querySelectorAll(".lossbook-plot")].filter((plot) => plot.offsetWidth);
    const fits = (plot) => plot.querySelector(".main-svg").getBoundingClientRect().width <= plot.clientWidth + 1;
    for (let i = 0; i < 250 && !plots.every(fits); i++) await new Promise((go) => setTimeout(go, 20));
    return plots.flatMap((plot) => {
        const frame = plot.getBoundingClientRect();
        const texts = [...plot.querySelectorAll(".infolayer text")].filter((text) => text.getBoundingClientRect().width > 2);
        const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
        const cut = boxes.filter(([, box]) => box.left < frame.left - 3 || box.right > frame.right + 3);
        const over = boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) =>
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 3 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4
        ).map(([other]) => `${one} | ${other}`));
        return [...cut.map(([text]) => `${text} |`), ...over];
    });
}"""


@dataclass
class Visit:
    """What one page showed."""

    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    formulas: dict = field(default_factory=dict)
    figures: list = field(default_factory=list)
    still: list = field(default_factory=list)
    contrasts: dict = field(default_factory=dict)
    axe: dict = field(default_factory=dict)
    widths: dict = field(default_factory=dict)
    collisions: list = field(default_factory=list)


def _violations(page) -> list[str]:
    # without preload axe does not fetch style sheets a second time, by addresses that it resolves against the page
    found = Axe().run(page, options={"resultTypes": ["violations"], "preload": False}).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:160]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def _listen(page, site: str, visit: Visit) -> None:
    page.on("console", lambda message: message.type == "error" and visit.errors.append(message.text))
    page.on("pageerror", lambda error: visit.errors.append(str(error)))

    page.on(
        "response",
        lambda response: response.status >= 400 and visit.errors.append(f"{response.status}: {response.url}"),
    )
    page.on(
        "request",
        lambda request: request.url.startswith((site, "data:", "blob:")) or visit.outside.append(request.url),
    )


def _visit(page, site: str, name: str) -> Visit:
    """Look at one page in the light, in the dark, and at a phone's width."""
    visit = Visit()
    _listen(page, site, visit)
    page.goto(site + name)
    page.evaluate(READY)
    visit.formulas = page.evaluate(FORMULAS)
    visit.figures = page.evaluate(FIGURES)
    visit.still = page.evaluate(MOVE_SLIDERS)
    page.set_viewport_size({"width": 390, "height": 844})
    visit.widths = page.evaluate("({page: document.documentElement.scrollWidth, window: innerWidth})")
    visit.collisions = page.evaluate(COLLISIONS)
    page.set_viewport_size({"width": 1280, "height": 800})
    page.evaluate(THIN_OUT)
    visit.axe["light"] = _violations(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.evaluate(READY)
    visit.contrasts = page.evaluate(FIGURE_CONTRASTS)
    visit.axe["dark"] = _violations(page)
    page.close()
    return visit


@pytest.fixture(scope="module")
def visits(built, site, chromium) -> dict[str, Visit]:
    """Open each page once, in two browsers that share the pages."""

    def look(names: list[str]) -> dict[str, Visit]:
        with chromium() as browser:
            context = browser.new_context(
                viewport={"width": 1280, "height": 800}, color_scheme="light", reduced_motion="reduce"
            )
            return {name: _visit(context.new_page(), site, name) for name in names}

    with ThreadPoolExecutor(2) as pool:
        return {
            name: visit
            for part in pool.map(look, [built.pages[0::2], built.pages[1::2]])
            for name, visit in part.items()
        }


def _complaints(visits: dict[str, Visit], look) -> str:
    return "\n".join(f"{name}: {complaint}" for name, visit in visits.items() for complaint in look(visit))


def test_no_console_error(visits):
    assert _complaints(visits, lambda visit: visit.errors) == ""


def test_no_request_beyond_localhost(visits):
    assert _complaints(visits, lambda visit: visit.outside) == ""


def test_formulas_are_typeset(visits):
    assert sum(visit.formulas["sources"] for visit in visits.values()) > 50
    bad = _complaints(
        visits,
        lambda visit: (
            [visit.formulas]
            if visit.formulas["errors"] or visit.formulas["typeset"] < visit.formulas["sources"]
            else []
        ),
    )
    assert bad == ""


def test_figures_are_drawn_and_named(visits):
    assert visits["book/index.html"].figures
    assert any(visit.figures for name, visit in visits.items() if name.startswith("chapters/"))
    bad = _complaints(
        visits, lambda visit: [figure for figure in visit.figures if not (figure["marks"] and figure["label"])]
    )
    assert bad == ""


def test_sliders_change_their_figures(visits):
    assert _complaints(visits, lambda visit: visit.still) == ""


def test_figures_are_legible_in_the_dark(visits):
    assert visits["book/index.html"].contrasts
    assert _complaints(visits, lambda visit: [ratio for ratio in visit.contrasts if ratio < 4.5]) == ""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_accessibility_violation(visits, theme):
    assert _complaints(visits, lambda visit: visit.axe[theme]) == ""


def test_phone_has_no_sideways_scroll(visits):
    assert (
        _complaints(visits, lambda visit: [visit.widths] if visit.widths["page"] > visit.widths["window"] else []) == ""
    )


def test_phone_shows_titles_and_legends_apart_and_whole(visits):
    assert _complaints(visits, lambda visit: visit.collisions) == ""


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    yield page
    page.close()


def test_search_finds_temperature(site, page):
    page.goto(site + "search.html?q=temperature")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map((link) => link.href)")
    assert any("chapters/similarity/temperature.html" in address for address in found)


@pytest.mark.parametrize(
    ("start", "link"),
    [
        ("chapters/similarity/temperature.html", "a.reference.internal[href*='#equation-']"),
        ("chapters/similarity/temperature.html", "a.reference.internal[href*='references.html#']"),
        ("chapters/similarity/temperature.html", "a.reference.internal[href*='ledger.html#claim-']"),
    ],
    ids=["equation", "citation", "claim"],
)
def test_links_land(site, page, start, link):
    page.goto(site + start)
    page.evaluate(READY)
    page.locator(link).first.click()
    page.wait_for_load_state("load")
    page.evaluate(READY)
    page.wait_for_function(
        """() => {
            const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
            const box = target?.getBoundingClientRect();
            return box && box.top >= -1 && box.top < innerHeight;
        }""",
        timeout=5000,
    )


def test_slider_moves_by_keyboard(site, page):
    page.goto(site + "book/index.html")
    page.evaluate(READY)
    slider = page.locator(".lossbook-figure input[type=range]")
    before = page.locator(".lossbook-plot").inner_html()
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("before => document.querySelector('.lossbook-plot').innerHTML !== before", arg=before)
    assert page.locator(".lossbook-slider output").inner_text() == "0.5"


def test_hub_page_makes_the_link_and_remembers_the_hub(site, page):
    page.goto(site + "book/hub.html#labs/similarity/temperature.ipynb")
    page.fill("#lossbook-hub-address", "https://hub.example.edu/")
    address = page.locator(".lossbook-hub output").inner_text()
    assert address.startswith("https://hub.example.edu/hub/user-redirect/git-pull?repo=https%3A%2F%2Fgithub.com")
    assert address.endswith("branch=main&urlpath=lab%2Ftree%2Flossbook%2Flabs%2Fsimilarity%2Ftemperature.ipynb")
    page.route("https://hub.example.edu/**", lambda route: route.fulfill(body="hub"))
    page.click(".lossbook-hub button")
    page.wait_for_url("https://hub.example.edu/**")
    page.goto(site + "book/hub.html")
    assert page.input_value("#lossbook-hub-address") == "https://hub.example.edu/"
