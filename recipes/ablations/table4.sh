#!/bin/sh
# Table 4: the noise schedules sin, linear and pow, each with a tokenizer, a store and a generator of its own. At the small
# scales also what pow's early steps are for: T = 5, and the first 2, 4 or 6 of 10 steps left out of sampling.
#
#   recipes/ablations/table4.sh                      digits, 3 seeds, an hour of one core
#   SCALE=cifar10 CIFAR10=cifar10-train.zip recipes/ablations/table4.sh
#
# A finished cell is not run again. Ends with table.md, table.csv, plot.png.
SCALE=${SCALE:-digits}
. "$(dirname "$0")/lib.sh"
judge_and_budget

pipeline_cell sin "$JUDGE" schedule.kind=sin
pipeline_cell linear "$JUDGE" schedule.kind=linear
pipeline_cell pow "$JUDGE" schedule.kind=pow
if [ "$SCALE" != imagenet256 ]; then
    pipeline_cell pow-T5 "$JUDGE" schedule.kind=pow quantizer.steps=5
    for skipped in 2 4 6; do
        sample_cell "pow-skip-$skipped" "$OUT/pow.%s.generator/generator.pt" "$JUDGE" --skip-steps "$skipped"
    done
fi

python "$here/table.py" "$OUT" --title "Noise schedules, $SCALE" \
    --columns fid/frechet_distance class_accuracy recon_psnr heldout_ce accuracy_gap \
    --paper sin="worst" linear="between" pow="best"
