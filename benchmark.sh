#!/usr/bin/env bash
#SBATCH --job-name=rde-benchmark --cpus-per-task=2 --requeue --open-mode=append --signal=B:USR1@180
set -euf -o pipefail # -f: a * in a list stays a *
{ # bash reads all of this before it runs any of it, so that the file may change while a study runs
HELP='usage: [PYTHON=python] bash benchmark.sh [options] [-- options for every run]
A list of commands, each of them a run, and then plot_benchmark.py. Typed again it goes on where it was.
  --methods LIST        scripts with their options, as "rde_dqn,rde_dqn --num-agents 1,./my_idea.py --beta 5"
                        (default: dqn_atari,sr_dqn_atari,rde_dqn_atari)
  --games LIST          environments (default: that of the script); of Atari as Alien,MsPacman; atari100k = all 26
  --replay-ratios LIST  as 0.5,1 (default: that of the script)
  --seeds N | LIST      5 = the seeds 1 to 5; or seeds and ranges, as 1,3,6-10 (default: 3)
  --jobs N              runs at the same time (default: 1); from 2 on each has one thread
  --runs-dir FOLDER     for runs, logs and results (default: runs/benchmark, with --smoke runs/smoke)
  --smoke               a study of two minutes, to see that everything works
  --dry-run, --count    print the commands, one a line; their number. On SLURM a task of an array is one of them:
    sbatch --array=0-$(( $(bash benchmark.sh --count OPTIONS) - 1 )) benchmark.sh OPTIONS'
ALL=Alien,Amidar,Assault,Asterix,BankHeist,BattleZone,Boxing,Breakout,ChopperCommand,CrazyClimber,DemonAttack,Freeway,\
Frostbite,Gopher,Hero,Jamesbond,Kangaroo,Krull,KungFuMaster,MsPacman,Pong,PrivateEye,Qbert,RoadRunner,Seaquest,UpNDown
fail() { echo "error: $1" >&2; exit 2; }
# ---------------------------------------------------------------------------------------------- the list of commands
methods="" games="" replay_ratios="" seeds="" jobs=1 runs_dir="" smoke="" dry_run="" count=""
while (($#)); do
    [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
    name=${1#--} name=${name//-/_}
    case $1 in
        --) shift; break ;;
        -h | --help) echo "$HELP"; exit 0 ;;
        --smoke | --dry-run | --count) printf -v "$name" yes; shift ;;
        --methods | --games | --replay-ratios | --seeds | --jobs | --runs-dir)
            [[ -n ${2:-} ]] || fail "$1 needs a value"
            printf -v "$name" %s "$2"; shift 2 ;;
        *) fail "$1 is not an option; see bash benchmark.sh --help (options of the scripts stand behind --)" ;;
    esac
done
if [[ -n $smoke ]]; then
    methods=${methods:-dqn_atari,sr_dqn_atari --reset-interval 80,rde_dqn_atari --reset-interval 80}
    replay_ratios=${replay_ratios:-0.5} seeds=${seeds:-2} runs_dir=${runs_dir:-runs/smoke}
    set -- --total-timesteps 300 --learning-starts 100 --buffer-size 5000 --eval-interval 150 --eval-episodes 1 "$@"
