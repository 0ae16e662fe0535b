"""Whole runs, on a real game and a real task: their files, the equalities between the scripts, and the same seed twice."""

import dataclasses
import importlib.machinery
import json
import os
import re
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from conftest import (
    QUICK,
    QUICK_SAC,
    ROOT,
    RUNS,
    assert_same_end,
    command,
    environment,
    equal,
    error_line,
    load_script,
    model,
    only_run,
    restored_signal_handlers,
    rows,
    run_main,
    run_script,
    scalars,
)


def as_weights(path) -> list[dict]:
    """Of the networks of Atari's scripts, which call them differently."""
    content = model(path)
    return content["q_networks"] if "q_networks" in content else [content["q_network"]]


# an ensemble of one is SR+DQN, and without resets all three are DQN
@pytest.mark.parametrize("first, second", [("sr", "rde of one"), ("dqn", "sr never"), ("dqn", "rde never")])
def test_equalities_between_the_scripts(runs, first, second):
    first, second = runs(first).path, runs(second).path
    assert rows(first, "episodes.csv") == rows(second, "episodes.csv") and len(rows(first, "episodes.csv")) > 2
    assert rows(first, "evaluations.csv") == rows(second, "evaluations.csv")
    assert equal(as_weights(first), as_weights(second))


@pytest.mark.parametrize("name", ["rde", "sac"])
def test_one_seed_repeats_to_the_bit_and_two_seeds_differ(runs, name, tmp_path):
    """The other one is run as a command, in a process of its own."""
    one, other = runs(name), runs(f"{name} other seed").path
    result = run_script(one.script, *RUNS[name][1], "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    again, one = only_run(tmp_path), one.path
    assert rows(one, "episodes.csv") == rows(again, "episodes.csv") != rows(other, "episodes.csv")
    assert rows(one, "evaluations.csv") == rows(again, "evaluations.csv") != rows(other, "evaluations.csv")
    assert scalars(one) == scalars(again) != scalars(other)
    assert equal(model(one), model(again)) and not equal(model(one), model(other))


def test_a_reset_makes_the_difference(runs):
    assert not equal(as_weights(runs("sr").path), as_weights(runs("sr never").path))


# Steps of resets, and of all that is evaluated.
RESETS = {"dqn": [], "sr": [460], "rde": [380, 560], "sac": [1300]}
SCHEDULED = {"dqn": [300], "sr": [300], "rde": [300], "sac": [1400]}
LAST = {"dqn": 600, "sr": 600, "rde": 600, "sac": 2050}


def due(name: str) -> list[tuple[int, str]]:
    """When something is evaluated, and why."""
    found = [(step, phase) for step in RESETS[name] for phase in ("before_reset", "after_reset")]
    found += [(step, "scheduled") for step in SCHEDULED[name]] + [(LAST[name], "final")]
    return sorted(found, key=lambda event: event[0])  # stable: before comes before after


@pytest.mark.parametrize("name", ["dqn", "sr", "rde", "sac"])
def test_what_a_run_leaves_behind(runs, name):
    run = runs(name)
    path, evaluated = run.path, 2 if name == "dqn" else 1
    env_id = "fish-swim" if name == "sac" else "BreakoutNoFrameskip-v4"
    assert re.fullmatch(rf"{env_id}__{run.script}__1__\d{{8}}-\d{{6}}", path.name)
    events = [file.name for file in path.glob("events.out.tfevents.*")]
    assert len(events) == 1
    assert {file.name for file in path.iterdir()} == {"args.json", "episodes.csv", "evaluations.csv", "model.pt", *events}

    evaluations = rows(path, "evaluations.csv")
    assert [(int(step), phase) for step, phase, episode, _ in evaluations if episode == "0"] == due(name)
    assert [episode for _, _, episode, _ in evaluations] == list("01"[:evaluated]) * len(due(name))
    assert all(0 <= float(score) <= 1_000 for *_, score in evaluations)

    with open(path / "episodes.csv") as file:
        assert file.readline() == "global_step,episodic_return,episodic_length,wall_seconds\n"
        episodes = [line.split(",") for line in file]
    steps, seconds = [int(row[0]) for row in episodes], [float(row[3]) for row in episodes]
    assert len(steps) > 1 and 0 < steps[0] and steps[-1] <= LAST[name]
    assert steps == sorted(steps) and seconds == sorted(seconds) and seconds[0] > 0
    assert all(0 <= float(row[1]) <= 1_000 for row in episodes)
    lengths = [int(row[2]) for row in episodes]
    if name == "sac":
        assert steps == [2_000, 2_000] and lengths == [1_000, 1_000]
    else:
        assert all(length > 4 * 10 for length in lengths)  # in emulator frames
    assert all(tensor.isfinite().all() for tensor in tensors(model(path)))


def tensors(content) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("name", ["rde", "sac"])
def test_args_json_says_what_was_run(runs, name):
    run = runs(name)
    script, content = load_script(run.script), json.loads((run.path / "args.json").read_text())
    assert set(content) == {
        "script", "script_sha256", "commit", "changed_since_commit", "args", "versions", "device",
    }  # fmt: skip
    assert content["script"] == f"{run.script}.py" and content["device"] == "cpu"
    hashed = subprocess.run(["sha256sum", ROOT / content["script"]], capture_output=True, text=True, check=True).stdout
    assert content["script_sha256"] == hashed.split()[0]
    fields = {field.name for field in dataclasses.fields(script.Args)}
    assert set(content["args"]) == fields - {"resume", "allow_changed_script", "check_only"}
    assert content["args"]["total_timesteps"] == LAST[name] and content["args"]["gamma"] == 0.99
    versions = {"python", "torch", "numpy", "gymnasium"} | ({"dm-control", "mujoco"} if name == "sac" else {"ale-py", "opencv"})
    assert set(content["versions"]) == versions and content["versions"]["torch"] == torch.__version__


def test_the_commit_of_a_script_and_whether_it_was_changed_since(tmp_path):
    """Inside of a git checkout and outside of any."""
    git = lambda *words: subprocess.run(
        ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    path = tmp_path / "rde_sac_dmc.py"
    path.write_text((ROOT / path.name).read_text())
    assert load_script("outside", path).commit_of_script() == {"commit": None, "changed_since_commit": None}
    git("init")
    git("add", path)
    git("commit", "-m", "one")
    inside = load_script("inside", path)
    assert inside.commit_of_script() == {"commit": git("rev-parse", "HEAD"), "changed_since_commit": False}
    (tmp_path / "another_file.txt").write_text("")  # which is none of the script's business
    assert inside.commit_of_script()["changed_since_commit"] is False
    with open(path, "a") as file:
        file.write("# changed\n")
    assert inside.commit_of_script() == {"commit": git("rev-parse", "HEAD"), "changed_since_commit": True}


COMMON = {"charts/episodic_return", "charts/episodic_length", "eval/episodic_return"}
PER_RESET = {"eval_before_reset/episodic_return", "eval_after_reset/episodic_return"}


def tags_of(name: str) -> set[str]:
    if name == "sac":
        losses = {f"losses/{loss}_{i}" for loss in ("critic_loss", "q_values", "actor_loss", "alpha") for i in (0, 1)}
        return (
            COMMON | PER_RESET | losses | {"rde/reset_agent", "rde/oldest_agent"} | {f"rde/acting_fraction_{i}" for i in (0, 1)}
        )
    common = COMMON | {"charts/epsilon", "eval/human_normalized_score"}
    plasticity = {f"plasticity/{what}" for what in ("dormant_units", "effective_rank", "weight_norm")}
    per_reset = PER_RESET | {tag.replace("episodic_return", "human_normalized_score") for tag in PER_RESET}
    if name in ("dqn", "sr"):
        return common | plasticity | {"losses/td_loss", "losses/q_values"} | (per_reset if name == "sr" else set())
    per_agent = {
        f"{tag}_{i}" for tag in {"losses/td_loss", "losses/q_values", "rde/acting_fraction"} | plasticity for i in (0, 1)
    }
    return common | per_reset | per_agent | {"rde/reset_agent", "rde/oldest_agent"}


@pytest.mark.parametrize("name", ["dqn", "sr", "rde", "sac"])
def test_the_curves_of_tensorboard(runs, name):
    path, learning_starts = runs(name).path, 100 if name == "sac" else 200
    curves = scalars(path)
    assert set(curves) == tags_of(name)
    log_points = list(range(100, LAST[name] + 1, 100))
    losses = [tag for tag in curves if tag.startswith("losses/")]
    assert losses
    for tag in losses:
        assert [step for step, _ in curves[tag]] == [step for step in log_points if step > learning_starts], tag
        assert np.isfinite([value for _, value in curves[tag]]).all()
    speeds = scalars(path, with_speed=True)["charts/SPS"]
    assert [step for step, _ in speeds] == [step for step in log_points if step > learning_starts]
    assert all(1 < speed < 1e6 for _, speed in speeds)
    if name != "sac":
        epsilons = [
            (step, pytest.approx(max(0.01, 1 - 0.99 * (step - (2 if name == "rde" else 1)) / 60))) for step in log_points
        ]
        assert curves["charts/epsilon"] == epsilons
    episodes = [(int(step), pytest.approx(float(score))) for step, score, _ in rows(path, "episodes.csv")]
    assert curves["charts/episodic_return"] == episodes
    lengths = [(int(step), float(length)) for step, _, length in rows(path, "episodes.csv")]
    assert curves["charts/episodic_length"] == lengths


@pytest.mark.parametrize("name", ["sr", "sac"])
def test_a_curve_of_evaluations_has_one_point_at_a_step(runs, name):
    """In eval/ stands what the run is worth: at a reset, before it. Around resets there are curves of their own."""
    path = runs(name).path
    means = {}
    for step, phase, _, score in rows(path, "evaluations.csv"):
        means.setdefault((int(step), phase), []).append(float(score))
    means = {event: float(np.mean(scores)) for event, scores in means.items()}
    curves = scalars(path)
    points = lambda *phases: [(step, pytest.approx(mean)) for (step, phase), mean in means.items() if phase in phases]
    assert curves["eval/episodic_return"] == points("scheduled", "before_reset", "final")
    steps = [step for step, _ in curves["eval/episodic_return"]]
    assert steps == sorted(set(steps)) == sorted(SCHEDULED[name] + RESETS[name] + [LAST[name]])
    for phase in ("before_reset", "after_reset"):
        assert curves[f"eval_{phase}/episodic_return"] == points(phase)
        assert [step for step, _ in curves[f"eval_{phase}/episodic_return"]] == RESETS[name]
    if name == "sr":
        script = load_script("sr_dqn_atari")
        for step, score in curves["eval/human_normalized_score"]:
            mean = dict(curves["eval/episodic_return"])[step]
            assert script.normalized_scores("BreakoutNoFrameskip-v4", mean) == {"human_normalized_score": pytest.approx(score)}


@pytest.mark.parametrize("name, resets", [("rde", [(380, 0), (560, 1)]), ("sac", [(1300, 0)])])
def test_the_curves_of_the_ensemble(runs, name, resets):
    curves, learning_starts = scalars(runs(name).path), {"rde": 0, "sac": 100}[name]
    assert curves["rde/reset_agent"] == resets
    resets_before = lambda step: sum(at < step for at, _ in resets)  # a point stands before what follows its step
    assert curves["rde/oldest_agent"] == [(step, resets_before(step) % 2) for step in range(100, LAST[name] + 1, 100)]
    others = dict(curves["rde/acting_fraction_1"])
    fractions = curves["rde/acting_fraction_0"]
    assert [step for step, _ in fractions] == list(range(100, LAST[name] + 1, 100))
    for step, fraction in fractions:
        assert fraction + others[step] == pytest.approx(float(step > learning_starts))  # random actions are no agent's
    assert 0 < np.mean([fraction for _, fraction in fractions]) < 1
    assert model(runs(name).path)["oldest_agent"] == len(resets) % 2


@pytest.mark.parametrize("name", ["dqn", "rde", "sac"])
def test_what_a_run_says_before_it_starts_is_what_happens(runs, name):
    """Device, agents x parameters, gradient steps, resets, memory of the buffer; and the folder."""
    run = runs(name)
    script = load_script(run.script)
    (line,) = [line for line in run.printed.splitlines() if "parameters" in line]
    agents, parameters, gradient_steps, resets, gigabytes = re.fullmatch(
        rf"[\w-]+: {LAST[name]:,} steps on CPU \(1 thread\(s\)\), (\d) agent\(s\) x ([\d,]+) parameters, ([\d,]+) gradient steps, "
        rf"(\d+) reset\(s\), replay buffer ([\d.]+) GB; in {re.escape(str(run.path))}",
        line,
    ).groups()
    content = model(run.path)
    if name == "sac":
        counted = sum(tensor.numel() for tensor in tensors(content)) // 2
    else:
        counted = sum(tensor.numel() for tensor in as_weights(run.path)[0].values())
    assert (int(agents), int(parameters.replace(",", ""))) == (1 if name == "dqn" else 2, counted)
    assert int(resets) == len(RESETS[name]) == len([row for row in rows(run.path, "evaluations.csv") if "after_reset" in row])
    assert int(gradient_steps) == {"dqn": 40, "rde": 40, "sac": 487}[name]
    args = script.Args(**json.loads((run.path / "args.json").read_text())["args"])
    env = script.make_env(args)
    num_bytes = script.ReplayBuffer.num_bytes(args, env.observation_space, env.action_space)
    assert gigabytes == f"{num_bytes / 1e9:.2f}"


@pytest.mark.parametrize(
    "script, arguments",
    [
        # a reset is due at step 300, the last one: it is not made
        ("rde_sac_dmc", "--total-timesteps 300 --learning-starts 100 --replay-ratio 1 --reset-interval 80 --num-envs 3"),
        ("rde_sac_dmc", "--total-timesteps 301 --learning-starts 100 --replay-ratio 1 --reset-interval 80 --num-envs 3"),
        ("rde_sac_dmc", "--total-timesteps 300 --learning-starts 100 --replay-ratio 0.9 --reset-interval 70 --num-agents 3"),
    ],
)
def test_as_many_gradient_steps_and_resets_happen_as_were_said(script, arguments, tmp_path, monkeypatch):
    module, happened = load_script(script), []
    for name in ("update", "reset"):
        real = getattr(module.Agent, name)
        monkeypatch.setattr(module.Agent, name, lambda agent, real=real, name=name: (happened.append(name), real(agent))[1])
    monkeypatch.setattr(module, "evaluate", lambda policy, envs, *rest: [{"r": 0.0, "l": 1}] * len(envs))  # would take long
    result = run_main(module, *QUICK_SAC, "--env-id", "cartpole-balance", *arguments.split(), "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    said = re.search(r"([\d,]+) gradient steps, (\d+) reset", result.stdout)
    resets, num_agents = scalars(only_run(tmp_path))["rde/reset_agent"], 3 if "--num-agents 3" in arguments else 2
    assert int(said[2]) == happened.count("reset") == len(resets) > 3
    assert [agent for _, agent in resets] == [number % num_agents for number in range(len(resets))]  # in turn
    # The last loop step may go a little beyond the end, and learns for all of it.
    assert happened.count("update") == int(said[1].replace(",", ""))


@pytest.mark.parametrize("name", ["rde", "sac"])
def test_what_a_person_sees(runs, name):
    run = runs(name)
    lines = [line.strip() for line in run.printed.splitlines()]
    said = [line for line in lines if line.startswith(("step", "the run"))]
    score = (
        r" mean \d+\.\d, human normalized score -?\d\.\d{3}, episodes \d+"
        if name == "rde"
        else r" mean \d+\.\d, episodes [\d.]+"
    )
    depth, every = (" last1", 18) if name == "rde" else ("", 300)
    expected = []
    for step, phase in due(name):
        expected.append(rf"step {step}: evaluation \({phase.replace('_', ' ')}\){score}")
        if phase == "before_reset":
            number = RESETS[name].index(step)
            expected.append(rf"step {step}: reset{depth} of agent {number} after {every * (number + 1)} gradient steps")
    expected.append(re.escape(f"the run is in {run.path}"))
    assert len(said) == len(expected)
    for line, pattern in zip(said, expected):
        assert re.fullmatch(pattern, line), line
    epsilon = r" epsilon=0\.01" if name == "rde" else ""
    assert re.search(rf"{LAST[name]}/{LAST[name]} .*return=\d+\.\d{epsilon} SPS=\d+", run.printed)


def test_the_progress_bar_says_no_speed_before_learning_begins(sac, tmp_path, monkeypatch):
    """The speed is that of learning; at steps 100, 200 and 300, of which learning begins after the first."""
    said = []
    monkeypatch.setattr(sac.tqdm, "set_postfix_str", lambda self, text, refresh: said.append(text))
    arguments = "--env-id cartpole-balance --total-timesteps 300".split()
    result = run_main(sac, *QUICK_SAC, *arguments, "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert said[0] == "return=- SPS=-"
    assert len(said) == 3 and all(re.fullmatch(r"return=- SPS=[1-9]\d*", text) for text in said[1:]), said


@pytest.mark.parametrize("name", ["dqn", "rde", "sac"])
def test_the_weights_of_the_run_play_as_the_last_evaluation_did(runs, name):
    """model.pt alone is enough to rebuild the agent that was evaluated."""
    run = runs(name)
    script = load_script(run.script)
    args = script.Args(**json.loads((run.path / "args.json").read_text())["args"])
    envs, device = [script.make_env(args) for _ in range(args.eval_episodes)], torch.device("cpu")
    agent = script.Agent(dataclasses.replace(args, seed=9), envs[0].observation_space, envs[0].action_space, None, device)
    agent.load_weights(model(run.path))
    generator = torch.Generator().manual_seed(script.derive_seed(args.seed, script.EVALUATION, LAST[name]))
    with restored_signal_handlers():
        stop = script.StopSignal()
        episodes = script.evaluate(agent.evaluation_policy(generator), envs, args.seed, LAST[name], device, stop)
    final = [float(score) for _, phase, _, score in rows(run.path, "evaluations.csv") if phase == "final"]
    assert [episode["r"] for episode in episodes] == final
    assert equal(agent.weights(), model(run.path))


def test_a_model_is_used_as_the_documentation_says(runs, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "rde_dqn_atari")  # imported as a person does it
    values = {}
    exec(code.replace("runs/<run folder>", str(runs("rde").path)), values)
    assert values["action"].shape == (1,) and values["observation"].shape == (4, 84, 84)


def test_weights_that_are_kept_during_a_run(runs):
    """At 4 times of the run, rounded up to a loop step; nothing else changes."""
    path, steps = runs("sac kept").path, [514, 1026, 1538, 2050]
    assert [file.name for file in sorted(path.glob("models/*"))] == [f"step_{step:08d}.pt" for step in steps]
    kept = [model(path, f"models/step_{step:08d}.pt") for step in steps]
    assert equal(kept[-1], model(path))
    assert not any(equal(ours, theirs) for i, ours in enumerate(kept) for theirs in kept[:i])
    assert_same_end(path, runs("sac").path)


def test_evaluating_more_changes_nothing_in_the_training(sac, tmp_path):
    paths = []
    for interval in (0, 170):
        arguments = "--env-id cartpole-balance --total-timesteps 300 --eval-interval".split()
        result = run_main(sac, *QUICK_SAC, *arguments, interval, "--runs-dir", tmp_path / str(interval))
        assert result.returncode == 0, result.stderr
        paths.append(only_run(tmp_path / str(interval)))
    few, many = (rows(path, "evaluations.csv") for path in paths)
    assert len(few) == 1 < len(many) and few[-1] == many[-1]  # the final evaluation, the same to the digit
    assert equal(*map(model, paths))


@pytest.mark.parametrize(
    "script, arguments, first, last",
    [("dqn_atari", QUICK, 201, 300), ("rde_sac_dmc", [*QUICK_SAC, "--env-id", "cartpole-balance"], 101, 200)],
)  # fmt: skip
def test_a_loss_that_is_not_finite_ends_the_run(script, arguments, first, last, tmp_path):
    """Before anything is evaluated or saved with it."""
    arguments = [*arguments, "--learning-rate", "1e29", "--checkpoint-interval", "20", "--runs-dir", tmp_path]
    line = error_line(run_main(load_script(script), *arguments))
    step = int(re.search(r"not finite (?:any more )?at step (\d+)", line)[1])
    assert first <= step <= last and line.endswith("try a lower --learning-rate")
    path = only_run(tmp_path)
    assert not (path / "model.pt").exists()
    content = torch.load(path / "checkpoint.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in tensors(content["parts"]["agent"]["metrics"]))


def test_track(tmp_path, sac, monkeypatch):
    """A run is one run of Weights & Biases, also when it goes on; init comes before the writer, whose files it watches."""
    calls, writer = [], sac.SummaryWriter
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sac, "SummaryWriter", lambda *arguments: (calls.append("writer"), writer(*arguments))[1])
    update = sac.Agent.update
    arguments = [*QUICK_SAC, "--total-timesteps", "150", "--track", "--wandb-project-name", "mine", "--wandb-entity", "us"]
    with restored_signal_handlers(), monkeypatch.context() as patch:
        patch.setattr(sac.Agent, "update", lambda agent: (update(agent), os.kill(os.getpid(), signal.SIGTERM))[0])
        assert run_main(sac, *arguments, "--runs-dir", tmp_path).returncode == 143
        path = only_run(tmp_path)
    assert run_main(sac, "--resume", path).returncode == 0
    first, then, second, last = calls
    assert then == last == "writer" and second == first and first["sync_tensorboard"] is True
    assert (first["id"], first["name"], first["project"], first["entity"]) == (path.name, path.name, "mine", "us")
    assert first["resume"] == "allow" and first["config"]["total_timesteps"] == 150


def test_video_of_the_first_game_of_every_evaluation(runs, tmp_path, monkeypatch):
    """Recorded to the end of the game, and nothing is kept in memory afterwards; the run is the same."""
    pytest.importorskip("moviepy")
    without, (script, arguments) = runs("dqn").path, RUNS["dqn"]  # made before anything is patched
    module, kept_frames = load_script(script), []
    real = module.Run.evaluate

    def evaluate(run, *arguments):
        finished = real(run, *arguments)
        assert not run.eval_envs[0].get_wrapper_attr("recording")
        kept_frames.append(len(run.eval_envs[0].get_wrapper_attr("recorded_frames")))
        return finished

    monkeypatch.setattr(module.Run, "evaluate", evaluate)
    result = run_main(module, *arguments, "--capture-video", "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    path = only_run(tmp_path)
    videos = sorted(path.glob("videos/*"))
    assert [video.name for video in videos] == [f"step-{step}-{phase}-episode-0.mp4" for step, phase in due("dqn")]
    assert all(os.path.getsize(video) > 1_000 for video in videos)
    assert kept_frames == [0] * len(due("dqn"))
    assert rows(path, "evaluations.csv") == rows(without, "evaluations.csv")


def test_a_run_with_two_agents_stays_below_1_6_gigabytes(tmp_path):
    """The whole default buffer, filled by a small run whose frames are all touched first."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import rde_dqn_atari as script\n"
        "init = script.ReplayBuffer.__init__\n"
        "def touched(self, *args): init(self, *args); self.frames.fill_(1); self.frames[-1] = 0\n"
        "script.ReplayBuffer.__init__ = touched\n"
        "script.main()\n"
        # (Not of getrusage: that begins with the memory of the process that started this one.)
        "print('peak', int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024)\n"
    )
    arguments = [*QUICK, "--buffer-size", 100_000, "--batch-size", 32, "--eval-episodes", 10, "--runs-dir", tmp_path]
    _, _, *arguments = command("rde_dqn_atari", *arguments, "--total-timesteps", 260, "--checkpoint-interval", 250)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    assert result.returncode == 0, result.stderr
    assert 0.7e9 < int(result.stdout.split("peak")[-1]) < 1.6e9


def test_denormal_numbers_become_0_in_every_thread_of_a_run(tmp_path):
    """Adam's moments of a dead unit fade into them. Looked at in a process of its own, when everything has been made."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, rde_dqn_atari as script\n"
        "def announce(run, agents, num_resets):\n"
        "    faded = torch.full((1_000_000,), 1.2e-38) * 0.9\n"
        "    print(torch.get_num_threads(), 'threads:', faded.count_nonzero().item(), 'left')\n"
        "    sys.exit()\n"
        "script.Run.announce = announce\n"
        "script.main()\n"
    )
    _, _, *arguments = command("rde_dqn_atari", *QUICK, "--runs-dir", tmp_path)
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                            env=environment() | {"OMP_NUM_THREADS": "2"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 threads: 0 left" in result.stdout
