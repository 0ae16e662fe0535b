"""The README's claims that a program can hold it to."""

import ast
import re

import pytest

from conftest import ATARI_SCRIPTS, ROOT, load_script

README = (ROOT / "README.md").read_text()


def rows_of_the_table(heading: str) -> dict[str, str]:
    """The defaults in the table of arguments under a heading."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r"^\| `--([a-z0-9-]+)`[^|]*\| ([^|]*) \| [^|]+ \|$", section, re.MULTILINE))


ROWS, SAC_ROWS = rows_of_the_table("Arguments"), rows_of_the_table("DeepMind Control")


@pytest.mark.parametrize("script", [*ATARI_SCRIPTS, "rde_sac_dmc"])
def test_the_table_of_arguments_is_that_of_the_script(script):
    defaults = {name.replace("_", "-"): value for name, value in vars(load_script(script).Args()).items()}
    table = ROWS | SAC_ROWS if script == "rde_sac_dmc" else ROWS
    assert defaults.keys() <= table.keys()
    for name, value in defaults.items():
        if name == "exp-name":
            continue  # the script's own name
        written = table[name].strip("`")
        if isinstance(value, (bool, int, float)):
            assert ast.literal_eval(written) == value, name
        else:
            assert written == (str(value) if value else "none"), name


def test_the_table_names_no_argument_that_does_not_exist():
    ensemble, sac = (
        {name.replace("_", "-") for name in vars(load_script(script).Args())} for script in ("rde_dqn_atari", "rde_sac_dmc")
    )
    assert ROWS.keys() == ensemble and SAC_ROWS.keys() <= sac
    assert ensemble - sac == {"start-e", "end-e", "exploration-fraction", "max-grad-norm", "reset-depth"}  # "the five"


def test_the_logged_metrics_are_described():
    for script in [*ATARI_SCRIPTS, "rde_sac_dmc"]:
        for tag in re.findall(r'"((?:charts|losses|eval|rde)/[a-zA-Z_]+)', (ROOT / f"{script}.py").read_text()):
            assert f"`{tag.rstrip('_')}" in README, tag


@pytest.mark.parametrize("path", ["README.md", "results/README.md"])
def test_the_files_that_a_readme_names_exist(path):
    text, folder = (ROOT / path).read_text(), (ROOT / path).parent
    for name in re.findall(r"`([a-zA-Z_/]+\.(?:py|sh|txt|md|png|csv))`", text):
        if name not in ("episodes.csv", "evaluations.csv", "results.csv", "training_games.csv"):  # of run and result folders
            assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)h#][^)]*)\)", text):
        assert (folder / name).exists(), name
