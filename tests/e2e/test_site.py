"""The documentation as a site: it builds strictly, has every page, and loads nothing from anywhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs-material is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_page_is_there_and_named(site: Path) -> None:
    pages = [page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")]
    home = (site / "index.html").read_text()
    for page in pages:
        assert (site / page).is_file()
        assert f'href="{page}"' in home, f"{page} is not in the navigation"
    assert not list(site.rglob("*.py"))


def test_nothing_is_loaded_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"([^\"]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|icon|preconnect)\"[^>]*href=\"([^\"]+)", text)
        assert loaded
        assert not [target for target in loaded if re.match(r"(https?:)?//", target)], page


def test_the_search_works_from_a_file(browser: Any, site: Path) -> None:
    opened = browser.new_page(viewport={"width": 1300, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto((site / "decisions" / "0004-two-step-ridge.html").as_uri())
    opened.click("[data-md-component=search-query]")
    opened.keyboard.type("self-generated", delay=20)
    opened.wait_for_selector(".md-search-result__item a", timeout=60_000)
    assert said == []
    assert not [url for url in asked if not url.startswith("file:")]
    opened.close()
