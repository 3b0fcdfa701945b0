#!/bin/sh
# Table 5: the paper's three sizes and ResGen: parameters, steps, passes and seconds an image, scores.
#
#   recipes/ablations/table5.sh                      digits: d2, d3, d4 and ResGen, 3 seeds, 22 CPU minutes
#   SCALE=cifar10 CIFAR10=cifar10-train.zip recipes/ablations/table5.sh
#   SCALE=imagenet256 IMAGENET=train IMAGENET_VAL=val recipes/ablations/table5.sh      d12, d16, d20 and ResGen: by the
#                                                    recipes' estimates 310 GPU-hours, tokenizers and all
#
# Ends with $OUT/table.md, table.csv, plot.png.
. "$(dirname "$0")/lib.sh"
judge_and_store
rvq_store 8

# size NAME RECIPE key=value...
size() {
    name=$1 recipe=$2
    shift 2
    generator_cell "$name" recipe "$STORE" "$JUDGE" "$recipe" "$@"
}

case $SCALE in
digits) sizes="2 3 4" short="train.steps=1500 train.eval_every=0" ;;
cifar10) sizes="2 4 6" short="train.steps=3000 train.eval_every=0" ;;
imagenet256) sizes="" short="" ;;
esac
for depth in $sizes; do # as many heads as layers, as in the paper, of 24 channels instead of 64
    # shellcheck disable=SC2086
    size "d$depth" "$GENERATOR_RECIPE" network.depth="$depth" network.width=$((24 * depth)) network.heads="$depth" $short
done
if [ "$SCALE" = imagenet256 ]; then
    for depth in 12 16 20; do
        size "d$depth" "imagenet256-d$depth"
    done
fi
# shellcheck disable=SC2086
generator_cell resgen recipe "$RVQ" "$JUDGE" "$RESGEN" $short

table "Sizes" fid/frechet_distance inception_score/classifier_score class_accuracy parameters steps passes \
    seconds_an_image --paper d12="133M parameters (Table 1)" d16="310M" d20="602M"
