"""play.py: the scores are those of `evaluate`, members play alone, videos and a window show it, and what cannot work is refused."""

import copy
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import types

import cv2
import numpy as np
import pytest
import torch

from conftest import ROOT, call_main, equal, load_script, model, read_csv, run_script, snapshot

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def play():
    return load_script("play")


@pytest.fixture
def folder(runs):
    """Gives the folder of a finished run of RUNS."""
    return lambda name: runs(name).path


def played(play, *arguments) -> list[str]:
    result = call_main(play, *arguments)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout.splitlines()


def scores(lines: list[str], player: str = "") -> list[tuple[str, ...]]:
    """Of the episodes' lines of a player: the values, in the order in which they stand."""
    lines = [line for line in lines if line.startswith(player) and "episode " in line and ": " in line]
    return [tuple(part.split()[-1] for part in line.split(": ")[1].split(", ")) for line in lines]


def script_of(play, path: pathlib.Path, **changes):
    """The script of a run, the run's arguments with these changes, one of its environments, and what makes its agents."""
    script, args = play.import_script(str(path), play.Options(str(path)))
    args = dataclasses.replace(args, **changes)
    env = script.make_env(args)
    return script, args, env, lambda: script.Agent(args, env.observation_space, env.action_space, None, CPU)


# ---------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", ["play minigrid", "rde", "drq", "sac", "play safety", "play one agent"])
def test_scores_of_the_final_evaluation(play, folder, name, monkeypatch):
    """Exactly the values that the run left, by its weights alone, and in what is printed their first digits."""
    path = folder(name)
    final = [row for row in read_csv(path / "evaluations.csv") if row["phase"] == "final"]
    agents, load_weights, shown, summary = [], play.load_weights, [], play.summary
    monkeypatch.setattr(play, "load_weights", lambda agent, file: (agents.append(agent), load_weights(agent, file)))
    monkeypatch.setattr(play, "summary", lambda episodes: (shown.append(episodes), summary(episodes))[1])
    lines = scores(played(play, path, "--like-evaluation"))
    for key, column in {"r": "episodic_return", "success": "success", "cost": "cost"}.items():
        assert [episode.get(key) for episode in shown[-1]] == [float(row[column]) if column in row else None for row in final]
    assert [float(line[0]) for line in lines] == pytest.approx([float(row["episodic_return"]) for row in final], rel=1e-5)
    assert equal(agents[0].weights(), model(path))


def test_weights_that_were_kept_on_the_way(play, folder):
    """--checkpoint takes the weights that were kept at that step, and --like-evaluation its step."""
    path = folder("play minigrid")
    for step in (200, 400, 600):
        assert play.find_weights(str(path), str(step)) == (str(path / "models" / f"step_{step:08d}.pt"), step)
    assert play.find_weights(str(path), "final") == play.find_weights(str(path), "newest") == (str(path / "model.pt"), None)
    lines = played(play, path, "--checkpoint", 600, "--like-evaluation")
    assert scores(lines) == scores(played(play, path, "--like-evaluation")) and len(scores(lines)) == 3
    assert "models/step_00000600.pt, epsilon 0.3; agent" in lines[0]


def test_an_episode_is_the_same_however_many_there_are(play, folder):
    """And denormal numbers are 0, as in the run."""
    path = folder("play one agent")
    before = snapshot(path)
    torch.set_flush_denormal(False)  # the run may have been made in this process, too
    three = scores(played(play, path, "--episodes", 3))
    assert (torch.tensor(1.2e-38) * 0.9).item() == 0.0
    assert len(set(three)) > 1 and len(three) == 3 and three[:1] == scores(played(play, path))
    assert scores(played(play, path, "--episodes", 3, "--seed", 1)) != three
    assert snapshot(path) == before


def test_mean_and_deviation(play):
    episodes = [{"r": 1.0, "l": 10, "cost": 0.0}, {"r": 2.0, "l": 30, "cost": 0.0}]
    assert play.summary(episodes) == {"return": "1.50 ± 0.71", "length": "20.00 ± 14.14", "cost": "0.00 ± 0.00"}
    assert play.summary(episodes[:1]) == {"return": "1", "length": "10", "cost": "0"}


def test_epsilon(play, folder):
    """In CartPole one step is one random number: with epsilon 1 the actions are those of the generator alone."""
    path = folder("play one agent")
    script, _, env, _ = script_of(play, path)
    generator = torch.Generator().manual_seed(script.derive_seed(0, script.EVALUATION, 0))
    env.reset(seed=script.derive_seed(0, script.EVALUATION, 0, 0))
    done, length = False, 0
    while not done:
        torch.rand(1, generator=generator)
        _, _, terminated, truncated, _ = env.step(torch.randint(2, (1,), generator=generator).item())
        done, length = terminated or truncated, length + 1
    assert scores(played(play, path, "--epsilon", 1)) == [(str(length), str(length))]
    assert scores(played(play, path, "--epsilon", 0.5)) == scores(played(play, path))  # the run's own


