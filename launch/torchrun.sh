#!/usr/bin/env bash
# Train on this machine: one rank on each of its GPUs, or two CPU ranks where it has none. Sets up .venv first.
#
#   bash launch/torchrun.sh experiment=own_text data.path=corpus model.vocab_size=8192
#   NPROC=4 bash launch/torchrun.sh experiment=quickstart run.name=four parallel=tensor_2_pipeline_2
#
# Arguments are those of `python -m nemotron_train.train`. Ctrl-C, SIGTERM and SIGUSR1 finish the step, save, and end with
# exit code 85: the same command goes on. Any other code but 0 is a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
# shellcheck source=launch/env.sh
source launch/env.sh
# shellcheck source=launch/ranks.sh
source launch/ranks.sh

ranks="${NPROC:-$(count_gpus)}"
if [ "$ranks" = 0 ]; then ranks=2; fi
say "Training on $ranks rank(s)"
run_ranks "$ranks" "$@"
if [ "$code" = "$go_on" ]; then
    say "Stopped; the same command goes on"
elif [ "$code" != 0 ]; then
    say "Failed (exit code $code)"
fi
exit "$code"
