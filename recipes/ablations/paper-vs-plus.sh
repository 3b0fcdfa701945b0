#!/bin/sh
# The paper's generator against the one with the options beyond it, at equal wall time: all, each alone, each removed.
#
#   recipes/ablations/paper-vs-plus.sh                       digits, 3 seeds, 60 s a generator: about 75 CPU minutes
#   SEEDS=0 TIME=180 recipes/ablations/paper-vs-plus.sh      one seed, longer
#
# Tokenizer, codes and judge are the demo's ($OUT/demo.<seed>, made where absent). A finished cell is not run again.
# Ends with $OUT/table.md, table.csv and plot.png.
SCALE=${SCALE:-digits}
. "$(dirname "$0")/lib.sh"
[ "$SCALE" = digits ] || { echo "$script: SCALE=$SCALE has no judge yet; digits alone" >&2 && exit 2; }
TIME=${TIME:-60}

for seed in $SEEDS; do
    [ -s "$OUT/demo.$seed/result.json" ] || rdpm demo --out "$OUT/demo.$seed" --seed "$seed" --quiet >&2
done

off="network.positions=rope network.class_latents=false network.head=linear objective.t_weights=uniform objective.perturb=0"
cell() {
    name=$1
    shift
    # shellcheck disable=SC2086
    generator_cell "$name" "$TIME" "$OUT/demo.%s/codes" "$OUT/demo.%s/runs/judge/judge.pt" $off "$@"
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
    --columns class_accuracy value heldout_ce accuracy_gap gap_at_T steps