# --------------------------------------------------------------------------------------------------------------- members


@pytest.mark.parametrize("name, changes", [("play minigrid", {"eval_epsilon": 0.0}), ("play safety", {})])
def test_a_member_alone(play, folder, name, changes):
    """Its proposals are taken always, and the actions are those of an agent all of whose members are that one."""
    path = folder(name)
    script, args, env, new_agent = script_of(play, path, **changes)
    agent, alone, generator = new_agent(), new_agent(), torch.Generator()
    play.load_weights(agent, str(path / "model.pt"))
    observations = np.random.default_rng(0).normal(size=(64, *env.observation_space.shape))
    act = lambda agent: agent.evaluation_policy(generator)(torch.from_numpy(observations.astype(np.float32)))
    together, composition, different = act(agent), play.Composition(script, agent), 0
    for member in range(args.num_agents):
        weights = model(path)
        for key, states in weights.items():  # every member gets this member's network
            if isinstance(states, list):
                weights[key] = [states[member]] * args.num_agents
            elif key in ("actors", "critics"):
                of_member = {name: tensor.chunk(args.num_agents)[member] for name, tensor in states.items()}
                weights[key] = {name: torch.cat([tensor] * args.num_agents) for name, tensor in of_member.items()}
        alone.load_weights(weights)
        composition.member = member
        actions = act(agent)
        torch.testing.assert_close(actions, act(alone))
        assert composition.acting == member and composition.values["p"][member] == 1.0 == sum(composition.values["p"])
        different += not torch.allclose(actions.float(), together.float())
    assert different  # else the members were alike


def test_all_of_them_in_a_table(play, folder):
    path = folder("play minigrid")
    lines = played(play, path, "--agent", "all", "--episodes", 2)
    assert scores(lines, "ensemble") == scores(played(play, path, "--episodes", 2))
    assert scores(lines, "agent 1") == scores(played(play, path, "--agent", 1, "--episodes", 2))
    assert [line[:10].rstrip() for line in lines[-5:]] == ["2 episode(", "ensemble", "agent 0", "agent 1", "agent 2"]
    assert lines[-5].split()[2:] == ["return", "length", "success"]


# ---------------------------------------------------------------------------------------------- other rules, and resets


