# Sourced by the other scripts of this folder: --help, the repository root, and what this machine has.

# `script --help` prints the comment at the top of that script.
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints the number of GPUs that this process may use.
count_gpus() {
    if [[ "${REC_DEVICE:-}" == cpu ]]; then
        echo 0
    elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES"
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    fi
}

# Sets NPROC, ranks on this machine (one a GPU, else 2), and OMP_NUM_THREADS, so that the ranks share the cores instead
# of fighting for them. What the caller has set stays.
set_ranks() {
    local gpus cores
    gpus=$(count_gpus)
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    if [[ -z "${NPROC:-}" ]]; then NPROC=$((gpus > 0 ? gpus : 2)); fi
    if [[ ! "$NPROC" =~ ^[1-9][0-9]*$ ]]; then
        echo "NPROC is '$NPROC', expected the number of ranks on this machine, 1 or more: NPROC=2 $0" >&2
        exit 2
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}"
}

# Prints a command as it could be typed, then runs it.
run() {
    printf '\n+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

# supervise COMMAND...: runs torchrun as a child and ends with its exit code, but with 75 (EX_TEMPFAIL: start me again, I
# go on) where the ranks were told to stop and have written their checkpoint: torchrun has no way to hand their code on,
# so they leave the step in the file REC_STOPPED_FILE. SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal is gone) stop it:
# torchrun gets SIGTERM, and kills ranks that are not done after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds, 150 unless set.
supervise() {
    local code child=
    interrupted=no stopping=no
    trap 'interrupted=yes; stop' TERM INT HUP
    REC_STOPPED_FILE=$(mktemp "${TMPDIR:-/tmp}/rec-stopped.XXXXXX")
    trap 'rm -f "$REC_STOPPED_FILE"' EXIT
    export REC_STOPPED_FILE TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}"
    set -m # a process group of its own: Ctrl-C must not reach torchrun a second time, from the terminal
    "$@" &
    child=$!
    if [[ $interrupted == yes ]]; then stop; fi
    while # a trapped signal ends `wait` with a code that is not the child's
        interrupted=no code=0
        wait "$child" || code=$?
        [[ $interrupted == yes ]]
    do :; done
    if [[ $code -ne 0 && -s $REC_STOPPED_FILE ]]; then
        echo "$(basename "$0"): stopped at step $(<"$REC_STOPPED_FILE"), checkpoint written; the same command goes on (75)"
        code=75
    fi
    exit "$code"
}

# Hands SIGTERM on, once: torchrun waits for its ranks again at a second signal, and leaves them behind at a third. In a
# trap a bare `return` gives the code of what the signal interrupted, which would end the script.
stop() {
    if [[ -z $child || $stopping == yes ]]; then return 0; fi
    stopping=yes
    echo "$(basename "$0"): told to stop; the ranks have $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s to write a checkpoint" >&2
    kill -TERM "$child" 2>/dev/null || true
}
