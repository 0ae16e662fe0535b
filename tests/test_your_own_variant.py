"""docs/your_own_variant.md followed to the letter: every diff fits, has its effect, and its run goes on exactly."""

import copy
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from test_play import played

from conftest import (
    QUICK,
    QUICK_CARTPOLE,
    ROOT,
    assert_same_end,
    call_main,
    environment,
    equal,
    load_module,
    load_script,
    model,
    only_run,
    read_csv,
    run_main,
    scalars,
    stop_when,
)

PAGE = (ROOT / "docs" / "your_own_variant.md").read_text()
BLOCKS = re.findall(r"<!-- (\S+) -> (\S+) -->\n```diff\n(.*?)```", PAGE, re.DOTALL)
DIFFS = {new: (old, diff) for old, new, diff in BLOCKS}
# One reset, after 10 gradient steps, at step 300.
QUICK_ATARI = [*QUICK, *"--total-timesteps 340 --num-agents 1 --reset-interval 10 --eval-interval 0 --eval-episodes 1".split()]


def changed(text: str, diff: str) -> str:
    """The text with the diff in it; its hunks, which lines with @@ divide, fit in one place each, in their order."""
    place = 0
    for hunk in re.split(r"^@@.*@@\n", diff, flags=re.MULTILINE):
        lines = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        before = "".join(f"{line}\n" for sign, line in lines if sign != "+")
        after = "".join(f"{line}\n" for sign, line in lines if sign != "-")
        assert text.count(before) == 1, f"in {text.count(before)} places:\n{before}"
        place, found = text.index(before), place
        assert place >= found
        text = text[:place] + after + text[place + len(before) :]
        place += len(after)
    return text


def variant_text(name: str) -> str:
    """Of a script of the repository, or of a copy with the page's change of that name."""
    if name not in DIFFS:
        return (ROOT / name).read_text()
    old, diff = DIFFS[name]
    return changed(variant_text(old), diff)


def variant(name: str, folder: pathlib.Path):
    """A copy with the page's change of that name, as a module."""
    (folder / name).write_text(variant_text(name))
    return load_script(pathlib.Path(name).stem, folder / name)


def run_and_continue(script, folder: pathlib.Path, arguments: list[str], stop_at: int, compare: bool = True) -> pathlib.Path:
    """The folder of a run that was stopped in between and continued. It comes to the end of another one, which was not."""
    arguments = [*arguments, "--checkpoint-interval", "50", "--runs-dir"]
    for name in ("undisturbed", "continued") if compare else ("continued",):
        if name == "continued":
            stopped = stop_when(lambda run: run.global_step >= stop_at, script, *arguments, folder / name)
            assert stopped.returncode == 143 and f"stopped at step {stop_at}" in stopped.stderr, stopped.stderr
        result = run_main(script, *arguments, folder / name)
        assert result.returncode == 0, result.stderr
        assert ("continuing" in result.stdout) == (name == "continued")
    path = only_run(folder / "continued")
    if compare:
        assert_same_end(path, only_run(folder / "undisturbed"))
    return path


def watched_resets(script, monkeypatch) -> list[tuple]:
    """Of every reset to come: the agent, the losses before, its parameters before and after. The others stay as they are."""
    resets, reset = [], script.Agent.reset

    def watched(agent):
        losses, before = agent.metrics[0].tolist(), copy.deepcopy([network.state_dict() for network in agent.q_networks])
        index, after = reset(agent), copy.deepcopy([network.state_dict() for network in agent.q_networks])
        assert all(equal(before[i], after[i]) for i in range(len(after)) if i != index)
        resets.append((index, losses, before[index], after[index]))
        return index

    monkeypatch.setattr(script.Agent, "reset", watched)
    return resets


def play(script_folder: pathlib.Path, path: pathlib.Path) -> str:
    """What play.py says first: of what it plays."""
    return played(load_module("play", ROOT / "play.py"), path, "--scripts-dir", script_folder)[0]


def test_the_page_has_the_seven_changes():
    assert list(DIFFS) == ["my_rule.py", "my_norm.py", "my_impala_atari.py", "my_worst_first.py", "my_metric.py",
                           "my_wrapper.py", "my_logged_actions.py"]  # fmt: skip
    assert len(re.findall("^## An?", PAGE, re.MULTILINE)) == 7


