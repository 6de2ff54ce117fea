#!/bin/sh
# The included small network on the generated corpus, on two CPU ranks: a small version of the others.
# NUM_ACCELERATORS=N sets another number; more options follow the two paths.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 DATA RUN [OPTIONS]" >&2; exit 2; }
data=$1 run=$2
shift 2
exec deepspeed --num_accelerators "${NUM_ACCELERATORS:-2}" "$(dirname "$0")/launch.py" \
  --recipe demo --data "$data" --run "$run" "$@"
