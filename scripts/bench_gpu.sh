#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and one time budget, without a network:
#
#   bash scripts/bench_gpu.sh [--dry-run] [--steps build,check,sanitizer,kernels,e2e,decode,table] [SECONDS=540]
#
# The extensions, then correctness of every op, then memory and race checks of small cases, then the kernels' benches,
# then training steps, then decoding, then the table of the fastest backends. Each has its share of the time that is
# left; what fails or runs out of it does not stop the next. All that is found goes to OUT (default bench/results/<gpu>),
# rows as soon as they are known. --dry-run: the same on the CPU, at small sizes. PYTHON names the interpreter (default
# python3), WHEELS a folder of wheels that are put on its path (peers that the machine lacks), ONLY a regular expression
# for the cases of kernels and training steps, VTRAIN_COMMIT what a copy was taken of.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cuda
steps=build,check,sanitizer,kernels,e2e,decode,table
budget=540
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) device=cpu ;;
        --steps) steps="$2" && shift ;;
        [1-9]*) budget="$1" ;;
        *) echo "error: $1; expected --dry-run, --steps LIST or seconds" >&2 && exit 2 ;;
    esac
    shift
done
python="${PYTHON:-python3}"
start=$SECONDS
failed=""
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1

if [ "$device" = cuda ]; then
    name="$("$python" -c 'import re, torch
torch.cuda.is_available() or exit(1)
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')" || {
        echo "error: $python finds no GPU (--dry-run works without one)" >&2
        exit 2
    }
else
    name=cpu
fi
out="${OUT:-bench/results/$name}"
mkdir -p "$out"

left() { echo $((budget - SECONDS + start)); }
wanted() { [[ ",$steps," = *",$1,"* ]]; }

# step SHARE NAME COMMAND...: at most SHARE percent of the time that is left; the log lies beside the rows. A command
# that has SECONDS among its words is told an eighth less, and what importing takes: it ends by itself and says what it
# left out.
step() {
    local limit=$(($(left) * $1 / 100)) label="$2"
    shift 2
    if [ "$limit" -lt 6 ]; then
        echo "== $label: no time left"
        failed="$failed $label"
        return
    fi
    echo "== $label (at most $limit s)"
    timeout --kill-after=10 "$limit" "${@/#SECONDS/$((limit * 7 / 8 > 16 ? limit * 7 / 8 - 8 : limit / 2))}" 2>&1 | tee "$out/$label.log"
    local code="${PIPESTATUS[0]}"
    if [ "$code" -eq 124 ] && [ -n "${PARTLY:-}" ]; then
        echo "== $label: the time ended before the checks did; nothing was found until then"
    elif [ "$code" -ne 0 ]; then
        echo "== $label: exit code $code"
        failed="$failed $label"
    fi
}

if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl &&
        export PYTHONPATH="$site:$PYTHONPATH"
fi
[ "$device" = cpu ] || nvidia-smi | tee "$out/nvidia-smi.log"

wanted build && step 30 build "$python" setup.py -q build_ext --inplace

# Eight processes compile side by side, which leaves the compiled kernels for the benches, too.
check=("$python" -m vkernels.check --device "$device")
some=(--jobs 8 --budget SECONDS)
[ "$device" = cuda ] || some=(--quick)
wanted check && OMP_NUM_THREADS=2 step 35 check "${check[@]}" "${some[@]}" --json "$out/check.json"

# Out-of-bounds accesses and races, on small cases, with every tensor in an allocation of its own.
ops=(--op varlen_attention --op vq_nearest --op embed --op decode_attention --op linear_cross_entropy --op rms_norm)
if wanted sanitizer && [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        PARTLY=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 step 10 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${check[@]}" --quick --backend triton "${ops[@]}"
    done
elif wanted sanitizer; then
    echo "== sanitizer: left out (it needs a GPU and compute-sanitizer)"
fi

bench=("$python" bench/run.py --device "$device" --out "$out" --only "${ONLY:-}")
[ "$device" = cuda ] || bench+=(--without torch.compile) # it takes minutes to compile for a CPU, and proves nothing here
wanted kernels && step 65 kernels "${bench[@]}" --suite kernels --budget SECONDS
wanted e2e && step 60 e2e "${bench[@]}" --suite e2e --budget SECONDS
decode=("$python" bench/decode.py --device "$device" --out "$out")
[ "$device" = cuda ] || decode+=(--only 40m --without "HF static, compiled")
wanted decode && step 90 decode "${decode[@]}" --budget SECONDS
wanted table && [ "$device" = cuda ] && step 100 table "${bench[@]}" --table

echo "== $out after $((SECONDS - start)) s${failed:+; failed:$failed}"
[ -z "$failed" ]
