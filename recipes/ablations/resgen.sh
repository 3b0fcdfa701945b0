#!/bin/sh
# ResGen against RDPM at equal parameters and equal wall time, and ResGen's own switches, all on digits.
#
#   recipes/ablations/resgen.sh                        3 seeds, 60 s a generator: about 3 CPU hours, not yet run
#   SEEDS=0 TIME=20 PARTS="families steps" recipes/ablations/resgen.sh      a part of it
#
#   PARTS   families (RDPM paper and plus, ResGen at depth 4, 8, 16), steps (sampled in 2..32 steps), switches (direct
#           tokens, random depths, 1..1024 components), schedules (trained with each, sampled with each)
#
# RDPM takes the demo's codes ($OUT/demo.<seed>, made where absent), ResGen those of a tokenizer of its own a depth; the
# judge is the demo's. A finished cell is not run again. Ends with $OUT/table.md, table.csv and plot.png.
SCALE=${SCALE:-digits}
. "$(dirname "$0")/lib.sh"
[ "$SCALE" = digits ] || { echo "$script: SCALE=$SCALE has no judge yet; digits alone" >&2 && exit 2; }
TIME=${TIME:-60}
PARTS=${PARTS:-families steps switches schedules}
DEPTH=8 # of the cells that do not vary it

for seed in $SEEDS; do
    [ -s "$OUT/demo.$seed/result.json" ] || rdpm demo --out "$OUT/demo.$seed" --seed "$seed" --quiet >&2
    for depth in 4 8 16; do
        tokenizer=$OUT/tokenizer-$depth.$seed
        [ -s "$OUT/codes-$depth.$seed/manifest.json" ] && continue
        rdpm train-tokenizer "$TRAIN" --recipe resgen-digits --out "$tokenizer" --quiet seed="$seed" \
            quantizer.steps="$depth" >&2
        rdpm tokenize "$TRAIN" "$OUT/codes-$depth.$seed" --tokenizer "$tokenizer/tokenizer.pt" --keep latents --quiet >&2
    done
done
judge="$OUT/demo.%s/runs/judge/judge.pt"

rdpm_cell() {
    name=$1
    shift
    RECIPE=digits
    generator_cell "$name" "$TIME" "$OUT/demo.%s/codes" "$judge" "$@"
}

resgen_cell() {
    name=$1 depth=$2
    shift 2
    RECIPE=resgen-digits
    generator_cell "$name" "$TIME" "$OUT/codes-$depth.%s" "$judge" "$@"
}

part() {
    case " $PARTS " in *" $1 "*) return 0 ;; esac
    return 1
}

resgen_cell resgen-depth-$DEPTH $DEPTH
if part families; then
    rdpm_cell rdpm-paper network.positions=rope network.class_latents=false network.head=linear \
        objective.t_weights=uniform objective.perturb=0
    rdpm_cell rdpm-plus
    resgen_cell resgen-depth-4 4
    resgen_cell resgen-depth-16 16
fi
if part steps; then
    for depth in 4 8 16; do
        [ "$depth" = "$DEPTH" ] || resgen_cell "resgen-depth-$depth" "$depth"
        for steps in 2 4 8 16 32; do
            sample_cell "depth-$depth-in-$steps" "resgen-depth-$depth" "$judge" --steps "$steps"
        done
    done
fi
if part switches; then
    resgen_cell direct-tokens $DEPTH network.target=direct
    resgen_cell random-depths $DEPTH objective.order=random
    for mixtures in 1 16 256 1024; do
        resgen_cell "components-$mixtures" $DEPTH network.mixtures="$mixtures"
    done
fi
if part schedules; then
    for trained in square cosine circle exp linear; do
        resgen_cell "trained-$trained" $DEPTH objective.schedule="$trained"
        for sampled in square cosine circle exp linear; do
            sample_cell "trained-$trained-sampled-$sampled" "trained-$trained" "$judge" --schedule "$sampled"
        done
    done
fi

python "$here/table.py" "$OUT" --title "ResGen and RDPM after $TIME s, $SCALE" \
    --columns class_accuracy value seconds steps
