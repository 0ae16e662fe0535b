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
OURS = [path for path in SCRIPTS if not path.stem.startswith("my_")]  # a variant of somebody's own may change what is above
ENSEMBLES = [path for path in OURS if "    num_agents: " in path.read_text()]


def test_what_the_scripts_share_is_equal():
    """All below the second line, those of a suite its environments, those of a kind of replay buffer that, too."""
    assert len(OURS) >= 8
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
    names = ("dqn_atari", "sr_dqn_atari", "rde_dqn_atari")
    above = {name: set(definitions(copies.parts(ROOT / f"{name}.py")[0])) for name in names}
    assert above["sr_dqn_atari"] - above["dqn_atari"] == {"RESET_LAYERS", "resets_due"}
    choice = {"selection_probabilities", "value_scale", "advantage_scale", "DEFAULT_BETA"}
    assert above["rde_dqn_atari"] - above["sr_dqn_atari"] == choice
    assert above["dqn_atari"] <= above["sr_dqn_atari"] <= above["rde_dqn_atari"]


@pytest.mark.parametrize("name", ["selection_probabilities", "value_scale", "advantage_scale", "DEFAULT_BETA", "resets_due",
                                  "events_due", "linear_schedule", "Agent.summary", "Agent.num_resets",
                                  "Agent.autocast"])  # fmt: skip
def test_what_scripts_have_in_common_above_the_line_is_one_text(name):
    """The ensembles their choice and their resets; whoever has them, the schedule and the precision."""
    paths = OURS if name in ("linear_schedule", "Agent.autocast") else ENSEMBLES
    texts = [source_of(text, name) for text in (copies.parts(path)[0] for path in paths) if name in all_definitions(text)]
    assert len(texts) > 3 and len(set(texts)) == 1


def test_the_arguments_of_the_run_and_of_the_machine_are_one_text():
    """But for --bf16 of rnd_dqn_atari.py, which says that the bonus is computed in float32."""
    texts = {}
    for path in OURS:
        text = re.search(r"    # -+ the run\n(.*?)    # -+ the environment\n", path.read_text(), re.DOTALL)[1]
        texts[path.stem] = re.sub(r"(?<=    bf16: bool = False\n).*?\"\"\"\n", "", text, flags=re.DOTALL)
    assert len(set(texts.values())) == 1 and "checkpoint_interval" in text and "cuda_graphs" in text


def all_definitions(text: str) -> list[str]:
    """At the top level, and of the agent."""
    agents = [node for node in ast.parse(text).body if names(node) == ["Agent"]]
    return definitions(text) + [f"Agent.{name}" for agent in agents for node in agent.body for name in names(node)]


def source_of(text: str, name: str) -> str:
    """Of a definition at the top level, or, as Class.method, in a class."""
    body = ast.parse(text).body
    for part in name.split("."):
        nodes = [node for node in body if part in names(node)]  # of a property its setter, too
        body = getattr(nodes[0], "body", None)
    return "\n".join(ast.get_source_segment(text, node) for node in nodes)


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


def copy_of_repository(folder) -> list[str]:
    """The scripts and their tests, in another folder."""
    (folder / "tests").mkdir()
    for path in [*SCRIPTS, *ROOT.glob("tests/co*.py"), ROOT / "tests" / "test_copies.py"]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    return [path.name for path in SCRIPTS]


@pytest.mark.parametrize("script, part", [("sr_dqn_atari", 1), ("dqn_atari", 2), ("rde_sac_dmc", 3), ("rde_dqn_atari", 0)])
def test_a_copy_that_drifts_is_noticed_and_copied(script, part, tmp_path):
    """In the environments of a suite; in a kind of replay buffer; below the second line. Above the line nothing is touched."""
    all_names, path = copy_of_repository(tmp_path), tmp_path / f"{script}.py"
    alike = {0: lambda other: False, 1: lambda other: copies.suite(other) == "atari", 3: lambda other: True,
             2: lambda other: copies.kind_of_buffer(other) == copies.kind_of_buffer(path)}[part]  # fmt: skip
    reached = [name for name in all_names if name != path.name and alike(ROOT / name)]
    assert bool(reached) == (part > 0)
    parts = copies.parts(path)
    parts[part] += "# drifted\n"
    path.write_text("".join(parts))
    before, expected = {name: (tmp_path / name).read_text() for name in all_names}, " ".join(reached) or "none"
    result = run_copies(tmp_path, path.name, "--check")
    assert (result.returncode, result.stdout) == (int(bool(reached)), f"different: {expected}\n")
    assert before == {name: (tmp_path / name).read_text() for name in all_names}
    result = run_copies(tmp_path, path.name)
    assert (result.returncode, result.stdout) == (0, f"changed: {expected}\n")
    for name in set(all_names) - {path.name}:
        parts = copies.parts(ROOT / name)
        parts[part] += "# drifted\n" if name in reached else ""
        assert (tmp_path / name).read_text() == "".join(parts)
    assert run_copies(tmp_path, path.name, "--check").returncode == 0


def test_a_script_of_ones_own_is_looked_after_and_disturbs_nothing(tmp_path):
    """A ninth one, with an idea above the line; then with a change below it, too."""
    copy_of_repository(tmp_path)
    text, path = (ROOT / "rde_dqn_atari.py").read_text(), tmp_path / "my_mean_judge_atari.py"
    old = "judged = q_values.index_select(0, self.oldest).squeeze(0)"
    assert text.count(old) == 1
    path.write_text(text.replace(old, "judged = q_values.mean(dim=0)"))
    check = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_copies.py", "-k", "not drifts and not own"]
    result = subprocess.run(check, cwd=tmp_path / "tests", capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "my_mean_judge_atari" not in result.stdout, result.stdout
    path.write_text(path.read_text() + "# drifted\n")
    result = subprocess.run(check, cwd=tmp_path / "tests", capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "my_mean_judge_atari.py" in result.stdout


def test_a_source_that_is_no_script(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "copies.py", "plot_benchmark.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "plot_benchmark.py is not one of the scripts" in result.stderr
