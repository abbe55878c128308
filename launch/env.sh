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
