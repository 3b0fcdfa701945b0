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
    EVAL="--seeds 2" PER_CLASS=${PER_CLASS:-80} VIEWS="--views 8"
    ;;
cifar10)
    RECIPE=cifar10-smoke TRAIN=${CIFAR10:?set CIFAR10 to a .zip or folder of class folders} SEEDS=${SEEDS:-0}
    HELDOUT=${CIFAR10_TEST:-$TRAIN}
    EVAL="--seeds 2 --limit 500" PER_CLASS=${PER_CLASS:-80} VIEWS="--views 2 --flip"
    ;;
imagenet256)
    RECIPE=imagenet256-tokenizer TRAIN=${IMAGENET:?set IMAGENET to ILSVRC train} SEEDS=${SEEDS:-0}
    HELDOUT=${IMAGENET_VAL:?set IMAGENET_VAL to ILSVRC val, in class folders}
    EVAL="--seeds 4" PER_CLASS=${PER_CLASS:-50} VIEWS=""
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

# judge_and_store: a judge of real images, and a store for generators to learn from -> JUDGE, STORE (%s where a seed
# belongs). On digits the demo's of each seed; on CIFAR-10 one of each for all seeds. What is there is not made again.
judge_and_store() {
    case $SCALE in
    digits)
        STORE=$OUT/demo.%s/codes JUDGE=$OUT/demo.%s/runs/judge/judge.pt
        for seed in $SEEDS; do
            [ -s "$OUT/demo.$seed/result.json" ] || rdpm demo --out "$OUT/demo.$seed" --seed "$seed" --quiet >&2
        done
        ;;
    cifar10)
        STORE=$OUT/codes JUDGE=$OUT/judge/judge.pt
        rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$OUT/tokenizer" --quiet train.steps=2000 \
            train.eval_every=1000 quantizer.bias=add >&2
        rdpm tokenize "$TRAIN" "$STORE" --tokenizer "$OUT/tokenizer/tokenizer.pt" --views 2 --flip --quiet >&2
        rdpm eval judge "$TRAIN" "$OUT/judge" --quiet train.epochs=6 >&2
        ;;
    *)
        echo "$script: SCALE=$SCALE has no judge; digits or cifar10" >&2
        exit 2
        ;;
    esac
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

# draw_and_score FOLDER SCORE JUDGE option...: draw $PER_CLASS samples a class and score them in one pass. JUDGE: a
# judge's file, or nothing for Inception.
draw_and_score() {
    folder=$1 into=$2 judge=$3
    shift 3
    began=$(date +%s)
    rdpm sample --per-class "$PER_CLASS" --out "$folder" --quiet "$@" >&2
    rdpm eval all "$folder" ${judge:+--extractor "$judge"} --json --quiet >"$into"
    python "$here/gap.py" --into "$into" --images "$folder" --seconds $(($(date +%s) - began))
}

# drawn_cell NAME CHECKPOINT JUDGE option...: samples of a trained generator -> NAME.<seed>.json. CHECKPOINT and JUDGE
# hold %s where the seed belongs.
drawn_cell() {
    name=$1 checkpoints=$2 judges=$3
    shift 3
    for seed in $SEEDS; do
        score=$OUT/$name.$seed.json
        [ -s "$score" ] && continue
        echo "$script: $name, seed $seed" >&2
        # shellcheck disable=SC2059
        checkpoint=$(printf "$checkpoints" "$seed") judge=$(printf "$judges" "$seed")
        draw_and_score "$OUT/$name.$seed" "$score.part" "$judge" --ckpt "$checkpoint" --seed "$seed" "$@"
        mv "$score.part" "$score"
    done
}

# pipeline_cell NAME JUDGE key=value...: the whole way with a tokenizer of its own -> NAME.<seed>.json. The overrides are
# the tokenizer's; TOKENIZER, GENERATOR and GENERATOR_RECIPE hold what all cells share.
pipeline_cell() {
    name=$1 judge=$2
    shift 2
    for seed in $SEEDS; do
        score=$OUT/$name.$seed.json run=$OUT/$name.$seed
        [ -s "$score" ] && continue
        echo "$script: $name, seed $seed" >&2
        # shellcheck disable=SC2086
        rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$run.tokenizer" --quiet seed="$seed" $TOKENIZER "$@" >&2
        # shellcheck disable=SC2086
        rdpm tokenize "$TRAIN" "$run.codes" --tokenizer "$run.tokenizer/tokenizer.pt" --seed "$seed" --quiet $VIEWS >&2
        # shellcheck disable=SC2086
        rdpm train-gen "$run.codes" --recipe "$GENERATOR_RECIPE" --out "$run.generator" --quiet seed="$seed" \
            $GENERATOR >&2
        # shellcheck disable=SC2086
        rdpm eval recon "$HELDOUT" --tokenizer "$run.tokenizer/tokenizer.pt" $EVAL --json --quiet >"$run.recon"
        draw_and_score "$run.samples" "$score.part" "$judge" --ckpt "$run.generator/generator.pt" --seed "$seed"
        python "$here/gap.py" "$run.generator" --into "$score.part" --recon "$run.recon"
        mv "$score.part" "$score"
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
