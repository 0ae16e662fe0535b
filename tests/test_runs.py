"""The scripts as commands, on a real game: their files, the equalities between them, and the same seed twice."""

import csv
import json
import os
import pathlib
import re
import subprocess

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ATARI_SCRIPTS, QUICK, ROOT, command, environment, load_script, run_script

# name: script and arguments beside QUICK
RUNS = {
    "dqn": ("dqn_atari", ""),
    "sr": ("sr_dqn_atari", "--reset-interval 60 --reset-depth last2"),
    "sr never": ("sr_dqn_atari", "--reset-interval 0"),
    "rde": ("rde_dqn_atari", "--reset-interval 120 --reset-depth last1 --num-envs 2"),
    "rde again": ("rde_dqn_atari", "--reset-interval 120 --reset-depth last1 --num-envs 2"),
    "rde other seed": ("rde_dqn_atari", "--reset-interval 120 --reset-depth last1 --num-envs 2 --seed 2"),
    "rde of one": ("rde_dqn_atari", "--num-agents 1 --reset-interval 60 --reset-depth last2"),
    "rde never": ("rde_dqn_atari", "--num-agents 1 --reset-interval 0"),
}


class Run:
    def __init__(self, name: str, runs_dir: pathlib.Path):
        script, arguments = RUNS[name]
        self.result = run_script(script, *QUICK, *arguments.split(), "--runs-dir", runs_dir)
        assert self.result.returncode == 0, self.result.stderr
        (self.path,) = runs_dir.iterdir()
        self.script = script

    def rows(self, name: str, without_time: bool = True) -> list[tuple]:
        with open(self.path / name, newline="") as file:
            rows = [tuple(row.values()) for row in csv.DictReader(file)]
        return [row[:3] for row in rows] if without_time and name == "episodes.csv" else rows

    def weights(self) -> list[dict]:
        model = torch.load(self.path / "model.pt", weights_only=True)
        return model["q_networks"] if "q_networks" in model else [model["q_network"]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    done = {}

    def get(name: str) -> Run:
        if name not in done:
            done[name] = Run(name, tmp_path_factory.mktemp("run") / "runs" / "")
        return done[name]

    return get


def same_weights(a: Run, b: Run) -> bool:
    pairs = zip(a.weights(), b.weights(), strict=True)
    return all(ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours) for ours, theirs in pairs)


# an ensemble of one is SR+DQN, and without resets all three are DQN
@pytest.mark.parametrize("first, second", [("sr", "rde of one"), ("dqn", "sr never"), ("dqn", "rde never")])
def test_equalities_between_the_scripts(runs, first, second):
    first, second = runs(first), runs(second)
    assert first.rows("episodes.csv") == second.rows("episodes.csv") and len(first.rows("episodes.csv")) > 2
    assert first.rows("evaluations.csv") == second.rows("evaluations.csv")
    assert same_weights(first, second)


def test_one_seed_repeats_to_the_bit_and_two_seeds_differ(runs):
    one, again, other = runs("rde"), runs("rde again"), runs("rde other seed")
    assert one.rows("episodes.csv") == again.rows("episodes.csv") != other.rows("episodes.csv")
    assert one.rows("evaluations.csv") == again.rows("evaluations.csv")
    assert same_weights(one, again) and not same_weights(one, other)


def test_a_reset_makes_the_difference(runs):
    assert not same_weights(runs("sr"), runs("sr never"))


@pytest.mark.parametrize("name", ["dqn", "sr", "rde"])
def test_what_a_run_leaves_behind(runs, name):
    run = runs(name)
    script, args = load_script(run.script), json.loads((run.path / "args.json").read_text())
    assert re.fullmatch(rf"BreakoutNoFrameskip-v4__{run.script}__1__\d{{8}}-\d{{6}}", run.path.name)
    events = [path.name for path in run.path.glob("events.out.tfevents.*")]
    assert len(events) == 1
    assert {path.name for path in run.path.iterdir()} == {"args.json", "episodes.csv", "evaluations.csv", "model.pt", *events}
    assert set(args) == {"args", "versions", "device"} and args["device"] == "cpu"
    assert set(args["args"]) == set(vars(script.Args())) - {"resume"}
    assert args["args"]["total_timesteps"] == 700 and args["versions"]["torch"] == torch.__version__

    evaluations = run.rows("evaluations.csv")
    phases = [(int(step), phase) for step, phase, episode, _ in evaluations if episode == "0"]
    # gradient steps begin after 200 steps, one every 4 steps; SR is reset every 60 of them, an agent of RDE's two as well
    resets = {"dqn": [], "sr": [440, 680], "rde": [440, 680]}[name]
    due = {300: ["scheduled"], 600: ["scheduled"], 700: ["final"]} | {step: ["before_reset", "after_reset"] for step in resets}
    assert phases == [(step, phase) for step in sorted(due) for phase in due[step]]
    assert [episode for _, _, episode, _ in evaluations] == ["0", "1"] * len(phases)
    assert all(float(score) >= 0 for *_, score in evaluations)

    episodes = run.rows("episodes.csv", without_time=False)
    assert len(episodes) > 2
    steps, seconds = [int(row[0]) for row in episodes], [float(row[3]) for row in episodes]
    assert steps == sorted(steps) and seconds == sorted(seconds) and 0 < steps[0] and steps[-1] <= 700
    assert all(int(length) > 4 * 10 and float(score) >= 0 for _, score, length, _ in episodes)


