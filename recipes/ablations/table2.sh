#!/bin/sh
# The tokenizer's ablation, after Table 2 of the paper: T, weight, bias and schedule, one factor at a time.
#
#   recipes/ablations/table2.sh                      digits, 3 seeds, 23 CPU minutes (36 tokenizers of 300 steps)
#   SCALE=cifar10 CIFAR10=cifar10-train.zip recipes/ablations/table2.sh      25 CPU minutes (12 of 400 steps)
#   SCALE=imagenet256 IMAGENET=train IMAGENET_VAL=val recipes/ablations/table2.sh      12 times the recipe's hours
#
# Ends with $OUT/table.md, table.csv and plot.png.
. "$(dirname "$0")/lib.sh"

# The default cell is the paper's (pow, T = 10, weights and bias on), but for the bias, which is blend; `bias-add` is the
# literal reading. At the small scales C = 32 as there.
default="schedule.kind=pow schedule.base=0.75 quantizer.steps=10 loss.weight=true quantizer.bias=blend"
small="autoencoder.channels=32 autoencoder.width=16 train.batch=32 train.save_every=1000 train.eval_every=0 $default"
case $SCALE in
digits) BUDGET="train.steps=300 $small" ;;
cifar10) BUDGET="train.steps=400 $small" ;;
imagenet256) BUDGET="$default" ;;
esac

tokenizer_cell default
tokenizer_cell T2 quantizer.steps=2
tokenizer_cell T5 quantizer.steps=5
tokenizer_cell T20 quantizer.steps=20
tokenizer_cell no-weight loss.weight=false
tokenizer_cell no-bias quantizer.bias=none
tokenizer_cell no-weight-no-bias loss.weight=false quantizer.bias=none
tokenizer_cell bias-add quantizer.bias=add
tokenizer_cell linear schedule.kind=linear
tokenizer_cell linear-T5 schedule.kind=linear quantizer.steps=5
tokenizer_cell linear-T20 schedule.kind=linear quantizer.steps=20
tokenizer_cell sin schedule.kind=sin

# What the paper's Table 2 says beside it. Its rows 1-6 vary T without weight and bias, 3, 7, 8 and 9 turn them on at
# T = 10; its bias is `add`. Of schedules it has samples alone (Table 4).
table "Tokenizer ablation" psnr ssim mse rfid lpips_vgg \
    --paper "T2=worse (rows 1-6, without weight and bias)" "T5=worse (rows 1-6)" "T20=better (rows 1-6)" \
    "no-weight=worse (row 8)" "no-bias=worse (row 7)" "no-weight-no-bias=worst of rows 3, 7-9" \
    "bias-add=best (row 9)"
