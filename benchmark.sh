#!/usr/bin/env bash
#SBATCH --job-name=rde-benchmark --cpus-per-task=2 --requeue --open-mode=append --signal=B:USR1@180
# shellcheck disable=SC2206,SC2207 # lists are split at spaces on purpose; because of set -f a * in them stays a *
set -euf -o pipefail
{ # bash reads all of this before it runs any of it, so that the file may change while a study runs

# A method is a script and the options that make it this method, under [suite:method].
declare -A METHODS=(
    [atari:dqn]="dqn_atari.py" [atari:sr_dqn]="sr_dqn_atari.py" [atari:rde_dqn]="rde_dqn_atari.py" [atari:rnd_dqn]="rnd_dqn_atari.py"
    [atari:drq]="rde_drq_atari.py --num-agents 1 --reset-interval 0"
    [atari:sr_drq]="rde_drq_atari.py --num-agents 1"
    [atari:rde_drq]="rde_drq_atari.py"
    [dmc:sac]="rde_sac_dmc.py --num-agents 1 --reset-interval 0"
    [dmc:sr_sac]="rde_sac_dmc.py --num-agents 1"
    [dmc:rde_sac]="rde_sac_dmc.py"
    [minigrid:dqn]="rde_dqn.py --num-agents 1 --reset-interval 0"
    [minigrid:sr_dqn]="rde_dqn.py --num-agents 1"
    [minigrid:rde_dqn]="rde_dqn.py"
    [safety:sac_lag]="rde_sac_safety.py --num-agents 1 --reset-interval 0"
    [safety:sr_sac_lag]="rde_sac_safety.py --num-agents 1"
    [safety:rde_sac_lag]="rde_sac_safety.py" # the ablation: --methods "rde_sac_lag --kappa 1"
)
declare -A PLAIN_METHOD=([atari]=dqn [dmc]=sac [minigrid]=dqn [safety]=sac_lag) # by default this, sr_this and rde_this
declare -A GAMES=([atari]="Freeway,MsPacman" [dmc]="walker-run,hopper-hop"
    [minigrid]="MiniGrid-LavaGapS5-v0" [safety]="SafetyHalfCheetahVelocity-v1")
ATARI_100K=Alien,Amidar,Assault,Asterix,BankHeist,BattleZone,Boxing,Breakout,ChopperCommand,CrazyClimber,DemonAttack,Freeway,\
Frostbite,Gopher,Hero,Jamesbond,Kangaroo,Krull,KungFuMaster,MsPacman,Pong,PrivateEye,Qbert,RoadRunner,Seaquest,UpNDown
declare -A SETTINGS=([official]="--num-envs 4 --learning-starts 2000 --end-e 0.1" # of Atari
    [smoke]="--total-timesteps 300 --learning-starts 100 --buffer-size 5000 --eval-interval 150 --eval-episodes 1")
declare -A REPLAY_RATIOS=([default]="1,4" [official]="0.25,1" [smoke]="0.5")
declare -A RESET_INTERVALS=([default:Freeway]=40000 [official:Freeway]=10000 [official]=20000 [smoke]=80) # else the script's

HELP='usage: [PYTHON=python] [SCRIPTS_DIR=folder] bash benchmark.sh [options] [-- options for every script]
Runs all combinations of games, methods, replay ratios and seeds, then plot_benchmark.py; called again it goes on where it was.
  --suite NAME           atari, dmc, minigrid or safety (default: by the names of the methods, else atari)
  --games LIST           ids, those of Atari by name (default there: Freeway,MsPacman); atari100k = all 26
  --methods LIST         of the table in this file, or a script of your own: "dqn,rde_dqn --beta 1e9,my_idea.py"
  --replay-ratios LIST   default 1,4; with --setting official 0.25,1, which are 1 and 4 of the paper
  --seeds N | LIST       5 = the seeds 1 to 5 (the default); or seeds and ranges: 1,3,6-10; seed 3 alone: 3-3
  --total-timesteps N    environment steps of a run (default: that of the script)
  --setting official     that of the code of the paper: --num-envs 4 --learning-starts 2000 --end-e 0.1 --tau 0.00125/ratio
  --smoke                a small study of two minutes, to see that everything works
  --reset-interval N     of the methods that reset (default: that of the script, in Freeway 40000; official: 20000 and 10000)
  --reset-depth DEPTH    last1, last2 or full, of the methods that reset
  --jobs N               runs at the same time (default 1); from 2 on with OMP_NUM_THREADS=1 each, unless it is set
  --runs-dir FOLDER      for the runs, their logs and the results (default: runs/benchmark, with --smoke runs/smoke)
  --no-plot              without plot_benchmark.py at the end
  --dry-run              only print every command, finished or not, one a line (for GNU parallel)
  --count                only print the number of runs; on SLURM every task of an array is one run:
                         sbatch --array=0-$(( $(bash benchmark.sh --count) - 1 )) benchmark.sh'
fail() { echo "error: $1" >&2; exit 2; }
# ------------------------------------------------------------------------------------------------------------------ the options
suite="" games="" methods="" replay_ratios="" seeds="" total_timesteps="" setting=default reset_interval="" reset_depth=""
jobs=1 runs_dir="" no_plot="" dry_run="" count=""
while (($#)); do
    [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
    name=${1#--} name=${name//-/_}
    case $1 in
        --) shift; break ;;
        -h | --help) echo "$HELP"; exit 0 ;;
        --smoke) setting=smoke; shift ;;
        --no-plot | --dry-run | --count) printf -v "$name" yes; shift ;;
        --suite | --games | --methods | --replay-ratios | --seeds | --total-timesteps | --setting | --reset-interval | \
            --reset-depth | --jobs | --runs-dir)
            [[ -n ${2:-} ]] || fail "$1 needs a value"
            printf -v "$name" %s "$2"; shift 2 ;;
        *) fail "$1 is not an option; see bash benchmark.sh --help" ;;
    esac
