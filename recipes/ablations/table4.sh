#!/bin/sh
# Table 4: the noise schedules sin, linear and pow, each with a tokenizer, a store and a generator of its own.
#
#   recipes/ablations/table4.sh                      digits, 3 seeds, 24 CPU minutes
#   PARTS="schedules early" recipes/ablations/table4.sh      7 more
#   SCALE=cifar10 CIFAR10=cifar10-train.zip recipes/ablations/table4.sh
#   SCALE=imagenet256 IMAGENET=train IMAGENET_VAL=val recipes/ablations/table4.sh      3 tokenizers, 3 times d12
#
#   PARTS   schedules (sin, linear, pow), early (what pow's early steps are for: T = 5, and the first 2, 4 or 6 of 10
#           steps left out of sampling); default schedules
#
# Ends with $OUT/table.md, table.csv, plot.png.
. "$(dirname "$0")/lib.sh"
PARTS=${PARTS:-schedules}
judge_and_budget

if part schedules; then
    pipeline_cell sin "$JUDGE" schedule.kind=sin
    pipeline_cell linear "$JUDGE" schedule.kind=linear
fi
pipeline_cell pow "$JUDGE" schedule.kind=pow
if part early; then
    pipeline_cell pow-T5 "$JUDGE" schedule.kind=pow quantizer.steps=5
    for skipped in 2 4 6; do
        sample_cell "pow-skip-$skipped" "$OUT/pow.%s.generator/generator.pt" "$JUDGE" --skip-steps "$skipped"
    done
fi

table "Noise schedules" fid/frechet_distance class_accuracy recon_psnr heldout_ce accuracy_gap \
    --paper sin="worst" linear="between" pow="best"
