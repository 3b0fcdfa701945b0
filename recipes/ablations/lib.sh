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

# generator_cell NAME SECONDS STORE JUDGE key=value...: train a generator for so many seconds by a measured rate, draw 800
# samples and judge them -> NAME.<seed>.json. STORE and JUDGE hold %s where the seed belongs.
generator_cell() {
    name=$1 seconds=$2 stores=$3 judges=$4
    shift 4
    for seed in $SEEDS; do
        score=$OUT/$name.$seed.json
        [ -s "$score" ] && continue
        echo "$script: $name, seed $seed" >&2
        # shellcheck disable=SC2059
        store=$(printf "$stores" "$seed") judge=$(printf "$judges" "$seed")
        set -- --recipe "$RECIPE" --quiet seed="$seed" "$@"
        rdpm train-gen "$store" --out "$OUT/$name.$seed.probe" "$@" train.steps=80 train.log_every=40 >&2
        steps=$(python "$here/gap.py" "$OUT/$name.$seed.probe" --steps-in "$seconds")
        rdpm train-gen "$store" --out "$OUT/$name.$seed" "$@" train.steps="$steps" train.eval_every=0 >&2
        rdpm sample --ckpt "$OUT/$name.$seed/generator.pt" --per-class 80 --out "$OUT/$name.$seed/samples" --quiet >&2
        rdpm eval fid "$OUT/$name.$seed/samples" --extractor "$judge" --subset 297 --json --quiet >"$score.part"
        python "$here/gap.py" "$OUT/$name.$seed" --into "$score.part"
        mv "$score.part" "$score"
        shift 4
    done
}

# sample_cell NAME CELL JUDGE option...: draw 800 samples of the trained CELL by these options of `rdpm sample` and judge
# them -> NAME.<seed>.json, with the seconds that drawing took, the program's start included. JUDGE holds %s for the seed.
sample_cell() {
    name=$1 cell=$2 judges=$3
    shift 3
    for seed in $SEEDS; do
        score=$OUT/$name.$seed.json
        [ -s "$score" ] && continue
        echo "$script: $name, seed $seed" >&2
        # shellcheck disable=SC2059
        judge=$(printf "$judges" "$seed") drawn=$OUT/$cell.$seed/$name started=$(date +%s)
        rdpm sample --ckpt "$OUT/$cell.$seed/generator.pt" --per-class 80 --out "$drawn" --quiet "$@" >&2
        seconds=$(($(date +%s) - started))
        rdpm eval fid "$drawn" --extractor "$judge" --subset 297 --json --quiet >"$score.part"
        python "$here/gap.py" "$OUT/$cell.$seed" --into "$score.part" --seconds "$seconds"
        mv "$score.part" "$score"
    done
}
