"""The documentation: links lead somewhere, the site builds, and what it says of code and records is so."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import mm_agrae
from mm_agrae.advantage import levels
from mm_agrae.config import Config
from mm_agrae.run.folder import RunFolder

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"`((?:docs|scripts|configs|mm_agrae|tests|examples)/[\w./-]*\w/?)`")
"""A path of the repository in code style."""


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import docs_hooks

    return docs_hooks


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Those that GitHub and the site give to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def dead_links(page: Path) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page(page):
    assert dead_links(page) == []
    # The changelog also names what has gone since.
    paths = [] if page.name == "CHANGELOG.md" else NAMED.findall(prose(page))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_dead_links_would_be_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A [heading](x), and more\n\n```\n# no heading\n```\n")
    sound = "[1](other.md) [2](other.md#a-heading-and-more) [3](https://x.org)"
    page.write_text(f"{sound} [4](gone.md) [5](other.md#no-heading) [6](#x)")
    assert dead_links(page) == ["gone.md", "other.md#no-heading", "#x"]


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is not installed: pip install '.[docs]'")
def test_the_site_builds_strictly(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Weight of the k3 estimate" in (tmp_path / "configuration" / "index.html").read_text(encoding="utf-8")
    assert 'id="mm_agrae.advantage.agrae"' in (tmp_path / "python" / "index.html").read_text(encoding="utf-8")


def test_the_configuration_reference_is_the_schema(hooks):
    text = hooks.settings()
    assert "| `kl_coef` | number ≥ 0 | `0.0` | Weight of the k3 estimate of KL to the starting policy; 0" in text
    known = {f"{path}.{name}".lstrip(".") for path, section in hooks.sections(Config) for name in section.model_fields}
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) == len(known)
    assert hooks.PLAIN.keys() <= known


def test_the_numbers_of_the_step_that_is_followed():
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    run = RunFolder(ROOT / "docs" / "one_step")
    rows = sorted(run.read_rollouts(3), key=lambda row: (row["prompt_index"], row["completion_index"]))
    group = [row for row in rows if row["prompt_index"] == 4]
    assert (run.path / group[0]["images"][0]).is_file()
    for row in group:
        text, _, answer = row["completion"].removeprefix("<think>").partition("</think> \\boxed{")
        parts = row["parts"]
        cells = [row["completion_index"], text, row["tokens"], answer.removesuffix("}")]
        cells += [f"{parts['accuracy']:g}", f"{parts['format']:g}", f"{row['reward']:.1f}"]
        assert f"| {' | '.join(map(str, cells))} |" in page

    def by_group(name):
        return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64).view(16, 8)

    found = levels("agrae", by_group("reward"), by_group("success"), alpha=0.5)
    assert torch.allclose(found.advantage_PG, by_group("advantage"), atol=1e-6)
    right, wrong = (3, 0)
    for title, index in (("correct (3, 7)", right), ("incorrect (the others)", wrong)):
        stages = [tensor[4, index].item() for tensor in (found.base_PG, found.sample_PG, found.advantage_PG)]
        assert f"| {title} | {' | '.join(f'{value:.3f}' for value in stages)} |".replace("-", "−") in page
    ratio_P = (found.sample_PG / found.base_PG)[:, 0]
    for value in (found.omega, ratio_P[4].item(), ratio_P[12].item(), found.omega / 0.5):
        assert f"{value:.3f}" in page
    assert f"sum over the group | 0 | 0 | {found.advantage_PG[4].sum().item():.3f}".replace("-", "−") in page
    metrics = run.read_metrics()[0]
    assert metrics["advantage/omega"] == pytest.approx(found.omega)
    assert f"{metrics['policy/kl_reference']:.1e}".replace("e-05", "e-5") in page


def test_the_citation_has_the_version():
    assert f"\nversion: {mm_agrae.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
