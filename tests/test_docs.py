"""What a program can hold README.md and docs/ to: tables of arguments, names of metrics, files and links, lengths."""

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from copies import scripts
from tables_of_arguments import page, pages_with_tables

from conftest import ROOT, environment, load_script, run_main

DOCUMENTED = [path for path in scripts() if not path.stem.startswith("my_")]  # a variant of somebody's own needs no page
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "results" / "README.md", *sorted((ROOT / "results").glob("*/README.md"))]


SECTIONS = ("What it is", "Usage", "Arguments", "Logged metrics", "Implementation details", "Deviations", "Results")


@pytest.mark.parametrize("script", DOCUMENTED, ids=lambda path: path.stem)
def test_every_script_has_a_page_with_the_same_sections(script):
    text = page(script).read_text()
    assert text.startswith(f"# {script.name}: ")
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == SECTIONS
    results = text.split("\n## Results\n")[1]
    assert re.search(r"^\|", results, re.MULTILINE) and "](../results/" in results
    beside_tables = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(beside_tables).split()) <= 1200
    assert [line for line in beside_tables if len(line) > 120] == []


def test_the_tables_of_arguments_are_those_of_the_scripts():
    """After a change: python tests/tables_of_arguments.py"""
    for path, text in pages_with_tables().items():
        assert path.read_text() == text, path.name


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
    for target in re.findall(r"\]\(([^)]*)\)", text) + re.findall(r"^\[[^]]*\]: (\S+)", text, re.MULTILINE):
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


PROGRAMS = (
    "python ",
    "python3 ",
    "bash ",
    "pip ",
    "uv ",
    "cp ",
    "mkdir ",
    "rm ",
    "mv ",
    "for ",
    "export ",
    "sbatch ",
    "nvidia-cuda-",
)


def commands(text: str) -> list[str]:
    """What a page or a docstring says can be typed, with lines that go on in one: in lines that are indented, or in ```bash."""
    lines = "\n\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    lines += [line[4:] for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines() if line.startswith("    ")]
    found, goes_on = [], False
    for line in lines:
        if goes_on:
            found[-1] += "\n" + line
        elif re.sub(r"^(\w+=\S* )+", "", line).startswith(PROGRAMS):
            found.append(line)
        else:
            assert not re.match(r" *--\w", line), f"a line before it has no backslash: {line}"
            continue
        goes_on = line.endswith("\\")
    return found


@pytest.mark.parametrize("path", [*PAGES, *sorted(ROOT.glob("*.py"))], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_commands_can_be_pasted_as_they_stand(path, tmp_path, monkeypatch):
    """Their lines are the shell's, and the scripts take the arguments. In a docstring they are the same lines in --help."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    monkeypatch.chdir(tmp_path)
    for command in commands(text):
        assert subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True, check=False).returncode == 0, (
            command
        )
        assert not re.search(r"\\[ \t]+$", command, re.MULTILINE), command
        for part in re.split(r"&&|;", command):
            words = shlex.split(re.sub(r"\\\n", " ", part), comments=True)
            words = words[1:] if words[:1] == ["for"] else [word for word in words if not re.match(r"\w+=", word)]
            script = words[1].removesuffix(".py") if words[:1] in (["python"], ["uv"]) and len(words) > 1 else ""
            if script not in [path.stem for path in scripts()] or re.search(r"[$<…*]|my_", part):
                continue
            if "MinAtar/" in part and importlib.util.find_spec("minatar") is None:  # a package for those who use it
                continue
            with monkeypatch.context() as patch:
                patch.setattr(load_script(script), "train", lambda args: None)
                result = run_main(load_script(script), *words[2:])
            assert result.returncode == 0, (command, result.stderr)
    if path in scripts():
        shown = [" ".join(line.split()) for line in run_main(load_script(path.stem), "--help").stdout.splitlines()]
        assert len(commands(text)) >= 2
        for command in commands(text):
            lines = [" ".join(line.split()) for line in command.splitlines()]
            assert any(shown[i : i + len(lines)] == lines for i in range(len(shown))), command


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.stem)
def test_the_header_of_a_script_names_the_packages_that_it_imports(script):
    """As `uv run` reads it (PEP 723), with the versions of requirements.txt, and no others."""
    text = script.read_text()
    header = re.match(r"# /// script\n(.*?)^# ///$", text, re.DOTALL | re.MULTILINE)[1]
    header = tomllib.loads("".join(line[2:] for line in header.splitlines(keepends=True)))
    assert set(header) == {"requires-python", "dependencies"} and header["requires-python"] == ">=3.11"
    split = lambda requirement: re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?(.*)", requirement.replace('"', "'")).groups()
    wanted = {name: (extras, rest) for name, extras, rest in map(split, header["dependencies"])}
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    ours = {name: (extras, rest) for name, extras, rest in map(split, lines)}
    for name, (extras, rest) in wanted.items():
        assert rest == ours[name][1], name
        assert set((extras or "").split(",")) - {""} <= set((ours[name][0] or "").split(",")), name
    modules = {name.split(".")[0] for node in ast.walk(ast.parse(text)) for name in (
        [alias.name for alias in node.names] if isinstance(node, ast.Import)
        else [node.module] if isinstance(node, ast.ImportFrom) else [])} - sys.stdlib_module_names  # fmt: skip
    package_of = importlib.metadata.packages_distributions()
    normal = lambda name: name.lower().replace("_", "-")
    imported = {normal(name) for module in modules for name in package_of.get(module, [module])}
    optional = {"wandb", "moviepy"}  # of --track and --capture-video
    # Gymnasium imports Box2D itself, and torch.utils.tensorboard TensorBoard.
    assert {normal(name) for name in wanted} == imported - optional | ({"box2d", "tensorboard"} & set(wanted))
    assert "tensorboard" in wanted


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_studies_that_a_page_gives_can_be_typed(path):
    """Every block of lines with benchmark.sh in it, run with --dry-run; other programs, and own scripts, do nothing."""
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


def test_every_study_has_a_page_with_its_command_and_a_row_of_the_results():
    """What it shows and what it does not, in lines that a terminal holds."""
    overview = (ROOT / "results" / "README.md").read_text()
    assert len(overview.splitlines()) <= 120
    for folder in sorted(path for path in (ROOT / "results").iterdir() if path.is_dir()):
        text = (folder / "README.md").read_text()
        assert f"]: {folder.name}/README.md\n" in overview and commands(text), folder.name
        assert "**What it shows.**" in text and "**What it does not.**" in text and "of commit" in text, folder.name
        assert [line for line in text.splitlines() if len(line) > 120] == []
        unshown = {file.name for file in folder.glob("*.png")} - set(re.findall(r"\((\w+\.png)\)", text))
        assert {name for name in unshown if not name.startswith("screens_")} == set(), folder.name
