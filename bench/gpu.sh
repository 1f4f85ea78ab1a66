#!/usr/bin/env bash
# Runs everything that needs a GPU, in less than ten minutes, and writes one JSON file:
#
#     bench/gpu.sh [--experiments] [--device cuda:0|simcuda] [--out FILE.json] [--venv DIR]
#                  [--limit SECONDS]
#
# Builds and installs the package into an environment of its own (temporary, or --venv, which is
# reused if it exists), runs the GPU's benches, then the tests on the device in the remaining time.
# With --experiments it first runs the experiments of parts/gpu/experiments (at most 8 minutes) and
# a short switch.py; the other benches and the tests then have what is left of the time.
# Needs no network if the interpreter has the packages for the build (pybind11, setuptools) and for
# the tests (pytest, hypothesis, numpy). The exit status is 0 if every step ran to its end. The file
# lists all failures; it is rewritten after each step.
set -euo pipefail

# Makes an environment that also sees the packages of the interpreter, even if the interpreter
# itself belongs to a virtual environment.
environment() {
  local packages
  [ -x "$venv/bin/python" ] || "$python" -m venv --without-pip "$venv"
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
    | grep -vxF "$packages" >"$packages/inherited.pth" || true
  "$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m ensurepip
}

# Builds from a copy, so that the tree stays clean and no earlier build output is used.
build() {
  local pip=("$venv/bin/python" -m pip --retries 1 --timeout 10 install -q)
  mkdir "$work/tree"
  tar -C "$root" --exclude='*.so' --exclude=__pycache__ -cf - \
    csrc warmserve_rt setup.py pyproject.toml README.md LICENSE | tar -C "$work/tree" -xf -
  WARMSERVE_BUILD_JOBS=$(nproc)
  export WARMSERVE_BUILD_JOBS
  "${pip[@]}" --no-build-isolation --no-deps --force-reinstall "$work/tree" \
    || "${pip[@]}" "$work/tree"
  (cd "$work" && "$venv/bin/python" -c 'import hypothesis, numpy, pytest, safetensors') \
    || "${pip[@]}" "$work/tree[test,bench]"
}

# Runs the tests of the device, each file in a process of its own for at most two minutes, so that a
# test that breaks the device's context or hangs does not affect other files. Test failures are
# results; any other exit status of pytest is an error.
run_tests() {
  local file status worst=0 pattern='device: Device'
  [ "$1" != simcuda ] || pattern+='|simulated_cuda'
  cd "$work"  # not the tree, because the package there is not built
  for file in "$root"/tests/*/test_*.py; do
    grep -qE "$pattern" "$file" || continue
    status=0
    timeout --foreground -k 5 -s INT 120 \
      "$venv/bin/python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" \
      --rootdir "$root" -k "$1" --junitxml "$work/tests-$(basename "$file" .py).xml" "$file" \
      || status=$?
    case $status in
      0 | 1 | 5) ;;  # all passed; some failed; the file has no test for this device
      2) return 2 ;;  # interrupted: the time is over
      *) worst=$status ;;
    esac
  done
  return "$worst"
}

# The script calls itself for some steps, so that a time limit can end them. They read their
# settings from environment variables.
case ${1:-} in
  --environment) environment; exit ;;
  --build) build; exit ;;
  --tests) run_tests "$2"; exit ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
device='' out='' venv='' limit=570
benches=(gpu driver_ops kernels)
while [ $# -gt 0 ]; do
  case $1 in
    --experiments) benches=(experiments switch "${benches[@]}"); shift; continue ;;
    --device) device=$2 ;;
    --out) out=$2 ;;
    --venv) venv=$2 ;;
    --limit) limit=$2 ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
  shift 2
done

work=$(mktemp -d "${TMPDIR:-/tmp}/warmserve-gpu-XXXXXX")
trap 'rm -rf "$work"' EXIT
python=$(command -v python3) || { echo "python3 is missing" >&2; exit 1; }
out=$(realpath -m "${out:-gpu.json}")

if [ -z "$device" ]; then
  device=simcuda
  "$python" - <<'PY' && device=cuda:0
import ctypes, sys
try:
    cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    sys.exit(cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0)
except OSError:
    sys.exit(1)
PY
fi
if [ "$device" = simcuda ]; then
  printf '%s\n' '****' '**** NO GPU: this is the simulated device; no number is from a GPU' '****'
fi

# Runs a step with a limit in seconds, at most the script's remaining time, and records its status.
ok=0
step() {
  local name=$1 most=$2 begin=$SECONDS status=0
  shift 2
  [ "$most" -le $((limit - SECONDS)) ] || most=$((limit - SECONDS))
  printf '\n=== %s (after %d s, for at most %d s)\n' "$name" "$SECONDS" "$most"
  if [ "$most" -gt 0 ]; then
    # The parent process may ignore interrupts; pytest and the benches must receive them.
    timeout -k 15 -s INT "$most" env --default-signal=INT "$@" 2>&1 | tee "$work/$name.log" || status=${PIPESTATUS[0]}
  else
    status=124
  fi
  printf '%s\t%d\t%d\n' "$name" "$status" $((SECONDS - begin)) >>"$work/steps.tsv"
  "$python" "$root/bench/parts/gpu/merge.py" "$work" "$device" "$out"
  return "$status"
}

venv=$(realpath -m "${venv:-$work/venv}")
export venv root work python
self=$root/bench/gpu.sh

step environment 60 "$self" --environment || exit 1
step build "$limit" "$self" --build || exit 1
cd "$work"
run=("$venv/bin/python" -u)
for bench in "${benches[@]}"; do
  script=$root/bench/$bench.py arguments=(--json "$work/$bench.json")
  case $device-$bench in
    *-experiments) script=$root/bench/gpu.py arguments+=(--experiments) ;;
    simcuda-switch) arguments+=(--share 0) ;;  # one block of each model
    *-switch) arguments+=(--rounds 2) ;;
  esac
  [ -e "$script" ] || continue
  case $device-$bench in
    simcuda-*) most=$limit ;;  # the machine may be slow
    *-experiments) most=500 ;;
    *-gpu) most=330 ;;
    *) most=90 ;;
  esac
  grep -q 'args.device' "$script" && arguments+=(--device "$device")
  step "$bench" "$most" "${run[@]}" "$script" "${arguments[@]}" || ok=1
done
step tests "$limit" "$self" --tests "$device" || ok=1

printf '\n%s\n' "$out"
exit "$ok"
