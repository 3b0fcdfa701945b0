# shellcheck shell=sh
# Shared by the ablation scripts: what a scale is, and cells that are never run twice. Sourced; POSIX shell.
#
#   SCALE      digits (CPU, minutes; the default) | cifar10 (CPU or GPU) | imagenet256 (the paper's size)
#   OUT        where runs and tables go; default runs/ablations/<script>-<scale>
#   SEEDS      of the cells; default "0 1 2" on digits, else 0
#   DEMO       demos of all seeds, DEMO.<seed>, which all scripts share; default runs/ablations/demo
#   PER_CLASS  samples a class; default 80, at imagenet256 50
#   GPUS       processes of each command, one a GPU; default one
#   CIFAR10, IMAGENET, IMAGENET_VAL   where the images are (CIFAR10_TEST: held-out ones, else the training images)
#   REF        at imagenet256: the reference of FID, as VIRTUAL_imagenet256_labeled.npz; default: the training images
#
# A cell is a NAME with a score a seed, $OUT/NAME.<seed>.json, written last, and what it was asked for beside it. A
# finished cell is not run again; one that was made with other settings stops the script. The table has the cells of the
# call, in its order. In the paths that cells take, %s is the seed.

set -eu
script=$(basename "$0" .sh)
SCALE=${SCALE:-digits}
OUT=${OUT:-runs/ablations/$script-$SCALE}
DEMO=${DEMO:-runs/ablations/demo}
here=$(cd "$(dirname "$0")" && pwd)
made="" # names of the call's cells

# stop MESSAGE: with exit code 2
stop() {
    echo "$script: $1" >&2
    exit 2
}

# images NAME: the value of this variable, without which there are no images
images() {
    eval "_value=\${$1:-}"
    [ -n "$_value" ] || stop "SCALE=$SCALE needs $1: a .zip or folder of class folders"
    printf '%s' "$_value"
}

# What is used by the scripts that source this, of which none uses all.
# shellcheck disable=SC2034
case $SCALE in
digits)
    RECIPE=digits GENERATOR_RECIPE=digits PLUS_RECIPE=digits RESGEN=resgen-digits RESGEN_TOKENIZER=""
    TRAIN=digits:train HELDOUT=digits:heldout SEEDS=${SEEDS:-0 1 2}
    EVAL="--seeds 2" PER_CLASS=${PER_CLASS:-80} VIEWS="--views 8" TIME=${TIME:-20}
    ;;
cifar10)
    RECIPE=cifar10-smoke GENERATOR_RECIPE=cifar10-smoke PLUS_RECIPE=cifar10-smoke RESGEN=resgen-cifar10
    RESGEN_TOKENIZER="train.steps=2000"
    TRAIN=$(images CIFAR10)
    SEEDS=${SEEDS:-0}
    HELDOUT=${CIFAR10_TEST:-$TRAIN}
    EVAL="--seeds 2 --limit 500" PER_CLASS=${PER_CLASS:-80} VIEWS="--views 2 --flip" TIME=${TIME:-180}
    ;;
imagenet256)
    RECIPE=imagenet256-tokenizer GENERATOR_RECIPE=imagenet256-d12 PLUS_RECIPE=imagenet256-d12-plus
    RESGEN=imagenet256-resgen-rvq8 RESGEN_TOKENIZER=""
    TRAIN=$(images IMAGENET)
    HELDOUT=$(images IMAGENET_VAL)
    SEEDS=${SEEDS:-0}
    EVAL="--seeds 4" PER_CLASS=${PER_CLASS:-50} VIEWS="--keep latents" TIME=${TIME:-recipe}
    ;;
*)
    stop "SCALE=$SCALE is none of digits, cifar10, imagenet256"
    ;;
esac
command -v rdpm >/dev/null || stop "rdpm is not on the PATH: activate the environment that it is installed in"
python -c "import matplotlib, rdpm_cli" 2>/dev/null || stop "python is not rdpm's: activate its environment"
if [ "$SCALE" = imagenet256 ] && ! rdpm doctor --json | python "$here/facts.py" --weights inception; then
    stop "scores at this size need Inception's weights, and rdpm doctor does not find them: it says where to put them"
fi
# The paper's generator: the options beyond it off. Stays unquoted.
# shellcheck disable=SC2034
PAPER="network.positions=rope network.class_latents=false network.head=linear objective.t_weights=uniform"
PAPER="$PAPER objective.perturb=0"
gpus=${GPUS:+--gpus $GPUS} # stays unquoted: no word, or two
mkdir -p "$OUT"

# part NAME: is it one of the $PARTS that a script was asked for?
part() {
    case " $PARTS " in *" $1 "*) return 0 ;; esac
    return 1
}

# ---- what cells are made of ------------------------------------------------------------------------------------------

# cell NAME: the call makes it
cell() {
    made="$made $1"
}

# begins NAME SEED WORD...: is the cell still to be made? Sets run and score, and says so. WORDS: what it is made with.
begins() {
    run=$OUT/$1.$2 score=$OUT/$1.$2.json _name="$1, seed $2"
    shift 2
    _asked="$SCALE $*"
    if [ -e "$score" ] || [ -e "$run.asked" ]; then
        _before=$(cat "$run.asked" 2>/dev/null) || _before=unknown
        [ "$_before" = "$_asked" ] || stop "cell $_name was made with other settings; choose another OUT than $OUT
  there: $_before
  now:   $_asked"
    fi
    [ -s "$score" ] && return 1
    printf '%s\n' "$_asked" >"$run.asked"
    echo "$script: $_name" >&2
}

# of_seed TEXT: with %s as the seed.
of_seed() {
    printf '%s\n' "$1" | sed "s/%s/$seed/g"
}

