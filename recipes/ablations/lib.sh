# Shared by the ablation scripts: what a scale is, and cells that are never run twice. Sourced; POSIX shell.
#
#   SCALE    digits (CPU, minutes) | cifar10 (CPU or GPU) | imagenet256 (the paper's size)
#   OUT      where runs and tables go; default runs/ablations/<script>-<scale>
#   SEEDS    default by scale
#   CIFAR10, IMAGENET, IMAGENET_VAL   where the images are (CIFAR10_TEST: held-out ones, else the training images)

set -eu
script=$(basename "$0" .sh)
SCALE=${SCALE:-digits}
OUT=${OUT:-runs/ablations/$script-$SCALE}
here=$(cd "$(dirname "$0")" && pwd)

case $SCALE in
digits)
    RECIPE=digits TRAIN=digits:train HELDOUT=digits:heldout SEEDS=${SEEDS:-0 1 2}
    EVAL="--seeds 2"
    ;;
cifar10)
    RECIPE=cifar10-smoke TRAIN=${CIFAR10:?set CIFAR10 to a .zip or folder of class folders} SEEDS=${SEEDS:-0}
    HELDOUT=${CIFAR10_TEST:-$TRAIN}
    EVAL="--seeds 2 --limit 500"
    ;;
imagenet256)
    RECIPE=imagenet256-tokenizer TRAIN=${IMAGENET:?set IMAGENET to ILSVRC train} SEEDS=${SEEDS:-0}
    HELDOUT=${IMAGENET_VAL:?set IMAGENET_VAL to ILSVRC val, in class folders}
    EVAL="--seeds 4"
    ;;
*)
    echo "$script: SCALE=$SCALE is none of digits, cifar10, imagenet256" >&2
    exit 2
    ;;
esac
mkdir -p "$OUT"

# tokenizer_cell NAME key=value...: train a tokenizer for every seed and score its reconstructions -> NAME.<seed>.json
tokenizer_cell() {
    name=$1
    shift
    for seed in $SEEDS; do
        score=$OUT/$name.$seed.json
        [ -s "$score" ] && continue
        echo "$script: $name, seed $seed" >&2
        # shellcheck disable=SC2086
        rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$OUT/$name.$seed" --quiet seed="$seed" $BUDGET "$@" >&2
        # shellcheck disable=SC2086
        rdpm eval recon "$HELDOUT" --tokenizer "$OUT/$name.$seed/tokenizer.pt" $EVAL --json --quiet >"$score.part"
        mv "$score.part" "$score"
    done
}
