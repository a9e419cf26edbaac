# Sourced by the other scripts: makes .venv with the pinned dependencies and an editable install, or reuses it, and
# compiles the host extensions when their sources changed. Leaves the shell in the root of the checkout, .venv first
# in PATH. PYTHON names the interpreter to build on; where packages come from is pip's own configuration.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
unset PYTHONPATH PYTHONHOME

fail() {
    echo "error: $*" >&2
    exit 2
}

# The interpreter below any virtual environment: an active .venv cannot be asked to replace itself.
base_python() {
    local name names=(.venv/bin/python python3 python3.12 python3.11 python3.13)
    [ -z "${PYTHON:-}" ] || names=("$PYTHON")
    for name in "${names[@]}"; do
        "$name" - 2>/dev/null <<'END' && return
import os, sys
assert sys.version_info >= (3, 11)
print(os.path.realpath(sys._base_executable))
END
    done
    name="${PYTHON:-python3}"
    fail "Python >= 3.11 is needed; $name is $("$name" -V 2>/dev/null || echo missing) (set PYTHON)"
}

check_tools() {
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv (or set PYTHON)"
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        fail "$python comes without its headers; on Debian and Ubuntu: apt install python3-dev (or set PYTHON)"
    command -v "${CXX:-g++}" >/dev/null || fail "g++ is needed to compile the host extensions (or set CXX)"
}

# pip, of whose output only the larger downloads and what delays them are shown; the rest goes to .venv/pip.log.
pip_install() {
    .venv/bin/python -m pip --disable-pip-version-check install -c scripts/constraints.txt "$@" 2>&1 |
        tee .venv/pip.log | sed -u -n -E -e 's#https?://[^ ]*/##' -e '/^WARNING: Retrying/p' \
        -e 's/^ *((Downloading|Using cached) .*[0-9] [MG]B\))$/   \1/p' \
        -e 's/^Installing collected packages:.*/   unpacking/p' && return
    tail -n 40 .venv/pip.log >&2
    fail "pip could not install $*"
}

install_all() {
    echo "   tools that build"
    pip_install setuptools pybind11 ninja
    echo "   torch"
    pip_install torch numpy
    # A triton that torch brings is kept.
    .venv/bin/python -c 'import triton' 2>/dev/null || pip_install triton==3.6.0
    echo "   vtrain: the other dependencies, and half a minute of compiling"
    pip_install --no-build-isolation -e '.[dev]'
}

extensions_are_current() {
    local suffix
    suffix="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
    [ "$(cat .venv/compiled 2>/dev/null)" = "$sources" ] &&
        [ -f "vtrain/_host$suffix" ] && [ -f "kernels/vkernels/_host$suffix" ]
}

# One script at a time: the lock is on this file and ends with the descriptor.
exec 9<scripts/env.sh
if command -v flock >/dev/null && ! flock -n 9; then
    echo "== waiting for another script that prepares .venv"
    flock 9
fi

python="$(base_python)"
where="$root $python $("$python" -V)"
wanted="$(cat pyproject.toml setup.py scripts/constraints.txt scripts/env.sh | cksum)"
sources="$(find csrc setup.py -type f -exec cksum {} + | LC_ALL=C sort | cksum)"

# .venv/installed is there only while the environment is whole. One that was half made, that another Python made or
# that was copied here is made anew; one with other versions is brought up to date.
if [ "$(cat .venv/installed 2>/dev/null)" != "$where $wanted" ]; then
    check_tools
    case "$(cat .venv/installed 2>/dev/null)" in
        "$where "*) echo "== updating .venv" ;;
        *)
            echo "== making .venv with $("$python" -V) (the first time this downloads torch)"
            rm -rf .venv
            "$python" -m venv .venv
            ;;
    esac
    rm -f .venv/installed
    install_all
    echo "$sources" >.venv/compiled
    echo "$where $wanted" >.venv/installed
elif ! extensions_are_current; then
    check_tools
    echo "== compiling the host extensions"
    # Without the mark an earlier compilation did not end, and its objects cannot be trusted.
    [ -f .venv/compiled ] && force="" || force=--force
    rm -f .venv/compiled
    .venv/bin/python setup.py -q build_ext --inplace $force
    echo "$sources" >.venv/compiled
fi
exec 9<&-
export VIRTUAL_ENV="$root/.venv" PATH="$root/.venv/bin:$PATH"
