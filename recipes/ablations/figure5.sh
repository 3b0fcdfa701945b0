#!/bin/sh
# The base of the pow schedule (Figure 5). All options of run.py follow, e.g. --scale cifar10 --images cifar10-train.zip
exec python "$(dirname "$0")/run.py" figure5 "$@"
