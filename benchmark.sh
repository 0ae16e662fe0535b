#!/usr/bin/env bash
#SBATCH --job-name=rde-benchmark
#SBATCH --cpus-per-task=2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#
# A study of reset deep ensembles: games x methods x replay ratios x seeds. See `bash benchmark.sh --help`.
set -euo pipefail
{ # bash reads all of this before it runs any of it: so the file may change while a study runs

help() {
    cat <<'HELP'
usage: bash benchmark.sh [options] [-- options for every training script]

Runs every combination of games, methods, replay ratios and seeds, and ends in the table and the pictures of
plot_benchmark.py, in the subfolder results of --runs-dir. It may be stopped at any moment (Ctrl-C) and called again:
finished runs are skipped, interrupted ones go on from their checkpoint. A failed run does not stop the others; it is listed
at the end, and the exit code is 1.

  --games LIST            Freeway,MsPacman (the default; walker-run,hopper-hop for SAC), or atari100k for all 26; full ids
                          such as ALE/... as they are
  --methods LIST          of dqn,sr_dqn,rde_dqn (the default), of sac,sr_sac,rde_sac, or scripts of your own: my_idea.py
  --replay-ratios LIST    1,4 (the default; 0.25,1 with --setting official, which are the paper's 1 and 4)
  --seeds N | LIST        5 = the seeds 1 to 5 (the default); or a list of seeds and ranges: 1,3,6-10; seed 3 alone: 3-3
  --total-timesteps N     environment steps of a run (default: that of the script, 100,000 on Atari)
  --setting NAME          default, or official: that of the paper's code, --num-envs 4 --reset-interval 20000
                          --learning-starts 2000 --end-e 0.1
  --reset-interval N      gradient steps of an agent between two of its resets, for the methods that reset (default: that of
                          the setting, and half of it in Freeway, as in the paper)
  --reset-depth DEPTH     last1, last2 or full, for the methods that reset
  --jobs N                runs at the same time on this machine (default 1); from 2 on, OMP_NUM_THREADS is set to 1
  --runs-dir FOLDER       where the runs and their logs are (default runs/benchmark, with --smoke runs/smoke)
  --smoke                 a study that takes two minutes: one game, one replay ratio, 2 seeds, 300 steps
  --no-plot               do not call plot_benchmark.py at the end
  --dry-run               print every command, one a line, those of finished runs after a "#", and run nothing
  --count                 print the number of runs, and run nothing

Lists are separated by commas or spaces. --dry-run can be piped into GNU parallel. On a SLURM cluster every task of an
array is one run of the same list, and is resumed when it was preempted or came to its time limit:

    sbatch --array=0-$(( $(bash benchmark.sh --count) - 1 )) benchmark.sh

PYTHON names the Python program (default: python), SCRIPTS_DIR the folder of the training scripts (default: that of this
file, or where sbatch was called).
HELP
}

fail() {
    echo "error: $1" >&2
    exit 2
}

# ------------------------------------------------------------------------------------------------------------- the study

ATARI_100K="Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand CrazyClimber DemonAttack Freeway
    Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster MsPacman Pong PrivateEye Qbert RoadRunner Seaquest UpNDown"

games="" methods="dqn,sr_dqn,rde_dqn" replay_ratios="" seeds="" total_timesteps="" setting=default
reset_interval="" reset_depth="" jobs=1 runs_dir="" smoke=no plot=yes action=run passed_on=()

while (($#)); do
    option=$1
    shift
    case $option in
        --) passed_on=("$@"); break ;;
        -h | --help) help; exit 0 ;;
        --dry-run) action=dry-run; continue ;;
        --count) action=count; continue ;;
        --smoke) smoke=yes; continue ;;
        --no-plot) plot=no; continue ;;
        --*=*) value=${option#*=} option=${option%%=*} ;;
        --*) (($#)) || fail "$option needs a value, or is not an option; see bash benchmark.sh --help"
            value=$1
            shift ;;
        *) fail "$option is not an option; see bash benchmark.sh --help" ;;
    esac
    case $option in
        --games) games=$value ;;
        --methods) methods=$value ;;
        --replay-ratios) replay_ratios=$value ;;
        --seeds) seeds=$value ;;
        --total-timesteps) total_timesteps=$value ;;
        --setting) setting=$value ;;
        --reset-interval) reset_interval=$value ;;
        --reset-depth) reset_depth=$value ;;
        --jobs) jobs=$value ;;
        --runs-dir) runs_dir=$value ;;
        *) fail "$option is not an option; see bash benchmark.sh --help" ;;
    esac
    [[ -n $value ]] || fail "$option needs a value"
