#!/bin/sh
# A small network from random weights on your own photographs, on a laptop's CPU or one small GPU.
# NUM_ACCELERATORS=N sets another number; more options follow the two paths, such as
# --set train.num_steps=20000.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 DATA RUN [OPTIONS]" >&2; exit 2; }
data=$1 run=$2
shift 2
exec deepspeed --num_accelerators "${NUM_ACCELERATORS:-1}" "$(dirname "$0")/launch.py" \
  --recipe small --data "$data" --run "$run" "$@"
