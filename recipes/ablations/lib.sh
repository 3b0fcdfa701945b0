# Shared by the ablation scripts: what a scale is, and cells that are never run twice. Sourced; POSIX shell.
#
#   SCALE    digits (CPU, minutes) | cifar10 (CPU or GPU) | imagenet256 (the paper's size)
#   OUT      where runs and tables go; default runs/ablations/<script>-<scale>
#   SEEDS    default by scale
#   DEMO     demos of all seeds, DEMO.<seed>, which all scripts share; default runs/ablations/demo
#   CIFAR10, IMAGENET, IMAGENET_VAL   where the images are (CIFAR10_TEST: held-out ones, else the training images)
#
# A cell is a NAME with a score a seed, $OUT/NAME.<seed>.json, written last. In its other arguments %s is the seed.

set -eu
script=$(basename "$0" .sh)
SCALE=${SCALE:-digits}
OUT=${OUT:-runs/ablations/$script-$SCALE}
DEMO=${DEMO:-runs/ablations/demo}
here=$(cd "$(dirname "$0")" && pwd)

case $SCALE in
digits)
    RECIPE=digits GENERATOR_RECIPE=digits RESGEN=resgen-digits RESGEN_TOKENIZER=""
    TRAIN=digits:train HELDOUT=digits:heldout SEEDS=${SEEDS:-0 1 2}
    EVAL="--seeds 2" PER_CLASS=${PER_CLASS:-80} VIEWS="--views 8"
    ;;
cifar10)
    RECIPE=cifar10-smoke GENERATOR_RECIPE=cifar10-smoke RESGEN=resgen-cifar10 RESGEN_TOKENIZER="train.steps=2000"
    TRAIN=${CIFAR10:?set CIFAR10 to a .zip or folder of class folders} SEEDS=${SEEDS:-0}
    HELDOUT=${CIFAR10_TEST:-$TRAIN}
    EVAL="--seeds 2 --limit 500" PER_CLASS=${PER_CLASS:-80} VIEWS="--views 2 --flip"
    ;;
imagenet256)
    RECIPE=imagenet256-tokenizer GENERATOR_RECIPE=imagenet256-d12 RESGEN=imagenet256-resgen-rvq8 RESGEN_TOKENIZER=""
    TRAIN=${IMAGENET:?set IMAGENET to ILSVRC train} SEEDS=${SEEDS:-0}
    HELDOUT=${IMAGENET_VAL:?set IMAGENET_VAL to ILSVRC val, in class folders}
    EVAL="--seeds 4" PER_CLASS=${PER_CLASS:-50} VIEWS=""
    ;;
*)
    echo "$script: SCALE=$SCALE is none of digits, cifar10, imagenet256" >&2
    exit 2
    ;;
esac
mkdir -p "$OUT"

# ---- what cells are made of ------------------------------------------------------------------------------------------

# begins NAME SEED: is the cell still to be made? Sets run and score, and says so.
begins() {
    run=$OUT/$1.$2 score=$OUT/$1.$2.json
    [ -s "$score" ] && return 1
    echo "$script: $1, seed $2" >&2
}

# of_seed TEXT: with %s as the seed.
of_seed() {
    # shellcheck disable=SC2059
    printf "$1" "$seed"
}

# train_for SECONDS RUN STORE option...: train a generator for as many steps as fit, by the rate of a short run. SECONDS
# may be `recipe`: for as long as recipe and options say.
train_for() {
    _budget=$1 _run=$2 _codes=$3
    shift 3
    if [ "$_budget" != recipe ]; then
        rdpm train-gen "$_codes" --out "$_run.probe" --quiet "$@" train.steps=80 train.log_every=40 >&2
        set -- "$@" train.steps="$(python "$here/facts.py" "$_run.probe" --steps-in "$_budget")" train.eval_every=0
    fi
    rdpm train-gen "$_codes" --out "$_run" --quiet --json "$@" >"$_run.said"
}

# draw_and_score FOLDER SCORE JUDGE option...: draw $PER_CLASS samples a class and score them in one pass. JUDGE: a
# judge's file, or nothing for Inception. The score also has passes and seconds an image, the program's start included.
draw_and_score() {
    _folder=$1 _score=$2 _judge=$3
    shift 3
    _began=$(date +%s)
    rdpm sample --per-class "$PER_CLASS" --out "$_folder" --quiet --json "$@" >"$_folder.drawn"
    _took=$(($(date +%s) - _began))
    rdpm eval all "$_folder" ${_judge:+--extractor "$_judge"} --json --quiet >"$_score"
    python "$here/facts.py" --into "$_score" --drawn "$_folder.drawn" --seconds "$_took"
}

# ---- cells -----------------------------------------------------------------------------------------------------------

# tokenizer_cell NAME key=value...: a tokenizer and its reconstructions
tokenizer_cell() {
    name=$1
    shift
    for seed in $SEEDS; do
        begins "$name" "$seed" || continue
        # shellcheck disable=SC2086
        rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$run" --quiet seed="$seed" $BUDGET "$@" >&2
        # shellcheck disable=SC2086
        rdpm eval recon "$HELDOUT" --tokenizer "$run/tokenizer.pt" $EVAL --json --quiet >"$score.part"
        mv "$score.part" "$score"
    done
}

