#!/bin/sh
# ResGen next to RDPM; also resgen-steps, -switches, -nucleus, -schedules of run.py. All options of run.py follow, e.g. --scale cifar10 --images cifar10-train.zip
exec python "$(dirname "$0")/run.py" resgen "$@"
