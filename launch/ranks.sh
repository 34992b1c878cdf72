# shellcheck shell=bash
# How ranks start and stop on this machine. Sourced after setup.sh, which sets `python`.

go_on=85 # exit code of a run that saved after a stop signal (EXIT_REQUEUE of nemotron_train/errors.py)

# Prints how many GPUs torch can use, without waiting for torch where there is no driver.
count_gpus() {
    if [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; then
        "$python" -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}

# Runs a command as a job of its own and passes signals on: Ctrl-C reaches it once, and it never outlives this script's
# SIGTERM. Leaves the command's exit code in `code`, and in `stopped` whether there was a signal.
run_job() {
    local signalled=yes
    stopped=no
    set -m
    "$@" </dev/null &
    local job=$!
    set +m
    trap 'signalled=yes stopped=yes; kill -INT "$job" 2>/dev/null || true' INT
    trap 'signalled=yes stopped=yes; kill -TERM "$job" 2>/dev/null || true' TERM HUP USR1 # torchrun does not know USR1
    while [ "$signalled" = yes ]; do
        signalled=no
        code=0
        wait "$job" || code=$?
    done
    trap - INT TERM HUP USR1
}

# run_ranks N ARGUMENT...: trains with so many ranks. Leaves `stopped` and `code`: 0, 85 after a stop signal, or that of a
# failure. torchrun returns 1 for both of these, but a rank that fails leaves a file.
run_ranks() {
    local ranks="$1" launcher=() records
    shift
    records="$(mktemp -d)"
    if [ "$ranks" -gt 1 ]; then
        launcher=(-m torch.distributed.run --standalone --nproc-per-node "$ranks" --log-dir "$records")
    fi
    run_job "$python" ${launcher[@]+"${launcher[@]}"} -m nemotron_train.train "$@"
    if [ "$code" != 0 ] && [ "$stopped" = yes ] && [ "$ranks" -gt 1 ] &&
        [ -z "$(find "$records" -name error.json)" ]; then code="$go_on"; fi
    rm -rf "$records"
}
