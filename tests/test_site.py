"""The documentation site: it builds without a warning, its reference is complete, and every link leads somewhere."""

import argparse
import dataclasses
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from bs4 import BeautifulSoup, Tag

import stepfuse
from stepfuse.data.settings_fields import setting_texts
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.scripts.cli.main import COMMANDS, GROUPS, make_parser
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.recipes.build_set import BuildConfig
from stepfuse.train.arguments import SettingsParser
from stepfuse.train.distill_settings import DistillSettings
from stepfuse.train.settings import DDPOSettings, DPOSettings, TrainSettings
from tests.fixtures_documents import ROOT
from tests.fixtures_site import GENERATED, build_site, documents, read_html, read_markdown

PROGRAMS = {"dpo": DPOSettings, "ddpo": DDPOSettings, "distill": DistillSettings}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once; a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    build_site(folder)
    return folder


@cache
def page_of(file: Path) -> BeautifulSoup:
    return BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")


def words(text: str) -> str:
    """A text without the marks of code, and with single spaces."""
    return " ".join(text.replace("`", "").split())


def entries(part: Tag) -> dict[str, str]:
    """The explanation of each option or setting that is described in a part of a page, by its name."""
    return {
        name.get_text().strip(): words(term.find_next_sibling("dd").get_text())
        for term in part.find_all("dt", class_="sig")
        for name in term.find_all(class_="descname")
    }


def section(page: BeautifulSoup, title: str) -> Tag:
    (found,) = [heading for heading in page.find_all(["h2", "h3"]) if heading.find(string=True) == title]
    return found.parent


def shown(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (each for each in parser._actions if each.help != argparse.SUPPRESS and each.dest != "help")


@pytest.mark.slow
def test_every_option_of_every_command_is_explained_in_the_site(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    page = page_of(site / "reference/commands.html")
    top = make_parser()
    for name in COMMANDS:
        parser: argparse.ArgumentParser = top
        for word in name.split():
            (actions,) = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
            parser = actions.choices[word]
        part = section(page, f"stepfuse {name}")
        assert words(parser.description or "") in words(part.get_text()), name
        if name in GROUPS:
            continue
        explained = entries(part)
        for action in shown(parser):
            for flag in action.option_strings or [str(action.metavar)]:
                assert words(action.help or "") in explained[flag], (name, flag)


@pytest.mark.slow
def test_every_flag_of_the_training_programs_leads_to_its_setting(site: Path) -> None:
    page = page_of(site / "reference/commands.html")
    anchors = read_html(site / "reference/settings.html").anchors
    for program, settings in PROGRAMS.items():
        part = section(page, f"train/{program}.py")
        links = {link.get_text(): link["href"] for link in part.find_all("a", class_="reference")}
        for action in shown(SettingsParser(settings)):
            if action.dest != "config":
                file, anchor = urldefrag(links[f"--{action.dest}"])
                assert file == "settings.html"
                assert anchor in anchors
                assert anchor.endswith(f".{action.dest}")


@pytest.mark.slow
def test_every_setting_is_in_the_site_with_its_default_and_its_help(site: Path) -> None:
    terms = {term.get("id"): term for term in page_of(site / "reference/settings.html").find_all("dt", class_="sig")}
    kinds = PROGRAMS | {"evaluate": EvaluationConfig, "build": BuildConfig}
    shared = {field.name for field in dataclasses.fields(TrainSettings)}
    for program, settings in kinds.items():
        texts = setting_texts(settings)
        for field in dataclasses.fields(settings):
            inherited = field.name in shared and program in PROGRAMS and field.name not in vars(settings)
            term = terms[f"setting-{'train' if inherited else program}.{field.name}"]
            assert words(texts[field.name][1]) in words(term.find_next_sibling("dd").get_text())
            if isinstance(field.default, int) and not isinstance(field.default, bool):
                assert term.get_text().rstrip("¶\n ").endswith(f"default {field.default}")


@pytest.mark.slow
def test_every_public_name_and_every_reward_is_in_the_site(site: Path) -> None:
    names = read_html(site / "reference/api.html").anchors
    assert {f"stepfuse.{name}" for name in stepfuse.__all__} <= names
    page = page_of(site / "reference/rewards.html")
    for name, entry in REWARDS.items():
        assert words(entry.source) in words(section(page, name).get_text())


@pytest.mark.slow
def test_formulas_are_shown_as_mathematics(site: Path) -> None:
    """Each pair of dollars of the text is one formula, and no dollar is left outside code."""
    source = (ROOT / "docs/concepts.md").read_text(encoding="utf-8").replace("$$", "$")
    page = page_of(site / "concepts.html").find("article")
    formulas = page.find_all("math")
    assert len(formulas) == source.count("$") / 2 > 20
    assert "$" not in page.get_text()


@pytest.mark.slow
def test_intervals_of_tables_and_options_of_commands_are_not_divided_between_lines(site: Path) -> None:
    page = page_of(site / "evaluation/README.html")
    whole = {part.get_text() for part in page.find_all(class_="unbroken")}
    assert {"[+1.65, +2.04]", "--output_dir", "--config"} <= whole
    cells = [cell for cell in page.find_all("td") if "[" in cell.get_text()]
    assert len(cells) > 100
    assert all(cell.find(class_="unbroken") for cell in cells)
    assert "1.37–1.55" in {part.get_text() for part in page_of(site / "speed/README.html").find_all(class_="unbroken")}


@pytest.mark.slow
def test_links_of_the_site_lead_to_its_files_and_their_anchors(site: Path) -> None:
    lost = []
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in (page for page in pages if "files" not in page.parts):  # copies of the repository's
        for link in read_html(page).links:
            address, anchor = urldefrag(link)
            if urlsplit(link).scheme or not (address or anchor):
                continue
            target = page.parent / unquote(urlsplit(address).path) if address else page
            known = target.is_file() and (not anchor or unquote(anchor) in read_html(target).anchors)
            if not known:
                lost.append((page.relative_to(site).as_posix(), link))
    assert lost == []


@pytest.mark.slow
def test_links_of_the_documents_lead_to_files_and_headings_of_the_repository(site: Path) -> None:
    """As the repository's own pages resolve them; what the site adds to a page is looked up in the site."""
    lost, count = [], 0
    for document in documents():
        for link in read_markdown(document).links:
            address, anchor = urldefrag(link)
            if urlsplit(link).scheme:
                continue
            count += 1
            target = (document.parent / unquote(address)).resolve() if address else document
            known = target.exists() and target.is_relative_to(ROOT)
            if known and anchor and target.suffix == ".md":
                anchors = read_markdown(target).anchors
                if target in GENERATED:
                    built = site / target.relative_to(ROOT / "docs").with_suffix(".html")
                    anchors = anchors | read_html(built).anchors
                known = anchor in anchors
            if not known:
                lost.append((document.relative_to(ROOT).as_posix(), link))
    assert count > 80
    assert lost == []


@pytest.mark.network
@pytest.mark.slow
def test_external_links_of_the_documents_are_answered() -> None:
    links = {urldefrag(link)[0] for document in documents() for link in read_markdown(document).links}
    links = {link for link in links if urlsplit(link).scheme == "https"}
    assert len(links) > 5
    lost = []
    for link in sorted(links):
        request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (stepfuse's documentation)"})
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except OSError as error:
            lost.append(f"{link}: {error}")
    assert lost == []
