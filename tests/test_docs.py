"""What a program can hold README.md and docs/ to: tables of arguments, names of metrics, files and links, lengths."""

import re
import subprocess
import sys

import pytest
from copies import scripts
from tables_of_arguments import page, with_table

from conftest import ROOT, environment

DOCUMENTED = [path for path in scripts() if not path.stem.startswith("my_")]  # a variant of somebody's own needs no page
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("script", DOCUMENTED, ids=lambda path: path.stem)
def test_every_script_has_a_page_whose_table_is_its_arguments(script):
    """After a change: python tests/tables_of_arguments.py"""
    text = page(script).read_text()
    assert text.startswith(f"# {script.name}: ")
    for section in ("Usage", "Arguments", "Logged metrics", "Deviations", "Results"):
        assert f"\n## {section}\n" in text, section
    assert text == with_table(script)


@pytest.mark.parametrize("script", DOCUMENTED, ids=lambda path: path.stem)
def test_every_logged_metric_is_described(script):
    """On the script's page, on the page of all scripts, or on that of the script whose metrics it says it has."""
    source, text = script.read_text(), page(script).read_text() + (ROOT / "docs" / "runs.md").read_text()
    for name in re.findall(r"\]\((\w+\.md)#logged-metrics\)", text):
        text += (ROOT / "docs" / name).read_text()
    tags = set(re.findall(r'"((?:charts|rde|rnd|safety|plasticity)/[a-zA-Z_]+)', source)) - {"charts/episodic_"}
    metrics = re.findall(r"METRICS = \((.*?)\)", source, re.DOTALL)
    assert metrics
    tags |= {f"losses/{name}" for name in re.findall(r'"(\w+)"', " ".join(metrics))}
    assert len(tags) >= 5
    assert [tag for tag in sorted(tags) if f"`{tag.rstrip('_')}" not in text] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_a_page_links_to_exists(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
            assert heading in anchors, target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_programs_that_a_page_names_exist(path):
    for name in re.findall(r"`(?:python |bash )?((?:tests/|baselines/)?\w+\.(?:py|sh))\b", path.read_text()):
        assert (ROOT / name).exists() or "my_" in name or name.startswith("_"), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_studies_that_a_page_gives_can_be_typed(path):
    """Every block of lines with benchmark.sh in it, run with --dry-run; the other programs, and a reader's own scripts, do nothing."""
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", path.read_text(), re.MULTILINE)
    blocks = [block for block in blocks if re.search(r"^ {4}.*benchmark\.sh", block, re.MULTILINE)]
    for block in blocks:
        program = (
            'bash() { [[ $* == *my_* ]] || command bash "$1" --dry-run "${@:2}"; }\n'
            "python() { :; }; nvidia-cuda-mps-control() { :; }; sbatch() { :; }; parallel() { cat; }\n"
        )
        result = subprocess.run(["bash", "-euc", program + block], cwd=ROOT, env=environment() | {"PYTHON": sys.executable},
                                capture_output=True, text=True, check=False)  # fmt: skip
        assert result.returncode == 0 and (re.search("my_|sbatch", block) or " --seed " in result.stdout), (
            block,
            result.stderr,
        )
    assert blocks or path.parent.name != "results"


def test_readme_fits_on_two_screens_and_names_every_script():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    for script in DOCUMENTED:
        assert f"[`{script.name}`](docs/{script.stem}.md)" in text
