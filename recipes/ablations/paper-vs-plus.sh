#!/bin/sh
# The paper's generator and the options beyond it, at equal time. All options of run.py follow, e.g. --scale cifar10 --images cifar10-train.zip
exec python "$(dirname "$0")/run.py" paper-vs-plus "$@"