# generator_cell NAME SECONDS STORE JUDGE RECIPE key=value...: a generator trained for so many seconds, and its samples
generator_cell() {
    name=$1 budget=$2 stores=$3 judges=$4 recipe=$5
    shift 5
    for seed in $SEEDS; do
        begins "$name" "$seed" || continue
        train_for "$budget" "$run" "$(of_seed "$stores")" --recipe "$recipe" seed="$seed" "$@"
        draw_and_score "$run.samples" "$score.part" "$(of_seed "$judges")" --ckpt "$run/generator.pt" --seed "$seed"
        python "$here/facts.py" "$run" --into "$score.part" --trained "$run.said"
        mv "$score.part" "$score"
    done
}

# sample_cell NAME CHECKPOINT JUDGE option...: samples of a trained generator
sample_cell() {
    name=$1 checkpoints=$2 judges=$3
    shift 3
    for seed in $SEEDS; do
        begins "$name" "$seed" || continue
        draw_and_score "$run" "$score.part" "$(of_seed "$judges")" --ckpt "$(of_seed "$checkpoints")" --seed "$seed" "$@"
        mv "$score.part" "$score"
    done
}

# pipeline_cell NAME JUDGE key=value...: the whole way with a tokenizer of its own. The overrides are the tokenizer's;
# TOKENIZER, GENERATOR and GENERATOR_RECIPE hold what all cells share.
pipeline_cell() {
    name=$1 judges=$2
    shift 2
    for seed in $SEEDS; do
        begins "$name" "$seed" || continue
        # shellcheck disable=SC2086
        rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$run.tokenizer" --quiet seed="$seed" $TOKENIZER "$@" >&2
        # shellcheck disable=SC2086
        rdpm tokenize "$TRAIN" "$run.codes" --tokenizer "$run.tokenizer/tokenizer.pt" --seed "$seed" --quiet $VIEWS >&2
        # shellcheck disable=SC2086
        train_for recipe "$run.generator" "$run.codes" --recipe "$GENERATOR_RECIPE" seed="$seed" $GENERATOR
        # shellcheck disable=SC2086
        rdpm eval recon "$HELDOUT" --tokenizer "$run.tokenizer/tokenizer.pt" $EVAL --json --quiet >"$run.recon"
        draw_and_score "$run.samples" "$score.part" "$(of_seed "$judges")" --ckpt "$run.generator/generator.pt" \
            --seed "$seed"
        python "$here/facts.py" "$run.generator" --into "$score.part" --trained "$run.generator.said" \
            --recon "$run.recon"
        mv "$score.part" "$score"
    done
}

# ---- what several scripts begin from: what is there is not made again ------------------------------------------------

# make_judge: a judge of real images for all seeds -> JUDGE; at the paper's size nothing, which is Inception
make_judge() {
    JUDGE=$OUT/judge/judge.pt
    case $SCALE in
    digits) rdpm eval judge "$TRAIN" "$OUT/judge" --heldout "$HELDOUT" --recipe digits --quiet >&2 ;;
    cifar10) rdpm eval judge "$TRAIN" "$OUT/judge" --quiet train.epochs=6 >&2 ;;
    imagenet256) JUDGE="" ;;
    esac
}

# judge_and_store: also a store for generators to learn from -> STORE; on digits both are the demo's of each seed
judge_and_store() {
    if [ "$SCALE" = digits ]; then
        STORE=$DEMO.%s/codes JUDGE=$DEMO.%s/runs/judge/judge.pt
        for seed in $SEEDS; do
            [ -s "$DEMO.$seed/result.json" ] || rdpm demo --out "$DEMO.$seed" --seed "$seed" --quiet >&2
        done
        return
    fi
    STORE=$OUT/codes _short=""
    [ "$SCALE" = imagenet256 ] || _short="train.steps=2000 train.eval_every=1000 quantizer.bias=add"
    # shellcheck disable=SC2086
    rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$OUT/tokenizer" --quiet $_short >&2
    # shellcheck disable=SC2086
    rdpm tokenize "$TRAIN" "$STORE" --tokenizer "$OUT/tokenizer/tokenizer.pt" --quiet $VIEWS >&2
    make_judge
}

# judge_and_budget: also what cells that go the whole way train for -> TOKENIZER, GENERATOR
judge_and_budget() {
    case $SCALE in
    digits) _steps=1500 TOKENIZER="train.steps=200 train.eval_every=0 quantizer.steps=10" ;;
    cifar10) _steps=3000 TOKENIZER="train.steps=2000 train.eval_every=0 quantizer.bias=add quantizer.steps=10" ;;
    imagenet256) _steps="" TOKENIZER="" ;;
    esac
    GENERATOR=${_steps:+train.steps=$_steps train.eval_every=0}
    make_judge
}

# rvq_store DEPTH: a store of plain residual codes -> RVQ; on digits one a seed, as the demo's are, else one for all
rvq_store() {
    RVQ=$OUT/rvq-$1.%s/codes _seeds=$SEEDS
    [ "$SCALE" = digits ] || RVQ=$OUT/rvq-$1/codes _seeds=0
    for seed in $_seeds; do
        _codes=$(of_seed "$RVQ")
        [ -s "$_codes/manifest.json" ] && continue
        _tokenizer=$(dirname "$_codes")/tokenizer
        # shellcheck disable=SC2086
        rdpm train-tokenizer "$TRAIN" --recipe "$RESGEN" --out "$_tokenizer" --quiet seed="$seed" \
            quantizer.steps="$1" $RESGEN_TOKENIZER >&2
        rdpm tokenize "$TRAIN" "$_codes" --tokenizer "$_tokenizer/tokenizer.pt" --keep latents --quiet >&2
    done
}
