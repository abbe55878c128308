#!/usr/bin/env bash
# Trains on this machine, one rank a GPU (2 ranks without GPUs). Arguments are overrides of the configuration.
#
#   ./launch/train.sh experiment=quickstart run_dir=runs/mine trainer.max_steps=1000
#   ./launch/train.sh -m experiment=quickstart seed=0,1,2     a sweep: one torchrun a job, one after the other
#   .venv/bin/python -m rec.train --help                      what can be overridden
#
#   NPROC=2           ranks
#   MAX_RESTARTS=0    times that torchrun starts all ranks again after one died; with checkpoint.resume=auto they go on
set -euo pipefail
. "$(dirname "$0")/env.sh"

./launch/setup.sh
set_ranks
for argument in "$@"; do
    case "$argument" in -m | --multirun)
        exec .venv/bin/python -m rec.train "$@"
        ;;
    esac
done
# exec: a SIGTERM to this script reaches torchrun, which hands it to the ranks, which write a checkpoint.
exec .venv/bin/torchrun --standalone --max-restarts "${MAX_RESTARTS:-0}" --nproc-per-node "$NPROC" -m rec.train "$@"
