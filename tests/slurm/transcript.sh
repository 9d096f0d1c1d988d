#!/usr/bin/env bash
# Plays the scenario of docs/slurm_transcript.md on a cluster of its own and prints it: three nodes train, two of them go
# down, the run goes on with two, is asked to save as before the time limit, and finishes.
#
#   PYTHON=.venv/bin/python tests/slurm/transcript.sh >out.txt        TRAINER: another interpreter for the job's processes
set -euo pipefail
PYTHON=$(realpath -s "${PYTHON:-$(command -v python3)}") TRAINER=${TRAINER:-$PYTHON}
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
export LAB=$work/lab PYTHONPATH=$root
trap '"$here/lab.sh" down; rm -rf "$work"' EXIT
"$here/lab.sh" up >/dev/null
mkdir "$work/mill" && cd "$work/mill"
"$PYTHON" -m pretrain data sample --out data/sample >/dev/null
"$PYTHON" -m pretrain tokenizer train --data data/sample --vocab-size 512 --out data/tokenizer >/dev/null
cat >run.yaml <<YAML
run: {dir: runs/mill}
model: {family: llama, num_layers: 2, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128}
data:
  tokenizer: data/tokenizer
  sources: [{name: code, paths: [data/sample/code/train-*]}, {name: prose, paths: [data/sample/prose/train-*]}]
  seq_len: 64
  global_batch_size: 12
  lanes: 12
train: {steps: 90, micro_batch_size: 1}
optimizer: {lr: 1.0e-3}
checkpoint: {every: 15}
metrics: {progress: false}
YAML
cat >site.yaml <<YAML
sbatch: {mem: 100}
python: $TRAINER
batch_python: $PYTHON
environment: {WARM_PYTHON: "${WARM_PYTHON:-}"}
preflight: {min_free_gb: 0.01}
YAML

inside() { "$here/lab.sh" exec "$@"; }
headrace() { inside "$PYTHON" -m pretrain "$@"; }
play() {
  echo "\$ $*"
  case $1 in headrace) "$@" ;; *) inside "$@" ;; esac 2>&1 | sed "s#$work/##g; s#$work##g"
  echo
}
step() { # waits until so many steps are done
  until [ "$(grep -c '"loss"' runs/mill/metrics.jsonl 2>/dev/null || echo 0)" -ge "$1" ]; do sleep .1; done
}

play sinfo -N -o '%N %T'
play headrace launch slurm run.yaml --nodes 2-3 --gpus-per-node 0 --time 10 --site site.yaml
step 25
play headrace launch status runs/mill
play scontrol update nodename=node2,node3 state=down reason=broken
until [ "$(grep -c '"start"' runs/mill/launch/attempts.jsonl)" -ge 2 ]; do sleep .1; done
step 50
play headrace launch status runs/mill
play scancel --batch --signal=USR1 1
until grep -q '"finished"' runs/mill/launch/attempts.jsonl; do sleep .2; done
play headrace launch status runs/mill
play cat runs/mill/log/slurm-1.log
inside "$TRAINER" -m pretrain train run.yaml run.dir=runs/alone >/dev/null 2>&1
hashes() { grep '"loss"' "$1" | sed 's/.*"step": *\([0-9]*\),.*"batch_sha256": *"\([0-9a-f]*\)".*/\1 \2/'; }
echo '$ # Steps and the SHA-256 of their tokens: the same as in one process that nothing interrupted?'
echo '$ diff <(hashes runs/mill/metrics.jsonl) <(hashes runs/alone/metrics.jsonl) && echo the same'
diff <(hashes runs/mill/metrics.jsonl) <(hashes runs/alone/metrics.jsonl) && echo the same
