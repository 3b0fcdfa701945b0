#!/bin/sh
# ResGen against RDPM at equal time and, at the small scales, equal parameters; ResGen's own switches at equal steps.
#
#   recipes/ablations/resgen.sh                        families on digits, 3 seeds, 20 s a generator: 30 CPU minutes
#   PARTS="switches nucleus" recipes/ablations/resgen.sh      other parts, each 10 to 30 CPU minutes
#   SCALE=cifar10 CIFAR10=cifar10-train.zip DEPTHS=8 recipes/ablations/resgen.sh      180 s a generator
#   SCALE=imagenet256 IMAGENET=train IMAGENET_VAL=val DEPTHS=8 recipes/ablations/resgen.sh      as long as recipes say
#
#   PARTS   families (RDPM paper and plus, ResGen at depth 4, 8, 16), steps (the same, sampled in 2..32 steps), switches
#           (direct tokens, random depths, 1..1024 components), nucleus (switches' default and random depths, sampled
#           with top_p 0.5..1), schedules (trained with each, sampled with each); default families
#   DEPTHS  of ResGen's codes, default "4 8 16"; what does not vary the depth has 8
#   TIME    of a generator of families and steps, in seconds, or `recipe`; default by scale
#   STEPS   of a generator of switches, nucleus and schedules; default by scale
#
# RDPM takes the demo's codes (at the other scales those of a tokenizer of its own), ResGen those of a tokenizer a depth;
# the judge is the same. Ends with $OUT/table.md, table.csv, plot.png, and steps.png.
. "$(dirname "$0")/lib.sh"
PARTS=${PARTS:-families}
DEPTHS=${DEPTHS:-4 8 16}
DEPTH=8
case $SCALE in
digits) equal="train.steps=${STEPS:-700} train.eval_every=0 sampling.top_p=1" ;; # the whole distribution shows
cifar10) equal="train.steps=${STEPS:-2000} train.eval_every=0 sampling.top_p=1" ;;
imagenet256) equal="${STEPS:+train.steps=$STEPS}" ;;
esac
judge_and_store

# resgen_cell NAME SECONDS DEPTH key=value...
resgen_cell() {
    name=$1 budget=$2 depth=$3
    shift 3
    rvq_store "$depth"
    generator_cell "$name" "$budget" "$RVQ" "$JUDGE" "$RESGEN" "$@"
}

if part families; then
    # shellcheck disable=SC2086
    generator_cell rdpm-paper "$TIME" "$STORE" "$JUDGE" "$GENERATOR_RECIPE" $PAPER
    generator_cell rdpm-plus "$TIME" "$STORE" "$JUDGE" "$PLUS_RECIPE"
fi
if part families || part steps; then
    for depth in $DEPTHS; do
        resgen_cell "resgen-depth-$depth" "$TIME" "$depth"
    done
fi
if part steps; then
    for depth in $DEPTHS; do
        for steps in 2 4 8 16 32; do
            sample_cell "depth-$depth-in-$steps" "$OUT/resgen-depth-$depth.%s/generator.pt" "$JUDGE" --steps "$steps"
        done
    done
fi
# shellcheck disable=SC2086
if part switches || part nucleus; then
    resgen_cell default recipe $DEPTH $equal
    resgen_cell random-depths recipe $DEPTH $equal objective.order=random
fi
if part nucleus; then
    for top_p in 0.9 0.8 0.7 0.5; do # the cells themselves are sampled with 1
        for order in default random-depths; do
            sample_cell "$order-top-p-$top_p" "$OUT/$order.%s/generator.pt" "$JUDGE" --top-p "$top_p"
        done
    done
fi
# shellcheck disable=SC2086
if part switches; then
    resgen_cell direct-tokens recipe $DEPTH $equal network.target=direct
    for mixtures in 1 16 256 1024; do
        resgen_cell "components-$mixtures" recipe $DEPTH $equal network.mixtures="$mixtures"
    done
fi
# shellcheck disable=SC2086
if part schedules; then
    for trained in square cosine circle exp linear; do
        resgen_cell "trained-$trained" recipe $DEPTH $equal objective.schedule="$trained"
        for sampled in cosine circle exp linear; do # the cell itself is sampled with square
            sample_cell "trained-$trained-sampled-$sampled" "$OUT/trained-$trained.%s/generator.pt" "$JUDGE" \
                --schedule "$sampled"
        done
    done
fi

table "ResGen and RDPM" class_accuracy fid/frechet_distance precision recall parameters passes seconds_an_image steps
# shellcheck disable=SC2086
if part steps; then python "$here/steps.py" "$OUT" --cells $made --seeds $SEEDS; fi
