#!/usr/bin/env bash
# Coverage-guided fuzzing of the C++ of csrc/host/vtrain under the address and undefined-behaviour sanitizers.
#     scripts/fuzz.sh [--seconds 60] [TARGET...]        a target is a csrc/fuzz/TARGET.cpp; without one all are run
# Starts from csrc/fuzz/corpus, keeps what it finds in .fuzz/ and goes on from there the next time. Exit 1 on a crash.
# CXX names the compiler: clang++ with libFuzzer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

known=()
for source in csrc/fuzz/*.cpp; do
    name="$(basename "$source" .cpp)"
    [ "$name" = driver ] || known+=("$name")
done
seconds=60 targets=()
while [ $# -gt 0 ]; do
    case "$1" in
        --seconds)
            seconds="${2:-}"
            [[ "$seconds" =~ ^[1-9][0-9]*$ ]] || fail "--seconds is '$seconds'; expected a number >= 1"
            shift
            ;;
        *)
            [[ " ${known[*]} " = *" $1 "* ]] || fail "no target $1; expected some of ${known[*]}"
            targets+=("$1")
            ;;
    esac
    shift
done
[ ${#targets[@]} -gt 0 ] || targets=("${known[@]}")

build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
cxx="${CXX:-clang++}"
flags=(-std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc/host)
echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' >"$build/probe.cpp"
"$cxx" "${flags[@]}" -fsanitize=fuzzer "$build/probe.cpp" -o "$build/probe" 2>/dev/null ||
    fail "$cxx cannot build with libFuzzer; on Debian and Ubuntu: apt install clang (or set CXX)"

echo "== compiling ${targets[*]}"
# What a fuzzer can drive is the plain C++: all sources that know nothing of Python.
mapfile -t sources < <(grep -L pybind11 csrc/host/vtrain/*.cpp)
for source in "${sources[@]}"; do
    "$cxx" "${flags[@]}" -fsanitize=fuzzer-no-link -c "$source" -o "$build/$(basename "$source" .cpp).o"
done
for target in "${targets[@]}"; do
    "$cxx" "${flags[@]}" -fsanitize=fuzzer "csrc/fuzz/$target.cpp" "$build"/*.o -o "$build/$target"
done

# What was freed is kept for a while to catch its use; more than 32 MB of small pieces costs gigabytes.
export ASAN_OPTIONS="quarantine_size_mb=32:${ASAN_OPTIONS:-}"
crashed=0
for target in "${targets[@]}"; do
    kept=".fuzz/$target" log=".fuzz/$target.log" folders=()
    mkdir -p "$kept"
    [ ! -d "csrc/fuzz/corpus/$target" ] || folders=("csrc/fuzz/corpus/$target")
    status=0
    nice -n 19 "$build/$target" -max_total_time="$seconds" -max_len=4096 -timeout=30 -use_value_profile=1 \
        -print_final_stats=1 -artifact_prefix=".fuzz/$target-" "$kept" "${folders[@]}" >"$log" 2>&1 || status=$?
    runs="$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")"
    edges="$(grep -ao 'cov: [0-9]*' "$log" | tail -n 1 | tr -dc 0-9 || true)"
    inputs="$(find "$kept" -type f | wc -l)"
    echo "$target: ${runs:-0} runs in $seconds s, ${edges:-0} edges covered, $inputs inputs kept"
    [ "$status" -eq 0 ] && continue
    crashed=1
    grep -a -E '^(claim broken|SUMMARY|==[0-9]+== *ERROR)|runtime error' "$log" | head -n 3 >&2 || true
    echo "$target: crashed on $(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1); the whole report: $log" >&2
done
exit "$crashed"
