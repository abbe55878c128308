#!/usr/bin/env bash
# Makes .venv with everything that training and the tests need. Quick when nothing has changed.
#
#   ./launch/setup.sh            install, or do nothing if .venv fits pyproject.toml
#   ./launch/setup.sh --fresh    delete .venv and install again
#
#   PYTHON=python3.12    the Python to use; default: that of .venv, else the newest of 3.13, 3.12 and 3.11 on PATH
#   REC_DEVICE=cuda      cpu or cuda; default: cuda where nvidia-smi finds a GPU
#
# pip's own settings hold (PIP_INDEX_URL, PIP_PROXY, PIP_CERT, PIP_DEFAULT_TIMEOUT ...). On a CPU machine pip may take a
# build of torch with gigabytes of CUDA libraries; it works, and a pip set to an index of CPU builds spares the download.
set -euo pipefail
. "$(dirname "$0")/env.sh"

stamp=.venv/setup-stamp
venv_python=.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip_output=--quiet # for a log; a person at a terminal sees the bars
if [[ -t 1 ]]; then pip_output=--progress-bar=on; fi

say() { echo "[setup] $*"; }

# fail WHAT [ADVICE...]
fail() {
    echo "[setup] FAILED: $1" >&2
    if [[ $# -gt 1 ]]; then printf '[setup]   %s\n' "${@:2}" >&2; fi
    exit 1
}

# step WHAT COMMAND...: runs a step; what it downloaded stays in pip's cache, so running again goes on from there.
step() {
    say "$1"
    "${@:2}" || fail "$1" \
        "run ./launch/setup.sh again once the cause above is gone; what is installed is kept" \
        "if a download failed: behind a proxy set HTTPS_PROXY (and PIP_CERT for its certificate), with a mirror set" \
        "PIP_INDEX_URL, on a slow line PIP_DEFAULT_TIMEOUT=180"
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

find_python() {
    local candidate candidates=(python3.13 python3.12 python3.11 python3)
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no usable Python: tried ${candidates[*]}, need 3.11, 3.12 or 3.13" \
        "install one, or name it: PYTHON=/path/to/python3.12 ./launch/setup.sh"
}

find_device() {
    local device=${REC_DEVICE:-}
    if [[ -z "$device" ]]; then device=$([[ $(count_gpus) -gt 0 ]] && echo cuda || echo cpu); fi
    [[ "$device" == cpu || "$device" == cuda ]] || fail "REC_DEVICE is '$device', expected cpu or cuda"
    echo "$device"
}

venv_version() { sed -n 's/^version = //p' .venv/pyvenv.cfg 2>/dev/null || true; }

# Everything that the installation depends on; the root, because scripts in .venv hold absolute paths.
wanted_state() { echo "$device python $(venv_version) in $PWD for pyproject.toml $(cksum <pyproject.toml)"; }

other_python() {
    [[ -n "${PYTHON:-}" && "$("$PYTHON" -c 'import platform; print(platform.python_version())')" != "$(venv_version)" ]]
}

up_to_date() {
    [[ -f $stamp && -x $venv_python && "$(<$stamp)" == "$(wanted_state)" ]] && ! other_python
}

# A second setup in another terminal waits here. Where flock is missing or refused, nobody waits.
lock() { { exec 9<pyproject.toml && flock 9; } 2>/dev/null || true; }

make_venv() {
    if supported "$venv_python" && "$venv_python" -m pip --version >/dev/null 2>&1 && ! other_python; then return; fi
    local python
    python=$(find_python)
    step "make .venv with $python (on Debian and Ubuntu this needs the package python3-venv)" \
        "$python" -m venv --clear .venv
}

# fbgemm-gpu and fbgemm-gpu-cpu share one folder: with both in, the last one wins, and removing one breaks the other.
remove_other_device() {
    local other=fbgemm-gpu
    if [[ $device == cuda ]]; then other=fbgemm-gpu-cpu; fi
    if "$venv_python" -m pip show --quiet "$other" >/dev/null 2>&1; then
        step "remove $other and its torch" "$venv_python" -m pip uninstall --quiet --yes fbgemm-gpu fbgemm-gpu-cpu torch
    fi
}

# Prints the pinned requirement of a package, from pyproject.toml.
pinned() {
    "$venv_python" - "$1" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    pyproject = tomllib.load(file)
known = pyproject["project"]["dependencies"] + pyproject["dependency-groups"]["torchrec"]
print(next(requirement for requirement in known if requirement.startswith(sys.argv[1] + "==")))
PYTHON
}

install() {
    local pip=("$venv_python" -m pip install "$pip_output") torch torchrec
    torch=$(pinned torch)
    torchrec=$(pinned torchrec)
    # Where builds for both are on offer, pip prefers the one that is labelled +cpu.
    if [[ $device == cuda ]]; then torch+=",!=${torch#torch==}+cpu"; fi
    step "install $torch ($device)" "${pip[@]}" "$torch"
    step "install rec and what it needs (this takes a minute)" "${pip[@]}" -e ".[$device,test]"
    step "install $torchrec" "${pip[@]}" --no-deps "$torchrec"
}

case "${1:-}" in
    "") fresh=no ;;
    --fresh) fresh=yes ;;
    *) fail "unknown argument '$1', expected --fresh, --help or nothing" ;;
esac
device=$(find_device)
if [[ $fresh == yes ]]; then rm -f $stamp; fi
if ! up_to_date; then lock; fi
if up_to_date; then
    say ".venv is up to date ($device, Python $(venv_version))"
    exit 0
fi
rm -f $stamp # from here on .venv is half done until the last line
if [[ $fresh == yes ]]; then step "delete .venv" rm -rf .venv; fi
make_venv
remove_other_device
install
say "check the installation"
"$venv_python" -m rec.doctor || fail "the installation is not sound: see the remedies above"
wanted_state >$stamp
say "done: .venv ($device, Python $(venv_version)) in $SECONDS s"
