#!/bin/sh
# Figure 5: the base of the pow schedule, alpha_t = base^(T - t), from 0.5 to 0.95.
#
#   recipes/ablations/figure5.sh                     digits, 2 seeds, 27 CPU minutes
#   SCALE=cifar10 CIFAR10=cifar10-train.zip recipes/ablations/figure5.sh
#   SCALE=imagenet256 IMAGENET=train IMAGENET_VAL=val recipes/ablations/figure5.sh      5 tokenizers, 5 times d12
#
# Ends with $OUT/table.md, table.csv, plot.png and schedules.png.
[ "${SCALE:-digits}" = digits ] && SEEDS=${SEEDS:-0 1}
. "$(dirname "$0")/lib.sh"
judge_and_budget

for base in 0.5 0.65 0.75 0.85 0.95; do
    pipeline_cell "base-$base" "$JUDGE" schedule.kind=pow schedule.base="$base"
done

table "Base of pow" fid/frechet_distance class_accuracy recon_psnr heldout_ce accuracy_gap \
    --paper base-0.75="best"
# shellcheck disable=SC2086
python "$here/schedules.py" "$OUT" --cells $made --seeds $SEEDS
