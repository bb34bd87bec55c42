"""The README's commands and tree are those of the repository."""

import re

import pytest
from world import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
VERBS = re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.M)


def test_it_is_short_and_leads_with_a_command() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    assert any("make run" in line for line in lines[:25])


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"(?:`|^    )make ([a-z]+)", README, re.M))))
def test_every_verb_it_names_exists(verb: str) -> None:
    assert verb in VERBS


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)|^    (\S+/) ", README, re.M))
def test_every_path_it_names_exists(path: tuple[str, str]) -> None:
    assert (ROOT / (path[0] or path[1])).exists()


def test_ci_calls_the_same_verbs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for verb in ("make check", "make test", "make run"):
        assert verb in script
        assert verb in workflow


def test_every_verb_has_a_line_of_help() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert targets is not None
    assert set(targets[1].split()) == set(VERBS)
