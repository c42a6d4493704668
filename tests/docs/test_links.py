"""Links, names of code and files, and the form of the pages."""

import pkgutil
import re
from pathlib import Path

import pytest
import yaml
from pages import PAGES, ROOT, prose

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MAX_LINE = 120


class _SiteConfiguration(yaml.SafeLoader):
    """Reads mkdocs.yml also where it names Python objects."""


_SiteConfiguration.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (
            anchor and anchor not in {re.sub(r"-+", "-", name) for name in anchors(file)} | anchors(file)
        ):
            broken.append(target)
    return broken


def missing_code(page: Path) -> list[str]:
    """Dotted names of the package that cannot be imported, and paths of the repository that are not there."""
    codes = re.findall(r"`([^`\n]+)`", prose(page.read_text("utf-8")))
    missing = []
    for code in codes:
        if re.fullmatch(r"lit_specrl(\.\w+)+", code):
            try:
                pkgutil.resolve_name(code)
            except (ImportError, AttributeError):
                missing.append(code)
        elif re.fullmatch(r"(lit_specrl|configs|recipes|tests|docs)/[\w/.]+", code) and not (ROOT / code).exists():
            missing.append(code)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_and_files_that_are_named_exist(page):
    assert missing_code(page) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_has_one_title_and_short_lines(page):
    text = prose(page.read_text("utf-8"))
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    rows_and_remarks = ("|", "<!--", "![")
    long = [line for line in text.splitlines() if len(line) > MAX_LINE and not line.startswith(rows_and_remarks)]
    assert not long, long


def test_the_site_has_every_page():
    settings = yaml.load((ROOT / "docs" / "site" / "mkdocs.yml").read_text("utf-8"), _SiteConfiguration)
    named = set(re.findall(r"[\w/-]+\.md", str(settings["nav"])))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}


def test_the_pictures_of_the_results_are_drawn_from_their_tables():
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    shown = set(re.findall(r"pictures/(\w+)\.svg", page))
    assert shown == set(re.findall(r'save\("(\w+)"\)', (ROOT / "docs" / "pictures" / "draw.py").read_text("utf-8")))


# ------------------------------------------------------------------------------------------ the tests see what is wrong


def test_what_is_broken_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n[a](none.md) [b](#title) [c](#nowhere) [d](https://x.y)\n`lit_specrl.Nothing` `configs/no.yaml`\n"
    )
    assert broken_links(page) == ["none.md", "#nowhere"]
    assert missing_code(page) == ["lit_specrl.Nothing", "configs/no.yaml"]
