#!/usr/bin/env bash
# Makes the source tree importable without an installation:   export PYTHONSAFEPATH=1 PYTHONPATH=$(bash tools/source_path.sh)
# (PYTHONSAFEPATH keeps the current folder, whose hydrasurgery/ lacks kernels and passes, from coming first; Python 3.11 or newer.)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
site=$root/build/source_path
mkdir -p "$site/hydrasurgery"
ln -sfn "$root"/hydrasurgery/* "$root/passes" "$root/kernels" "$site/hydrasurgery/"
ln -sfn "$root/tests" "$site/"
echo "$site"
