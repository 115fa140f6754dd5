#!/usr/bin/env bash
# Whether installing bitpress into vLLM's own environment would change any package that is there:
#     bash bench/beside_vllm.sh [.cache/bench-envs/vllm]
# Asks pip for its plan and installs nothing. Prints what would be added; exit status 1 if anything would be changed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
env=${1:-$here/../.cache/bench-envs/vllm}
plan=$(mktemp)
trap 'rm -f "$plan"' EXIT
"$env/bin/python" -m pip install --quiet --dry-run --report "$plan" "$here/.." 2>/dev/null
"$env/bin/python" - "$plan" <<'PY'
import importlib.metadata
import json
import sys

wanted = [(e["metadata"]["name"], e["metadata"]["version"]) for e in json.load(open(sys.argv[1]))["install"]]
changed = []
for name, version in wanted:
    try:
        before = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(f"new      {name} {version}")
        continue
    if name.lower() != "bitpress":
        changed.append(f"{name} {before} -> {version}")
print("\n".join(f"CHANGED  {c}" for c in changed) or "nothing that is there would change")
sys.exit(bool(changed))
PY
