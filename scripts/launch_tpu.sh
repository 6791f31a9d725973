#!/usr/bin/env bash
# Installs this checkout on every worker of a Cloud TPU and starts training there, in the background.
#   TPU=NAME ZONE=ZONE [PROJECT=ID] scripts/launch_tpu.sh --config=configs/X.py --workdir=/mnt/bucket/X
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"
[ $# -gt 0 ] || { echo "flags of python -m vit_interact.train are missing" >&2; exit 1; }

tpu=(gcloud compute tpus tpu-vm)
where=(--zone="$ZONE" --worker=all ${PROJECT:+--project="$PROJECT"})
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD

"${tpu[@]}" scp "${where[@]}" "$archive" "$TPU:~/vit_interact.tar.gz"
"${tpu[@]}" ssh "${where[@]}" "$TPU" --command='
  rm -rf vit_interact && mkdir vit_interact && tar xzf vit_interact.tar.gz -C vit_interact &&
  python3 -m venv vit_interact_venv && vit_interact_venv/bin/pip install --quiet "./vit_interact[tpu,tfds]"'
printf -v flags ' %q' --distributed "$@"
"${tpu[@]}" ssh "${where[@]}" "$TPU" --command="
  cd vit_interact && nohup ../vit_interact_venv/bin/python -m vit_interact.train$flags \
    > ../training.log 2>&1 < /dev/null & sleep 1; echo started"
echo "watch it: ${tpu[*]} ssh --zone=$ZONE --worker=0 $TPU --command='tail -f training.log'"