def test_tensorboard(runs):
    rde, dqn = runs("rde"), runs("dqn")
    accumulators = {}
    for run in (rde, dqn):
        accumulators[run] = EventAccumulator(str(run.path)).Reload()
    common = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/epsilon", "eval/episodic_return",
              "eval/human_normalized_score"}  # fmt: skip
    assert set(accumulators[dqn].Tags()["scalars"]) == common | {"losses/td_loss", "losses/q_values"}
    per_agent = {f"{tag}_{i}" for tag in ("losses/td_loss", "losses/q_values", "rde/acting_fraction") for i in (0, 1)}
    assert set(accumulators[rde].Tags()["scalars"]) == common | per_agent | {"rde/reset_agent", "rde/oldest_agent"}
    scalars = lambda run, tag: [(event.step, event.value) for event in accumulators[run].Scalars(tag)]
    assert scalars(rde, "rde/reset_agent") == [(440, 0), (680, 1)]
    assert [step for step, _ in scalars(rde, "charts/epsilon")] == [100, 200, 300, 400, 500, 600, 700]
    assert dict(scalars(rde, "rde/oldest_agent")) == {step: float(440 < step < 680) for step in range(100, 701, 100)}
    for step, fraction in scalars(rde, "rde/acting_fraction_0"):
        other = dict(scalars(rde, "rde/acting_fraction_1"))[step]
        assert fraction + other == pytest.approx(1)
    episodes = [(int(step), float(score)) for step, score, _ in rde.rows("episodes.csv")]
    assert scalars(rde, "charts/episodic_return") == episodes
    score = np.mean([float(row[3]) for row in rde.rows("evaluations.csv") if row[1] == "final"])
    assert scalars(rde, "eval/episodic_return")[-1] == (700, pytest.approx(score))
    normalized = load_script("rde_dqn_atari").human_normalized_score("BreakoutNoFrameskip-v4", score)
    assert scalars(rde, "eval/human_normalized_score")[-1] == (700, pytest.approx(normalized))


def test_what_a_person_sees(runs):
    run = runs("rde")
    lines = [line.strip() for line in (run.result.stdout + run.result.stderr).replace("\r", "\n").splitlines()]
    said = [line for line in lines if line.startswith(("step", "the run"))]
    assert len(said) == 10
    assert re.fullmatch(
        r"step 300: evaluation \(scheduled\) mean \d+\.\d, human-normalized -?\d\.\d{3}, games \d+ \d+", said[0]
    )
    assert said[2] == "step 440: reset last1 of agent 0 after 60 gradient steps"
    assert [line.split(" mean")[0] for line in said if "evaluation" in line] == [
        "step 300: evaluation (scheduled)", "step 440: evaluation (before reset)", "step 440: evaluation (after reset)",
        "step 600: evaluation (scheduled)", "step 680: evaluation (before reset)", "step 680: evaluation (after reset)",
        "step 700: evaluation (final)",
    ]  # fmt: skip
    assert said[-1] == f"the run is in {run.path}"
    assert re.search(r"700/700 .*return=\d+\.\d epsilon=0\.01 SPS=\d+", "\n".join(lines))


def test_the_weights_of_the_run_play(runs):
    """model.pt alone is enough to rebuild the ensemble that was evaluated."""
    run, rde = runs("rde"), load_script("rde_dqn_atari")
    model = torch.load(run.path / "model.pt", weights_only=True)
    assert model["oldest_agent"] == 0 and len(model["q_networks"]) == 2
    network = rde.QNetwork(4)
    network.load_state_dict(model["q_networks"][0])
    assert torch.isfinite(network(torch.rand(3, 4, 84, 84))).all()


def test_a_model_is_used_as_the_readme_says(runs, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.syspath_prepend(ROOT)
    values = {}
    exec(code.replace("runs/<run folder>", str(runs("rde").path)).replace("Alien", "Breakout"), values)
    assert values["q_values"].shape == (1, 4) and values["observation"].shape == (4, 84, 84)


@pytest.mark.parametrize("script", ATARI_SCRIPTS)
def test_a_loss_that_is_not_finite_ends_the_run(script, tmp_path):
    result = run_script(script, *QUICK, "--learning-rate", "1e30", "--runs-dir", tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    step = int(re.search(r"not finite any more at step (\d+)", line)[1])
    assert 200 < step <= 230
    (path,) = tmp_path.iterdir()
    assert len((path / "episodes.csv").read_text().splitlines()) > 1 and not (path / "model.pt").exists()


def test_video_of_the_first_game_of_every_evaluation(tmp_path):
    pytest.importorskip("moviepy")
    result = run_script("dqn_atari", *QUICK, "--total-timesteps", "400", "--capture-video", "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.iterdir()
    videos = sorted(path.glob("videos/*.mp4"))
    assert [video.name.split("-episode")[0] for video in videos] == ["step-300-scheduled", "step-400-final"]
    assert all(os.path.getsize(video) > 1_000 for video in videos)


def test_a_run_with_two_agents_stays_below_1_6_gigabytes(tmp_path):
    """The whole default buffer, filled by a small run whose frames are all touched first."""
    code = (
        "import resource, sys, runpy; sys.argv = sys.argv[1:]\n"
        "import importlib.util as u; spec = u.spec_from_file_location('script', sys.argv[0]); m = u.module_from_spec(spec)\n"
        "sys.modules['script'] = m; spec.loader.exec_module(m); init = m.ReplayBuffer.__init__\n"
        "def touched(self, *args): init(self, *args); self.frames.fill_(1); self.frames[-1] = 0\n"
        "m.ReplayBuffer.__init__ = touched; m.main()\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    arguments = [*QUICK, "--buffer-size", 100_000, "--batch-size", 32, "--eval-episodes", 10, "--runs-dir", tmp_path]
    python, *rest = command("rde_dqn_atari", *arguments, "--total-timesteps", 400, "--checkpoint-interval", 250)

    result = subprocess.run([python, "-c", code, *rest], capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split("peak")[-1]) < 1.6e9
