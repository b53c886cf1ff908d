#!/usr/bin/env bash
# Fills the table of training and sampling on one NVIDIA H100 or H200, within 25 minutes.
#
#     benchmarks/gpu.sh [FOLDER]
#
# Each line of the table is a run of --mode=benchmark, or of a sweep of 12 runs on the digits, with all
# evaluations. A run that fails or that takes too long leaves its line out, and the others go on.
# FOLDER (default runs/gpu) keeps the figures and the logs. Runs that it holds already are not repeated.
# The sampler of FFHQ-1024 takes 20 of the 250 solver steps: the share of the peak is that of 250 within
# a percent, as the solver steps have almost all of the work.
set -u
cd "$(dirname "$0")/.." || exit
folder=${1:-runs/gpu}
python=${PYTHON:-python}
end=$((SECONDS + 1500))
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
mkdir -p "$folder"

# measure NAME SECONDS ARGUMENTS: one run of the program, at most SECONDS long.
measure() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  [ -e "$folder/$name/seconds" ] && return
  limit=$((limit < end - SECONDS ? limit : end - SECONDS))
  if [ $limit -le 0 ]; then echo "$name: no time left"; return; fi
  if timeout "$limit" "$python" -m madformer_jax.main "$@" --workdir="$folder/$name" >"$folder/$name.log" 2>&1; then
    echo $((SECONDS - began)) >"$folder/$name/seconds"
  else
    echo "$name: failed, see $folder/$name.log"
  fi
}

# benchmark NAME SECONDS CONFIG PARTS ARGUMENTS
benchmark() {
  local name=$1 limit=$2 config=$3 parts=$4
  shift 4
  measure "$name" "$limit" --mode=benchmark --config="$config" --config.model.dtype=bfloat16 \
    --config.benchmark.parts="$parts" --config.benchmark.warmup=1 --config.benchmark.steps=3 "$@"
}

"$python" -m benchmarks.gpu >"$folder/attention.log" 2>&1 || echo "attention: failed, see $folder/attention.log"
for batch in 4 64 1; do
  benchmark "mid_$batch" 120 configs/bench_mid.py train,sample --config.train.batch="$batch" \
    --config.sample.n="$batch" --config.sample.batch="$batch"
done
benchmark ffhq1024_train 300 configs/ffhq1024.py train --config.train.batch=16 --config.train.accumulate=1
benchmark imagenet256_train 240 configs/imagenet256.py train --config.train.batch=64 --config.train.accumulate=2
for batch in 64 4 1; do
  benchmark "ffhq1024_sample_$batch" 240 configs/ffhq1024.py sample --config.sample.steps=20 \
    --config.sample.n="$batch" --config.sample.batch="$batch"
done
measure sweep_digits 300 --mode=sweep --config=configs/sweeps/depth.py:digits
for batch in 64 4 1; do
  benchmark "imagenet256_sample_$batch" 180 configs/imagenet256.py sample --config.sample.steps=20 \
    --config.sample.n="$batch" --config.sample.batch="$batch"
done
for batch in 4 1; do
  benchmark "ffhq1024_train_$batch" 240 configs/ffhq1024.py train --config.train.batch="$batch" --config.train.accumulate=1
done
"$python" -m benchmarks.gpu_table "$folder"
