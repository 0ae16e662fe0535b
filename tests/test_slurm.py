"""benchmark.sh as the array of a SLURM cluster: by the variables and signals of SLURM, and on a real one where there is one."""

import os
import shutil
import signal
import socket
import subprocess

import pytest
from test_benchmark import BENCHMARK, ONE_GAME, PONG, SMALL, Study, commands, wait_until


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def test_array_task_is_the_line_of_the_dry_run(study):
    listed = commands(study.run("--dry-run", *SMALL))
    for index in (0, 5, 7):
        result = study.run(*SMALL, SLURM_ARRAY_TASK_ID=str(index), SLURM_JOB_ID="1")
        assert result.returncode == 0 and "PLOT" not in result.stdout and " left" not in result.stdout
        assert study.events("start")[-1]["options"] == listed[index][2:]
    assert study.run(*SMALL, SLURM_ARRAY_TASK_ID="5", SLURM_JOB_ID="1").returncode == 0 and len(study.events("start")) == 3
    beyond = study.run(*SMALL, SLURM_ARRAY_TASK_ID="8", SLURM_JOB_ID="1")
    assert (beyond.returncode, beyond.stdout) == (2, "") and "8 runs, and number 8 (from 0 on) is none" in beyond.stderr


def test_copy_in_a_spool_folder_finds_the_checkout(study, tmp_path):
    (tmp_path / "spool").mkdir()
    copy = shutil.copy(BENCHMARK, tmp_path / "spool" / "slurm_script")
    listed = commands(study.call(["bash", copy, "--dry-run", *ONE_GAME], SLURM_SUBMIT_DIR=str(study.scripts)))
    assert listed[0][1] == f"{study.scripts}/dqn_atari.py"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_near_the_time_limit_the_task_requeues_itself(study, tmp_path, number):
    """At SIGTERM, which scancel sends to every process of the job, it saves as well, and is not queued again."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/requeued'\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    environment = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "77", "PATH": f"{tmp_path}/bin:{study.environment['PATH']}"}
    process = study.start(*ONE_GAME, "--", "--wait-at", "3", "--save-seconds", "0.5", **environment)
    run = study.wait_for("waiting")[0]["pid"]
    process.send_signal(number)
    if number == signal.SIGTERM:
        os.kill(run, number)
    process.communicate(timeout=100)
    assert process.returncode == 128 + number and len(study.events("saved")) == 2
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 77\n" if number == signal.SIGUSR1 else "")


SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
SLURM_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={control_port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=500 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """The variables that lead to a cluster of one node, this machine: munged, slurmctld and slurmd, ended after the test."""
    missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged", "runuser") if shutil.which(name, path=SBIN) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"it needs root, and apt-get install slurm-wlm munge (not there: {missing})")
    folder, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"control_port": one.getsockname()[1], "node_port": other.getsockname()[1]}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=folder, cpus=os.cpu_count(), **ports))
    variables, daemons = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}, []
    environment = os.environ | variables

    def start(*command: str) -> None:
        with open(folder / "log", "a") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def is_idle() -> bool:
        return subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True).stdout == "idle\n"

    try:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:  # nobody answers
            os.makedirs("/run/munge", exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            start("runuser", "-u", "munge", "--", "munged", "--foreground")
        start("slurmctld", "-D")
        start("slurmd", "-D")
        wait_until(is_idle, lambda: (folder / "log").read_text()[-5000:])
        yield variables
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(100)


def test_array_on_a_real_slurm(slurm, study):
    """Each run of an array happens once; a preempted one is queued again and goes on from its checkpoint."""

    def call(*command: str) -> str:
        result = subprocess.run(command, env=study.environment | slurm, cwd=study.scripts, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    options = ["--games", "Pong", "--methods", "dqn_atari,rde_dqn_atari", "--seeds", "2", "--runs-dir", str(study.runs)]
    options += ["--", "--wait-at", "3", "--save-seconds", "0.5"]
    tasks_of_runs = [(seed, script) for seed in "12" for script in ("dqn_atari", "rde_dqn_atari")]
    assert call("bash", "benchmark.sh", "--count", *options) == "4"
    submit = ["sbatch", "--parsable", "--array=0-3", "--cpus-per-task=1", "benchmark.sh", *options]
    job = call(*submit)
    first = study.wait_for("waiting")[0]
    first = first["seed"], first["exp_name"]
    task = f"{job}_{tasks_of_runs.index(first)}"
    call("scontrol", "requeue", task)  # what a preemption does
    study.wait_for("signal")
    study.go()
    wait_until(lambda: task in call("squeue", "-h", "-r", "-t", "PD", "-o", "%i"), lambda: call("squeue"))
    call("scontrol", "update", f"jobid={task}", "StartTime=now")  # else SLURM waits two minutes with it
    wait_until(lambda: not call("squeue", "-h"), lambda: call("squeue"))
    assert study.finished() == sorted((PONG, script, "1", seed) for seed, script in tasks_of_runs)
    starts = [(event["seed"], event["exp_name"], event["step"]) for event in study.events("start")]
    assert len(study.events("end")) == 4 and len(starts) == 5 and (*first, 3) in starts  # the preempted one went on

    call(*submit)
    wait_until(lambda: not call("squeue", "-h"), lambda: call("squeue"))
    assert len(study.events("start")) == 5  # all finished, nothing was run again
