#!/usr/bin/env bash
# Everything that needs a GPU, in one command, offline: benchmarks/on_gpu.sh FOLDER [--dry-run]
#
# Builds what there is to build, runs the tests on the GPU, compute-sanitizer on the ops, and all benchmarks, within 9
# minutes. Needs Python with torch, triton, transformers, pytest and pytest-benchmark; nothing of memkernel installed.
# A copy of the tree without .git needs MEMKERNEL_COMMIT to say which commit it is.
# FOLDER gets results.jsonl, report.txt, summary.txt and each part's log. A part that fails or runs out of time is
# reported there and the rest goes on; the exit status is the number of parts that failed. --dry-run goes through the
# same parts on a CPU, at tiny shapes and without compute-sanitizer.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: benchmarks/on_gpu.sh FOLDER [--dry-run]}" && cd "$1" && pwd)
device=cuda
[ "${2:-}" = --dry-run ] && device=cpu
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
: >"$out/summary.txt"

part() { # part NAME SECONDS COMMAND...: run it, log it, go on
  local name=$1 limit=$2 began=$SECONDS status verdict
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="out of time ($limit s)" ;;
    *) verdict="FAILED (exit $status)" ;;
  esac
  printf '%-24s %-24s %4d s\n' "$name" "$verdict" $((SECONDS - began)) | tee -a "$out/summary.txt"
}

kernels=(tests/test_triton.py tests/test_triton_attention.py tests/test_cuda_write.py)
on_host="compiles or host_threads or races"
sanitized="every_path or writes_what_the_reference or draws_what_the_reference or on_a_device"
if [ $device = cuda ]; then
  part gpu 10 nvidia-smi
  part build 60 "$python" setup.py build_ext --inplace
  part kernels 30 "$python" -c "from memkernel import cuda, native, ops
assert not (cuda.WHY_NOT or native.WHY_NOT or ops.WHY_NO_TRITON), (cuda.WHY_NOT, native.WHY_NOT, ops.WHY_NO_TRITON)"
  # Side by side, for most of their time goes into compiling kernels, on one processor each.
  part tests-engine 120 "$python" -m pytest -q tests/test_cuda.py tests/test_cuda_write.py -k "not ($on_host)" &
  part tests-ops 120 "$python" -m pytest -q tests/test_triton.py &
  attention=("$python" -m pytest -q tests/test_triton_attention.py -k)
  part tests-float32 120 "${attention[@]}" float32 &
  part tests-bfloat16 120 "${attention[@]}" bfloat16 &
  part tests-attention 120 "${attention[@]}" "not (float32 or bfloat16)" &
  wait
else
  part build 120 "$python" setup.py build_ext --build-lib "$out/build" --build-temp "$out/build"
  part tests 120 "$python" -m pytest -q tests/test_ops.py
fi
if [ $device = cuda ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part "$tool" 80 compute-sanitizer --tool $tool --error-exitcode 1 --launch-timeout 0 \
      "$python" -m pytest -q "${kernels[@]}" -k "$sanitized" &
  done
  wait
else
  printf '%-24s not run: no compute-sanitizer, or no GPU\n' sanitizer | tee -a "$out/summary.txt"
fi
shape=8b
[ $device = cpu ] && shape=tiny
# What matters most comes first, in case time runs out: each row is written when it is known.
files=(benchmarks/bench_{read,update,memory_attention,small_ops,document,memory_file,cold_start}.py)
part benchmarks 240 "$python" -m pytest -q "${files[@]}" --benchmark --shape $shape \
  --device $device --results "$out/results.jsonl"
part report 20 "$python" -m benchmarks.report --results "$out/results.jsonl" --text "$out/report.txt"
failed=$(grep -cE 'FAILED|out of time' "$out/summary.txt")
echo "$failed parts failed; logs, rows and report in $out"
exit "$failed"
