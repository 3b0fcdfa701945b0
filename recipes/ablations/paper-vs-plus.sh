#!/bin/sh
# The paper's generator against the one with the options beyond it, at equal time: all, each alone, each removed.
#
#   recipes/ablations/paper-vs-plus.sh                       digits, 3 seeds, 20 s a generator: 30 CPU minutes
#   TIME=recipe CELLS="plus plus-without-perturb" OUT=long recipes/ablations/paper-vs-plus.sh      the demo's length
#   SCALE=cifar10 CIFAR10=cifar10-train.zip CELLS="paper plus" recipes/ablations/paper-vs-plus.sh      180 s each
#   SCALE=imagenet256 IMAGENET=train IMAGENET_VAL=val CELLS="paper plus" recipes/ablations/paper-vs-plus.sh
#
#   TIME    of a generator, in seconds, or `recipe`; default by scale
#   CELLS   some of them alone
#
# Tokenizer, codes and judge: on digits the demo's of each seed ($DEMO.<seed>); else one of each for all seeds
# ($OUT/tokenizer, codes, judge). What is there is not made again. Ends with $OUT/table.md, table.csv and plot.png.
. "$(dirname "$0")/lib.sh"
judge_and_store

# At the paper's size the noise is one of the options; at the others all cells have the recipe's, cached in many views.
cached="" fresh=""
[ "$SCALE" != imagenet256 ] || cached=objective.noise=cached fresh=objective.noise=fresh
chosen() {
    name=$1
    shift
    case " ${CELLS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    # shellcheck disable=SC2086
    generator_cell "$name" "$TIME" "$STORE" "$JUDGE" "$PLUS_RECIPE" $PAPER $cached "$@"
}
positions="network.positions=both" latents="network.class_latents=true" head="network.head=geometric"
weights="objective.t_weights=alpha" perturb="objective.perturb=0.3"

# shellcheck disable=SC2086
{
    chosen paper
    chosen plus $positions $latents $head $weights $perturb $fresh
    chosen plus-without-positions $latents $head $weights $perturb $fresh
    chosen plus-without-latents $positions $head $weights $perturb $fresh
    chosen plus-without-geometric $positions $latents $weights $perturb $fresh
    chosen plus-without-t-weights $positions $latents $head $perturb $fresh
    chosen plus-without-perturb $positions $latents $head $weights $fresh
}
chosen paper-with-positions $positions
chosen paper-with-latents $latents
chosen paper-with-geometric $head
chosen paper-with-t-weights $weights
chosen paper-with-perturb $perturb

table "Generators, time $TIME" class_accuracy fid/frechet_distance heldout_ce accuracy_gap gap_at_T steps