done

[[ $setting == default || $setting == official ]] || fail "--setting is $setting, but must be default or official"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "--jobs is $jobs, but must be a number from 1 on"
for number in "$total_timesteps" "$reset_interval"; do
    [[ $number =~ ^[0-9]*$ ]] || fail "$number is not a number of steps"
done

suite=atari
[[ $methods =~ (^|[ ,])(sac|sr_sac|rde_sac)([ ,]|$) ]] && suite=dmc
if [[ $suite == dmc ]]; then
    [[ $methods =~ dqn ]] && fail "--methods $methods mixes methods for Atari and for the DeepMind Control Suite"
    [[ $setting == default && $smoke == no ]] || fail "--setting official and --smoke are for Atari"
    [[ $games != atari100k ]] || fail "--games atari100k is for Atari; SAC's tasks have names such as walker-run"
fi

setting_options=()
if [[ $setting == official ]]; then
    setting_options=(--num-envs 4 --learning-starts 2000 --end-e 0.1)
    : "${replay_ratios:=0.25,1}"
fi
if [[ $smoke == yes ]]; then
    setting_options+=(--learning-starts 100 --buffer-size 5000 --eval-interval 150 --eval-episodes 1)
    : "${games:=MsPacman}" "${replay_ratios:=0.5}" "${seeds:=2}" "${total_timesteps:=300}" "${reset_interval:=80}"
    : "${runs_dir:=runs/smoke}"
fi
default_games=Freeway,MsPacman
[[ $suite == dmc ]] && default_games=walker-run,hopper-hop
: "${games:=$default_games}"
: "${replay_ratios:=1,4}" "${seeds:=5}" "${runs_dir:=runs/benchmark}"
[[ $games == atari100k ]] && games=$ATARI_100K

read -ra games <<<"$(tr ',\n' '  ' <<<"$games")"
for game in "${games[@]}"; do
    if [[ $suite == dmc ]]; then
        [[ $game == *-* && $game != *NoFrameskip* ]] || fail "--games: $game is no task of SAC, such as walker-run"
    elif [[ $game =~ ^[a-z_]+-[a-z_]+$ && " ${methods//,/ } " =~ \ (dqn|sr_dqn|rde_dqn)\  ]]; then
        fail "--games: $game is a task of the DeepMind Control Suite; ${BASH_REMATCH[1]} plays Atari"
    fi
done
read -ra methods <<<"${methods//,/ }"
read -ra replay_ratios <<<"${replay_ratios//,/ }"
for ratio in "${replay_ratios[@]}"; do
    [[ $ratio =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && $ratio =~ [1-9] ]] || fail "--replay-ratios: $ratio is not a positive number"