# train_for SECONDS RUN STORE option...: train a generator for as many steps as fit, by the rate of a short run. SECONDS
# may be `recipe`: for as long as recipe and options say.
train_for() {
    _budget=$1 _run=$2 _codes=$3
    shift 3
    if [ "$_budget" != recipe ]; then
        # shellcheck disable=SC2086
        rdpm train-gen "$_codes" --out "$_run.probe" --quiet $gpus "$@" train.steps=80 train.log_every=40 >&2
        _steps=$(python "$here/facts.py" "$_run.probe" --steps-in "$_budget")
        set -- "$@" train.steps="$_steps" train.eval_every=0
    fi
    # shellcheck disable=SC2086
    rdpm train-gen "$_codes" --out "$_run" --quiet --json $gpus "$@" >"$_run.said"
}

# draw_and_score FOLDER SCORE JUDGE option...: draw $PER_CLASS samples a class and score them in one pass. JUDGE: a
# judge's file, or nothing for Inception. The score also has passes and seconds an image.
draw_and_score() {
    _folder=$1 _score=$2 _judge=$3
    shift 3
    # shellcheck disable=SC2086
    if ! rdpm --log-format json sample --per-class "$PER_CLASS" --out "$_folder" --json $gpus "$@" \
        >"$_folder.drawn" 2>>"$_folder.log"; then
        tail -n 1 "$_folder.log" >&2
        return 1
    fi
    # shellcheck disable=SC2086
    rdpm eval all "$_folder" ${_judge:+--extractor "$_judge"} ${REF:+--ref "$REF"} --json --quiet $gpus >"$_score"
    python "$here/facts.py" --into "$_score" --drawn "$_folder.drawn" --log "$_folder.log"
}

# table TITLE COLUMN... [--paper CELL=TEXT...]: of the call's cells -> $OUT/table.md, table.csv, plot.png
table() {
    _title=$1
    shift
    # shellcheck disable=SC2086
    python "$here/table.py" "$OUT" --title "$_title, $SCALE" --cells $made --seeds $SEEDS --columns "$@"
}

# ---- cells -----------------------------------------------------------------------------------------------------------

# tokenizer_cell NAME key=value...: a tokenizer and its reconstructions. BUDGET holds what all cells share.
tokenizer_cell() {
    name=$1
    shift
    cell "$name"
    for seed in $SEEDS; do
        begins "$name" "$seed" "$BUDGET" "$@" || continue
        # shellcheck disable=SC2086
        rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$run" --quiet $gpus seed="$seed" $BUDGET "$@" >&2
        # shellcheck disable=SC2086
        rdpm eval recon "$HELDOUT" --tokenizer "$run/tokenizer.pt" $EVAL --json --quiet $gpus >"$score.part"
        mv "$score.part" "$score"
    done
}

# generator_cell NAME SECONDS STORE JUDGE RECIPE key=value...: a generator trained for so many seconds, and its samples
generator_cell() {
    name=$1 budget=$2 stores=$3 judges=$4 recipe=$5
    shift 5
    cell "$name"
    for seed in $SEEDS; do
        begins "$name" "$seed" "$PER_CLASS samples a class, time $budget," "$recipe" "$@" || continue
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
    cell "$name"
    for seed in $SEEDS; do
        begins "$name" "$seed" "$PER_CLASS samples a class," "$@" || continue
        draw_and_score "$run" "$score.part" "$(of_seed "$judges")" --ckpt "$(of_seed "$checkpoints")" --seed "$seed" "$@"
        mv "$score.part" "$score"
    done
}

# pipeline_cell NAME JUDGE key=value...: the whole way with a tokenizer of its own. The overrides are the tokenizer's;
# TOKENIZER, GENERATOR and GENERATOR_RECIPE hold what all cells share.
pipeline_cell() {
    name=$1 judges=$2
    shift 2
    cell "$name"
    for seed in $SEEDS; do
        begins "$name" "$seed" "$PER_CLASS samples a class," "$TOKENIZER" "$GENERATOR" "$@" || continue
        # shellcheck disable=SC2086
        rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$run.tokenizer" --quiet $gpus seed="$seed" \
            $TOKENIZER "$@" >&2
        # shellcheck disable=SC2086
        rdpm tokenize "$TRAIN" "$run.codes" --tokenizer "$run.tokenizer/tokenizer.pt" --seed "$seed" --quiet $gpus \
            $VIEWS >&2
        # shellcheck disable=SC2086
        train_for recipe "$run.generator" "$run.codes" --recipe "$GENERATOR_RECIPE" seed="$seed" $GENERATOR
        # shellcheck disable=SC2086
        rdpm eval recon "$HELDOUT" --tokenizer "$run.tokenizer/tokenizer.pt" $EVAL --json --quiet $gpus >"$run.recon"
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
    rdpm train-tokenizer "$TRAIN" --recipe "$RECIPE" --out "$OUT/tokenizer" --quiet $gpus $_short >&2
    # shellcheck disable=SC2086
    rdpm tokenize "$TRAIN" "$STORE" --tokenizer "$OUT/tokenizer/tokenizer.pt" --quiet $gpus $VIEWS >&2
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
        rdpm train-tokenizer "$TRAIN" --recipe "$RESGEN" --out "$_tokenizer" --quiet $gpus seed="$seed" \
            quantizer.steps="$1" $RESGEN_TOKENIZER >&2
        # shellcheck disable=SC2086
        rdpm tokenize "$TRAIN" "$_codes" --tokenizer "$_tokenizer/tokenizer.pt" --keep latents --quiet $gpus >&2
    done
}
