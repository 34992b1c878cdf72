# shellcheck shell=bash
# How a job goes back into the queue. Sourced by the batch scripts beside it.

go_on=85 # exit code of a run that saved after a stop signal (EXIT_REQUEUE of nemotron_train/errors.py)

say() { printf '== %s job %s: %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$*"; }

# requeue REASON: puts this job back into the queue and ends the script. One that Slurm is ending already, because somebody
# cancelled it (then it reads COMPLETING) or it is being requeued, is left to that.
requeue() {
    local state
    state="$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')"
    if [ "$state" = RUNNING ]; then
        say "back into the queue: $1"
        scontrol requeue "$SLURM_JOB_ID"
    else
        say "$1; the job is ${state:-gone} and is not put back into the queue"
    fi
    exit "$go_on"
}
