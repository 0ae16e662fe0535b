#!/usr/bin/env bash
# Every table.md and every picture of a study in this folder, from the packed runs (runs.tar.xz) or the CSV files beside it.
#
#     bash results/redraw.sh                     # all of them, two minutes
#     bash results/redraw.sh minigrid safety     # these
set -euo pipefail
cd "$(dirname "$0")"

draw() { # a study: its pictures, and other options
    local study=$1 data=("$1"/runs.tar.xz)
    [[ -e ${data[0]} ]] || data=("$study/results.csv")
    [[ -e ${data[0]} ]] || return 0 # a single run, as in lunar_lander
    [[ $study != drq_study ]] || data+=("$study/drq_replay_ratio_2.tar.xz")
    rm -f "$study"/{learning_curves,training_games,aggregate,collapse}*.png
    "${PYTHON:-python}" ../plot_benchmark.py "${data[@]}" --out-dir "$study" --merge-versions --pictures "${@:2}"
}

[[ $# -gt 0 ]] || set -- */
for study in "${@%/}"; do
    case $study in
    drq) ;; # single runs of many kinds, compared in docs/rde_drq_atari.md
    rnd_100k)
        draw "$study" training_games
        for table in "$study"/bonus_*.csv; do "${PYTHON:-python}" ../plot_bonus.py "$table"; done
        ;;
    pendulum_sac) draw "$study" learning_curves ;; # no resets
    alien_default) draw "$study" learning_curves training_games ;;
    freeway_*) draw "$study" learning_curves training_games ;; # its evaluations cannot measure a collapse
    cheetah_run_sac | mspacman_* | safety) draw "$study" learning_curves training_games collapse ;;
    drq_study) draw "$study" learning_curves aggregate_training_games collapse --references atari100k_published.csv ;;
    *) draw "$study" learning_curves collapse ;;
    esac
done
