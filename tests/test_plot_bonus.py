"""plot_bonus.py: which screens it takes, what it says of them, what it refuses."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from conftest import ROOT, load_script, only_run, run_main

sys.path.insert(0, str(ROOT))

import plot_bonus  # noqa: E402

RUN = (
    "--env-id BreakoutNoFrameskip-v4 --total-timesteps 200 --learning-starts 100 --replay-ratio 0.1 --batch-size 4 --buffer-size 300 "
    "--eval-interval 0 --eval-episodes 1 --eval-epsilon 1 --keep-models 4"
).split()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bonus")
    result = run_main(load_script("rnd_dqn_atari"), *RUN, "--runs-dir", folder)
    assert result.returncode == 0, result.stderr
    return only_run(folder)


def test_screens_are_those_that_differ_most():
    """Brightness 0, 10, 20, 200, 210, 100: after the first one the farthest, 210, then the one half way between."""
    frames = np.stack([np.full((84, 84), value, np.uint8) for value in (0, 10, 20, 200, 210, 100)])
    assert plot_bonus.different_screens(frames, 3).tolist() == [0, 4, 5]
    assert sorted(plot_bonus.different_screens(frames, 10)) == [0, 1, 2, 3, 4, 5]


def test_bonus_of_the_screens_over_the_run(run_folder, tmp_path):
    """Of the models since learning starts; each by its own predictor, statistics and deviation, here written out.

    As a command, with a notebook's backend, and paths in the home folder.
    """
    (tmp_path / "run").symlink_to(run_folder)
    odd = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "plot_bonus.py", *"~/run --screens 3 --steps 50 --out-dir ~/out".split()]
    subprocess.run(command, cwd=tmp_path, env=os.environ | odd, check=True)
    assert set(os.listdir(tmp_path / "out")) == {"bonus.png", "bonus.csv", "screens.png"}
    assert (tmp_path / "out" / "bonus.png").stat().st_size > 10_000
    table = pd.read_csv(tmp_path / "out" / "bonus.csv")
    assert sorted(table.step.unique()) == [100, 150, 200]
    assert set(table.groupby(["step", "kind"]).screen.apply(tuple)) == {(0, 1, 2)}

    args, models = plot_bonus.load(run_folder)
    env = plot_bonus.rnd.make_env(args)
    agent = plot_bonus.rnd.Agent(args, env.observation_space, env.action_space, None, torch.device("cpu"))
    agent.load_weights(models[200])
    frames = plot_bonus.played_screens(args, agent, 50, 0.3)
    assert frames.shape == (50, 84, 84) and np.array_equal(frames, plot_bonus.played_screens(args, agent, 50, 0.3))
    screens = frames[plot_bonus.different_screens(frames, 3)].astype(np.float64)
    deviation_of = lambda moments: (moments["squares"] / moments["count"]).sqrt().numpy()
    for step, weights in models.items():
        of_frames, scale = weights["rnd"]["frame_moments"], deviation_of(weights["rnd"]["return_moments"])
        agent.load_weights(weights)
        for kind, shown in (("screen", screens), ("upside down", screens[:, ::-1])):
            inputs = ((shown - of_frames["mean"].numpy()) / np.maximum(deviation_of(of_frames), 1e-4)).clip(-5, 5)
            inputs = torch.tensor(inputs, dtype=torch.float32).unsqueeze(1)
            with torch.no_grad():
                errors = (agent.rnd.predictor(inputs) - agent.rnd.target(inputs)).square().mean(dim=1).numpy()
            rows = table[(table.step == step) & (table.kind == kind)]
            np.testing.assert_allclose(rows.error, errors, rtol=1e-3)
            np.testing.assert_allclose(rows.bonus, errors / scale, rtol=1e-3)


def test_the_picture_is_drawn_again_from_what_was_written(run_folder, tmp_path, monkeypatch):
    """The table and the screens that it had are given to the picture once more. Lines have the colours of the frames."""
    drawn, picture = [], plot_bonus.picture
    monkeypatch.setattr(plot_bonus, "picture", lambda *given: drawn.append((*given, picture(*given))) or drawn[-1][-1])
    for arguments in ([run_folder, "--screens", "3", "--steps", "50", "--out-dir", tmp_path], [tmp_path / "bonus.csv"]):
        (tmp_path / "bonus.png").unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["plot_bonus.py", *map(str, arguments)])
        plot_bonus.main()
        assert (tmp_path / "bonus.png").stat().st_size > 10_000
    (_, screens, table, _, figure), (title, screens_again, table_again, folder, _) = drawn
    assert title == "bonus" and folder is None
    np.testing.assert_array_equal(np.round(255 * screens_again), screens)
    pd.testing.assert_frame_equal(table_again, table, rtol=1e-4, check_dtype=False)
    *frames, error, _ = figure.axes
    for axes, color in zip(frames, plot_bonus.COLORS[:3], strict=True):
        assert to_hex(axes.spines["left"].get_edgecolor()).upper() == color
        assert sum(to_hex(line.get_color()).upper() == color for line in error.lines) == 2


@pytest.mark.parametrize("changes, options, message", [
    ({}, ["nowhere"], "nowhere is not the folder of a run: "), ({}, ["run", "--screens", "9"], "--screens must be 1 to 8"),
    ({}, ["run", "--steps", "2"], "--steps at least as many"), ({}, ["run", "--epsilon", "2"], "--epsilon in [0, 1]"),
    ({"models": None}, ["run"], "kept no models on its way"),
    ({"model.pt": b""}, ["run"], "model.pt is damaged, cut off, or holds more"),
    ({"model.pt": b"PK\3\4"}, ["run"], "model.pt is damaged, cut off, or holds more"),
    ({"bonus.csv": b"step,screen,kind,error,bonus\n100,0,screen,1,2\n"}, ["run/bonus.csv"], "run/bonus.csv cannot be drawn: "),
    ({"args.json": b"{"}, ["run"], "run is not the folder of a run: "),
    ({"args.json": b'{"script": "dqn_atari.py", "script_sha256": "", "args": {}}'}, ["run"], "run is not the folder of a run: "),
])  # fmt: skip
def test_wrong_arguments_and_folders(changes, options, message, run_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(run_folder, tmp_path / "run")
    for name, content in changes.items():
        (tmp_path / "run" / name).write_bytes(content) if content is not None else shutil.rmtree(tmp_path / "run" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot_bonus.py", *options])
    with pytest.raises(SystemExit) as end:
        plot_bonus.main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err