def test_selection_rule(tmp_path):
    """The judge's favourite acts in nine of ten cases, else anybody: in a run, and where shipped weights are played."""
    script = variant("my_rule.py", tmp_path)
    probabilities = script.selection_probabilities(torch.tensor([[1.0, 2.0, -3.0]]), torch.ones(1, 1), 0.0)
    assert probabilities.flatten().tolist() == pytest.approx([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3])
    points = scalars(run_and_continue(script, tmp_path, QUICK_CARTPOLE, stop_at=200))
    entropies = [value for _, value in points["rde/choice_entropy"] if value]  # 0: nothing but random actions in between
    assert len(entropies) >= 2
    # Of two agents: 0.95 and 0.05.
    assert entropies == pytest.approx([-0.95 * math.log(0.95) - 0.05 * math.log(0.05)] * len(entropies), rel=1e-4)
    (tmp_path / "try").mkdir()
    shutil.copy(tmp_path / "my_rule.py", tmp_path / "try" / "rde_dqn.py")
    options = ["--scripts-dir", tmp_path / "try", "--reset", "oldest", "--episodes", "2"]
    result = call_main(load_script("play"), ROOT / "results" / "lunar_lander", *options)
    assert result.returncode == 0 and "try/rde_dqn.py is not the text that made the run" in result.stderr
    assert "1 fresh network(s), 2 episode(s) each: return " in result.stdout


def test_network(tmp_path, monkeypatch):
    """The gains and shifts of the LayerNorms move, are reset to 1 and 0, and are in model.pt, of both agents."""
    script = variant("my_norm.py", tmp_path)
    resets = watched_resets(script, monkeypatch)
    path = run_and_continue(script, tmp_path, QUICK_CARTPOLE, stop_at=200)
    norms = {"1.weight": 1, "1.bias": 0, "4.weight": 1, "4.bias": 0}
    assert [index for index, *_ in resets[:2]] == [0, 1]
    for _, _, before, after in resets:
        for name, initial in norms.items():  # a unit that no observation activates stands still
            assert (before[name] != initial).sum() >= 4 and (after[name] == initial).all()
        assert all(not torch.equal(before[name], after[name]) for name in before)
    for network in model(path)["q_networks"]:  # agent 1 has learned since step 260, agent 0 since step 180
        assert all(network[name].shape == (8,) and (network[name] != initial).any() for name, initial in norms.items())
    assert "my_norm.py, model.pt" in play(tmp_path, path)


def test_encoder(tmp_path, monkeypatch):
    """Every convolution of the 15 learns, and a full reset gives all of them new values; plasticity sees all activations.

    For the sake of time with one agent, and without a run to compare with.
    """
    script = variant("my_impala_atari.py", tmp_path)
    resets = watched_resets(script, monkeypatch)
    path = run_and_continue(script, tmp_path, [*QUICK_ATARI, "--reset-depth", "full"], stop_at=320, compare=False)
    ((index, _, before, after),) = resets
    torch.manual_seed(script.derive_seed(1, script.INITIALISATION))
    untrained, activations = script.QNetwork(4), script.Activations()
    kernels = [name for name, value in model(path)["q_networks"][0].items() if value.ndim == 4]
    assert index == 0 and len(kernels) == 15 and before["hidden.weight"].shape == (512, 3872)
    for name in kernels:
        assert not torch.equal(before[name], untrained.state_dict()[name]), name  # it has learned
        assert not torch.equal(before[name], after[name]), name
    with torch.no_grad(), activations:
        untrained(torch.rand(2, 4, 84, 84))
    assert [seen.shape[1] for seen in activations.seen] == [*[16] * 4, *[32] * 9, 512]
    assert all(0 < value < 1 for _, value in scalars(path)["plasticity/active_units_0"])


