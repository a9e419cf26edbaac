# Sourced by the other scripts: makes .venv with the pinned dependencies and an editable install, or reuses it.
# PYTHON names the interpreter (default python3).

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is $("$python" -V 2>&1); Python >= 3.11 is needed (set PYTHON)" >&2
    exit 2
}
command -v g++ >/dev/null || { echo "error: g++ is needed to build the host extension" >&2; exit 2; }

fingerprint="$(cat pyproject.toml setup.py scripts/constraints.txt scripts/env.sh | cksum)"
if [ "$(cat .venv/.installed 2>/dev/null)" != "$fingerprint" ]; then
    echo "== making .venv (the first time this downloads torch)"
    rm -rf .venv
    "$python" -m venv .venv
    pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@" -c scripts/constraints.txt; }
    pip install setuptools wheel pybind11 ninja
    # torch by its exact version first: a triton that it brings is kept, and where it brings none 3.6.0 is added.
    pip install torch==2.13.0 numpy
    .venv/bin/python -c 'import triton' 2>/dev/null || pip install triton==3.6.0
    pip install --no-build-isolation -e '.[dev]'
    echo "$fingerprint" >.venv/.installed
else
    # Rebuilds only what changed.
    .venv/bin/python setup.py -q build_ext --inplace
fi
export PATH="$root/.venv/bin:$PATH"
