#!/usr/bin/env bash
# SimpleAR's whole way on a set made here: captioned photographs -> FSQ tokenizer -> token shards at two resolutions ->
# pretraining -> fine-tuning at twice the resolution -> guided samples of both. Nothing is downloaded.
# Everything goes to runs/simplear/smoke/; what is done is not done again.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

runs=runs/simplear/smoke
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as in scripts/quickstart.sh: the matrices are small
ranks="${VTRAIN_SIMPLEAR_RANKS:-1}"
start=$SECONDS
step() { echo; echo "== $1   [$((SECONDS - start)) s]"; }
run() { torchrun --standalone --nproc-per-node "$ranks" -m "$@"; }

step "1/8 the pictures: crops of 14 photographs and 10 scanned digits, with captions"
[ -s $runs/data/prompts.txt ] || python scripts/photographs.py export $runs/data

step "2/8 text tokenizer: SentencePiece on the captions"
[ -s $runs/text/tokenizer.model ] || python -m vtrain.text_tokenizer --cfg simplear/smoke/text

step "3/8 image tokenizer: 4x4 pixels -> a code out of 240"
run vtrain.autoencoder --cfg simplear/smoke/tokenizer

step "4/8 token shards: 4x4 codes a picture at 16 pixels, 8x8 at 32 pixels"
run vtrain.extract --cfg simplear/smoke/extract
run vtrain.extract --cfg simplear/smoke/extract input.records=$runs/data/valid.json run.out=$runs/shards16/valid
run vtrain.extract --cfg simplear/smoke/extract_large
run vtrain.extract --cfg simplear/smoke/extract_large input.records=$runs/data/valid.json run.out=$runs/shards32/valid

step "5/8 pretraining at 16 pixels"
run vtrain.pretrain --cfg simplear/smoke/pretrain

step "6/8 fine-tuning at 32 pixels"
run vtrain.pretrain --cfg simplear/smoke/sft

step "7/8 eight pictures of each of 24 prompts, at both resolutions"
run vtrain.sample --cfg simplear/smoke/sample model.path=$runs/pretrain/final run.out=$runs/samples16
run vtrain.sample --cfg simplear/smoke/sample

step "8/8 what the pictures show"
python scripts/photographs.py score $runs/data $runs/samples16 $runs/samples32 --require 0.8
echo "open $runs/samples32/grid.png and $runs/samples16/grid.png (samples), $runs/tokenizer/reconstructions.png"
