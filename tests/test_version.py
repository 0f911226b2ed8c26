"""The version has one source, ganclean/_version.py, and everything else agrees with it."""

import re
from pathlib import Path

from ganclean import __version__

ROOT = Path(__file__).parents[1]


def test_the_citation_names_this_version():
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [__version__]


def test_the_newest_release_in_the_changelog_is_this_version():
    unreleased, *released = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert unreleased == "Unreleased"
    # Before the first release there is none.
    assert not released or released[0] == __version__


def test_the_build_reads_the_version_and_does_not_state_it():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject and 'path = "ganclean/_version.py"' in pyproject
