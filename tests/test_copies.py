"""What the scripts share is copied, to the letter; what differs is named here."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("*_*.py") if path.stem.startswith(("dqn", "sr", "rde", "rnd")))

# The algorithm itself. Everything else that two scripts both define must be the same.
MAY_DIFFER = {"Args", "check_args", "Agent", "train", "resets_due", "agenda_due"}
# Of environments other than Atari, too.
MAY_DIFFER_BETWEEN_SUITES = MAY_DIFFER | {
    "ReplayBuffer", "make_env", "environment_state", "restore_environment", "evaluate", "WRAPPER_STATE", "RESET_LAYERS",
    "network_input", "package_versions", "__docstring__",
    "RunFolder.log_evaluation",  # human-normalized scores
    "check_finite", "resume_args",  # arguments that SAC has not got: the norm of gradients, the decay of epsilon
    "load_checkpoint",  # the shape of the replay buffer
}  # fmt: skip


def definitions(path: pathlib.Path) -> dict[str, str]:
    """The source of every class, function and constant at the top level, comments and decorators included."""
    source = path.read_text()
    lines, found, previous_end = source.splitlines(), {}, 0
    for node in ast.parse(source).body:
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        while start - 1 > previous_end and lines[start - 2].startswith("#") and "-----" not in lines[start - 2]:
            start -= 1  # the comment above belongs to it
        text = "\n".join(lines[start - 1 : node.end_lineno])
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if isinstance(node, ast.ClassDef) and node.name == "RunFolder":  # one of its methods may differ
                (method,) = [part for part in node.body if getattr(part, "name", None) == "log_evaluation"]
                found["RunFolder.log_evaluation"] = "\n".join(lines[method.lineno - 1 : method.end_lineno])
                text = text.replace(found["RunFolder.log_evaluation"], "")
            found[node.name] = text
        elif isinstance(node, ast.Assign):
            for target in ast.walk(node.targets[0]):
                if isinstance(target, ast.Name):
                    found[target.id] = text
        previous_end = node.end_lineno
    return found


def suite(path: pathlib.Path) -> str:
    return path.stem.split("_")[-1]


PAIRS = [(a, b) for i, a in enumerate(SCRIPTS) for b in SCRIPTS[i + 1 :]]


@pytest.mark.parametrize("first, second", PAIRS, ids=lambda path: path.stem)
def test_shared_definitions_are_identical(first, second):
    ours, theirs = definitions(first), definitions(second)
    may_differ = MAY_DIFFER if suite(first) == suite(second) else MAY_DIFFER_BETWEEN_SUITES
    shared = (ours.keys() & theirs.keys()) - may_differ
    assert len(shared) > 15
    assert [name for name in sorted(shared) if ours[name] != theirs[name]] == []


def test_the_atari_scripts_are_found_and_define_the_same_but_for_the_idea():
    names = {path.stem: definitions(path).keys() for path in SCRIPTS if suite(path) == "atari"}
    assert {"dqn_atari", "sr_dqn_atari", "rde_dqn_atari"} <= names.keys()
    assert names["sr_dqn_atari"] - names["dqn_atari"] == {"RESET_LAYERS", "resets_due"}
    assert names["rde_dqn_atari"] - names["sr_dqn_atari"] == {"selection_probabilities"}
    assert names["dqn_atari"] <= names["sr_dqn_atari"] <= names["rde_dqn_atari"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_no_other_file_of_the_repository(script):
    siblings = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            assert not siblings & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in siblings and node.level == 0


def test_the_comparison_notices_a_changed_comment(tmp_path):
    """The check itself: a copy that drifts by one word in one comment is found."""
    original = ROOT / "sr_dqn_atari.py"
    drifted = tmp_path / "drifted.py"
    drifted.write_text(original.read_text().replace("Qbert stays at 0 lives", "Qbert keeps 0 lives"))
    ours, theirs = definitions(original), definitions(drifted)
    assert [name for name in ours if ours[name] != theirs[name]] == ["EpisodicLife"]
