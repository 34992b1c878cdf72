#!/usr/bin/env bash
# Sets up, prepares text that every machine has, trains a small hybrid model on it and shows what it learned.
#
#   bash launch/quickstart.sh                                      two CPU ranks, or up to eight GPUs
#   bash launch/quickstart.sh parallel.tensor_parallel_size=2      any key of the configuration can be changed
#   RANKS=4 bash launch/quickstart.sh                              another number of ranks
#
# Run again, it goes on from where it was stopped; what is complete is not done twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
# shellcheck source=launch/env.sh
source launch/env.sh
# shellcheck source=launch/ranks.sh
source launch/ranks.sh

data=runs/quickstart-data
vocab_size=2048 # model.vocab_size of recipes/model/quickstart.yaml
sources=(code tests prose)

run_dir=runs/quickstart
for argument in "$@"; do
    case "$argument" in
        run.name=*) run_dir="runs/${argument#*=}" ;;
    esac
done
for argument in "$@"; do
    case "$argument" in
        run.dir=*) run_dir="${argument#*=}" ;;
    esac
done

# once NAME COMMAND...: runs the command unless it was completed before.
once() {
    local stamp="$data/complete/$1"
    shift
    [ ! -e "$stamp" ] || return 0
    "$@"
    touch "$stamp"
}

prepare_data() {
    local settings="vocab_size=$vocab_size"
    if [ "$(cat "$data/settings.txt" 2>/dev/null)" != "$settings" ]; then # nothing there, or made for another vocabulary
        rm -rf "${data:?}"/{complete,text,tokenizer.json,heldout} "${sources[@]/#/$data/}"
        mkdir -p "$data"
        printf '%s\n' "$settings" >"$data/settings.txt"
    fi
    mkdir -p "$data/complete"
    local source
    once text "$python" -m data_tools stdlib-corpus --output "$data/text"
    once tokenizer "$python" -m data_tools train-tokenizer --vocab-size "$vocab_size" \
        --input "$data"/text/train/{code,tests,prose}.jsonl --output "$data/tokenizer.json"
    for source in "${sources[@]}"; do
        once "$source" "$python" -m data_tools tokenize --tokenizer "$data/tokenizer.json" --source "$source" \
            --input "$data/text/train/$source.jsonl" --output "$data/$source"
        once "heldout-$source" "$python" -m data_tools tokenize --tokenizer "$data/tokenizer.json" --source "$source" \
            --input "$data/text/heldout/$source.jsonl" --output "$data/heldout" --workers 1
    done
}

count_ranks() {
    local gpus
    gpus="$(count_gpus)"
    # 1, 2, 4 or 8: a step of 16 samples divides among them.
    local ranks=2
    if [ "$gpus" -ge 1 ]; then
        ranks=1
        while [ "$((ranks * 2))" -le "$gpus" ] && [ "$ranks" -lt 8 ]; do ranks=$((ranks * 2)); done
    fi
    echo "${RANKS:-$ranks}"
}

train() {
    local ranks finished="$run_dir/quickstart_finished.txt"
    if [ -e "$finished" ] && [ "$(cat "$finished")" = "$*" ]; then
        say "The run in $run_dir is finished"
        return
    fi
    ranks="$(count_ranks)"
    say "Training in $run_dir on $ranks ranks"
    local micro_batch=()
    if [ "$ranks" -gt 2 ]; then micro_batch=("train.micro_batch_size=$((ranks < 16 ? 16 / ranks : 1))"); fi
    run_ranks "$ranks" experiment=quickstart ${micro_batch[@]+"${micro_batch[@]}"} "$@"
    if [ "$code" != 0 ]; then
        if [ "$stopped" = yes ]; then say "Stopped"; else say "Training failed (exit code $code)"; fi
        say "The same command goes on from the last checkpoint in $run_dir, if there is one"
        exit "$code"
    fi
    mkdir -p "$run_dir"
    printf '%s\n' "$*" >"$finished"
}

SECONDS=0
prepare_data
say "Data in $data is ready (${SECONDS} s)"
train "$@"
"$python" launch/quickstart_report.py "$run_dir"
say "To start over: rm -r $run_dir (the data in $data stays), then the same command"
