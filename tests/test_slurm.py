"""benchmark.sh as the array of a SLURM cluster: by the variables and signals of SLURM, and on a real one where there is one."""

import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import time

import pytest
from test_benchmark import BENCHMARK, ONE_GAME, PONG, SMALL, Study


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def test_array_task_is_the_line_of_the_dry_run(study):
    commands = study.dry_run(*SMALL)
    for index in (0, 5, 7):
        result = study.run(*SMALL, SLURM_ARRAY_TASK_ID=str(index), SLURM_JOB_ID="1")
        assert result.returncode == 0 and "PLOT" not in result.stdout and " left" not in result.stdout
        assert study.events("start")[-1]["options"] == commands[index][2:]
    assert study.run(*SMALL, SLURM_ARRAY_TASK_ID="5", SLURM_JOB_ID="1").returncode == 0 and len(study.events("start")) == 3
    beyond = study.run(*SMALL, SLURM_ARRAY_TASK_ID="8", SLURM_JOB_ID="1")
    assert (beyond.returncode, beyond.stdout) == (2, "") and "8 runs, and number 8 (from 0 on) is none" in beyond.stderr


def test_copy_in_a_spool_folder_finds_the_checkout(study, tmp_path):
    (tmp_path / "spool").mkdir()
    copy = shutil.copy(BENCHMARK, tmp_path / "spool" / "slurm_script")
    environment = study.environment | {"SLURM_SUBMIT_DIR": str(study.scripts)}
    command = ["bash", copy, "--dry-run", *ONE_GAME]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and shlex.split(result.stdout.splitlines()[0])[1] == f"{study.scripts}/dqn_atari.py"


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


SLURM_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={control_port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=500 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """SLURM_CONF of a cluster of one node, this machine: munged, slurmctld and slurmd, ended after the test."""
    programs = ("sbatch", "slurmctld", "slurmd", "munged", "runuser")
    missing = [program for program in programs if shutil.which(program, path=SBIN) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"it needs root, and apt-get install slurm-wlm munge (not there: {missing})")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "log"):
        (folder / name).mkdir()
    host, (control_port, node_port) = socket.gethostname().split(".")[0], free_ports(2)
    conf = folder / "slurm.conf"
    ports = {"control_port": control_port, "node_port": node_port}
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, cpus=os.cpu_count(), **ports))
    environment, daemons = {"SLURM_CONF": str(conf), "PATH": SBIN}, []

    def start(*command: str) -> None:
        log = open(folder / "log" / pathlib.Path(command[-1 if "--" in command else 0]).name, "w")
        daemons.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))

    def node_state() -> str:
        command = ["sinfo", "-h", "-o", "%T"]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout.strip()

    try:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:  # nobody answers
            os.makedirs("/run/munge", exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            start("runuser", "-u", "munge", "--", "munged", "--foreground")
        start("slurmctld", "-D", "-f", str(conf))
        start("slurmd", "-D", "-f", str(conf))
        deadline = time.time() + 60
        while node_state() != "idle":
            assert time.time() < deadline, "\n".join(path.read_text()[-2000:] for path in (folder / "log").iterdir())
            time.sleep(0.2)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def test_array_on_a_real_slurm(slurm, study):
    """Each run of an array happens once; a preempted one is queued again and goes on from its checkpoint."""
    environment = study.environment | slurm

    def call(*command: str) -> str:
        result = subprocess.run(command, env=environment, cwd=study.scripts, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def wait_until_empty() -> None:
        deadline = time.time() + 100
        while queue := call("squeue", "-h"):
            assert time.time() < deadline, queue
            time.sleep(0.3)

    options = ["--games", "Pong", "--methods", "dqn_atari,rde_dqn_atari", "--seeds", "2", "--runs-dir", str(study.runs)]
    options += ["--", "--wait-at", "3", "--save-seconds", "0.5"]
    tasks_of_runs = [(seed, script) for seed in "12" for script in ("dqn_atari", "rde_dqn_atari")]
    assert call("bash", "benchmark.sh", "--count", *options) == "4"
    submit = ["sbatch", "--parsable", "--array=0-3", "--cpus-per-task=1", "benchmark.sh", *options]
    job = call(*submit)
    first = study.wait_for("waiting")[0]
    index = tasks_of_runs.index((first["seed"], first["exp_name"]))
    tasks = dict(line.split() for line in call("squeue", "-h", "-r", "-t", "R", "-o", "%K %A").splitlines())
    call("scontrol", "requeue", tasks[str(index)])  # what a preemption does
    study.wait_for("signal")
    study.go()
    deadline = time.time() + 60
    while f"{job}_{index}" not in call("squeue", "-h", "-r", "-t", "PD", "-o", "%i"):
        assert time.time() < deadline, call("squeue")
        time.sleep(0.3)
    call("scontrol", "update", f"jobid={job}_{index}", "StartTime=now")  # else SLURM waits two minutes with it
    wait_until_empty()

    assert study.finished() == sorted((PONG, script, "1", seed) for seed, script in tasks_of_runs)
    assert len(study.events("end")) == 4
    starts = [(event["seed"], event["exp_name"], event["step"]) for event in study.events("start")]
    assert len(starts) == 5 and (first["seed"], first["exp_name"], 3) in starts  # the preempted one went on from its checkpoint

    call(*submit)
    wait_until_empty()
    assert len(study.events("start")) == 5  # all finished, nothing was run again
