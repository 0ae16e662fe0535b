"""The tables of arguments in docs/ are made from the scripts, with the ranges of --help: after a change of an `Args`, run

    python tests/tables_of_arguments.py

and the table of every script's page is its Args again. What is one text in all scripts, the arguments of the run and of the
machine, stands in docs/runs.md alone. A test compares them.
"""

import ast
import pathlib
import re

from copies import ROOT, scripts

from conftest import load_script

BEGIN, END = "<!-- the arguments of the script -->", "<!-- end of the arguments -->"
SHARED = ("the run", "the machine")
RUNS = ROOT / "docs" / "runs.md"


def ranges(script: pathlib.Path) -> dict[str, str]:
    """What --help shows of the arguments that have one, as >= 0, <= 1."""
    module = load_script(script.stem, script)
    module.show_ranges()
    kinds = module.Args.__annotations__.items()
    metavars = {name: kind.__metadata__[-1].metavar for name, kind in kinds if hasattr(kind, "__metadata__")}
    return {name: metavar.partition(" ")[2] for name, metavar in metavars.items()}


def table(script: pathlib.Path, shared: bool = False) -> str:
    """One table, in the order and the groups of the script's Args: argument, default, range, meaning.

    Of the groups that all scripts share, or of the others.
    """
    source, range_of = script.read_text(), ranges(script)
    (args,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    titles = {number: match[1] for number, line in enumerate(source.splitlines(), start=1)
              if (match := re.fullmatch(r"    # -+ (.*)", line))}  # fmt: skip
    lines = ["| argument | default | range | meaning |", "|---|---|---|---|"]
    for field, docstring in zip(args.body[::2], args.body[1::2], strict=True):
        if begun := [titles.pop(number) for number in list(titles) if number < field.lineno]:
            (title,) = begun
        if (title in SHARED) != shared:
            continue
        lines += [f"| **{title}** | | | |"] if begun else []
        kind, default = ast.unparse(field.annotation), ast.get_source_segment(source, field.value)
        if choices := re.search(r"Literal\[(.*)\]", kind):
            range_of[field.target.id] = choices[1].replace("'", "")
        flag = "--" + field.target.id.replace("_", "-")
        if kind == "bool":
            flag, default = (f"{flag}` / `--no-{flag[2:]}", "yes" if default == "True" else "no")
        elif default in ('""', "None"):
            default = "none"
        elif field.target.id == "exp_name":
            default = "the script's name"
        else:
            default = f"`{default.strip(chr(34))}`"
        meaning = " ".join(docstring.value.value.split()).replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| `{flag}` | {default} | {range_of.get(field.target.id, '')} | {meaning} |")
    return "\n".join(lines)


def page(script: pathlib.Path) -> pathlib.Path:
    return ROOT / "docs" / f"{script.stem}.md"


def with_table(path: pathlib.Path, rows: str) -> str:
    """The page, with the table as it has to be."""
    before, rest = path.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


def pages_with_tables() -> dict[pathlib.Path, str]:
    """Every page that has a table of arguments, as it has to be."""
    texts = {page(script): with_table(page(script), table(script)) for script in scripts() if page(script).exists()}
    return texts | {RUNS: with_table(RUNS, table(ROOT / "rde_dqn_atari.py", shared=True))}


if __name__ == "__main__":
    for path, text in pages_with_tables().items():
        path.write_text(text)