done
[[ $seeds =~ ^[0-9]+$ ]] && seeds=1-$seeds
read -ra seed_ranges <<<"${seeds//,/ }"
seeds=()
for range in "${seed_ranges[@]}"; do
    [[ $range =~ ^([0-9]+)(-([0-9]+))?$ ]] || fail "--seeds: $range is neither a seed nor a range such as 1-5"
    first=$((10#${BASH_REMATCH[1]})) last=$((10#${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}))
    ((first <= last)) || fail "--seeds: $range holds no seed"
    for ((seed = first; seed <= last; seed++)); do seeds+=("$seed"); done
done
((${#games[@]} && ${#methods[@]} && ${#replay_ratios[@]} && ${#seeds[@]})) || fail "a list of --games, --methods, ... is empty"

# SLURM runs a copy of this file that lies elsewhere, and tells where sbatch was called.
here=$(dirname -- "${BASH_SOURCE[0]}")
if [[ -z ${SCRIPTS_DIR:-} ]]; then
    SCRIPTS_DIR=$here
    [[ ! -e $here/dqn_atari.py && -n ${SLURM_SUBMIT_DIR:-} ]] && SCRIPTS_DIR=$SLURM_SUBMIT_DIR
fi
in_scripts_dir() { [[ $SCRIPTS_DIR == . ]] && echo "$1" || echo "$SCRIPTS_DIR/$1"; }
PYTHON=${PYTHON:-python}
for program in "$PYTHON" flock setsid; do
    command -v "$program" >/dev/null || fail "the program $program is not there (PYTHON=... names another Python)"
done

# Sets `command`, the training script and its arguments for one run.
compose_command() {
    local game=$1 method=$2 ratio=$3 seed=$4 script method_options=() interval
    case $method in
        dqn | sr_dqn | rde_dqn) script=$(in_scripts_dir "${method}_atari.py") ;;
        sac) script=$(in_scripts_dir rde_sac_dmc.py) method_options=(--num-agents 1 --reset-interval 0) ;;
        sr_sac) script=$(in_scripts_dir rde_sac_dmc.py) method_options=(--num-agents 1) ;;
        rde_sac) script=$(in_scripts_dir rde_sac_dmc.py) ;;
        *.py) [[ -e $method ]] && script=$method || script=$(in_scripts_dir "$method") ;;
        *) fail "--methods: $method is no method (dqn, sr_dqn, rde_dqn, sac, sr_sac, rde_sac) and no script (my_idea.py)" ;;
    esac
    [[ -f $script ]] || fail "the script $script is not there (SCRIPTS_DIR=... names another folder)"
    if [[ $method != sac ]] && grep -q '^    reset_interval: int' "$script"; then
        interval=$reset_interval
        if [[ -z $interval && $suite == atari ]]; then # half as long in Freeway, as in the paper
            [[ $setting == official ]] && interval=20000
            [[ $game == Freeway* ]] && interval=$((${interval:-80000} / 2))
        fi
        [[ -n $interval ]] && method_options+=(--reset-interval "$interval")
        [[ -n $reset_depth ]] && method_options+=(--reset-depth "$reset_depth")
    fi
    [[ $suite == atari && ! $game =~ [-/] ]] && game=${game}NoFrameskip-v4
    command=("$script" --env-id "$game" --seed "$seed" --replay-ratio "$ratio")
    [[ -n $total_timesteps ]] && command+=(--total-timesteps "$total_timesteps")
    command+=("${setting_options[@]}" "${method_options[@]}" "${passed_on[@]}" --runs-dir "$runs_dir" --resume auto)
}

# Replay ratio by replay ratio, and within one seed by seed: so a study that is stopped early is a smaller study. Each
# run's arguments stand in all_arguments, from first_argument[index] on.
run_names=() all_arguments=() first_argument=(0)
for ratio in "${replay_ratios[@]}"; do
    for seed in "${seeds[@]}"; do
        for game in "${games[@]}"; do
            for method in "${methods[@]}"; do
                compose_command "$game" "$method" "$ratio" "$seed"
                all_arguments+=("${command[@]}")
                first_argument+=("${#all_arguments[@]}")
                run_names+=("$game $method, replay ratio $ratio, seed $seed")
            done
        done
    done
