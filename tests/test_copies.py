"""What the scripts share is copied, to the byte (tests/copies.py); and a script stands alone."""

import ast
import re
import shutil
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
    assert [path for path in sorted(ROOT.glob("*.py")) if re.search(r"^def train\(", path.read_text(), re.MULTILINE)] == SCRIPTS
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
    texts = {name: copies.parts(ROOT / f"{name}.py")[0] for name in ("dqn_atari", "sr_dqn_atari", "rde_dqn_atari")}
    above = {name: set(definitions(text)) for name, text in texts.items()}
    assert source_of(texts["sr_dqn_atari"], "RESET_LAYERS") == source_of(texts["rde_dqn_atari"], "RESET_LAYERS")
    assert above["sr_dqn_atari"] - above["dqn_atari"] == {"RESET_LAYERS", "resets_due"}
    choice = {"selection_probabilities", "value_scale", "advantage_scale", "DEFAULT_BETA"}
    assert above["rde_dqn_atari"] - above["sr_dqn_atari"] == choice
    assert above["dqn_atari"] <= above["sr_dqn_atari"] <= above["rde_dqn_atari"]


OF_ENSEMBLES = ["selection_probabilities", "value_scale", "advantage_scale", "DEFAULT_BETA", "resets_due", "events_due"]
OF_ALL = ["UnitInterval", "linear_schedule", "Agent.autocast"]


@pytest.mark.parametrize("name", OF_ENSEMBLES + OF_ALL)
def test_what_scripts_have_in_common_above_the_line_is_one_text(name):
    """The ensembles their choice and their resets; whoever has them, the schedule and the precision."""
    paths = OURS if name in OF_ALL else ENSEMBLES
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
    text, positions = script.read_text(), []
    rows = re.findall(r"^    (\S.*)$", ast.get_docstring(ast.parse(text)).split("Where is what:\n")[1], re.MULTILINE)
    defined = {name: node.lineno for node in ast.parse(text).body for name in names(node)}
    for number, line in enumerate(text.splitlines(), start=1):
        if heading := re.match("# =+ (the line|the second line)$", line):
            defined[f"-- {heading[1]} --"] = number
    for row in rows:
        heading = re.match(r"-- [\w ]+ --", row)
        words = [heading[0]] if heading else re.match(r"(?:\w+(?:, )?)+", row)[0].removesuffix(", ").split(", ")
        assert words and all(word in defined for word in words), row
        positions += [defined[word] for word in words]
    assert positions == sorted(positions) and len(positions) >= 10


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_no_other_file_of_the_repository(script):
    siblings = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]}
    for node in ast.walk(ast.parse(script.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module]
        assert not siblings & {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("script, part", [("sr_dqn_atari", 1), ("dqn_atari", 2), ("rde_sac_dmc", 3), ("rde_dqn_atari", 0)])
def test_a_copy_that_drifts_is_noticed_and_copied(script, part, tmp_path, monkeypatch, capsys):
    """In the environments of a suite; in a kind of replay buffer; below the second line. Above the line nothing is touched."""
    path = tmp_path / f"{script}.py"
    for file in SCRIPTS:
        shutil.copy(file, tmp_path)
    alike = {0: lambda other: False, 1: lambda other: copies.suite(other) == "atari", 3: lambda other: True,
             2: lambda other: copies.kind_of_buffer(other) == copies.kind_of_buffer(path)}[part]  # fmt: skip
    reached = [other.name for other in SCRIPTS if other.name != path.name and alike(other)]
    assert bool(reached) == (part > 0)

    def drifted(other) -> str:
        parts = copies.parts(ROOT / other.name)
        parts[part] += "# drifted\n"
        return "".join(parts)

    path.write_text(drifted(path))
    monkeypatch.setattr(copies, "ROOT", tmp_path)
    for options, said, code in ((["--check"], "different", bool(reached)), ([], "changed", 0), (["--check"], "different", 0)):
        monkeypatch.setattr(sys, "argv", ["copies.py", path.name, *options])
        with pytest.raises(SystemExit) as end:
            copies.main()
        names = " ".join(reached) if code or not options else ""
        assert (end.value.code, capsys.readouterr().out) == (code, f"{said}: {names or 'none'}\n")
    for other in SCRIPTS:
        expected = drifted(other) if other.name in (path.name, *reached) else other.read_text()
        assert (tmp_path / other.name).read_text() == expected
