# What the cells of table4.sh and figure5.sh share: budgets by scale, and a judge. Sourced after lib.sh.
case $SCALE in
digits)
    TOKENIZER="train.steps=200 train.eval_every=0 quantizer.steps=10"
    GENERATOR="train.steps=1500 train.eval_every=0" GENERATOR_RECIPE=digits
    ;;
cifar10)
    TOKENIZER="train.steps=2000 train.eval_every=0 quantizer.bias=add quantizer.steps=10"
    GENERATOR="train.steps=3000 train.eval_every=0" GENERATOR_RECIPE=cifar10-smoke
    ;;
imagenet256)
    TOKENIZER="" GENERATOR="" GENERATOR_RECIPE=imagenet256-d16 JUDGE=""
    ;;
esac
if [ "$SCALE" != imagenet256 ]; then
    JUDGE=$OUT/judge/judge.pt
    if [ "$SCALE" = digits ]; then
        rdpm eval judge "$TRAIN" "$OUT/judge" --heldout "$HELDOUT" --recipe digits --quiet >&2
    else
        rdpm eval judge "$TRAIN" "$OUT/judge" --quiet train.epochs=6 >&2
    fi
fi