def test_rule_of_resets(tmp_path, monkeypatch):
    """The agent with the higher loss is reset. The other one judges then, also where the run is played."""
    script = variant("my_worst_first.py", tmp_path)
    resets = watched_resets(script, monkeypatch)
    arguments = [*QUICK_CARTPOLE, "--num-agents", "3", "--reset-interval", "60", "--total-timesteps", "500"]
    path = run_and_continue(script, tmp_path, arguments, stop_at=330)
    order = [index for index, *_ in resets]
    assert all(losses[index] == max(losses) for index, losses, *_ in resets)
    order = order[: len(order) // 2]  # then once more
    assert len(order) == 9 and order != [number % 3 for number in range(9)]
    last = {index: number for number, index in enumerate(order)}
    oldest = min(range(3), key=lambda index: last.get(index, -1))
    assert model(path)["oldest_agent"] == oldest and model(path)["num_resets"] == 9
    assert [agent for _, agent in scalars(path)["rde/reset_agent"]] == order
    assert f"; agent {oldest} of 3 judges" in play(tmp_path, path)


def test_metric(tmp_path):
    script = variant("my_metric.py", tmp_path)
    points = scalars(run_and_continue(script, tmp_path, QUICK_CARTPOLE, stop_at=200))
    for agent in (0, 1):
        losses, largest = (points[f"losses/{name}_{agent}"] for name in ("td_loss", "largest_error"))
        assert [step for step, _ in largest] == [step for step, _ in losses] and len(largest) == 2
        for (_, loss), (_, error) in zip(losses, largest):
            # Of the Huber loss: no more than that of the largest of 8 errors, and no less than an eighth of it.
            huber = error**2 / 2 if error < 1 else error - 0.5
            assert huber / 8 * 0.999 <= loss <= huber * 1.001


@pytest.mark.parametrize("name", ["my_wrapper.py", "my_logged_actions.py"])
def test_wrapper(tmp_path, monkeypatch, name):
    """A quarter of the steps play the last action; the generator and that action are continued exactly."""
    script = variant(name, tmp_path)
    played, step = [], script.StickyActions.step

    def watched(env, action):
        last, result = env.last_action, step(env, action)
        assert env.env.actions[-1] == env.last_action
        played.append((last, int(action), env.last_action))
        return result

    monkeypatch.setattr(script.StickyActions, "step", watched)
    path = run_and_continue(script, tmp_path, [*QUICK_CARTPOLE, "--num-envs", "1"], stop_at=205)
    assert all(now in (last, action) for last, action, now in played)
    sticky = [now == last for last, action, now in played if last != action]
    assert len(sticky) > 300 and sum(sticky) / len(sticky) == pytest.approx(0.25, abs=4 * (0.19 / len(sticky)) ** 0.5)
    assert name in play(tmp_path, path)


def test_environments(tmp_path):
    """The page's module and commands, as they stand, with less steps; what was learned is played."""
    module, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_envs.py").write_text(module)
    for name in ("rde_dqn.py", "rde_sac_dmc.py", "play.py"):
        shutil.copy(ROOT / name, tmp_path)
    discrete, continuous = re.findall(r"^    (PYTHONPATH=\. (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    less = "--learning-starts 300 --eval-episodes 2"
    variables = environment() | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    for command in (f"{discrete} {less} --total-timesteps 1500 --hidden-dim 32 --num-hidden-layers 1",
                    f"{continuous} {less} --total-timesteps 700 --reset-interval 300",
                    "PYTHONPATH=. python play.py runs/*Corridor* --episodes 5"):  # fmt: skip
        command = ["bash", "-c", command]
        result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    assert len(re.findall(r"episode \d: ", result.stdout)) == 5
    paths = list((tmp_path / "runs").iterdir())
    assert len(paths) == 2
    for path in paths:  # 1 at the end, and at most 40 steps at 0.1 each
        assert all(-4.001 < float(row["episodic_return"]) <= 1 for row in read_csv(path / "evaluations.csv"))


def test_a_run_of_other_code_stands_beside_ours(tmp_path, monkeypatch):
    """The page's random player writes what plot_benchmark.py reads, with the scores of a random player."""
    _, player = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        exec(player.replace('"seed": 1', f'"seed": {seed}'), {})
    ours = run_main(load_script("rde_dqn"), *QUICK_CARTPOLE, "--eval-episodes", "2", "--runs-dir", "runs/theirs")
    assert ours.returncode == 0, ours.stderr
    command = [sys.executable, ROOT / "plot_benchmark.py", "runs/mine", "runs/theirs", "--out-dir", "comparison"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "left out" not in result.stderr, result.stderr
    rows = read_csv(tmp_path / "comparison" / "results.csv")
    assert {row["method"] for row in rows} == {"my_random", "RDE+DQN value"}
    random = [(row["seed"], row["global_step"], row["phase"], row["episodes"]) for row in rows if row["method"] == "my_random"]
    steps = [("0", "scheduled"), ("5000", "scheduled"), ("10000", "final")]
    assert random == [(seed, step, phase, "20") for seed in "12" for step, phase in steps]
    # 22 steps is what CartPole lasts at random; of the mean of 20 episodes the deviation is 2.7.
    assert all(12 < float(row["score"]) < 35 for row in rows if row["method"] == "my_random")
    assert (tmp_path / "comparison" / "learning_curves.png").stat().st_size > 10_000


def test_variants_are_looked_after_and_disturb_nothing(tmp_path):
    """All seven in the repository's folder, where test_copies.py holds; but for a change of theirs below the line."""
    ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".pytest_cache", "results", "docs")
    shutil.copytree(ROOT, folder := tmp_path / "repository", ignore=ignored)
    for name in DIFFS:
        (folder / name).write_text(variant_text(name))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_copies.py"]
    settings = {"cwd": folder, "env": environment(), "capture_output": True, "text": True, "check": False}
    result = subprocess.run(command, **settings)
    assert result.returncode == 0, result.stdout[-3000:]
    (folder / "my_metric.py").write_text(variant_text("my_metric.py") + "# drifted\n")
    result = subprocess.run([*command, "-k", "share_is_equal"], **settings)
    assert result.returncode == 1 and "my_metric.py" in result.stdout
