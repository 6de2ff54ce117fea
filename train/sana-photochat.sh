#!/bin/sh
# The whole network of Sana on PhotoChat; BASE is the directory of the pipeline.
# NUM_ACCELERATORS=N sets the number of devices; the global batch stays the same. More options
# follow the three paths, such as --set train.optim.lr=2e-5.
set -eu
[ $# -ge 3 ] || { echo "usage: $0 DATA RUN BASE [OPTIONS]" >&2; exit 2; }
data=$1 run=$2 base=$3
shift 3
exec deepspeed --num_accelerators "${NUM_ACCELERATORS:-1}" "$(dirname "$0")/launch.py" \
  --recipe sana-photochat --data "$data" --run "$run" --set backbone.weights="$base" "$@"
