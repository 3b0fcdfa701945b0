#!/bin/sh
# Table 3: one generator sampled by the likeliest code, with constant guidance, with a linear ramp, with Gumbel noise.
#
#   recipes/ablations/table3.sh                      digits, 3 seeds, about 12 CPU minutes beside the demos
#   SCALE=imagenet256 CHECKPOINT=runs/d16/generator.pt IMAGENET=... IMAGENET_VAL=... recipes/ablations/table3.sh
#   CFG=1.5 TAU=1.2 recipes/ablations/table3.sh      other strengths
#
# On digits twice: the demo's generator, and a weak one of a fifth of its steps, for guidance helps a weak model more. At
# the other scales one generator, CHECKPOINT. A finished cell is not run again. Ends with table.md, table.csv, plot.png.
SCALE=${SCALE:-digits}
. "$(dirname "$0")/lib.sh"
CFG=${CFG:-1.0} TAU=${TAU:-1.0}

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
    for seed in $SEEDS; do
        rdpm train-gen "$(of_seed "$STORE")" --recipe "$GENERATOR_RECIPE" --out "$OUT/weak.$seed.run" --quiet \
            seed="$seed" train.steps=1200 train.eval_every=0 >&2
    done
    rows "" "$DEMO.%s/generator.pt" "$JUDGE"
    rows weak- "$OUT/weak.%s.run/generator.pt" "$JUDGE"
else
    rows "" "${CHECKPOINT:?set CHECKPOINT to a trained generator}" "${JUDGE:-}"
fi

python "$here/table.py" "$OUT" --title "Sampling, $SCALE" \
    --columns fid/frechet_distance sfid/spatial_frechet_distance inception_score/classifier_score precision recall \
    class_accuracy --paper raw="worst" cfg-linear="better than cfg" gumbel="best"
