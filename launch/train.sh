#!/usr/bin/env bash
# Trains on this machine, one rank a GPU (2 ranks without GPUs). Arguments are overrides of the configuration.
#
#   ./launch/train.sh experiment=quickstart run_dir=runs/mine trainer.max_steps=1000
#   ./launch/train.sh -m experiment=quickstart seed=0,1,2     a sweep: one torchrun a job, one after the other
#   .venv/bin/python -m rec.train --help                      what can be overridden
#
#   NPROC=2           ranks
#   MAX_RESTARTS=0    times that torchrun starts all ranks again after one died; they go on from the last checkpoint
#
# On SIGTERM or Ctrl-C the ranks write a checkpoint and this script ends with 75; the same command goes on. They have
# 150 s for it (TORCH_ELASTIC_SHUTDOWN_TIMEOUT), then torchrun kills them.
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
supervise .venv/bin/torchrun --standalone --max-restarts "${MAX_RESTARTS:-0}" --nproc-per-node "$NPROC" -m rec.train "$@"