done
num_runs=${#run_names[@]}

# Sets `command` for a run of the list.
load_command() { command=("${all_arguments[@]:${first_argument[$1]}:${first_argument[$1 + 1]}-${first_argument[$1]}}"); }

if [[ $action == count ]]; then
    echo "$num_runs"
    exit 0
fi

# ------------------------------------------------------------------------------------------------- what is done already

# Two runs are the same if all their arguments are. Those that a command leaves to its script are read from the script's Args.
# Prints for every command its state (finished, interrupted, new, or doubled in the list), its seconds, and how these are known.
RUN_STATES=$(cat <<'PYTHON_PROGRAM'
import ast, csv, glob, json, os, statistics, sys

runs_dir, seconds_per_update = sys.argv[1], float(sys.argv[2])
fields = sys.stdin.buffer.read().decode(errors="surrogateescape").split("\0")[:-1]
commands = []
while fields:
    count = int(fields.pop(0))
    commands.append(fields[:count])
    del fields[:count]


def read_defaults(script):
    for node in ast.parse(open(script, encoding="utf-8").read()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields = {field.target.id: field.value for field in node.body if isinstance(field, ast.AnnAssign)}
            literals = {name: value for name, value in fields.items() if isinstance(value, (ast.Constant, ast.UnaryOp))}
            literals = {name: ast.literal_eval(value) for name, value in literals.items()}
            return literals | {"exp_name": os.path.basename(script).removesuffix(".py")}
    return {}


def read_arguments(command, defaults):
    arguments, options = dict(defaults), command[1:]
    while options:
        name, equals, value = options.pop(0).removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if isinstance(defaults.get(name.removeprefix("no_")), bool) and not equals:
            name, value = name.removeprefix("no_"), not name.startswith("no_")
        elif not equals and options:
            value = options.pop(0)
        arguments[name] = value
    return {name: comparable(value) for name, value in arguments.items() if name not in ("resume", "runs_dir")}


def comparable(value):
    try:
        return value if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return {"True": True, "False": False, "None": None}.get(value, value)


def is_finished(folder):
    if not os.path.exists(os.path.join(folder, "model.pt")):
        return False
    with open(os.path.join(folder, "evaluations.csv"), newline="") as file:
        return any("final" in row[1:2] for row in csv.reader(file))


def measured_seconds_per_step(folder):
    with open(os.path.join(folder, "episodes.csv"), newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["wall_seconds"]) / float(last["global_step"])


def kind(arguments):  # runs of one kind take equally long
    names = ("exp_name", "replay_ratio", "num_agents", "num_envs", "eval_interval", "eval_episodes", "bf16", "cuda")
    return tuple(str(arguments.get(name)) for name in names)


folders, measured = [], {}
for path in sorted(glob.glob(os.path.join(glob.escape(runs_dir), "*", "args.json"))):
    folder = os.path.dirname(path)
    try:
        with open(path) as file:
            arguments = {name: comparable(value) for name, value in json.load(file)["args"].items()}
        finished = is_finished(folder)
    except (OSError, ValueError, KeyError, AttributeError):
        continue  # what cannot be read is no finished run; plot_benchmark.py names it
    folders.append((arguments, "finished" if finished else "interrupted"))
    if finished:
        try:
            seconds_per_step = measured_seconds_per_step(folder)
        except (OSError, ValueError, TypeError, KeyError, IndexError, ZeroDivisionError):
            continue  # too short for a whole game, or not readable
        measured.setdefault(kind(arguments), []).append(seconds_per_step)

defaults, seen = {}, []
for command in commands:
    script = command[0]
    if script not in defaults:
        defaults[script] = read_defaults(script)
    arguments = read_arguments(command, defaults[script])
    states = {state for saved, state in folders if all(saved.get(name, value) == value for name, value in arguments.items())}
    state = "finished" if "finished" in states else "interrupted" if states else "new"
    if (script, arguments) in seen:
        state = "doubled"
    seen.append((script, arguments))

    steps, basis = arguments.get("total_timesteps", 100_000.0), "unknown"
    if kind(arguments) in measured:
        seconds, basis = statistics.median(measured[kind(arguments)]) * steps, "measured"
    elif "dqn" in os.path.basename(script):
        updates = max(0, steps - arguments.get("learning_starts", 0)) * arguments["replay_ratio"]  # of all agents together:
        updates *= arguments.get("num_agents", 1)
        evaluations = steps / arguments["eval_interval"] if arguments.get("eval_interval") else 1
        if arguments.get("reset_interval"):
            evaluations += 2 * updates / arguments["reset_interval"]
        seconds = 5 + updates * seconds_per_update + steps * 0.003 + evaluations * arguments.get("eval_episodes", 10)
        basis = "estimated"
    print(state, int(seconds) if basis != "unknown" else 0, basis)
PYTHON_PROGRAM
)

# Reads the states of the given runs, a line for each.
run_states() {
    local index
    for index in "$@"; do
        load_command "$index"
        printf '%s\0' "${#command[@]}" "${command[@]}"
    done | "$PYTHON" -I -c "$RUN_STATES" "$runs_dir" "$seconds_per_update"
}

# Two processes of one thread each do more in sum on two cores than one after the other with two threads.
((jobs > 1)) && export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
seconds_per_update=0.020 threads="two threads"
[[ ${OMP_NUM_THREADS:-} == 1 ]] && seconds_per_update=0.033 threads="one thread"

all_states=$(run_states $(seq 0 $((num_runs - 1)))) || fail "the finished runs in $runs_dir cannot be read"
mapfile -t run_state <<<"$all_states"
for ((index = 0; index < num_runs; index++)); do
    [[ ${run_state[index]} != doubled* ]] || fail "the list names this run twice: ${run_names[index]}"
done

if [[ $action == dry-run ]]; then
    for ((index = 0; index < num_runs; index++)); do
        load_command "$index"
        [[ ${run_state[index]} == finished* ]] && printf '# finished: '
        printf '%q' "$PYTHON"
        printf ' %q' "${command[@]}"
        printf '\n'
    done
    exit 0
fi

# ----------------------------------------------------------------------------------------------------------- the runs

declare -A index_of_process=() started_at=() log_of_run=()
failures=() num_elsewhere=0 stop_signal=0 forward_at=0 saved_for_requeue=no
LOCKED=75

# The log of a run, which is its lock as well: readable, and different for different commands.
log_path() {
    load_command "$1"
    local name="${run_names[$1]}" sum
    name=${name//, /__} name=${name//[^A-Za-z0-9._-]/_}
    # without the script's folder before them, and --runs-dir and --resume behind them
    sum=$(printf '%s\0' "$(basename -- "${command[0]}")" "${command[@]:1:${#command[@]}-5}" | cksum)
    echo "$runs_dir/logs/${name}__${sum%% *}.log"
}

# Starts a run in the background. The process is the training script itself, which holds the lock as long as it lives, even if
# this one is killed; in a session of its own, so that Ctrl-C in the terminal reaches it once, through stop_runs.
start_run() {
    local index=$1 log
    log=$(log_path "$index")
    log_of_run[$index]=$log started_at[$index]=$SECONDS
    load_command "$index"
    (
        exec 9>>"$log"
        flock "${lock_options[@]}" 9 || exit "$LOCKED"
        [[ $(run_states "$index") == finished* ]] && exit 0
        load_command "$index"
        printf '$ %q' "$PYTHON" >&9
        printf ' %q' "${command[@]}" >&9
        printf '\n' >&9
        exec setsid "$PYTHON" "${command[@]}" </dev/null >&9 2>&1
    ) &
    index_of_process[$!]=$index
    report "$index" "started, log: $log"
    ((stop_signal == 0)) || kill -TERM "$!" 2>/dev/null || true # the signal came while it was being started
}

report() { echo "[$(($1 + 1))/$num_runs] ${run_names[$1]}: $2"; }

# Waits until runs have ended, and notes how.
reap_runs() {
    local process index code last_line
    while :; do
        for process in "${!index_of_process[@]}"; do
            kill -0 "$process" 2>/dev/null && continue
            index=${index_of_process[$process]} code=0
            wait "$process" || code=$?
            unset "index_of_process[$process]"
            if ((stop_signal)); then
                report "$index" "stopped"
                ((code == 143)) && saved_for_requeue=yes
            elif ((code == LOCKED)); then
                report "$index" "another process is doing it, left to that"
                num_elsewhere=$((num_elsewhere + 1))
            elif ((code == 0)) && [[ $(run_states "$index") == finished* ]]; then
                report "$index" "finished after $((SECONDS - started_at[$index])) s"
            else
                ((code)) && code="exit code $code" || code="exit code 0, but no finished run"
                last_line=$(tail -n 1 -- "${log_of_run[$index]}" 2>/dev/null | tr '\r' '\n' | tail -n 1 | cut -c 1-200) ||
                    last_line="its log cannot be read"
                report "$index" "FAILED ($code): $last_line"
                failures+=("${run_names[$index]} ($code), log: ${log_of_run[$index]}")
            fi
            return 0
        done
        if ((forward_at && SECONDS >= forward_at)); then
            forward_at=0
            for process in "${!index_of_process[@]}"; do
                if catches_sigterm "$process"; then kill -TERM "$process" 2>/dev/null || true; fi
            done
        fi
        sleep 0.2 &
        wait "$!" || true # a signal ends the wait, and is handled at once
    done
}

# Whether the process has a handler for SIGTERM. The training scripts take theirs away when the first signal comes.
catches_sigterm() {
    local caught
    caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) || return 1
    ((16#${caught:-0} & 1 << 14))
}

# Asks the running scripts to save a checkpoint and end; the second time ends them at once. SLURM's SIGTERM (preempted,
# cancelled) goes to every process of the job. Then only a script that has not had it after a while is sent it, because a second
# one would end it in the middle of saving.
stop_runs() {
    local process
    if [[ $1 == 15 && -n ${SLURM_JOB_ID:-} ]]; then
        stop_signal=$1 forward_at=$((SECONDS + 5))
        return 0
    fi
    if ((stop_signal)); then
        for process in "${!index_of_process[@]}"; do kill -KILL "$process" 2>/dev/null || true; done
        return 0 # (a bare return in a trap gives the status of what was interrupted)
    fi
    stop_signal=$1
    echo "stopping ${#index_of_process[@]} run(s), which save a checkpoint first; again to stop them without" >&2
    for process in "${!index_of_process[@]}"; do kill -TERM "$process" 2>/dev/null || true; done
}

mkdir -p -- "$runs_dir/logs" || fail "--runs-dir $runs_dir cannot be made"
[[ -w $runs_dir && -w $runs_dir/logs ]] || fail "--runs-dir $runs_dir cannot be written"

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    ((SLURM_ARRAY_TASK_ID < num_runs)) || fail "array task $SLURM_ARRAY_TASK_ID: the list has the runs 0 to $((num_runs - 1))"
    indices=("$SLURM_ARRAY_TASK_ID") lock_options=() plot=no # waits for a process that ends elsewhere
else
    indices=($(seq 0 $((num_runs - 1)))) lock_options=(--nonblock)
fi

to_do=() seconds_left=0 num_resumed=0 num_unknown=0 num_measured=0
for index in "${indices[@]}"; do
    read -r state seconds basis <<<"${run_state[index]}"
    [[ $state == finished ]] && continue
    to_do+=("$index") seconds_left=$((seconds_left + seconds))
    [[ $state == interrupted ]] && num_resumed=$((num_resumed + 1))
    [[ $basis == unknown ]] && num_unknown=$((num_unknown + 1))
    [[ $basis == measured ]] && num_measured=$((num_measured + 1))
done

echo "$num_runs runs in $runs_dir: ${#games[@]} game(s) x ${#methods[@]} method(s) x ${#replay_ratios[@]} replay ratio(s)" \
    "x ${#seeds[@]} seed(s)"
echo "games: ${games[*]}; methods: ${methods[*]}; replay ratios: ${replay_ratios[*]}; seeds: ${seeds[*]}"
echo "to do here: ${#to_do[@]} of ${#indices[@]}, $jobs at a time; interrupted before, to be continued: $num_resumed"
if ((num_unknown < ${#to_do[@]})); then
    minutes=$((seconds_left / jobs / 60 + 1))
    ((minutes < 120)) && duration="$minutes min" || duration="$(((minutes + 30) / 60)) hours"
    echo "time: about $duration. Known from finished runs like them: $num_measured runs; for the others from" \
        "$seconds_per_update s for an agent's gradient step ($threads of a two-core machine, no GPU)," \
        "0.003 s for a step of an environment and 1 s for a game of an evaluation"
fi
if ((num_unknown)); then
    echo "time: not known of $num_unknown runs, and not counted: no run like them is finished yet"
fi

trap 'stop_runs 2' INT
trap 'stop_runs 15' TERM
trap 'stop_runs 1' HUP
trap 'stop_runs 10' USR1 # SLURM: the time limit is near
for index in "${to_do[@]}"; do
    while ((${#index_of_process[@]} >= jobs && !stop_signal)); do reap_runs; done
    ((stop_signal)) && break
    start_run "$index"
done
while ((${#index_of_process[@]})); do reap_runs; done

if ((stop_signal)); then
    if ((stop_signal == 10)) && [[ $saved_for_requeue == yes && -n ${SLURM_JOB_ID:-} ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    echo "stopped; the same command goes on from here" >&2
    exit $((128 + stop_signal))
fi
((num_elsewhere)) && echo "$num_elsewhere run(s) are left to another process that is doing them"
if ((${#failures[@]})); then
    echo "${#failures[@]} of ${#to_do[@]} runs FAILED:" >&2
    printf '  %s\n' "${failures[@]}" >&2
fi
plot_script=$(in_scripts_dir plot_benchmark.py)
if [[ $plot == yes && -f $plot_script ]]; then
    "$PYTHON" "$plot_script" --runs-dir "$runs_dir" || failures+=("plot_benchmark.py")
fi
((${#failures[@]} == 0)) || exit 1
exit 0
}
