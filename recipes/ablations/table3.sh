#!/bin/sh
# Table 3: one generator sampled by the likeliest code, with constant guidance, with a linear ramp, with Gumbel noise.
#
#   recipes/ablations/table3.sh                      digits, 3 seeds, 20 CPU minutes beside the demos
#   CFG=1.5 TAU=1.2 OUT=stronger recipes/ablations/table3.sh      other strengths
#   SCALE=cifar10 CIFAR10=cifar10-train.zip recipes/ablations/table3.sh
#   SCALE=imagenet256 CHECKPOINT=runs/d16/generator.pt IMAGENET=train IMAGENET_VAL=val recipes/ablations/table3.sh
#
#   CHECKPOINT   the generator; default: the demo's of each seed on digits, else one that is trained first
#
# On digits twice: a weak generator too, the paper's own network, which knows the class half of the time after 4,000
# steps. For guidance is said to help a weak model more. Ends with $OUT/table.md, table.csv, plot.png.
. "$(dirname "$0")/lib.sh"
CFG=${CFG:-1.0} TAU=${TAU:-1.0}

# trained NAME RECIPE key=value...: a generator a seed, $OUT/NAME.<seed>.run
trained() {
    name=$1 recipe=$2
    shift 2
    for seed in $SEEDS; do
        # shellcheck disable=SC2086
        rdpm train-gen "$(of_seed "$STORE")" --recipe "$recipe" --out "$OUT/$name.$seed.run" --quiet $gpus \
            seed="$seed" "$@" >&2
    done
}

# rows PREFIX CHECKPOINT JUDGE
rows() {
    prefix=$1
    shift
    sample_cell "${prefix}raw" "$@" --preset raw
    sample_cell "${prefix}cfg" "$@" --preset cfg --cfg "$CFG"
    sample_cell "${prefix}cfg-linear" "$@" --preset cfg-linear --cfg "$CFG"
    sample_cell "${prefix}gumbel" "$@" --preset gumbel --cfg "$CFG" --tau "$TAU"
    sample_cell "${prefix}gumbel-alone" "$@" --preset gumbel --cfg 0 --tau "$TAU"
}

if [ "$SCALE" = digits ]; then
    judge_and_store
    rows "" "${CHECKPOINT:-$DEMO.%s/generator.pt}" "$JUDGE"
    # shellcheck disable=SC2086
    trained weak "$GENERATOR_RECIPE" $PAPER train.steps=4000 train.eval_every=0
    rows weak- "$OUT/weak.%s.run/generator.pt" "$JUDGE"
elif [ -n "${CHECKPOINT:-}" ]; then
    make_judge
    rows "" "$CHECKPOINT" "$JUDGE"
else
    judge_and_store
    trained generator "$PLUS_RECIPE"
    rows "" "$OUT/generator.%s.run/generator.pt" "$JUDGE"
fi

table "Sampling" fid/frechet_distance sfid/spatial_frechet_distance inception_score/classifier_score precision recall \
    class_accuracy --paper raw="worst" cfg-linear="better than cfg" gumbel="best"
