#!/bin/sh
# Ways of sampling (Table 3). All options of run.py follow, e.g. --scale cifar10 --images cifar10-train.zip
exec python "$(dirname "$0")/run.py" table3 "$@"
