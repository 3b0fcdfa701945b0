#!/bin/sh
# Parts of the tokenizer (Table 2). All options of run.py follow, e.g. --scale cifar10 --images cifar10-train.zip
exec python "$(dirname "$0")/run.py" table2 "$@"
