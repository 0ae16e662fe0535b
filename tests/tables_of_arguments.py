"""The tables of arguments in docs/ are made from the scripts, with the ranges of --help: after a change of an `Args`, run

    python tests/tables_of_arguments.py

and the table of every script's page is its Args again. A test compares them.
"""

import ast
import pathlib
import re

from copies import ROOT, scripts

from conftest import load_script

BEGIN, END = "<!-- the arguments of the script -->", "<!-- end of the arguments -->"


def ranges(script: pathlib.Path) -> dict[str, str]:
    """What --help shows of the arguments that have one, as >= 0, <= 1."""
    module = load_script(script.stem, script)
    module.show_ranges()
    kinds = module.Args.__annotations__.items()
    metavars = {name: kind.__metadata__[-1].metavar for name, kind in kinds if hasattr(kind, "__metadata__")}
    return {name: metavar.partition(" ")[2] for name, metavar in metavars.items()}


def table(script: pathlib.Path) -> str:
    """One table, in the order and the groups of the script's Args: argument, default, range, meaning."""
    source, range_of = script.read_text(), ranges(script)
    (args,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    titles = {number: match[1] for number, line in enumerate(source.splitlines(), start=1)
              if (match := re.fullmatch(r"    # -+ (.*)", line))}  # fmt: skip
    lines = ["| argument | default | range | meaning |", "|---|---|---|---|"]
    for field, docstring in zip(args.body[::2], args.body[1::2], strict=True):
        if title := next((titles.pop(number) for number in list(titles) if number < field.lineno), None):
            lines.append(f"| **{title}** | | | |")
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


def with_table(script: pathlib.Path) -> str:
    """The script's page, with the table as it has to be."""
    before, rest = page(script).read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table(script)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for path in scripts():
        if page(path).exists():
            page(path).write_text(with_table(path))
