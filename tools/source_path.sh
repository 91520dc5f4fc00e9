#!/usr/bin/env bash
# Makes the source tree importable without an installation:   export PYTHONPATH=$(bash tools/source_path.sh)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
site=$root/build/source_path
mkdir -p "$site/hydrasurgery"
ln -sfn "$root"/hydrasurgery/* "$root/passes" "$root/kernels" "$site/hydrasurgery/"
echo "$site"
