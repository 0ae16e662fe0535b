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
from test_benchmark import BENCHMARK, ONE_GAME, PONG, SMALL, Study, dry_run


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def test_array_task_is_the_line_of_the_dry_run(study):
    commands = dry_run(study, *SMALL)
    for index in (0, 5, 7):
        result = study.run(*SMALL, SLURM_ARRAY_TASK_ID=str(index), SLURM_JOB_ID="1")
        assert result.returncode == 0 and "PLOT" not in result.stdout
        assert study.events("start")[-1]["options"] == commands[index][2:]
    assert len(study.events("start")) == 3
    assert study.run(*SMALL, SLURM_ARRAY_TASK_ID="5", SLURM_JOB_ID="1").returncode == 0 and len(study.events("start")) == 3
    beyond = study.run(*SMALL, SLURM_ARRAY_TASK_ID="8", SLURM_JOB_ID="1")
    assert beyond.returncode == 2 and "the runs 0 to 7" in beyond.stderr


def test_copy_in_a_spool_folder_finds_the_checkout(study, tmp_path):
    (tmp_path / "spool").mkdir()
    copy = shutil.copy(BENCHMARK, tmp_path / "spool" / "slurm_script")
    del study.environment["SCRIPTS_DIR"]
    environment = study.environment | {"SLURM_SUBMIT_DIR": str(study.scripts)}
    command = ["bash", copy, "--dry-run", *ONE_GAME]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and shlex.split(result.stdout.splitlines()[0])[1] == f"{study.scripts}/dqn_atari.py"


WAITING = ("--games", "Pong", "--methods", "dqn", "--replay-ratios", "1", "--seeds", "1", "--", "--wait-at", "3")


def test_near_the_time_limit_the_task_requeues_itself(study, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/requeued'\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    path = f"{tmp_path}/bin:{study.environment['PATH']}"
    process = study.start(*WAITING, SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="77", PATH=path)
    study.wait_for("waiting")
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGUSR1 and (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert len(study.events("signal")) == 1 and len(study.events("saved")) == 2


def test_sigterm_of_slurm_reaches_the_run_once(study):
    """SLURM sends it to every process of the job; another one from benchmark.sh would end the run while it saves."""
    process = study.start(*WAITING, "--save-seconds", "1", SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="77")
    pid = study.wait_for("waiting")[0]["pid"]
    os.kill(process.pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 143 and len(study.events("signal")) == 1 and len(study.events("saved")) == 2


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
    missing = [
        program
        for program in ("sbatch", "slurmctld", "slurmd", "munged", "runuser")
        if shutil.which(program, path=SBIN) is None
    ]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"the array on a real SLURM is NOT tested: it needs root and apt-get install slurm-wlm munge (not there: {missing})"
        )
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "log"):
        (folder / name).mkdir()
    host, (control_port, node_port) = socket.gethostname().split(".")[0], free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(host=host, folder=folder, control_port=control_port, node_port=node_port, cpus=os.cpu_count())
    )
    environment, daemons = {"SLURM_CONF": str(conf), "PATH": SBIN}, []

    def start(*command: str) -> None:
        log = open(folder / "log" / pathlib.Path(command[-1 if "--" in command else 0]).name, "w")
        daemons.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))

    def node_state() -> str:
        return subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=os.environ | environment, capture_output=True, text=True
        ).stdout.strip()

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
    del environment["SCRIPTS_DIR"]  # found through SLURM_SUBMIT_DIR
    shutil.copy(BENCHMARK, study.scripts)

    def call(*command: str) -> str:
        result = subprocess.run(command, env=environment, cwd=study.scripts, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def wait_until_empty() -> None:
        deadline = time.time() + 100
        while queue := call("squeue", "-h"):
            assert time.time() < deadline, queue
            time.sleep(0.3)

    options = ["--games", "Pong", "--methods", "dqn,rde_dqn", "--replay-ratios", "1", "--seeds", "2"]
    options += ["--runs-dir", str(study.runs), "--", "--wait-at", "3", "--save-seconds", "0.5"]
    count = int(call("bash", "benchmark.sh", "--count", *options))
    assert count == 4
    submit = ["sbatch", "--parsable", f"--array=0-{count - 1}", "--cpus-per-task=1", "benchmark.sh", *options]
    job = call(*submit)
    first = study.wait_for("waiting")[0]
    index = [(1, "dqn_atari"), (1, "rde_dqn_atari"), (2, "dqn_atari"), (2, "rde_dqn_atari")].index(
        (first["seed"], first["exp_name"])
    )
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

    runs = sorted((PONG, script, 1.0, seed) for seed in (1, 2) for script in ("dqn_atari", "rde_dqn_atari"))
    assert study.finished() == runs and len(study.events("end")) == 4 == len(list(study.runs.glob("*/args.json")))
    starts = [(event["seed"], event["exp_name"], event["step"]) for event in study.events("start")]
    assert len(starts) == 5 and (first["seed"], first["exp_name"], 3) in starts  # the preempted one went on from its checkpoint
    assert len(study.events("signal")) == 1

    call(*submit)
    wait_until_empty()
    assert len(study.events("start")) == 5  # all finished, nothing was run again
