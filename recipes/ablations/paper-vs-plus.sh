#!/bin/sh
# The paper's generator against the one with the options beyond it, at equal wall time: all, each alone, each removed.
#
#   recipes/ablations/paper-vs-plus.sh                       digits, 3 seeds, 20 s a generator: 30 CPU minutes
#   SEEDS=0 TIME=180 recipes/ablations/paper-vs-plus.sh      one seed, longer
#   CELLS="paper plus" recipes/ablations/paper-vs-plus.sh    these alone
#   SCALE=cifar10 CIFAR10=cifar10-train.zip CELLS="paper plus" TIME=180 recipes/ablations/paper-vs-plus.sh
#
# Tokenizer, codes and judge: on digits the demo's of each seed ($DEMO.<seed>); on CIFAR-10 one of each for all seeds
# ($OUT/tokenizer, codes, judge). What is there is not made again, nor is a finished cell.
# Ends with $OUT/table.md, table.csv and plot.png.
SCALE=${SCALE:-digits}
. "$(dirname "$0")/lib.sh"
TIME=${TIME:-20}
judge_and_store

off="network.positions=rope network.class_latents=false network.head=linear objective.t_weights=uniform objective.perturb=0"
cell() {
    name=$1
    shift
    case " ${CELLS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    # shellcheck disable=SC2086
    generator_cell "$name" "$TIME" "$STORE" "$JUDGE" "$GENERATOR_RECIPE" $off "$@"
}
positions="network.positions=both" latents="network.class_latents=true" head="network.head=geometric"
weights="objective.t_weights=alpha" perturb="objective.perturb=0.3"

cell paper
cell plus $positions $latents $head $weights $perturb
cell plus-without-positions $latents $head $weights $perturb
cell plus-without-latents $positions $head $weights $perturb
cell plus-without-geometric $positions $latents $weights $perturb
cell plus-without-t-weights $positions $latents $head $perturb
cell plus-without-perturb $positions $latents $head $weights
cell paper-with-positions $positions
cell paper-with-latents $latents
cell paper-with-geometric $head
cell paper-with-t-weights $weights
cell paper-with-perturb $perturb

python "$here/table.py" "$OUT" --title "Generators after $TIME s, $SCALE" \
    --columns class_accuracy fid/frechet_distance heldout_ce accuracy_gap gap_at_T steps
