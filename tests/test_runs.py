"""Whole runs, on a real game and real tasks: their files, what they say, the equalities between the scripts."""

import dataclasses
import hashlib
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch

from conftest import (
    QUICK,
    QUICK_CARTPOLE,
    ROOT,
    assert_same_end,
    environment,
    equal,
    error_line,
    load_script,
    model,
    only_run,
    put_environments,
    read_csv,
    rows,
    run_main,
    scalars,
    stop_when,
    tensors,
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


def test_two_seeds_and_a_reset_make_a_difference(runs):
    """That one seed repeats to the bit is seen below, and in test_resume.py."""
    one, other = runs("cartpole").path, runs("cartpole other seed").path
    assert all(rows(one, name) != rows(other, name) for name in ("episodes.csv", "evaluations.csv"))
    assert scalars(one) != scalars(other) and not equal(model(one), model(other))
    assert not equal(as_weights(runs("sr").path), as_weights(runs("sr never").path))


# ----------------------------------------------------------------------------------------------- what a run leaves behind

# Steps of resets, and of all that is evaluated; gradient steps; steps before the first one, and of a loop step.
RESETS = {"dqn": [], "rde": [380, 560], "sac": [1300], "cartpole": [180, 260]}
SCHEDULED = {"dqn": [300], "rde": [300], "sac": [1400], "cartpole": [160]}
LAST = {"dqn": 600, "rde": 600, "sac": 2050, "cartpole": 300}
GRADIENT_STEPS = {"dqn": 40, "rde": 40, "sac": 487, "cartpole": 100}
LEARNING_STARTS = {"dqn": 200, "rde": 200, "sac": 100, "cartpole": 100}


def evaluations_of(path) -> dict[tuple[int, str], list[float]]:
    """The scores of every evaluation, by its step and phase."""
    scores = {}
    for step, phase, episode, score in rows(path, "evaluations.csv"):
        scores.setdefault((int(step), phase), []).append(float(score))
        assert int(episode) == len(scores[int(step), phase]) - 1
    return scores


def args_of(run):
    """The script of a run, and its arguments."""
    script = load_script(run.script)
    return script, script.Args(**json.loads((run.path / "args.json").read_text())["args"])


@pytest.mark.parametrize("name", RESETS)
def test_the_files_of_a_run(runs, name):
    run = runs(name)
    path, num_episodes = run.path, 2 if name in ("dqn", "cartpole") else 1
    (events,) = [file.name for file in path.glob("events.out.tfevents.*")]
    files = {"args.json", "episodes.csv", "evaluations.csv", "model.pt", "lock", f"{run.script}.py", events}
    assert {file.name for file in path.iterdir()} == files
    assert (path / f"{run.script}.py").read_bytes() == (ROOT / f"{run.script}.py").read_bytes()

    evaluations = evaluations_of(path)
    due = [(step, phase) for step in RESETS[name] for phase in ("before_reset", "after_reset")]
    due += [(step, "scheduled") for step in SCHEDULED[name]] + [(LAST[name], "final")]
    assert list(evaluations) == sorted(due, key=lambda event: event[0])  # stable: before comes before after
    assert {len(scores) for scores in evaluations.values()} == {num_episodes}
    assert all(0 <= score <= 1_000 for scores in evaluations.values() for score in scores)

    assert (path / "episodes.csv").read_text().startswith("global_step,episodic_return,episodic_length,wall_seconds\n")
    episodes = [list(map(float, row.values())) for row in read_csv(path / "episodes.csv")]
    steps, returns, lengths, seconds = zip(*episodes)
    assert len(steps) > 1 and 0 < steps[0] and steps[-1] <= LAST[name]
    assert sorted(steps) == list(steps) and sorted(seconds) == list(seconds) and seconds[-1] > 0
    assert all(0 <= score <= 1_000 for score in returns)
    if name == "sac":
        assert steps == (2_000, 2_000) and lengths == (1_000, 1_000)
    elif name != "cartpole":
        assert all(length > 4 * 10 for length in lengths)  # in emulator frames
    assert all(tensor.isfinite().all() for tensor in tensors(model(path)))


@pytest.mark.parametrize(
    "name, packages",
    [("rde", {"ale-py", "opencv"}), ("sac", {"dm-control", "mujoco", "box2d"}), ("cartpole", {"box2d", "minigrid"})],
)
def test_args_json_says_what_was_run(runs, name, packages):
    run = runs(name)
    (script, args), content = args_of(run), json.loads((run.path / "args.json").read_text())
    assert set(content) == {"script", "script_sha256", "args", "versions", "device"}
    assert content["script"] == f"{run.script}.py" and content["device"] == "CPU"
    assert content["script_sha256"] == hashlib.sha256((run.path / content["script"]).read_bytes()).hexdigest()
    assert set(content["args"]) == {field.name for field in dataclasses.fields(script.Args)}
    assert (args.total_timesteps, args.eval_episodes) == (LAST[name], 2 if name == "cartpole" else 1)
    assert run.path.name == script.run_name(args)
    assert set(content["versions"]) == {"python", "torch", "numpy", "gymnasium", "device"} | packages
    assert content["versions"]["torch"] == torch.__version__ and content["versions"]["device"] == "cpu"


def test_hyperparameters_are_a_table_in_tensorboard(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs("cartpole")
    (event,) = EventAccumulator(str(run.path)).Reload().Tensors("hyperparameters/text_summary")
    heading, line, *table = event.tensor_proto.string_val[0].decode().splitlines()
    args = json.loads((run.path / "args.json").read_text())["args"]
    assert (event.step, heading, line) == (0, "|argument|value|", "|-|-|")
    assert table == [f"|{name}|{value}|" for name, value in args.items()] and "|replay_ratio|0.5|" in table


COMMON = {"charts/episodic_return", "charts/episodic_length", "eval/episodic_return"}
PER_RESET = {"eval_before_reset/episodic_return", "eval_after_reset/episodic_return"}
ENSEMBLE = {"rde/reset_agent", "rde/oldest_agent", "rde/youngest_fraction", "rde/choice_entropy", "rde/acting_fraction"}
LOSSES = {"losses/td_loss", "losses/q_values", "losses/gradient_norm"}
PLASTICITY = {f"plasticity/{what}" for what in "dormant_units active_units effective_rank stable_rank weight_norm".split()}
SCORE = "eval/human_normalized_score"
# A metric of an ensemble has one curve per agent.
TAGS = {
    "dqn": COMMON | LOSSES | PLASTICITY | {"charts/epsilon", SCORE},
    "rde": COMMON | PER_RESET | ENSEMBLE | LOSSES | PLASTICITY | {"charts/epsilon", SCORE}
    | {tag.replace("episodic_return", "human_normalized_score") for tag in PER_RESET},
    "sac": COMMON | PER_RESET | ENSEMBLE | {f"losses/{name}" for name in load_script("rde_sac_dmc").Agent.METRICS},
    "cartpole": COMMON | PER_RESET | ENSEMBLE | LOSSES | {"charts/epsilon"},
}  # fmt: skip


@pytest.mark.parametrize("name", TAGS)
def test_the_curves_of_tensorboard(runs, name):
    path = runs(name).path
    curves = scalars(path)
    assert {re.sub(r"_\d$", "", tag) for tag in curves} == TAGS[name]
    per_agent = {tag[:-2] for tag in curves if tag[:-1] + "0" in curves and tag[:-1] + "1" in curves}
    expected = {tag for tag in TAGS[name] if tag.startswith(("losses/", "plasticity/"))} | {"rde/acting_fraction"}
    assert per_agent == (set() if name == "dqn" else expected)
    log_points = list(range(100, LAST[name] + 1, 100))
    losses = [tag for tag in curves if tag.startswith("losses/")]
    for tag in losses:
        assert [step for step, _ in curves[tag]] == [step for step in log_points if step > LEARNING_STARTS[name]], tag
        assert np.isfinite([value for _, value in curves[tag]]).all()
    speeds = scalars(path, with_speed=True)["charts/SPS"]
    assert [step for step, _ in speeds] == [step for step in log_points if step > LEARNING_STARTS[name]]
    assert all(1 < speed < 1e6 for _, speed in speeds)
    if name in ("dqn", "rde"):
        decayed = lambda step: max(0.01, 1 - 0.99 * (step - (2 if name == "rde" else 1)) / 60)
        assert curves["charts/epsilon"] == [(step, pytest.approx(decayed(step))) for step in log_points]
    episodes = [(int(step), float(score), float(length)) for step, score, length in rows(path, "episodes.csv")]
    assert curves["charts/episodic_return"] == sorted({(step, float(np.float32(score))) for step, score, _ in episodes})
    assert curves["charts/episodic_length"] == sorted({(step, length) for step, _, length in episodes})


@pytest.mark.parametrize("name", ["rde", "cartpole"])
def test_a_curve_of_evaluations_has_one_point_at_a_step(runs, name):
    """In eval/ stands what the run is worth: at a reset, before it. Around resets there are curves of their own."""
    curves, evaluations = scalars(runs(name).path), evaluations_of(runs(name).path)
    points = lambda *phases: [(step, pytest.approx(np.mean(scores))) for (step, phase), scores in evaluations.items()
                              if phase in phases]  # fmt: skip
    assert curves["eval/episodic_return"] == points("scheduled", "before_reset", "final")
    assert [step for step, _ in curves["eval/episodic_return"]] == sorted(SCHEDULED[name] + RESETS[name] + [LAST[name]])
    for phase in ("before_reset", "after_reset"):
        assert curves[f"eval_{phase}/episodic_return"] == points(phase)
        assert [step for step, _ in curves[f"eval_{phase}/episodic_return"]] == RESETS[name]
    for (step, score), (_, mean) in zip(curves.get(SCORE, []), curves["eval/episodic_return"]):
        assert score == pytest.approx((mean - 1.7) / (30.5 - 1.7), abs=1e-6)  # Breakout's random player, and human


@pytest.mark.parametrize("name", ["rde", "sac", "cartpole"])
def test_the_curves_of_the_ensemble(runs, name):
    curves, resets = scalars(runs(name).path), [(step, number % 2) for number, step in enumerate(RESETS[name])]
    assert curves["rde/reset_agent"] == resets
    resets_before = lambda step: sum(at < step for at, _ in resets)  # a point stands before what follows its step
    assert curves["rde/oldest_agent"] == [(step, resets_before(step) % 2) for step in range(100, LAST[name] + 1, 100)]
    fractions, others = curves["rde/acting_fraction_0"], dict(curves["rde/acting_fraction_1"])
    assert [step for step, _ in fractions] == list(range(100, LAST[name] + 1, 100))
    for step, fraction in fractions:
        # In SAC all actions before learning are random ones, and nobody's.
        assert fraction + others[step] == pytest.approx(float(name != "sac" or step > 100))
    assert 0 < np.mean([fraction for _, fraction in fractions]) < 1
    assert model(runs(name).path)["oldest_agent"] == len(resets) % 2


# ------------------------------------------------------------------------------------------------------- what a run says


@pytest.mark.parametrize("name", RESETS)
def test_what_a_run_says_before_it_starts_is_what_happens(runs, name):
    """Device, agents x parameters, gradient steps, resets, memory of the buffer; and the folder; of the time nothing."""
    run = runs(name)
    agents, parameters, choice, gradient_steps, resets, gigabytes = re.fullmatch(
        rf"[\w-]+: {LAST[name]:,} steps on CPU \(1 thread\(s\)\), (\d) agent\(s\) x ([\d,]+) parameters, ((?:selec[^,]*, )?)"
        rf"([\d,]+) gradient steps, (\d+) reset\(s\), replay buffer ([\d.]+) GB, time left is known once learning runs; "
        rf"in {re.escape(str(run.path))}", run.printed.splitlines()[0],
    ).groups()  # fmt: skip
    counted = tensors(model(run.path) if name == "sac" else as_weights(run.path)[0])
    counted = sum(tensor.numel() for tensor in counted) // (2 if name == "sac" else 1)
    assert (int(agents), int(parameters.replace(",", ""))) == (1 if name == "dqn" else 2, counted)
    assert choice == ("" if name == "dqn" else "selection by value (beta 50), ")
    assert (int(resets), int(gradient_steps)) == (len(RESETS[name]), GRADIENT_STEPS[name])
    row = {"sac": 2 * 24 + 5 + 2, "cartpole": 2 * 4 + 1 + 2}.get(name)  # observations twice, action, reward, terminated
    num_bytes = args_of(run)[1].buffer_size * (4 * row if row else 84 * 84)
    assert float(gigabytes) == pytest.approx(num_bytes / 1e9, rel=0.1, abs=0.005)


@pytest.mark.parametrize("num_agents, last_step, arguments", [
    (2, 300, "--total-timesteps 300 --replay-ratio 1 --reset-interval 80 --num-envs 3"),  # no reset after the last step
    (2, 303, "--total-timesteps 301 --replay-ratio 1 --reset-interval 80 --num-envs 3"),
    (3, 300, "--total-timesteps 300 --replay-ratio 0.9 --reset-interval 70 --num-agents 3"),
])  # fmt: skip
def test_as_many_gradient_steps_and_resets_happen_as_were_said(num_agents, last_step, arguments, tmp_path, monkeypatch):
    script, happened = load_script("rde_dqn"), []
    for name in ("update", "reset"):
        real = getattr(script.Agent, name)
        monkeypatch.setattr(script.Agent, name, lambda agent, real=real, name=name: (happened.append(name), real(agent))[1])
    result = run_main(script, *QUICK_CARTPOLE, *arguments.split(), "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    said = re.search(r"([\d,]+) gradient steps, (\d+) reset", result.stdout)
    resets = scalars(only_run(tmp_path))["rde/reset_agent"]
    assert int(said[2]) == happened.count("reset") == len(resets) > 3
    assert [agent for _, agent in resets] == [number % num_agents for number in range(len(resets))]  # in turn
    # The last loop step may go a little beyond the end, and learns for all of it. There the bar ends, too.
    assert happened.count("update") == int(said[1].replace(",", ""))
    assert f"| {last_step}/{last_step} [" in result.stderr


@pytest.mark.parametrize("name, depth, interval", [("rde", " last1", 18), ("cartpole", "", 40)])
def test_what_a_person_sees(runs, name, depth, interval):
    """An evaluation and a reset are one line each; the episodes of evaluations.csv are in it."""
    run, expected = runs(name), []
    for (step, phase), scores in evaluations_of(run.path).items():
        normalized = f", human normalized score {(np.mean(scores) - 1.7) / 28.8:.3f}" if name == "rde" else ""
        expected.append(f"step {step}: evaluation ({phase.replace('_', ' ')}) mean {np.mean(scores):g} +- "
                        f"{np.std(scores):.4g}, lowest {min(scores):g}, highest {max(scores):g}{normalized}")  # fmt: skip
        if phase == "before_reset":
            number = RESETS[name].index(step)
            expected.append(f"step {step}: reset{depth} of agent {number} after {interval * (number + 1)} gradient steps")
    lines = [line.strip() for line in run.printed.splitlines()]
    assert [line for line in lines if line.startswith(("step", "the run"))] == [*expected, f"the run is in {run.path}"]
    assert re.search(rf"{LAST[name]}/{LAST[name]} \[.*, 00:00 left, return=[\d.]+, epsilon=0\.\d+, SPS=\d+", run.printed)


def test_no_speed_and_no_time_left_are_said_before_learning_begins(tmp_path, monkeypatch):
    """Random play is many times faster; at steps 100, 200 and 300, of which learning begins after the first."""
    script, said = load_script("rde_dqn"), []
    monkeypatch.setattr(script.tqdm, "set_postfix_str", lambda self, text, refresh: said.append(text))
    assert run_main(script, *QUICK_CARTPOLE, "--runs-dir", tmp_path).returncode == 0
    assert re.fullmatch(r"time left is known once learning runs, return=[\d.]+, epsilon=0\.\d+", said[0])
    pattern = r"00:0\d left, return=[\d.]+, epsilon=0\.10, SPS=[1-9]\d*"
    assert len(said) == 3 and all(re.fullmatch(pattern, text) for text in said[1:]), said
    returns = [(int(step), float(score)) for step, score, _ in rows(only_run(tmp_path), "episodes.csv")]
    for at, text in zip((100, 200, 300), said):  # the mean of the last ten
        finished = [score for step, score in returns if step <= at]
        assert f"return={np.mean(finished[-10:]):g}," in text
    assert len(finished) > 12


# ---------------------------------------------------------------------------------------------------------- the weights


def test_a_model_is_used_as_the_documentation_says(runs, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "rde_dqn_atari", raising=False)  # imported as a person does it
    values = {}
    exec(code.replace("runs/<run folder>", str(runs("rde").path)), values)
    assert values["action"].shape == (1,) and values["observation"].shape == (4, 84, 84)


def test_evaluating_more_changes_nothing_in_the_training(runs, tmp_path):
    result = run_main(load_script("rde_dqn"), *QUICK_CARTPOLE, "--eval-interval", "30", "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    few, many = runs("cartpole").path, only_run(tmp_path)
    assert rows(few, "episodes.csv") == rows(many, "episodes.csv") and equal(model(few), model(many))
    assert set(rows(few, "evaluations.csv")[2:]) < set(rows(many, "evaluations.csv"))  # the same to the digit, but for step 160


# -------------------------------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize(
    "script, arguments, first, last",
    [("dqn_atari", QUICK, 201, 300), ("rde_dqn", [*QUICK_CARTPOLE, "--max-grad-norm", "1e29"], 101, 200)],
)
def test_a_loss_that_is_not_finite_ends_the_run(script, arguments, first, last, tmp_path):
    """Before anything is evaluated or saved with it."""
    arguments = [*arguments, "--learning-rate", "1e29", "--checkpoint-interval", "20", "--runs-dir", tmp_path]
    line = error_line(run_main(load_script(script), *arguments))
    step = int(re.search(r"not finite any more at step (\d+): {'td_loss': ", line)[1])
    assert first <= step <= last and line.endswith("try a lower --learning-rate")
    path = only_run(tmp_path)
    assert not (path / "model.pt").exists()
    content = torch.load(path / "checkpoint.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in tensors(content["parts"]["agent"]["metrics"]))


class Broken(gym.Wrapper):
    """After 150 steps the reward, or else the observation, is not a number."""

    def __init__(self, env, what: str, number: float):
        super().__init__(env)
        self.what, self.number, self.num_steps = what, number, 0

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        self.num_steps += 1
        if self.num_steps == 150 and self.what == "reward":
            reward = self.number
        elif self.num_steps == 150:
            observation = observation * self.number
        return observation, reward, *rest


@pytest.mark.parametrize("number", [np.nan, -np.inf])
@pytest.mark.parametrize("script, arguments, what, message", [
    ("rde_dqn", QUICK_CARTPOLE, "reward", "CartPole-v1: the environment gave an observation or reward that is not finite"),
    ("rde_dqn", QUICK_CARTPOLE, "observation", "CartPole-v1: the environment gave an observation or reward that is not finite"),
    ("dqn_atari", QUICK, "reward", "BreakoutNoFrameskip-v4: the environment gave a reward of "),
])  # fmt: skip
def test_what_an_environment_gives_is_looked_at(script, arguments, what, message, number, tmp_path, monkeypatch):
    """When it is stored; and the learning rate is not blamed."""
    module = load_script(script)
    make_env = module.make_env
    put_environments(monkeypatch, module, lambda args, render=False: Broken(make_env(args, render), what, number))
    line = error_line(run_main(module, *arguments, "--num-envs", 1, "--checkpoint-interval", 50, "--runs-dir", tmp_path))
    assert line.startswith(f"error: {message}") and "--learning-rate" not in line
    content = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert content["parts"]["run"]["global_step"] == 100


# ---------------------------------------------------------------------------------------------------------------- others


def test_track(tmp_path, monkeypatch):
    """A run is one run of Weights & Biases, also when it goes on; init comes before the writer, whose files it watches."""
    script, calls = load_script("rde_dqn"), []
    writer, wandb = script.SummaryWriter, types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    wandb.init = lambda **arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(script, "SummaryWriter", lambda *words, **more: (calls.append("writer"), writer(*words, **more))[1])
    arguments = [*QUICK_CARTPOLE, *"--track --wandb-project-name mine --wandb-entity us --runs-dir".split(), tmp_path]
    assert stop_when(lambda run: run.global_step == 150, script, *arguments).returncode == 143
    name = only_run(tmp_path).name
    assert run_main(script, *arguments).returncode == 0
    first, then, second, last = calls
    assert then == last == "writer" and second == first and first.pop("config")["total_timesteps"] == 300
    assert first == {"id": name, "name": name, "project": "mine", "entity": "us", "resume": "allow", "sync_tensorboard": True}

    def init(**arguments):
        raise wandb.errors.Error("no account\nhere")

    wandb.init = init
    assert error_line(run_main(script, *arguments, "--seed", 2)) == "error: Weights & Biases: no account here"


def run_code(script: str, code: str, *arguments, **variables: str) -> str:
    """What a process of its own prints that runs this code and then the script."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch, {script} as script\n{code}"
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False,
                            env=environment() | variables)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_run_with_two_agents_stays_below_1_6_gigabytes(tmp_path):
    """The whole default buffer, filled by a small run whose frames are all touched first."""
    code = (
        "init = script.ReplayBuffer.__init__\n"
        "def touched(self, *args): init(self, *args); self.frames.fill_(1); self.frames[-1] = 0\n"
        "script.ReplayBuffer.__init__ = touched\n"
        "script.main()\n"
        # (Not of getrusage: that begins with the memory of the process that started this one.)
        "print('peak', int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024)\n"
    )
    arguments = [*QUICK, "--buffer-size", 100_000, "--batch-size", 32, "--eval-episodes", 10, "--runs-dir", tmp_path]
    arguments += ["--total-timesteps", 260, "--checkpoint-interval", 250, "--eval-epsilon", 0.9]  # short games
    assert 0.7e9 < int(run_code("rde_dqn_atari", code, *arguments).split("peak")[-1]) < 1.6e9


def test_denormal_numbers_become_0_in_every_thread_of_a_run(tmp_path):
    """Adam's moments of a dead unit fade into them. Looked at in a process of its own, when everything has been made."""
    code = (
        "def announce(run, agents, num_resets):\n"
        "    faded = torch.full((1_000_000,), 1.2e-38) * 0.9\n"
        "    print(torch.get_num_threads(), 'threads:', faded.count_nonzero().item(), 'left')\n"
        "    sys.exit()\n"
        "script.Run.announce = announce\n"
        "script.main()\n"
    )
    assert "2 threads: 0 left" in run_code("rde_dqn", code, *QUICK_CARTPOLE, "--runs-dir", tmp_path, OMP_NUM_THREADS="2")


@pytest.mark.parametrize("flag, deterministic", [("--torch-deterministic", True), ("--no-torch-deterministic", False)])
def test_cudnn_is_told_whether_to_be_deterministic(flag, deterministic, tmp_path, monkeypatch):
    script = load_script("rde_dqn")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not deterministic)
    monkeypatch.setattr(script, "ReplayBuffer", lambda *args: sys.exit(3))  # the run has begun, that is enough
    assert run_main(script, *QUICK_CARTPOLE, flag, "--runs-dir", tmp_path).returncode == 3
    assert torch.backends.cudnn.deterministic is deterministic


def test_as_a_command(runs, tmp_path):
    """A script that lies alone in a folder, with a folder of runs beside it; the same run as in the process of the tests."""
    (tmp_path / "rde_dqn.py").write_bytes((ROOT / "rde_dqn.py").read_bytes())
    result = subprocess.run([sys.executable, "rde_dqn.py", *QUICK_CARTPOLE], cwd=tmp_path, env=environment(),
                            capture_output=True, text=True, check=False)  # fmt: skip
    path = only_run(tmp_path / "runs")
    assert result.returncode == 0 and f"the run is in {os.path.relpath(path, tmp_path)}\n" in result.stdout, result.stderr
    assert set(os.listdir(tmp_path)) == {"rde_dqn.py", "runs"} and path.name == runs("cartpole").path.name
    assert_same_end(path, runs("cartpole").path)
