"""Two versions of the scripts, run with the same commands: do they play the same games and learn the same weights, to the bit?

    git worktree add ../old HEAD~1
    python tests/compare_versions.py ../old .
    python tests/compare_versions.py ../old . --case rde "sac bf16"

Both folders hold the scripts; how they name a run's folder does not matter. Every case is run in one and then in the other, on
the CPU. Compared are episodes.csv (but for its seconds), evaluations.csv, model.pt, TensorBoard's points (but for the speed)
and the videos. The new version may log and keep more. Exit code 1 if anything differs.
"""

import argparse
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

from conftest import read_csv, scalars

ATARI = (
    "--env-id BreakoutNoFrameskip-v4 --total-timesteps 700 --learning-starts 200 --replay-ratio 0.25 --batch-size 4 "
    "--buffer-size 300 --eval-interval 300 --eval-episodes 2 "
)
SAC = (
    "--env-id cartpole-swingup --total-timesteps 1300 --learning-starts 700 --replay-ratio 0.5 --batch-size 16 "
    "--hidden-dim 16 --buffer-size 1000 --eval-interval 600 --eval-episodes 2 "
)
SAFETY = (
    "--env-id SafetyPointMaze-v0 --total-timesteps 1300 --learning-starts 700 --replay-ratio 0.5 --batch-size 16 "
    "--hidden-dim 16 --buffer-size 1000 --eval-interval 600 --eval-episodes 1 "
)
MLP = "--env-id CartPole-v1 --total-timesteps 1300 --learning-starts 200 --hidden-dim 32 --eval-interval 600 --eval-episodes 2 "
BEFORE = {"rde_sac_dmc": SAC, "rde_sac_safety": SAFETY, "rde_dqn": MLP}  # of the others ATARI
ALIEN, FREEWAY, QBERT = (f"--env-id {game}NoFrameskip-v4 " for game in ("Alien", "Freeway", "Qbert"))