fi
folder=$(dirname -- "${BASH_SOURCE[0]}") PYTHON=${PYTHON:-python} seeds=${seeds:-3} runs_dir=${runs_dir:-runs/benchmark}
[[ ${BASH_SOURCE[0]} != */slurm_script ]] || folder=$SLURM_SUBMIT_DIR # SLURM runs a copy that lies elsewhere
[[ $jobs =~ ^[1-9][0-9]{0,2}$ ]] || fail "--jobs is $jobs, but must be a number from 1 to 999"
[[ $seeds =~ ^[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*$ ]] || fail "--seeds is $seeds, not as 5 or 1,3,6-10"
[[ $seeds == *[,-]* ]] || seeds=1-$seeds
IFS=, read -ra methods <<<"${methods:-dqn_atari,sr_dqn_atari,rde_dqn_atari}"
games=${games/#atari100k/$ALL} games=(${games//,/ }) replay_ratios=(${replay_ratios//,/ }) commands=() names=()
for seed in $(for range in ${seeds//,/ }; do seq "${range%-*}" "${range#*-}"; done); do # stopped early: fewer seeds
    for ratio in "${replay_ratios[@]:-}"; do for game in "${games[@]:-}"; do for method in "${methods[@]}"; do
        words=($method) script=${words[0]:-} options=("${words[@]:1}") id=$game
        [[ $script == *.py ]] || script=$folder/$script.py
        [[ -f $script ]] || fail "--methods: the script $script is not there"
        [[ $script != *_atari.py || $game == *[-/]* ]] || id+=${game:+NoFrameskip-v4}
        label=$(basename -- "$script" .py)${options[0]:+_${options[*]#--}} label=${label//[^a-zA-Z0-9.-]/_}
        command=("$PYTHON" "$script" ${id:+--env-id "$id"} ${ratio:+--replay-ratio "$ratio"} --seed "$seed")
        command+=(--runs-dir "$runs_dir" ${options[0]:+--exp-name "$label"}) # its name in tables and pictures
        commands+=("$(printf '%q ' "${command[@]}" "$@" "${options[@]}")")
        names+=("${label:0:150}${game:+__${game//[^a-zA-Z0-9.-]/_}}${ratio:+__ratio_$ratio}__seed_$seed")
    done; done; done
done
num_runs=${#commands[@]} task=${SLURM_ARRAY_TASK_ID:-} run=${task:-0} last=${task:-$((num_runs - 1))} stopped=""
((0 <= last && last < num_runs)) || fail "the list has $num_runs runs, and number $last (from 0 on) is none of them"
[[ -z $count ]] || { echo "$num_runs"; exit 0; }
[[ -z $dry_run ]] || { printf '%s\n' "${commands[@]}"; exit 0; }
# ----------------------------------------------------------------------------------------------------------- the runs
logs=${runs_dir/#~\//$HOME/}/logs processes=() started=() failures=() left=$((last - run + 1)) seconds=0 num_timed=0
mkdir -p -- "$logs" || exit 2
export PYTHONUNBUFFERED=1 # what a run says is in its log at once
((jobs == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # processes of one thread each do more in sum
echo "$num_runs run(s), $jobs at a time; what they say is in $logs"
stop() { stopped=$1 last=-1; kill -TERM "${processes[@]}" 2>/dev/null || true; }
for name in HUP INT TERM USR1; do trap "stop $name" "$name"; done # runs, in sessions of their own, get TERM alone
while ((run <= last || ${#processes[@]})); do
    while ((run <= last && ${#processes[@]} < jobs)); do
        echo "[$((run + 1))/$num_runs] ${names[run]} begins"
        { echo "\$ ${commands[run]}"; eval "exec setsid ${commands[run]}"; } &>>"$logs/${names[run]}.log" </dev/null &
        processes[run]=$! started[run]=$SECONDS run=$((run + 1))
    done
    [[ -z $stopped ]] || stop "$stopped" # again: it may have come at the moment when a run began
    for i in "${!processes[@]}"; do
        kill -0 "${processes[i]}" 2>/dev/null && continue
        code=0 left=$((left - 1))
        wait "${processes[i]}" || code=$?
        unset "processes[i]"
        how=$(tail -n 1 -- "$logs/${names[i]}.log" | tr '\r' '\n' | tail -n 1) || how="no log"
        ((code)) || [[ $how == *finished ]] || num_timed=$((num_timed + 1)) seconds=$((seconds + SECONDS - started[i]))
        ((code == 0 || code == 75)) || [[ -n $stopped && $code -gt 128 ]] || # 75: another process is at it
            failures+=("${names[i]}, exit code $code: $how")
        ((left * num_timed == 0)) || how+="; $left left, about $((left * seconds / num_timed / jobs / 60 + 1)) min"
        echo "[$((i + 1))/$num_runs] ${names[i]}: $how"
        continue 2
    done
    wait -n || true # a signal ends it, too
done
[[ -n $stopped$task ]] || "$PYTHON" "$folder/plot_benchmark.py" --runs-dir "$runs_dir" || failures+=(plot_benchmark.py)
((${#failures[@]} == 0)) || printf '%s\n' "${#failures[@]} FAILED:" "${failures[@]/#/  }" >&2
[[ -n $stopped ]] || exit $((${#failures[@]} > 0))
echo "stopped; the same command goes on from here" >&2
[[ $stopped != USR1 || -z ${SLURM_JOB_ID:-} ]] || scontrol requeue "$SLURM_JOB_ID"
exit $((128 + $(kill -l "$stopped")))
}
