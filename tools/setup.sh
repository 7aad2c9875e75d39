#!/usr/bin/env bash
# Makes .venv ready in this checkout: system packages, torch, fast_essl (editable), FFCV; all pinned by constraints.txt.
# Called by `make setup`. PYTHON chooses the interpreter; TORCH_INDEX another index for torch.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
ready=$venv/.ready # there once an installation is complete

fail() {
    echo "setup: error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "${PYTHON:-python3} is not Python 3.11 or newer; install one and name it: make setup PYTHON=python3.11"
}

# What is missing, as Debian's package names; found by trying, so that a complete machine needs no apt and no root.
missing_packages() {
    local python=$1 version packages=()
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=("$version-venv")
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
        || packages+=("$version-dev")
    command -v pkg-config >/dev/null || packages+=(pkg-config)
    if command -v g++ >/dev/null; then
        compiles opencv2/core.hpp opencv_core || packages+=(libopencv-core-dev)
        compiles opencv2/imgproc.hpp opencv_imgproc || packages+=(libopencv-imgproc-dev)
        compiles turbojpeg.h turbojpeg || packages+=(libturbojpeg0-dev)
    else
        packages+=(g++ libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev)
    fi
    echo "${packages[*]}"
}

compiles() { # HEADER LIBRARY: can a program include and link it
    printf '#include <%s>\nint main() {}\n' "$1" \
        | g++ -x c++ -I/usr/include/opencv4 - "-l$2" -o /dev/null 2>/dev/null
}

install_packages() {
    local sudo=() command
    command="apt-get install -y --no-install-recommends $*"
    command -v apt-get >/dev/null || fail "missing system packages, and no apt here; install what Debian calls: $*"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "missing system packages, and no sudo here; run as root: $command"
        sudo=(sudo DEBIAN_FRONTEND=noninteractive)
    fi
    echo "setup: installing system packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    "${sudo[@]}" apt-get update -qq </dev/null || fail "apt-get update failed; run as root: $command"
    # shellcheck disable=SC2086  # the command is a list of words
    "${sudo[@]}" $command -qq </dev/null >/dev/null || fail "apt-get failed; run as root: $command"
}

# PyPI's torch carries gigabytes of CUDA: a machine without a GPU takes PyTorch's CPU build where it can be reached.
torch_index() {
    local cpu=https://download.pytorch.org/whl/cpu
    if [ -n "${TORCH_INDEX:-}" ]; then
        echo "--extra-index-url=$TORCH_INDEX"
    elif ! command -v nvidia-smi >/dev/null \
        && "$venv/bin/python" -c "import urllib.request as r; r.urlopen('$cpu/torch/', timeout=10)" 2>/dev/null; then
        echo "--extra-index-url=$cpu"
    fi
}

python=$(find_python)
packages=$(missing_packages "$python")
# shellcheck disable=SC2086  # a list of words
[ -z "$packages" ] || install_packages $packages

# An installation that was interrupted, or whose interpreter is gone, is made anew: pip takes half a package for a whole one.
if [ ! -e $ready ] || ! $venv/bin/python -c '' 2>/dev/null; then
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv --clear $venv || fail "$python -m venv failed; its output is above"
fi
rm -f $ready

pip() {
    local command=$1
    shift
    $venv/bin/python -m pip --disable-pip-version-check "$command" --quiet --constraint constraints.txt "$@" </dev/null \
        || fail "pip $command $* failed; its output is above"
}

echo "setup: installing fast_essl and its pinned dependencies into $venv (some minutes the first time)"
pip install pip setuptools wheel
# shellcheck disable=SC2046  # nothing or one option
pip install torch $(torch_index)
# setuptools warns that folders here are importable; they are meant to be.
PYTHONWARNINGS=ignore pip install --no-build-isolation --editable '.[dev]'

# --no-deps: FFCV names opencv-python, which wants libGL. No cache: what it was linked with may have changed.
if ! $venv/bin/python -c 'import ffcv' 2>/dev/null; then
    echo "setup: building FFCV"
    pip install opencv-python-headless
    PKG_CONFIG_PATH=$PWD/tools/ffcv CPATH=$PWD/tools/ffcv:/usr/include/opencv4 \
        pip install --no-deps --no-build-isolation --no-cache-dir --force-reinstall ffcv
    $venv/bin/python -W ignore -c 'import ffcv' || fail "FFCV was built but cannot be imported; the reason is above"
fi
touch $ready
echo "setup: $venv is ready"
