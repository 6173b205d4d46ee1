#!/usr/bin/env bash
# Everything that needs a GPU, in one command, offline: benchmarks/on_gpu.sh FOLDER [--dry-run]
#
# Builds what there is to build, runs the tests on the GPU, compute-sanitizer on the ops, and all benchmarks, within 9
# minutes. Needs Python with torch, triton, transformers, pytest and pytest-benchmark; nothing of memkernel installed.
# A copy of the tree without .git needs MEMKERNEL_COMMIT to say which commit it is.
# FOLDER gets log.txt, results.jsonl, report.txt and summary.txt. A part that fails or runs out of time is reported there
# and the rest goes on; the exit status is the number of parts that failed. --dry-run goes through the same parts on a
# CPU, at tiny shapes and without compute-sanitizer.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: benchmarks/on_gpu.sh FOLDER [--dry-run]}" && cd "$1" && pwd)
device=cuda
[ "${2:-}" = --dry-run ] && device=cpu
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=0
: >"$out/log.txt"
: >"$out/summary.txt"

part() { # part NAME SECONDS COMMAND...: run it, log it, go on
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  printf '\n== %s: %s\n' "$name" "$*" >>"$out/log.txt"
  timeout --kill-after=10 "$limit" "$@" >>"$out/log.txt" 2>&1
  status=$?
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="out of time ($limit s)" ;;
    *) verdict="FAILED (exit $status)" ;;
  esac
  [ $status = 0 ] || failed=$((failed + 1))
  printf '%-24s %-24s %4d s\n' "$name" "$verdict" $((SECONDS - began)) | tee -a "$out/summary.txt"
}

kernels=(tests/test_triton.py tests/test_triton_attention.py tests/test_cuda_write.py)
on_host="compiles or host_threads or races"
sanitized="every_path or writes_what_the_reference or draws_what_the_reference or on_a_device"
if [ $device = cuda ]; then
  part "gpu" 10 nvidia-smi
  part "build" 60 "$python" setup.py build_ext --inplace
  part "kernels" 30 "$python" -c "from memkernel import cuda, native, ops
assert not (cuda.WHY_NOT or native.WHY_NOT or ops.WHY_NO_TRITON), (cuda.WHY_NOT, native.WHY_NOT, ops.WHY_NO_TRITON)"
  part "tests" 120 "$python" -m pytest -q tests/test_cuda.py "${kernels[@]}" -k "not ($on_host)"
else
  part "build" 120 "$python" setup.py build_ext --build-lib "$out/build" --build-temp "$out/build"
  part "tests" 120 "$python" -m pytest -q tests/test_ops.py
fi
if [ $device = cuda ] && command -v compute-sanitizer >>"$out/log.txt"; then
  for tool in memcheck racecheck; do
    part "$tool" 50 compute-sanitizer --tool $tool --error-exitcode 1 --launch-timeout 0 \
      "$python" -m pytest -q "${kernels[@]}" -k "$sanitized"
  done
else
  printf '%-24s not run: no compute-sanitizer, or no GPU\n' sanitizer | tee -a "$out/summary.txt"
fi
shape=8b
[ $device = cpu ] && shape=tiny
# What matters most comes first, in case time runs out: each row is written when it is known.
files=(benchmarks/bench_{memory_attention,read,update,small_ops,document,memory_file,cold_start}.py)
part "benchmarks" 240 "$python" -m pytest -q "${files[@]}" --benchmark --shape $shape \
  --device $device --results "$out/results.jsonl"
part "report" 20 "$python" -m benchmarks.report --results "$out/results.jsonl" --text "$out/report.txt"
echo "$failed parts failed; log, rows and report in $out"
exit $failed