# Name: script, arguments beside those above, threads. The names' last words say what a case is there for.
CASES = {
    "dqn": ("dqn_atari", "", 1),
    "dqn alien": ("dqn_atari", ALIEN + "--total-timesteps 1200 --eval-interval 0 --eval-episodes 1", 1),
    "dqn freeway whole game": ("dqn_atari", FREEWAY + "--total-timesteps 2200 --learning-starts 1900 --eval-interval 0 "
                               "--eval-episodes 1 --replay-ratio 0.5", 1),
    "dqn ratio 0.29": ("dqn_atari", QBERT + "--replay-ratio 0.29 --eval-episodes 1", 1),
    "dqn 2 threads": ("dqn_atari", "--batch-size 32 --seed 2 --total-timesteps 400", 2),
    "dqn video": ("dqn_atari", "--total-timesteps 400 --capture-video", 1),
    "sr last2": ("sr_dqn_atari", "--reset-depth last2 --reset-interval 60", 1),
    "sr full qbert 2 environments": ("sr_dqn_atari", QBERT + "--reset-depth full --reset-interval 40 --num-envs 2", 1),
    "sr never": ("sr_dqn_atari", "--reset-interval 0 --gamma 0.9 --tau 0.1 --learning-rate 1e-3", 1),
    "rde": ("rde_dqn_atari", "--reset-depth last1 --reset-interval 120", 1),
    "rde full alien": ("rde_dqn_atari", ALIEN + "--reset-depth full --reset-interval 120 --total-timesteps 900 "
                       "--eval-episodes 1", 1),
    "rde 2 environments": ("rde_dqn_atari", "--reset-interval 120 --num-envs 2", 1),
    "rde 4 environments": ("rde_dqn_atari", "--reset-interval 120 --num-envs 4 --replay-ratio 0.29 --total-timesteps 900", 1),
    "rde ratio 2": ("rde_dqn_atari", "--reset-depth last2 --reset-interval 500 --replay-ratio 2 --total-timesteps 500", 1),
    "rde bf16": ("rde_dqn_atari", "--reset-interval 60 --bf16 --total-timesteps 400", 1),
    "rde resets often": ("rde_dqn_atari", "--num-agents 3 --reset-interval 60 --eval-episodes 1 --beta 5", 1),
    "rde one agent": ("rde_dqn_atari", "--num-agents 1 --reset-interval 60", 1),
    "rde small buffer": ("rde_dqn_atari", "--buffer-size 10 --learning-starts 20 --total-timesteps 500 --num-envs 2", 1),
    "rde checkpoints": ("rde_dqn_atari", "--reset-interval 120 --checkpoint-interval 150", 1),
    "rde 2 threads": ("rde_dqn_atari", "--reset-interval 120 --batch-size 32 --total-timesteps 500", 2),
    "sac": ("rde_sac_dmc", "--reset-interval 200", 1),
    "sac one agent": ("rde_sac_dmc", "--num-agents 1 --reset-interval 100 --replay-ratio 0.29", 1),
    "sac 2 environments": ("rde_sac_dmc", "--num-envs 2 --reset-interval 200 --total-timesteps 2200", 1),
    "sac 4 environments": ("rde_sac_dmc", "--num-envs 4 --reset-interval 0 --total-timesteps 4200 --learning-starts 3600", 1),
    "sac resets often": ("rde_sac_dmc", "--num-agents 3 --reset-interval 90 --env-id walker-walk --eval-episodes 1", 1),
    "sac ratio 2": ("rde_sac_dmc", "--reset-interval 600 --replay-ratio 2 --num-hidden-layers 3 --beta 5", 1),
    "sac bf16": ("rde_sac_dmc", "--reset-interval 200 --bf16", 1),
    "sac checkpoints": ("rde_sac_dmc", "--reset-interval 200 --checkpoint-interval 250", 1),
    "sac 2 threads": ("rde_sac_dmc", "--reset-interval 200 --hidden-dim 256 --batch-size 256", 2),
    "sac video": ("rde_sac_dmc", "--reset-interval 0 --eval-interval 0 --eval-episodes 1 --capture-video", 1),
    "drq": ("rde_drq_atari", "--reset-interval 120", 1),
    "drq numbers 2 environments": ("rde_drq_atari", "--reset-interval 120 --num-atoms 1 --width 0.5 --anneal --num-envs 2", 1),
    "rnd": ("rnd_dqn_atari", "", 1),
    "rnd without bonus": ("rnd_dqn_atari", "--intrinsic-coef 0 --num-envs 2", 1),
    "mlp": ("rde_dqn", "--reset-interval 300", 1),
    "mlp minigrid": ("rde_dqn", "--env-id MiniGrid-LavaGapS5-v0 --reset-interval 200 --tau 0.01 --target-update-interval 0", 1),
    "mlp lunar lander": ("rde_dqn", "--env-id LunarLander-v3 --reset-interval 300 --optimizer rmsprop --num-envs 2", 1),
    "safety": ("rde_sac_safety", "--reset-interval 200", 1),
    "safety cheetah": ("rde_sac_safety", "--env-id SafetyHalfCheetahVelocity-v1 --reset-interval 200 --kappa 1", 1),
}  # fmt: skip


def run(folder: pathlib.Path, case: str, runs_dir: str) -> tuple[pathlib.Path | None, str]:
    """The run's folder, or None and what went wrong."""
    script, arguments, num_threads = CASES[case]
    arguments = BEFORE.get(script, ATARI) + arguments
    environment = {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, folder / f"{script}.py", *arguments.split(), "--runs-dir", runs_dir],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        words = [line.strip("│╭╮╰╯─ ") for line in result.stderr.splitlines()]  # tyro puts its messages in a frame
        return None, " / ".join([f"exit code {result.returncode}", *list(filter(None, words))[-3:]])
    (path,) = pathlib.Path(runs_dir).iterdir()
    return path, ""


