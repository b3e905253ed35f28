#!/usr/bin/env bash
# Llama-3.1-405B, losslessly compressed, over HTTP, with vLLM: docs/guide/nodes.md.
#
#   examples/serve_405b.sh one DIR             one node with 8 GPUs of 80 GB
#   examples/serve_405b.sh worker HEAD         second node first: joins the first one, whose address is HEAD
#   examples/serve_405b.sh head DIR            first node: two nodes of 8 GPUs, for long contexts
#
# DIR is what `bitforbit compress` wrote, under the same path on every node.
set -euo pipefail

RAY_PORT=${RAY_PORT:-6379}
GPUS=16

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[[ $# == 2 ]] || usage
what=$1 argument=$2

case $what in
one)
  exec bitforbit serve "$argument" --host 0.0.0.0 --tensor-parallel-size 8 --max-model-len 65536
  ;;
head)
  ray start --head --port "$RAY_PORT" --num-gpus 8
  trap 'ray stop' EXIT
  until [[ $(python -c 'import ray; ray.init("auto", log_to_driver=False); print(int(ray.cluster_resources().get("GPU", 0)))') -ge $GPUS ]]; do
    echo "waiting for $GPUS GPUs: run \`$0 worker THIS_NODE\` on the other node" >&2
    sleep 5
  done
  bitforbit serve "$argument" --host 0.0.0.0 --tensor-parallel-size 8 --pipeline-parallel-size 2 \
    --distributed-executor-backend ray --max-model-len 131072
  ;;
worker)
  exec ray start --address "$argument:$RAY_PORT" --num-gpus 8 --block
  ;;
*) usage ;;
esac
