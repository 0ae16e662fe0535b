"""What the scripts share is copied, to the byte (tests/copies.py); and a script stands alone."""

import ast
import re
import shutil
import subprocess
import sys

import copies
import pytest

from conftest import ROOT

SCRIPTS = copies.scripts()
FOUR = {"dqn_atari", "sr_dqn_atari", "rde_dqn_atari", "rde_sac_dmc"}


def test_what_the_scripts_share_is_equal():
    """All below the second line, those of a suite its environments, those of a kind of replay buffer that, too."""
    assert FOUR <= {path.stem for path in SCRIPTS}
    for source in SCRIPTS:
        assert [path.name for path in SCRIPTS if copies.with_copies(path, source) != path.read_text()] == []


def test_every_script_is_one_of_these():
    """What trains has the two lines, in their order: so nothing is left out of the comparison."""
    trains = [path for path in sorted(ROOT.glob("*.py")) if re.search(r"^def train\(", path.read_text(), re.MULTILINE)]
    assert trains == SCRIPTS
    for path in SCRIPTS:
        headings = [match[0].split()[-2:] for match in copies.HEADINGS.finditer(path.read_text())]
        assert headings == [["the", "line"], ["replay", "buffer"], ["second", "line"]]
        assert "".join(copies.parts(path)) == path.read_text()


def names(node) -> list[str]:
    """What a statement at the top level defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets if target is not None for name in ast.walk(target) if isinstance(name, ast.Name)]


def definitions(text: str) -> list[str]:
    return [name for node in ast.parse(text).body for name in names(node)]


def test_the_atari_scripts_define_the_same_but_for_the_idea():
    above = {name: set(definitions(copies.parts(ROOT / f"{name}.py")[0])) for name in FOUR}
    assert above["sr_dqn_atari"] - above["dqn_atari"] == {"RESET_LAYERS", "resets_due"}
    choice = {"selection_probabilities", "value_scale", "advantage_scale", "DEFAULT_BETA"}
    assert above["rde_dqn_atari"] - above["sr_dqn_atari"] == choice
    assert above["dqn_atari"] <= above["sr_dqn_atari"] <= above["rde_dqn_atari"]


ENSEMBLES = {"rde_dqn_atari", "rde_drq_atari", "rde_dqn", "rde_sac_dmc", "rde_sac_safety"}


@pytest.mark.parametrize(
    "name, count",
    [
        ("selection_probabilities", 5), ("value_scale", 5), ("advantage_scale", 5), ("DEFAULT_BETA", 5), ("Agent.summary", 5),
        ("resets_due", 5), ("events_due", 5), ("linear_schedule", 6), ("Agent.autocast", 8),
    ],
)  # fmt: skip
def test_what_scripts_have_in_common_above_the_line_is_one_text(name, count):
    """The ensembles their choice and their resets; whoever has one, the schedule."""
    paths = [path for path in SCRIPTS if count > 5 or path.stem in ENSEMBLES]
    paths = [path for path in paths if name.split(".")[0] in definitions(copies.parts(path)[0])]
    texts = [source_of(copies.parts(path)[0], name) for path in paths]
    assert len(texts) == count and len(set(texts)) == 1


def test_the_arguments_of_the_run_and_of_the_machine_are_one_text():
    """But for --bf16 of rnd_dqn_atari.py, which says that the bonus is computed in float32."""
    texts = {
        path.stem: re.search(r"    # -+ the run\n(.*?)    # -+ the environment\n", path.read_text(), re.DOTALL)[1]
        for path in SCRIPTS
    }
    common = texts["dqn_atari"]
    start, end = (
        re.search(r'    bf16: bool = False\n    """.*?"""\n', text, re.DOTALL).span()
        for text in (common, texts["rnd_dqn_atari"])
    )
    texts["rnd_dqn_atari"] = texts["rnd_dqn_atari"][: end[0]] + common[start[0] : start[1]] + texts["rnd_dqn_atari"][end[1] :]
    assert (
        [name for name, text in texts.items() if text != common] == [] and "resume: str" in common and "cuda_graphs" in common
    )


def source_of(text: str, name: str) -> str:
    """Of a definition at the top level, or, as Class.method, in a class."""
    body = ast.parse(text).body
    for part in name.split("."):
        (node,) = [node for node in body if part in names(node)]
        body = getattr(node, "body", None)
    return ast.get_source_segment(text, node)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_map_of_a_script_names_what_is_there_in_its_order(script):
    text = script.read_text()
    rows = re.findall(r"^    (\S.*)$", ast.get_docstring(ast.parse(text)).split("Where is what:\n")[1], re.MULTILINE)
    defined = {name: node.lineno for node in ast.parse(text).body for name in names(node)}
    for number, line in enumerate(text.splitlines(), start=1):
        if heading := re.match("# =+ (the line|the second line)$", line):
            defined[f"-- {heading[1]} --"] = number
    positions = []
    for row in rows:
        heading = re.match(r"-- [\w ]+ --", row)
        words = [heading[0]] if heading else re.match(r"(?:\w+(?:, )?)+", row.split("  ")[0])[0].split(", ")
        words = [word.split()[0] if not heading else word for word in words if word]
        assert words and all(word in defined for word in words), row
        positions += [defined[word] for word in words]
    assert positions == sorted(positions) and len(positions) >= 10


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_no_other_file_of_the_repository(script):
    siblings = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            assert not siblings & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in siblings and node.level == 0


def run_copies(folder, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, folder / "tests" / "copies.py", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "script, old, new, part, reached",
    [
        # a word of a comment in the environments of a suite; in its replay buffer; below the second line
        (
            "sr_dqn_atari",
            "without it Qbert goes on wrongly",
            "without it Qbert plays on wrongly",
            1,
            {"dqn_atari", "rde_dqn_atari"},
        ),
        ("dqn_atari", "in one copy: the places", "in a single copy: the places", 2, {"sr_dqn_atari", "rde_dqn_atari"}),
        ("rde_sac_dmc", "# too many for one step", "# far too many for one step", 3, FOUR - {"rde_sac_dmc"}),
        ("rde_dqn_atari", "# the judge, and the next to be reset", "# the judge", 0, set()),
    ],
)
def test_a_copy_that_drifts_is_noticed_and_copied(script, old, new, part, reached, tmp_path):
    """The check itself, on copies of the four scripts: what is different, and that above the line nothing is touched."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "copies.py", tmp_path / "tests")
    for name in FOUR:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    path = tmp_path / f"{script}.py"
    assert old in copies.parts(path)[part]
    path.write_text(path.read_text().replace(old, new))
    before = {name: (tmp_path / f"{name}.py").read_text() for name in FOUR}
    expected = " ".join(f"{name}.py" for name in sorted(reached)) or "none"
    result = run_copies(tmp_path, path.name, "--check")
    assert (result.returncode, result.stdout) == (int(bool(reached)), f"different: {expected}\n")
    assert before == {name: (tmp_path / f"{name}.py").read_text() for name in FOUR}
    result = run_copies(tmp_path, path.name)
    assert (result.returncode, result.stdout) == (0, f"changed: {expected}\n")
    for name in FOUR:
        text = (tmp_path / f"{name}.py").read_text()
        assert text == (before[name].replace(old, new) if name in reached else before[name])
    assert run_copies(tmp_path, path.name, "--check").returncode == 0


def test_a_source_that_is_no_script(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "copies.py", "plot_benchmark.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "plot_benchmark.py is not one of the scripts" in result.stderr