RULES = {  # the arguments of the run that other options stand for
    "": {}, "--selection advantage": {"selection": "advantage", "beta": None}, "--beta 0": {"beta": 0.0},
    "--selection advantage --beta 1.5": {"selection": "advantage", "beta": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("options", RULES)
def test_what_a_reset_costs(play, folder, options):
    """Scores and shares of three fresh networks, each in episodes of its own, against an agent that is reset and evaluated by
    hand."""
    path = folder("play minigrid")
    rule = {"": "value (beta 50)", "--beta 0": "value (beta 0)", "--selection advantage": "advantage (beta 5)",
            "--selection advantage --beta 1.5": "advantage (beta 1.5)"}[options]  # fmt: skip
    heading, *lines = played(play, path, *"--reset oldest --fresh-seeds 3 --episodes 4".split(), *options.split())
    script, args, _, new_agent = script_of(play, path, **RULES[options])
    envs, weights, shares = [script.make_env(args) for _ in range(4)], model(path), []
    means = {"return": [], "success": []}
    fresh = weights["oldest_agent"]
    assert heading.endswith(f"; agent {fresh} of 3 is reset, selection by {rule}")  # another one judges
    for seed in range(3):
        agent, acting = new_agent(), []
        agent.load_weights(weights)
        before = copy.deepcopy(agent.q_networks)
        torch.manual_seed(script.derive_seed(seed, script.INITIALISATION))
        assert agent.reset() == fresh
        same = [all(map(torch.equal, a.parameters(), b.parameters())) for a, b in zip(before, agent.q_networks)]
        assert same == [i != fresh for i in range(3)]
        agent.act = lambda *inputs, act=agent.act, acting=acting: (acting.append(act(*inputs)), acting[-1])[1]
        generator = torch.Generator().manual_seed(script.derive_seed(0, script.EVALUATION, seed))
        episodes = script.evaluate(agent.evaluation_policy(generator), envs, 0, seed, CPU, lambda env: None)
        shares.append(np.mean(torch.cat([choice[1] for choice in acting]).numpy() == fresh))
        line = f"fresh network {seed} as agent {fresh}: "
        for title, key in (("return", "r"), ("success", "success")):
            values = [episode[key] for episode in episodes]
            means[title].append(np.mean(values))
            line += f"{title} {np.mean(values):.4g} ± {np.std(values):.4g}, "
        assert lines[seed] == line + f"acts in {shares[-1]:.0%}"
    assert len(set(shares)) > 1 and (options != "--beta 0" or abs(np.mean(shares) - 1 / 3) < 0.1)
    line = "3 fresh network(s), 4 episode(s) each: "
    for title, values in means.items():
        line += f"{title} {np.mean(values):.4g} ± {np.std(values, ddof=1) / np.sqrt(3):.2f} (standard error), "
    assert lines[3:] == [line + f"the fresh agent acts in {np.mean(shares):.0%}"]


def test_after_a_reset_of_safe_rde_cost_is_told_too(play, folder, monkeypatch):
    """Costs of 0, 3 and 9 in the place of the episodes' own, of which a quick run may have none."""
    own, costs = play.play, iter((0, 3, 9))

    def with_cost(*arguments) -> list[dict]:
        cost = next(costs)
        return [episode | {"cost": cost} for episode in own(*arguments)]

    monkeypatch.setattr(play, "play", with_cost)
    lines = played(play, folder("safety"), *"--reset oldest --fresh-seeds 3 --seed 1".split())
    matches = [re.search(r": return \S+ ± 0, cost (\d) ± 0, acts in \d+%$", line) for line in lines[1:4]]
    assert [match[1] for match in matches] == ["0", "3", "9"]
    assert "(standard error), cost 4 ± 2.65 (standard error), the fresh agent acts" in lines[4]


def test_another_rule_is_played_without_a_reset_too(play, folder):
    path = folder("play safety")
    by_run, uniform = (played(play, path, "--episodes", 2, *more) for more in ((), ("--beta", 0)))
    assert scores(by_run) != scores(uniform)
    assert scores(played(play, path, "--episodes", 2, "--selection", "value")) == scores(by_run)
    assert scores(played(play, path, "--episodes", 2, "--selection", "value", "--beta", 50)) == scores(by_run)


def test_another_rule_is_played_with_its_own_betas(play, folder, tmp_path):
    """Whatever those of the run are: by the other rule they mean something else."""
    path = pathlib.Path(shutil.copytree(folder("safety"), tmp_path / "run"))
    content = json.loads((path / "args.json").read_text())
    content["args"] |= {"beta": 0.0, "beta_cost": 0.0}
    (path / "args.json").write_text(json.dumps(content))
    by_run, other = (scores(played(play, path, "--episodes", 2, *more)) for more in ((), ("--selection", "advantage")))
    assert by_run != other == scores(played(play, folder("safety"), "--episodes", 2, "--selection", "advantage"))


def test_an_older_script_knows_one_rule_alone(play, folder, tmp_path):
    path = pathlib.Path(shutil.copytree(folder("safety"), tmp_path / "run"))
    content = json.loads((path / "args.json").read_text())
    del content["args"]["selection"]
    (path / "args.json").write_text(json.dumps(content))
    text, argument = (ROOT / "rde_sac_safety.py").read_text(), 'selection: Literal["value", "advantage"] = "value"'
    text = text.replace(argument, "other: int = 0")
    (tmp_path / "rde_sac_safety.py").write_text(text)
    result = call_main(play, path, "--scripts-dir", tmp_path, "--selection", "advantage")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.splitlines()[-1] == "error: --selection: rde_sac_safety.py, as it lies there, has one rule alone"


# -------------------------------------------------------------------------------------------------------------- pictures


def test_video(play, folder, tmp_path):
    """One per episode, of as many pictures as there are steps and the beginning, with a text below; and the same scores."""
    arguments = (folder("play minigrid"), "--episodes", 2, "--agent", 1)
    lines = played(play, *arguments, "--video", tmp_path, "--show-choice")
    assert scores(lines) == scores(played(play, *arguments))
    files = [f"MiniGrid-LavaGapS5-v0__rde_dqn__agent1__seed0-episode-{i}.mp4" for i in range(2)]
    assert sorted(os.listdir(tmp_path)) == files
    for file, (_, length, _) in zip(files, scores(lines)):
        video, frames = cv2.VideoCapture(str(tmp_path / file)), []
        while (frame := video.read())[0]:
            frames.append(frame[1])
        assert len(frames) in (int(length), int(length) + 1)  # MoviePy's rounding can lose the last one
        assert frames[0].shape[0] >= 400 + 20 * 3
        text = [frame[-60:].max() for frame in frames]
        assert text[0] < 60 and min(text[1:]) > 150  # nothing was chosen before the first step


def test_what_stands_under_a_picture(play):
    composition = play.Composition.__new__(play.Composition)
    composition.agent, composition.num_agents = types.SimpleNamespace(oldest=torch.tensor([1])), 2
    composition.values, composition.acting = {"Q": [1.23456, -2.0], "cost": [0.5, 0.0], "p": [1.0, 0.0]}, 0
    assert composition.lines() == ["agent 0:  Q 1.23  cost 0.5  p 1  acts", "agent 1:  Q -2  cost 0  p 0  judges"]
    composition.acting = None
    assert composition.lines() == []


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed")
@pytest.mark.parametrize("name", ["play one agent", pytest.param("play safety", marks=pytest.mark.slow)])
def test_window(play, folder, name):
    """On a display. A window of OpenGL's beside MuJoCo's pictures would be ended by the X server."""
    reader, writer = os.pipe()
    display = subprocess.Popen(["Xvfb", "-displayfd", str(writer)], pass_fds=[writer], stderr=subprocess.DEVNULL)
    os.close(writer)
    try:
        with os.fdopen(reader) as file:
            result = run_script("play", folder(name), "--window", SDL_VIDEODRIVER="x11", DISPLAY=f":{file.readline().strip()}")
    finally:
        display.terminate()
        display.wait()
    assert result.returncode == 0, result.stderr
    assert scores(result.stdout.splitlines()) == scores(played(play, folder(name)))


def test_closing_the_window_ends_it(play, monkeypatch):
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame.display.init()
    window, frame = play.Window(fps=1_000), np.full((30, 40, 3), 7, np.uint8)
    window.show(frame)
    assert window.screen.get_size() == (40, 30) and window.screen.get_at((5, 5))[:3] == (7, 7, 7)
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    with pytest.raises(SystemExit) as end:
        window.show(frame)
    pygame.display.quit()
    assert end.value.code == 0


def test_no_display(folder):
    result = run_script("play", folder("play one agent"), "--window", SDL_VIDEODRIVER="x11", DISPLAY="", WAYLAND_DISPLAY="")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: --window finds no display ("), result.stderr


# --------------------------------------------------------------------------------------------------------------- refusals


def refused(play, *arguments) -> str:
    result = call_main(play, *arguments)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and not result.stdout
    return line.removeprefix("error: ")


WRONG_ARGUMENTS = {  # the run and, by what is said in the end, the arguments beside --video videos
    "play minigrid": {
        "--video and --window exclude each other": ["--window"],
        "--agent is 3, but must be one of ensemble, all, 0, 1, 2": ["--agent 3"],
        "add --video FOLDER or --window": ["--video= --show-choice"],
        "add --reset oldest": ["--fresh-seeds 2"],
        "are weights of the steps 200, 400, 600": ["--checkpoint 300", "--checkpoint x", "--checkpoint -1"],
        "leave out --video, --window, --like-evaluation and --agent": [
            "--reset oldest", "--video= --reset oldest --like-evaluation", "--video= --reset oldest --agent all"],
        "plays many episodes side by side and shows none; leave out --video and --window": ["--like-evaluation"],
        "--video file: File exists": ["--video file"],
    },
    "play one agent": {
        "--agent is 0, but the run has one agent alone": ["--agent 0"],
        "--agent is all, but the run has one agent alone": ["--agent all"],
        "the run has one agent alone, and nothing is chosen": [
            "--show-choice", "--video= --reset oldest", "--selection value", "--beta 1"],
        "are weights of no step (--keep-models)": ["--checkpoint 5"],
    },
    "play safety": {"--epsilon is for discrete actions, and rde_sac_safety.py has none": ["--epsilon 0.1"]},
}  # fmt: skip


def test_wrong_arguments(play, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, arguments_of in WRONG_ARGUMENTS.items():
        for message, arguments in [(message, one) for message, several in arguments_of.items() for one in several]:
            assert refused(play, folder(name), "--video", "videos", *arguments.split()).endswith(message), arguments
    assert os.listdir(tmp_path) == ["file"]


OUT_OF_RANGE = ["--epsilon -0.1", "--epsilon 1.1", "--epsilon nan", "--episodes 0", "--seed -1", "--fresh-seeds 0", "--beta -1",
                "--beta nan"]  # fmt: skip


@pytest.mark.parametrize("arguments", OUT_OF_RANGE)
def test_values_out_of_range(play, tmp_path, arguments):
    result = call_main(play, tmp_path, *arguments.split())
    assert result.returncode == 2 and not result.stdout and "Input should be " in result.stderr
    assert arguments.split()[0][2:].replace("-", "_") in result.stderr


@pytest.fixture
def copied(folder, tmp_path):
    return pathlib.Path(shutil.copytree(folder("play minigrid"), tmp_path / "copied"))


def test_wrong_folders(play, copied, tmp_path):
    assert refused(play, tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} is not a folder"
    assert "args.json: No such file" in refused(play, tmp_path)
    content = json.loads((copied / "args.json").read_text())
    does_not_fit, no_script = (
        "its args.json does not fit",
        "the run's script {} is not in {}; say with --scripts-dir where it is",
    )
    no_arguments = f"the arguments in {copied}/args.json do not fit {ROOT / 'rde_dqn.py'}: "
    for changed, message in (
        *(("", does_not_fit), ([], does_not_fit), ({}, does_not_fit)),
        *((content | {"script": name}, no_script.format(name, ROOT)) for name in ("x.py", "../rde_dqn.py", "/etc/passwd", 7)),
        *((content | {"args": args}, no_arguments) for args in ({"seed": -1}, {"seed": "x"}, {"beta": [1]})),
    ):  # fmt: skip
        (copied / "args.json").write_text(json.dumps(changed) if changed != "" else "")
        assert message in refused(play, copied)
    (copied / "args.json").write_text(json.dumps(content))
    (copied / "rde_dqn.py").unlink()
    assert refused(play, copied, "--run-script") == f"the run's script rde_dqn.py is not in {copied}; leave out --run-script"


def test_wrong_weights(play, copied, folder):
    file, weights = copied / "model.pt", (copied / "model.pt").read_bytes()
    middle = len(weights) // 2
    for content in (weights[:middle], weights[:middle] + bytes([weights[middle] ^ 1]) + weights[middle + 1 :]):
        file.write_bytes(content)
        assert refused(play, copied) == f"{file} is damaged, cut off, or holds more than weights"
    for content in (model(folder("play one agent")), {"epsilon": 1}):
        torch.save(content, file)
        assert "are not those of this script's agent" in refused(play, copied)
    file.unlink()
    assert refused(play, copied).endswith("there is no model.pt; --checkpoint newest plays the weights of step 600")
    assert "step_00000600.pt" in played(play, copied, "--checkpoint", "newest")[0]
    shutil.rmtree(copied / "models")
    assert refused(play, copied, "--checkpoint", "newest").endswith("no weights were kept on the way (--keep-models)")


def test_other_scripts(play, folder, tmp_path):
    """A changed script is warned about and played; with --run-script the text that made the run. What is no script is refused."""
    path, source = folder("play one agent"), (ROOT / "rde_dqn.py").read_text()
    ours, other = scores(played(play, path)), tmp_path / "rde_dqn.py"
    warning = f"warning: {other} is not the text that made the run, and is played as it is"
    other.write_text(source.replace("features.float())", "-features.float())"))
    assert call_main(play, path, "--scripts-dir", tmp_path).returncode == 0
    other.write_text(source + "\n# changed\n")
    result = call_main(play, path, "--scripts-dir", tmp_path)
    assert result.returncode == 0 and scores(result.stdout.splitlines()) == ours
    assert result.stderr == f"{warning}; --run-script plays with the run's own text\n"
    assert scores(played(play, path, "--scripts-dir", tmp_path, "--run-script")) == ours
    for text, message in (("def evaluate(): pass", "it has no Agent, Args, EVALUATION, SCRIPT, check_environment,"),
                          ("import no_such_package", "cannot be imported: No module named")):  # fmt: skip
        other.write_text(text)
        assert message in refused(play, path, "--scripts-dir", tmp_path)
    # And a text in the run's folder that is not the one that made it.
    copied = pathlib.Path(shutil.copytree(path, tmp_path / "copied"))
    (copied / "rde_dqn.py").write_text(source + "\n# changed\n")
    result = call_main(play, copied, "--run-script")
    assert result.returncode == 0 and scores(result.stdout.splitlines()) == ours
    assert result.stderr == f"{warning}\n".replace(str(other), str(copied / "rde_dqn.py"))


def test_without_the_flag_nothing_in_a_folder_is_executed(play, folder, tmp_path):
    path = pathlib.Path(shutil.copytree(folder("play one agent"), tmp_path / "run"))
    for name in ("rde_dqn.py", "args.py", "torch.py", "sitecustomize.py"):
        (path / name).write_text("raise SystemExit('executed')")
    assert scores(played(play, path)) == scores(played(play, folder("play one agent")))
    assert call_main(play, path, "--run-script").returncode == "executed"
