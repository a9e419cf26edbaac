#!/usr/bin/env bash
# Lint and the default tests; with --slow the slow tests too. Further arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
marker=(-m "not slow")
if [ "${1:-}" = --slow ]; then
    marker=()
    shift
fi
ruff check .
ruff format --check .
python scripts/config_reference.py --check
python -m pytest -n 2 --dist loadfile "${marker[@]}" "$@"
# Triton decides at its import whether it interprets: a process of its own.
TRITON_INTERPRET=1 exec python -m pytest -n 2 --dist loadfile "${marker[@]}" tests/interpreter