done
passed_on=("$@") for_scripts=" $methods $* "
set_here=" --(env-id|seed|replay-ratio|runs-dir|resume|check-only)[ =]" # scripts take --env_id for --env-id, too
[[ ! ${for_scripts//_/-} =~ $set_here ]] || fail "--${BASH_REMATCH[1]} is set by benchmark.sh itself for every run (see --games, --seeds, --replay-ratios, --runs-dir)"
# ------------------------------------------------------------------------------------------------------------- the list of runs
case $suite:$methods in :*sac_lag*) suite=safety ;; :*sac*) suite=dmc ;; :*) suite=atari ;; esac
plain=${PLAIN_METHOD[$suite]:-} methods=${methods:-$plain,sr_$plain,rde_$plain}
[[ -n $plain ]] || fail "--suite is $suite, but must be atari, dmc, minigrid or safety"
[[ $setting == default || $suite == atari && -n ${SETTINGS[$setting]:-} ]] || fail "the suite $suite has no setting $setting; --setting official and --smoke are for atari"
[[ $setting != smoke ]] || games=${games:-MsPacman} seeds=${seeds:-2} runs_dir=${runs_dir:-runs/smoke}
added=(${SETTINGS[$setting]:-} ${total_timesteps:+--total-timesteps "$total_timesteps"}) runs_dir=${runs_dir:-runs/benchmark}
[[ ${BASH_SOURCE[0]} != */slurm_script ]] || SCRIPTS_DIR=${SCRIPTS_DIR:-$SLURM_SUBMIT_DIR} # the name of SLURM's copy elsewhere
SCRIPTS_DIR=${SCRIPTS_DIR:-$(dirname -- "${BASH_SOURCE[0]}")} PYTHON=${PYTHON:-python} scripts=() options=() resets=()
command -v "$PYTHON" >/dev/null || fail "the program $PYTHON is not there (PYTHON=... names another)"
IFS=, read -ra methods <<<"${methods//$'\n'/ }"
for m in "${!methods[@]}"; do
    read -r name own <<<"${methods[m]}"
    [[ $name == *.py || -n ${METHODS[$suite:$name]:-} ]] || fail "--methods: $suite has no $name, but $(printf '%s\n' "${!METHODS[@]}" | sed -n "s/^$suite://p" | sort | paste -sd' ')"
    [[ -z $own || $own == --* ]] || fail "--methods: ${methods[m]}: commas separate methods, and options begin with --"
    read -r script all <<<"${METHODS[$suite:$name]:-$name} $own"
    [[ $name == *.py && -e $script ]] || script=$SCRIPTS_DIR/$script
    [[ -f $script ]] || fail "the script $script is not there (SCRIPTS_DIR=... names another folder)"
    label=$(basename -- "$name" .py)_${own//--/} # plots tell it by this from the method without options
    [[ -z $own || $own == *--exp[-_]name* ]] || all+=" --exp-name ${label//[^A-Za-z0-9.-]/_}"
    methods[m]="$name${own:+ $own}" scripts+=("$script") options+=("$all") resets+=(yes)
    [[ " $all " != *" --reset-interval 0 "* ]] && grep -q '^    reset_interval:' -- "$script" || resets[m]=""
done

games=${games:-${GAMES[$suite]}} replay_ratios=${replay_ratios:-${REPLAY_RATIOS[$setting]}} seeds=${seeds:-5}
[[ $games != atari100k ]] || games=$ATARI_100K
[[ ! $seeds =~ ^[0-9]+$ ]] || seeds=1-$seeds
games=(${games//,/ }) replay_ratios=(${replay_ratios//,/ }) ranges=(${seeds//,/ }) seeds=()
for range in "${ranges[@]}"; do
    [[ $range =~ ^[0-9]{1,10}(-[0-9]{1,10})?$ ]] || fail "--seeds: $range is neither a seed nor a range such as 1-5"
    from=$((10#${range%-*})) to=$((10#${range#*-}))
    ((from <= to && to - from < 100000)) || fail "--seeds: $range holds no seed, or more than 100,000"
    seeds+=($(seq "$from" "$to"))
done
num_ratios=${#replay_ratios[@]} num_seeds=${#seeds[@]} num_games=${#games[@]} num_methods=${#methods[@]}
num_runs=$((num_ratios * num_seeds * num_games * num_methods))
((num_runs > 0 && num_runs <= 100000)) || fail "the lists make $num_runs runs, but 1 to 100,000 are a study"
[[ $jobs =~ ^[1-9][0-9]{0,2}$ ]] || fail "--jobs is $jobs, but must be a number from 1 to 999"
# Sets `command` and `run`, its name. Replay ratio by replay ratio, in it seed by seed: stopped early it is a smaller study.
compose() { # index. --tau: the official target network moves by 0.005 once in a step of 4 environments
    local m=$(($1 % num_methods)) game=${games[$1 / num_methods % num_games]} interval
    local seed=${seeds[$1 / num_methods / num_games % num_seeds]}
    local ratio=${replay_ratios[$1 / num_methods / num_games / num_seeds]}
    interval=${reset_interval:-${RESET_INTERVALS[$setting:${game%NoFrameskip*}]:-${RESET_INTERVALS[$setting]:-}}}
    run="$game ${methods[m]}, replay ratio $ratio, seed $seed"
    [[ $suite != atari || $game == *[-/]* ]] || game+=NoFrameskip-v4
    command=("${scripts[m]}" --env-id "$game" --seed "$seed" --replay-ratio "$ratio" "${added[@]}")
    [[ $setting != official ]] || command+=(--tau "$(LC_ALL=C awk -v r="$ratio" 'BEGIN { print (r > 0 ? 0.00125 / r : 0) }')")
    [[ -z ${resets[m]} ]] || command+=(${interval:+--reset-interval "$interval"} ${reset_depth:+--reset-depth "$reset_depth"})
    command+=("${passed_on[@]}" ${options[m]} --runs-dir "$runs_dir" --resume auto)
}
show_command() { printf '%q ' "$PYTHON" "${command[@]}"; echo; }
[[ -z $count ]] || { echo "$num_runs"; exit 0; }
[[ -z $dry_run ]] || { for ((i = 0; i < num_runs; i++)); do compose "$i"; show_command; done; exit 0; }
# --------------------------------------------------------------------------------------------------------------------- the runs
array_task=${SLURM_ARRAY_TASK_ID:-} first=${SLURM_ARRAY_TASK_ID:-0} last=${SLURM_ARRAY_TASK_ID:-$((num_runs - 1))}
((last < num_runs)) || fail "array task $last: the list has the runs 0 to $((num_runs - 1))"
if [[ -z $array_task ]]; then # what every run of a replay ratio, game or method would refuse is known before the first run
    for ((i = 0; i < num_ratios || i < num_games || i < num_methods; i++)); do
        compose $(((i % num_ratios * num_seeds * num_games + i % num_games) * num_methods + i % num_methods))
        code=0 message=$("$PYTHON" "${command[@]}" --check-only 2>&1 >/dev/null </dev/null) || code=$?
        ((code == 0 || code == 75)) && continue # 75, here and below: another process is at this run
        message=$(sed -n '/^╭/{n;s/ *│ *//g;p;q};$p' <<<"$message") # the last line, or the first in a frame
        fail "$run: ${message#error: }"
    done
fi
mkdir -p -- "$runs_dir/logs" 2>/dev/null && [[ -w $runs_dir/logs ]] || fail "--runs-dir $runs_dir cannot be written"
((jobs == 1)) || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # processes of one thread each do more in sum
echo "$num_runs runs in $runs_dir, $jobs at a time: games ${games[*]}; replay ratios ${replay_ratios[*]}; $num_seeds seed(s)"

declare -A title_of=() log_of=() started=() # of the processes
num_done=0 num_timed=0 seconds=0 failures=() stop_signal="" stopped_at=-9
stop_runs() { # signal; the scripts save a checkpoint at the first TERM, and end at once at the second one
    ((SECONDS > stopped_at + 1)) || return 0 # twice at once is once: the program `timeout` does so
    stop_signal=$1 stopped_at=$SECONDS
    [[ $1 == TERM && -n ${SLURM_JOB_ID:-} ]] || kill -TERM "${!title_of[@]}" || true # SLURM sends TERM to all processes
    echo "stopping: the runs save a checkpoint first; again to end them at once"
}
trap 'stop_runs HUP' HUP; trap 'stop_runs INT' INT; trap 'stop_runs TERM' TERM; trap 'stop_runs USR1' USR1 # USR1: of SLURM
reap_run() { # says how a run has ended; if none has, waits
    local process code=0 how left eta=""
    for process in "${!title_of[@]}"; do
        kill -0 "$process" && continue
        wait "$process" || code=$?
        how=$(tail -n 1 -- "${log_of[$process]}" | tr '\r' '\n' | tail -n 1) || how="its log cannot be written"
        [[ -n $stop_signal && $code -gt 128 ]] && code=stopped
        case $code:$how in
            stopped:*) how=stopped ;;
            0:*"is finished already") how="is finished already" ;;
            0:*) how=finished num_timed=$((num_timed + 1)) seconds=$((seconds + SECONDS - started[$process])) ;;
            75:*) how="another process is at it, left to that" ;;
            *)
                failures+=("${title_of[$process]} (exit code $code), log: ${log_of[$process]}")
                how="FAILED (exit code $code): ${how:0:200}" ;;
        esac
        num_done=$((num_done + 1)) left=$((last - first + 1 - num_done))
        ((num_timed && left)) && eta=", about $(((left + jobs - 1) / jobs * seconds / num_timed / 60 + 1)) min left"
        echo "${title_of[$process]}: $how; $num_done of $((num_done + left)) done$eta"
        unset "title_of[$process]"
        return
    done
    wait -n || true # a signal ends it as well
}
for ((i = first; i <= last; i++)); do
    while ((${#title_of[@]} >= jobs)); do reap_run; done
    compose "$i"
    name=${run//, /__} name=${name//[^A-Za-z0-9._-]/_}
    log=$runs_dir/logs/${name:0:150}__$(cksum <<<"${command[*]}" | cut -d ' ' -f 1).log || true # false if Ctrl-C ended cksum
    [[ -z $stop_signal ]] || break
    ( # becomes the script, which holds the lock on its log even if this shell is killed; setsid: Ctrl-C reaches it once
        exec </dev/null >>"$log" 2>&1 && flock --nonblock --conflict-exit-code 75 1 || exit
        echo "\$ $(show_command)"
        exec setsid "$PYTHON" "${command[@]}"
    ) &
    title_of[$!]="[$((i + 1))/$num_runs] $run" log_of[$!]=$log started[$!]=$SECONDS
    echo "${title_of[$!]}: started, log: $log"
    [[ -z $stop_signal ]] || kill -TERM "$!" || true # the signal came this moment
done 2>/dev/null # where bash would print lines of this file for a run that was killed
while ((${#title_of[@]})); do reap_run; done 2>/dev/null
# ---------------------------------------------------------------------------------------------------------------------- the end
exit_code=$((${#failures[@]} > 0))
[[ -n $no_plot$stop_signal$array_task ]] || "$PYTHON" "$SCRIPTS_DIR/plot_benchmark.py" --runs-dir "$runs_dir" || exit_code=1
((${#failures[@]} == 0)) || printf '%s\n' "${#failures[@]} of $((last - first + 1)) runs FAILED:" "${failures[@]/#/  }" >&2
[[ -n $stop_signal ]] || exit $exit_code
echo "stopped; the same command goes on from here" >&2
[[ $stop_signal != USR1 || -z ${SLURM_JOB_ID:-} ]] || scontrol requeue "$SLURM_JOB_ID"
exit $((128 + $(kill -l "$stop_signal")))
}
