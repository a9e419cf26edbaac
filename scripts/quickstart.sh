#!/usr/bin/env bash
# From a bare checkout to generated pictures: scanned digits -> image tokenizer -> token shards -> training -> samples.
# Everything goes to runs/quickstart/; what is done is not done again. VTRAIN_QUICKSTART_RANKS=2 trains on two processes.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

runs=runs/quickstart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # matrices this small are slower on two threads than on one
ranks="${VTRAIN_QUICKSTART_RANKS:-1}"
start=$SECONDS
step() { echo; echo "== $1   [$((SECONDS - start)) s]"; }
run() { torchrun --standalone --nproc-per-node "$ranks" -m "$@"; }

step "1/6 the pictures: scikit-learn's 1,797 scanned digits as PNG and captions"
[ -s $runs/data/prompts.txt ] || python scripts/digits.py export $runs/data

step "2/6 text tokenizer: SentencePiece on the captions"
[ -s $runs/text/tokenizer.model ] || python -m vtrain.text_tokenizer --cfg quickstart/text

step "3/6 image tokenizer: 8x8 pixels -> 4x4 codes out of 24"
run vtrain.autoencoder --cfg quickstart/vq

step "4/6 token shards: pictures and captions encoded once"
run vtrain.extract --cfg quickstart/extract
run vtrain.extract --cfg quickstart/extract input.records=$runs/data/valid.jsonl run.out=$runs/shards/valid
python -m vtrain.shards verify $runs/shards/train

step "5/6 the decoder learns caption -> codes"
run vtrain.pretrain --cfg quickstart/ar

step "6/6 20 pictures of each digit"
[ $runs/samples/sampling.json -nt $runs/ar/final/model.safetensors ] || rm -rf $runs/samples # of an older model
[ $runs/samples/grid.png -nt $runs/ar/final/model.safetensors ] || run vtrain.sample --cfg quickstart/sample

step "done"
python scripts/digits.py score $runs/samples
echo "open $runs/samples/grid.png (samples), $runs/ar/loss.png (loss curve), $runs/vq/reconstructions.png (tokenizer)"
