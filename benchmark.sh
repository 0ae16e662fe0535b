#!/usr/bin/env bash
#SBATCH --job-name=rde-benchmark --cpus-per-task=2 --requeue --open-mode=append --signal=B:USR1@180
# shellcheck disable=SC2206 # lists are split at their spaces on purpose; with set -f a * in them stands for no file names
set -euf -o pipefail
{ # bash reads all of this before it runs any of it, so that the file may change while a study runs

# A method is a script and the options that make it this method, under [suite:method].
declare -A METHODS=(
    [atari:dqn]="dqn_atari.py"
    [atari:sr_dqn]="sr_dqn_atari.py"
    [atari:rde_dqn]="rde_dqn_atari.py"
    [atari:rnd_dqn]="rnd_dqn_atari.py"
    [dmc:sac]="rde_sac_dmc.py --num-agents 1 --reset-interval 0"
    [dmc:sr_sac]="rde_sac_dmc.py --num-agents 1"
    [dmc:rde_sac]="rde_sac_dmc.py"
    [minigrid:dqn]="rde_dqn.py --num-agents 1 --reset-interval 0"
    [minigrid:sr_dqn]="rde_dqn.py --num-agents 1"
    [minigrid:rde_dqn]="rde_dqn.py"
    [safety:sac_lag]="rde_sac_safety.py --num-agents 1 --reset-interval 0"
    [safety:sr_sac_lag]="rde_sac_safety.py --num-agents 1"
    [safety:rde_sac_lag]="rde_sac_safety.py"
)
SUITES="atari dmc minigrid safety" # the first that has all methods is meant, unless --suite names one
declare -A DEFAULT_METHODS=([atari]="dqn,sr_dqn,rde_dqn" [dmc]=sac,sr_sac,rde_sac
    [minigrid]=dqn,sr_dqn,rde_dqn [safety]=sac_lag,sr_sac_lag,rde_sac_lag)
declare -A DEFAULT_GAMES=([atari]=Freeway,MsPacman [dmc]=walker-run,hopper-hop
    [minigrid]=MiniGrid-LavaGapS5-v0 [safety]=SafetyHalfCheetahVelocity-v1)
declare -A OFFICIAL=([atari]="--num-envs 4 --learning-starts 2000 --end-e 0.1") # a suite without an entry has no --setting official
declare -A SMOKE=([atari]="--learning-starts 100 --buffer-size 5000 --eval-interval 150 --eval-episodes 1") # and no --smoke
# The paper's, by suite:setting:game or suite:setting. Where none is named it is the script's own.
declare -A RESET_INTERVALS=([atari:default:Freeway]=40000 [atari:official:Freeway]=10000 [atari:official]=20000)
ATARI_100K=Alien,Amidar,Assault,Asterix,BankHeist,BattleZone,Boxing,Breakout,ChopperCommand,CrazyClimber,DemonAttack,Freeway,\
Frostbite,Gopher,Hero,Jamesbond,Kangaroo,Krull,KungFuMaster,MsPacman,Pong,PrivateEye,Qbert,RoadRunner,Seaquest,UpNDown

help() {
    cat <<'HELP'
usage: bash benchmark.sh [options] [-- options for every script]

Runs every combination of games, methods, replay ratios and seeds, then plot_benchmark.py. Stopped with Ctrl-C and called again it
skips what is finished and goes on with what was interrupted. Failed runs are listed at the end with their logs; exit code 1.

  --suite NAME           atari, dmc, minigrid or safety (default: the first of these that has the methods)
  --games LIST           their ids; Atari's by name: Freeway,MsPacman (the default there), atari100k = all 26
  --methods LIST         atari, minigrid: dqn,sr_dqn,rde_dqn; atari: rnd_dqn; dmc: sac,sr_sac,rde_sac; safety: sac_lag,sr_sac_lag,
                         rde_sac_lag; and my_idea.py, a script that you copied and changed. With options of its own:
                         "dqn,rde_dqn --beta 1e9"; its --exp-name is rde_dqn_beta_1e9 then, unless it is given
  --replay-ratios LIST   default 1,4; with --setting official 0.25,1, which are the paper's 1 and 4
  --seeds N | LIST       5 = the seeds 1 to 5 (the default); or seeds and ranges: 1,3,6-10; seed 3 alone: 3-3
  --total-timesteps N    environment steps of a run (default: the script's)
  --setting NAME         official = the paper's code: --num-envs 4 --reset-interval 20000 --learning-starts 2000 --end-e 0.1
  --reset-interval N     of the methods that reset (default: the script's; as in the paper, 40000 in Freeway, 10000 if official)
  --reset-depth DEPTH    last1, last2 or full, of the methods that reset
  --jobs N               runs at the same time (default 1); from 2 on with OMP_NUM_THREADS=1 each, unless it is set
  --runs-dir FOLDER      for the runs, their logs and the results (default runs/benchmark, with --smoke runs/smoke)
  --smoke, --no-plot     a small study of two minutes; without plot_benchmark.py
  --dry-run, --count     run nothing: print every command, finished or not, one a line (for GNU parallel), or only their number
PYTHON names the Python program, SCRIPTS_DIR the scripts' folder. On SLURM every task of an array is one run:
    sbatch --array=0-$(( $(bash benchmark.sh --count) - 1 )) benchmark.sh
HELP
}
fail() { echo "error: $1" >&2; exit 2; }

suite="" games="" methods="" replay_ratios="" seeds="" total_timesteps="" setting=default reset_interval="" reset_depth=""
jobs=1 runs_dir="" smoke="" no_plot="" dry_run="" count=""
while (($#)); do
    [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
    name=${1#--} name=${name//-/_}
    case $1 in
        --) shift; break ;;
        -h | --help) help; exit 0 ;;
        --smoke | --no-plot | --dry-run | --count) printf -v "$name" yes; shift ;;
        --suite | --games | --methods | --replay-ratios | --seeds | --total-timesteps | --setting | --reset-interval | \
            --reset-depth | --jobs | --runs-dir)
            [[ -n ${2:-} ]] || fail "$1 needs a value"
            printf -v "$name" %s "$2"; shift 2 ;;
        *) fail "$1 is not an option; see bash benchmark.sh --help" ;;
    esac
done
passed_on=("$@")

# Options that every run gets from benchmark.sh are refused among those for scripts, which take --env_id for --env-id as well.
declare -A OURS=([env-id]=--games [seed]=--seeds [replay-ratio]=--replay-ratios [runs-dir]="--runs-dir before any --"
    [resume]="no --resume, runs go on by themselves" [check-only]=--dry-run)
refuse_ours() {
    [[ ! " ${*//_/-} " =~ \ --(env-id|seed|replay-ratio|runs-dir|resume|check-only)[\ =] ]] ||
        fail "--${BASH_REMATCH[1]} is not for the scripts here; use ${OURS[${BASH_REMATCH[1]}]}"
}
refuse_ours "${passed_on[@]}"

[[ -z $suite || -n ${DEFAULT_METHODS[$suite]:-} ]] || fail "--suite is $suite, but must be one of: $SUITES"
methods=${methods:-${DEFAULT_METHODS[${suite:-atari}]}} methods=${methods//$'\n'/,}
IFS=, read -ra methods <<<"${methods//, /,}"
for suite in ${suite:-$SUITES}; do
    missing=""
    for name in "${methods[@]%% *}"; do [[ $name == *.py || -n ${METHODS[$suite:$name]:-} ]] || missing+=" $name"; done
    [[ -n $missing ]] || break
done
[[ -z $missing ]] || fail "--methods: no suite has them all; $suite has no$missing"

# SLURM runs a copy of this file that lies elsewhere, and tells where sbatch was called.
here=$(dirname -- "${BASH_SOURCE[0]}")
[[ -e $here/plot_benchmark.py || -z ${SLURM_SUBMIT_DIR:-} ]] || here=$SLURM_SUBMIT_DIR
SCRIPTS_DIR=${SCRIPTS_DIR:-$here} PYTHON=${PYTHON:-python} scripts=() options=() resets=()
command -v "$PYTHON" >/dev/null || fail "the program $PYTHON is not there (PYTHON=... names another)"
for method in "${methods[@]}"; do
    read -r name own <<<"$method"
    [[ -z $own || $own == --* ]] || fail "--methods: $method: commas separate methods, and options begin with --"
    refuse_ours "$own"
    read -r script all <<<"${METHODS[$suite:$name]:-$name} $own"
    [[ $name == *.py && -e $script ]] || script=$SCRIPTS_DIR/$script
    [[ -f $script ]] || fail "the script $script is not there (SCRIPTS_DIR=... names another folder)"
    if [[ -n $own && $own != *--exp[-_]name* ]]; then # else plots could not tell it from the method without options
        label=$(basename -- "$name" .py)_${own//--/}
        all+=" --exp-name ${label//[^A-Za-z0-9.-]/_}"
    fi
    resets+=(no)
    [[ " $all " == *" --reset-interval 0 "* ]] || ! grep -q '^    reset_interval:' -- "$script" || resets[-1]=yes
    scripts+=("$script") options+=("$all")
done

[[ $setting == default || $setting == official && -n ${OFFICIAL[$suite]:-} ]] || fail "$suite has no --setting $setting"
[[ -z $smoke || -n ${SMOKE[$suite]:-} ]] || fail "$suite has no --smoke"
added=()
[[ $setting == official ]] && added+=(${OFFICIAL[$suite]}) && : "${replay_ratios:=0.25,1}"
[[ -n $smoke ]] && added+=(${SMOKE[$suite]}) && : "${games:=${DEFAULT_GAMES[$suite]##*,}}" "${replay_ratios:=0.5}" \
    "${seeds:=2}" "${total_timesteps:=300}" "${reset_interval:=80}" "${runs_dir:=runs/smoke}"
[[ $games == atari100k ]] && games=$ATARI_100K
: "${games:=${DEFAULT_GAMES[$suite]}}" "${replay_ratios:=1,4}" "${seeds:=5}" "${runs_dir:=runs/benchmark}"
[[ $seeds =~ ^[0-9]+$ ]] && seeds=1-$seeds
games=(${games//,/ }) replay_ratios=(${replay_ratios//,/ }) ranges=(${seeds//,/ }) seeds=()
for range in "${ranges[@]}"; do
    [[ $range =~ ^([0-9]{1,10})(-([0-9]{1,10}))?$ ]] || fail "--seeds: $range is neither a seed nor a range such as 1-5"
    from=$((10#${BASH_REMATCH[1]})) to=$((10#${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}))
    ((from <= to && to - from < 100000)) || fail "--seeds: $range holds no seed, or more than 100,000"
    seeds+=($(seq "$from" "$to"))
done
twice=$(printf '%s\n' "${methods[@]/#/--methods }" "${games[@]/#/--games }" "${replay_ratios[@]/#/--replay-ratios }" \
    "${seeds[@]/#/--seeds }" | sort | uniq -d)
[[ -z $twice ]] || fail "twice in a list: ${twice%%$'\n'*}"
num_runs=$((${#replay_ratios[@]} * ${#seeds[@]} * ${#games[@]} * ${#methods[@]}))
((num_runs > 0 && num_runs <= 100000)) || fail "the lists make $num_runs runs, but 1 to 100,000 are a study"
[[ $jobs =~ ^[1-9][0-9]{0,3}$ && $jobs -le 1000 ]] || fail "--jobs is $jobs, but must be a number from 1 to 1000"

# Sets `command` and `run`, its name. Replay ratio by replay ratio, in it seed by seed: a study stopped early is a smaller study.
compose() { # index
    local m=$(($1 % ${#methods[@]})) rest=$(($1 / ${#methods[@]})) game seed ratio interval
    game=${games[rest % ${#games[@]}]} rest=$((rest / ${#games[@]}))
    seed=${seeds[rest % ${#seeds[@]}]} ratio=${replay_ratios[rest / ${#seeds[@]}]}
    run="$game ${methods[m]}, replay ratio $ratio, seed $seed"
    interval=${RESET_INTERVALS[$suite:$setting:${game%NoFrameskip*}]:-${RESET_INTERVALS[$suite:$setting]:-}}
    interval=${reset_interval:-$interval}
    [[ $suite == atari && ! $game =~ [-/] ]] && game+=NoFrameskip-v4
    command=("${scripts[m]}" --env-id "$game" --seed "$seed" --replay-ratio "$ratio")
    command+=(${total_timesteps:+--total-timesteps "$total_timesteps"} "${added[@]}")
    [[ ${resets[m]} == yes ]] && command+=(${interval:+--reset-interval "$interval"} ${reset_depth:+--reset-depth "$reset_depth"})
    command+=("${passed_on[@]}" ${options[m]} --runs-dir "$runs_dir" --resume auto)
}
show_command() { printf '%q ' "$PYTHON" "${command[@]}"; echo; }

[[ -z $count ]] || { echo "$num_runs"; exit 0; }
[[ -z $dry_run ]] || { for ((i = 0; i < num_runs; i++)); do compose "$i"; show_command; done; exit 0; }

# -------------------------------------------------------------------------------------------------------------- the runs

first=0 last=$((num_runs - 1)) lock=(--nonblock --conflict-exit-code 75) # 75, of the scripts as well: another process is at it
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then # one run, which waits for another process that does it
    ((SLURM_ARRAY_TASK_ID < num_runs)) || fail "array task $SLURM_ARRAY_TASK_ID: the list has the runs 0 to $last"
    first=$SLURM_ARRAY_TASK_ID last=$SLURM_ARRAY_TASK_ID lock=() no_plot=yes
else # what every run of a method, a game or a replay ratio would refuse is known before the first one
    for ((i = 0; i < ${#methods[@]} || i < ${#games[@]} || i < ${#replay_ratios[@]}; i++)); do
        row=$((i % ${#replay_ratios[@]} * ${#seeds[@]} * ${#games[@]} + i % ${#games[@]}))
        compose $((row * ${#methods[@]} + i % ${#methods[@]}))
        message=$("$PYTHON" "${command[@]}" --check-only 2>&1 >/dev/null </dev/null) && continue
        message=$(sed -n '/^╭/{n;s/ *│ *//g;p;q};$p' <<<"$message") # the last line, or the first in tyro's frame
        fail "$run: ${message#error: }"
    done
fi
mkdir -p -- "$runs_dir/logs" && [[ -w $runs_dir/logs ]] || fail "--runs-dir $runs_dir cannot be written"
((jobs > 1)) && export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # processes of one thread each do more in sum

declare -A index_of=() log_of=() started=() # of the processes
num_done=0 num_timed=0 seconds=0 stop_signal=0 saved="" failures=()

# The process is the training script itself, which holds the lock on its log even if this shell is killed; in a session of its own, so
# that a terminal's Ctrl-C reaches it once, through stop_runs.
start_run() { # index
    compose "$1"
    local name=${run//, /__} sum
    sum=$({ printf '%s\0' "${command[@]:1:${#command[@]}-5}"; cat -- "${command[0]}"; } | cksum) || true
    name=${name//[^A-Za-z0-9._-]/_} log=$runs_dir/logs/${name:0:150}__${sum%% *}.log
    (
        exec 9>>"$log" || exit
        flock "${lock[@]}" 9 || exit
        echo "\$ $(show_command)" >&9
        exec setsid "$PYTHON" "${command[@]}" </dev/null >&9 2>&1
    ) &
    index_of[$!]=$1 log_of[$!]=$log started[$!]=$SECONDS
    echo "[$(($1 + 1))/$num_runs] $run: started, log: $log"
    ((stop_signal == 0)) || kill -TERM "$!" || true # the signal came while it was being started
}

duration() { # of seconds
    if (($1 < 120)); then echo "$1 s"; elif (($1 < 7200)); then echo "$((($1 + 30) / 60)) min"; else echo "$((($1 + 1800) / 3600)) h"; fi
}

reap_runs() { # says how a run has ended; if none has, waits
    local process code=0 how pace="" left
    for process in "${!index_of[@]}"; do
        kill -0 "$process" && continue
        wait "$process" || code=$?
        compose "${index_of[$process]}"
        how=$(tail -n 1 -- "${log_of[$process]}" | tr '\r' '\n' | tail -n 1 | cut -c 1-200) || how="its log cannot be written"
        case $code:$how in
            0:*"is finished already"*) how="is finished already" ;;
            0:*) how=finished num_timed=$((num_timed + 1)) seconds=$((seconds + SECONDS - started[$process])) ;;
            75:*) how="another process is at it, left to that" ;;
            *)
                [[ $code == 143 ]] && saved=yes
                if ((stop_signal && code > 128)); then how=stopped; else
                    how="FAILED (exit code $code): $how" failures+=("$run (exit code $code), log: ${log_of[$process]}")
                fi ;;
        esac
        num_done=$((num_done + 1)) left=$((last - first + 1 - num_done))
        ((num_timed && left)) && pace=", $(duration $((seconds / num_timed))) a run, about $(
            duration $(((left + jobs - 1) / jobs * seconds / num_timed))) left"
        echo "[$((${index_of[$process]} + 1))/$num_runs] $run: $how; $num_done of $((num_done + left)) done$pace"
        unset "index_of[$process]"
        return 0
    done
    wait -n || true # a signal ends it as well, and is handled at once
}

# Asks the runs to save a checkpoint and end; the second time ends them at once. SLURM's SIGTERM has gone to all processes of the
# job. A second one would end a script that is saving: so it is sent after a while only, and to those that still have a handler for
# it, which the scripts take away at the first.
stop_runs() { # signal
    local process caught
    if [[ $1 == 15 && -n ${SLURM_JOB_ID:-} ]]; then
        trap '' TERM # for what is started here: it has to outlive the next one
        for process in "${!index_of[@]}"; do
            (sleep 5; caught=$(sed -n 's/^SigCgt:\s*//p' "/proc/$process/status"); ((16#$caught & 1 << 14)) && kill "$process") >/dev/null &
        done
        trap 'stop_runs 15' TERM
    elif ((stop_signal)); then
        kill -KILL "${!index_of[@]}" || true
    else
        echo "stopping ${#index_of[@]} run(s), which save a checkpoint first; again to stop them without"
        kill -TERM "${!index_of[@]}" || true
    fi
    stop_signal=$1
}

echo "$num_runs runs in $runs_dir, $jobs at a time: games ${games[*]}; methods $(IFS=,; echo "${methods[*]}"); replay ratios" \
    "${replay_ratios[*]}; ${#seeds[@]} seed(s)"
for signal in 1 2 10 15; do trap "stop_runs $signal" "$signal"; done # HUP, INT, USR1 (SLURM: near the time limit), TERM
{
    for ((i = first; i <= last && !stop_signal; i++)); do
        while ((${#index_of[@]} >= jobs && !stop_signal)); do reap_runs; done
        ((stop_signal)) || start_run "$i"
    done
    while ((${#index_of[@]})); do reap_runs; done
} 2>/dev/null # where bash would print lines of this file for a run that was killed

exit_code=$((${#failures[@]} > 0))
if [[ -z $no_plot && $stop_signal == 0 && -e $SCRIPTS_DIR/plot_benchmark.py ]]; then
    "$PYTHON" "$SCRIPTS_DIR/plot_benchmark.py" --runs-dir "$runs_dir" || exit_code=1
fi
((${#failures[@]} == 0)) || printf '%s\n' "${#failures[@]} of $((last - first + 1)) runs FAILED:" "${failures[@]/#/  }" >&2
if ((stop_signal)); then
    [[ $stop_signal == 10 && -n $saved && -n ${SLURM_JOB_ID:-} ]] && scontrol requeue "$SLURM_JOB_ID"
    echo "stopped; the same command goes on from here" >&2
    exit $((128 + stop_signal))
fi
exit $exit_code
}
