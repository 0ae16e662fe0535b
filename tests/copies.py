"""Copies what the scripts share to where it is copied. After a change below a line:

    python tests/copies.py rde_dqn_atari.py

Then all other scripts have below the second line what this one has; those of its suite also have its environments, and those
of its suite and kind of replay buffer its replay buffer. `--check` only says which scripts differ. Above the line nothing is
touched.
"""

import argparse
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADINGS = re.compile(r"^# =+ the line$|^# -+ replay buffer$|^# =+ the second line$", re.MULTILINE)


def scripts() -> list[pathlib.Path]:
    return [path for path in sorted(ROOT.glob("*.py")) if len(HEADINGS.findall(path.read_text())) == 3]


def parts(path: pathlib.Path) -> list[str]:
    """The algorithm, the environments, the replay buffer, and what all scripts share; together the whole file."""
    text = path.read_text()
    first, second, third = (match.start() for match in HEADINGS.finditer(text))
    return [text[:first], text[first:second], text[second:third], text[third:]]


def suite(path: pathlib.Path) -> str:
    """Scripts of a suite have the same environments: the last word of the name, as in rde_dqn_atari.py."""
    return path.stem.split("_")[-1]


def kind_of_buffer(path: pathlib.Path) -> tuple[str, str]:
    return suite(path), re.search(r"^class (\w+)", parts(path)[2], re.MULTILINE)[1]


def with_copies(path: pathlib.Path, source: pathlib.Path) -> str:
    """The text of a script with everything that it shares with the source as it is there."""
    algorithm, environments, replay_buffer, _ = parts(path)
    if suite(path) == suite(source):
        environments = parts(source)[1]
    if kind_of_buffer(path) == kind_of_buffer(source):
        replay_buffer = parts(source)[2]
    return algorithm + environments + replay_buffer + parts(source)[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the script that was changed")
    parser.add_argument("--check", action="store_true", help="say which scripts differ, and change nothing")
    arguments = parser.parse_args()
    source = ROOT / arguments.source
    if source not in scripts():
        parser.error(f"{arguments.source} is not one of the scripts")
    different = [path for path in scripts() if with_copies(path, source) != path.read_text()]
    if not arguments.check:
        for path in different:
            path.write_text(with_copies(path, source))
    print("different:" if arguments.check else "changed:", *([path.name for path in different] or ["none"]))
    sys.exit(bool(different and arguments.check))


if __name__ == "__main__":
    main()
