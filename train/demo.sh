#!/bin/sh
# The shipped small network on the made corpus, two CPU ranks: what the others look like in small.
# NUM_ACCELERATORS=N takes others; more options go behind the two paths.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 DATA RUN [OPTIONS]" >&2; exit 2; }
data=$1 run=$2
shift 2
exec deepspeed --num_accelerators "${NUM_ACCELERATORS:-2}" "$(dirname "$0")/launch.py" \
  --recipe demo --data "$data" --run "$run" "$@"
