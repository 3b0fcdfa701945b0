#!/bin/sh
# Table 4: the noise schedules sin, linear and pow, each with a tokenizer, a store and a generator of its own.
#
#   recipes/ablations/table4.sh                      digits, 3 seeds, about 15 CPU minutes
#   SCALE=cifar10 CIFAR10=cifar10-train.zip recipes/ablations/table4.sh
#
# A finished cell is not run again. Ends with table.md, table.csv, plot.png.
SCALE=${SCALE:-digits}
. "$(dirname "$0")/lib.sh"
judge_and_budget

pipeline_cell sin "$JUDGE" schedule.kind=sin
pipeline_cell linear "$JUDGE" schedule.kind=linear
pipeline_cell pow "$JUDGE" schedule.kind=pow

python "$here/table.py" "$OUT" --title "Noise schedules, $SCALE" \
    --columns fid/frechet_distance class_accuracy recon_psnr heldout_ce accuracy_gap \
    --paper sin="worst" linear="between" pow="best"
