"""The tables of arguments in docs/ are made from the scripts: after a change of an `Args`, run

    python tests/tables_of_arguments.py

and the table of every script's page is its Args again. A test compares them.
"""

import ast
import pathlib
import re

from copies import ROOT, scripts

BEGIN, END = "<!-- the arguments of the script -->", "<!-- end of the arguments -->"


def table(script: pathlib.Path) -> str:
    """One table, in the order and the groups of the script's Args: argument, default, range, meaning."""
    source = script.read_text()
    (args,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    titles = {number: match[1] for number, line in enumerate(source.splitlines(), start=1)
              if (match := re.fullmatch(r"    # -+ (.*)", line))}  # fmt: skip
    lines = ["| argument | default | range | meaning |", "|---|---|---|---|"]
    for field, docstring in zip(args.body[::2], args.body[1::2], strict=True):
        if title := next((titles.pop(number) for number in list(titles) if number < field.lineno), None):
            lines.append(f"| **{title}** | | | |")
        kind, default = ast.unparse(field.annotation), ast.get_source_segment(source, field.value)
        choices = re.search(r"Annotated\[[\w |]+, '(.*)'\]", kind) or re.search(r"Literal\[(.*)\]", kind)
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
        lines.append(f"| `{flag}` | {default} | {choices[1].replace(chr(39), '') if choices else ''} | {meaning} |")
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
