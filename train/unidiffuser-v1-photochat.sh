#!/bin/sh
# UniDiffuser-v1 on PhotoChat: the paper's two A800-80GB (Table 5). NUM_ACCELERATORS=N sets
# another number; the global batch stays the same. More options follow the three paths, such as
# --set train.order=blocked.
set -eu
[ $# -ge 3 ] || { echo "usage: $0 DATA RUN WEIGHTS [OPTIONS]" >&2; exit 2; }
data=$1 run=$2 weights=$3
shift 3
exec deepspeed --num_accelerators "${NUM_ACCELERATORS:-2}" "$(dirname "$0")/launch.py" \
  --recipe unidiffuser-v1-photochat --data "$data" --run "$run" --set backbone.weights="$weights" "$@"
