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


EVERY_PAGE = pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
EVERY_SCRIPT = pytest.mark.parametrize("script", DOCUMENTED, ids=lambda path: path.stem)


SECTIONS = ["What it is", "Usage", "Arguments", "Logged metrics", "Implementation details", "Deviations", "Results"]


@EVERY_SCRIPT
def test_every_script_has_a_page_with_the_same_sections(script):
    text = page(script).read_text()
    assert text.startswith(f"# {script.name}: ") and re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    results = text.split("\n## Results\n")[1]
    assert re.search(r"^\|", results, re.MULTILINE) and "](../results/" in results
    beside_tables = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(beside_tables).split()) <= 1200
    assert [line for line in beside_tables if len(line) > 120] == []


def test_the_tables_of_arguments_are_those_of_the_scripts():
    """After a change: python tests/tables_of_arguments.py"""
    assert [path.name for path, text in pages_with_tables().items() if path.read_text() != text] == []


@EVERY_SCRIPT
def test_every_logged_metric_is_described(script):
    """On the script's page, on the page of all scripts, or on that of the script whose metrics it says it has."""
    source, text = script.read_text(), page(script).read_text() + (ROOT / "docs" / "runs.md").read_text()
    for name in re.findall(r"\]\((\w+\.md)#logged-metrics\)", text):
        text += (ROOT / "docs" / name).read_text()
    tags = set(re.findall(r'"((?:charts|rde|rnd|safety|plasticity)/[a-zA-Z_]+)', source)) - {"charts/episodic_"}
    metrics = re.findall(r"METRICS = \((.*?)\)", source, re.DOTALL)
    tags |= {f"losses/{name}" for name in re.findall(r'"(\w+)"', " ".join(metrics))}
    assert metrics and len(tags) >= 5
    assert [tag for tag in sorted(tags) if f"`{tag.rstrip('_')}" not in text] == []


@EVERY_PAGE
def test_what_a_page_links_to_and_the_programs_that_it_names_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(((?!http)[^)]*)\)", text) + re.findall(r"^\[[^]]*\]: ((?!http)\S+)", text, re.MULTILINE):
        name, _, heading = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target
    for name in re.findall(r"`(?:python |bash )?((?:tests/|baselines/)?\w+\.(?:py|sh))\b", text):
        assert (ROOT / name).exists() or "my_" in name or name.startswith("_"), name


PROGRAMS = tuple("python |python3 |bash |pip |uv |cp |mkdir |rm |mv |for |export |sbatch |nvidia-cuda-".split("|"))


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


def arguments_of(part: str) -> tuple[str, list[str]]:
    """Of a command that starts a script, with what can be known of its arguments: the script, and these; else "" and none."""
    words = shlex.split(re.sub(r"\\\n", " ", part), comments=True)
    words = words[1:] if words[:1] == ["for"] else [word for word in words if not re.match(r"\w+=", word)]
    script = words[1].removesuffix(".py") if words[:1] in (["python"], ["uv"]) and len(words) > 1 else ""
    if script not in [path.stem for path in scripts()] or re.search(r"[$<…*]|my_", part):
        return "", []
    if "MinAtar/" in part and importlib.util.find_spec("minatar") is None:  # a package for those who use it
        return "", []
    return script, words[2:]


@pytest.mark.parametrize("path", [*PAGES, *sorted(ROOT.glob("*.py"))], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_commands_can_be_pasted_as_they_stand(path, tmp_path, monkeypatch):
    """Their lines are the shell's, and the scripts take the arguments. In a docstring they are the same lines in --help."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    monkeypatch.chdir(tmp_path)
    for command in commands(text):
        checked = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True, check=False)
        assert checked.returncode == 0 and not re.search(r"\\[ \t]+$", command, re.MULTILINE), command
        for script, arguments in filter(any, map(arguments_of, re.split(r"&&|;", command))):
            with monkeypatch.context() as patch:
                patch.setattr(load_script(script), "train", lambda args: None)
                result = run_main(load_script(script), *arguments)
            assert result.returncode == 0, (command, result.stderr)
    if path in scripts():
        words = lambda text: "".join(f"{' '.join(line.split())}\n" for line in text.splitlines())
        shown = words(run_main(load_script(path.stem), "--help").stdout)
        assert len(commands(text)) >= 2
        assert [command for command in commands(text) if f"\n{words(command)}" not in shown] == []


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.stem)
def test_the_header_of_a_script_names_the_packages_that_it_imports(script):
    """As `uv run` reads it (PEP 723), with the versions of requirements.txt, and no others."""
    text = script.read_text()
    header = re.match(r"# /// script\n(.*?)^# ///$", text, re.DOTALL | re.MULTILINE)[1]
    header = tomllib.loads(re.sub("^# ", "", header, flags=re.MULTILINE))
    assert set(header) == {"requires-python", "dependencies"} and header["requires-python"] == ">=3.11"
    split = lambda requirement: re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?(.*)", requirement.replace('"', "'")).groups("")
    parts = lambda requirements: {name: (set(extras.split(",")), rest) for name, extras, rest in map(split, requirements)}
    wanted = parts(header["dependencies"])
    ours = parts(line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#"))
    for name, (extras, rest) in wanted.items():
        assert rest == ours[name][1] and extras <= ours[name][0] | {""}, name
    modules = {name.split(".")[0] for node in ast.walk(ast.parse(text)) for name in (
        [alias.name for alias in node.names] if isinstance(node, ast.Import)
        else [node.module] if isinstance(node, ast.ImportFrom) else [])} - sys.stdlib_module_names  # fmt: skip
    package_of = importlib.metadata.packages_distributions()
    normal = lambda name: name.lower().replace("_", "-")
    imported = {normal(name) for module in modules for name in package_of.get(module, [module])}
    optional = {"wandb", "moviepy"}  # of --track and --capture-video
    # Gymnasium imports Box2D itself, and torch.utils.tensorboard TensorBoard.
    assert {normal(name) for name in wanted} == imported - optional | {"tensorboard"} | ({"box2d"} & set(wanted))


@EVERY_PAGE
def test_the_studies_that_a_page_gives_can_be_typed(path):
    """Every block of lines with benchmark.sh in it, run with --dry-run; other programs (which draw and delete), and own scripts, do nothing."""
    program = (
        'bash() { [[ $1 != benchmark.sh || $* == *my_* ]] || command bash "$1" --dry-run "${@:2}"; }\n'
        "python() { :; }; nvidia-cuda-mps-control() { :; }; sbatch() { :; }; parallel() { cat; }\n"
    )
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", path.read_text(), re.MULTILINE)
    blocks = [block for block in blocks if re.search(r"^ {4}.*benchmark\.sh", block, re.MULTILINE)]
    for block in blocks:
        result = subprocess.run(["bash", "-euc", program + block], cwd=ROOT, env=environment() | {"PYTHON": sys.executable},
                                capture_output=True, text=True, check=False)  # fmt: skip
        assert result.returncode == 0, (block, result.stderr)
        assert re.search("my_|sbatch", block) or " --seed " in result.stdout, block
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