def rows(path: pathlib.Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "wall_seconds"} for row in read_csv(path)]


def difference(old, new, name: str) -> str:
    """The first difference between two values: tensors, dicts and lists of them, or plain values."""
    if type(old) is not type(new):
        return f"{name}: {type(old).__name__} became {type(new).__name__}"
    if isinstance(old, torch.Tensor):
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"{name}: {old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}"
        unequal = old != new
        if not unequal.any():
            return ""
        return f"{name}: {int(unequal.sum())} of {old.numel()} numbers, the first {old[unequal][0]} became {new[unequal][0]}"
    if isinstance(old, (list, tuple)):
        if len(old) != len(new):
            return f"{name}: {len(old)} entries became {len(new)}"
        old, new = dict(enumerate(old, start=1)), dict(enumerate(new, start=1))
    if isinstance(old, dict):
        if missing := old.keys() - new.keys():  # a new version may hold more
            return f"{name}: missing {sorted(missing)}"
        return next(filter(None, (difference(old[key], new[key], f"{name}[{key!r}]") for key in old)), "")
    return "" if old == new else f"{name}: {old!r} became {new!r}"


def videos(path: pathlib.Path, with_content: bool) -> list[tuple[str, str]]:
    """By their step and phase; how the recorder numbers the episodes of a process does not matter."""
    files = [file for file in path.glob("videos/*.mp4") if file.stat().st_size]
    digest = lambda file: hashlib.sha256(file.read_bytes()).hexdigest() if with_content else ""
    return sorted((file.stem.split("-episode")[0], digest(file)) for file in files)


def compare(old_folder: pathlib.Path, new_folder: pathlib.Path, case: str) -> tuple[list[str], str]:
    """What differs, and how much was compared."""
    with tempfile.TemporaryDirectory() as old_runs, tempfile.TemporaryDirectory() as new_runs:
        (old, old_error), (new, new_error) = run(old_folder, case, old_runs), run(new_folder, case, new_runs)
        errors = {"the old version ended with": old_error, "the new version ended with": new_error}
        if old_error or new_error:
            return [f"{name} {error}" for name, error in errors.items() if error], ""
        files = {"episodes.csv": rows, "evaluations.csv": rows, "TensorBoard": lambda path: scalars(path.parent)}
        files["model.pt"] = lambda path: torch.load(path, weights_only=True)
        contents = {name: (read(old / name), read(new / name)) for name, read in files.items()}
        if "--capture-video" in CASES[case][1]:
            # Atari's had the frames of no-ops and FIREs, too, with which a game or life begins; what is evaluated has not.
            with_content = not CASES[case][0].endswith("_atari")
            contents["videos"] = videos(old, with_content), videos(new, with_content)
    differences = [difference(*both, name) for name, both in contents.items()]
    if contents.get("videos") == ([], []):
        differences.append("videos: there are none")
    num_points = sum(map(len, contents["TensorBoard"][0].values()))
    counts = f"{len(contents['episodes.csv'][0])} episodes, {len(contents['evaluations.csv'][0])} scores, {num_points} points"
    return list(filter(None, differences)), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_folder", type=pathlib.Path)
    parser.add_argument("new_folder", type=pathlib.Path)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    args = parser.parse_args()
    num_different = 0
    for case in args.case:
        started = time.monotonic()
        differences, counts = compare(args.old_folder.resolve(), args.new_folder.resolve(), case)
        num_different += bool(differences)
        seconds, verdict = time.monotonic() - started, "DIFFERENT" if differences else "equal"
        print(f"{case:30} {verdict:10} {seconds:5.0f} s  {counts}", *differences, sep="\n    ", flush=True)
    print(f"{len(args.case) - num_different} of {len(args.case)} cases are equal")
    sys.exit(num_different > 0)


if __name__ == "__main__":
    main()
