# shellcheck shell=bash
# How a job goes back into the queue. Sourced by the batch scripts beside it.

go_on=85 # exit code of a run that saved after a stop signal (EXIT_REQUEUE of nemotron_train/errors.py)

say() { printf '== %s job %s: %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$*"; }

# requeue REASON: puts this job back into the queue and ends the script; does not, if somebody cancelled the job meanwhile.
requeue() {
    local state
    state="$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')"
    case "$state" in
        RUNNING | COMPLETING | PREEMPTED)
            say "back into the queue: $1"
            scontrol requeue "$SLURM_JOB_ID"
            ;;
        *) say "$1; the job is ${state:-gone} and stays out of the queue" ;;
    esac
    exit "$go_on"
}
