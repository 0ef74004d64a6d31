#!/usr/bin/env bash
# Writes ci/requirements.lock: every package but torch, pinned with hashes; and
# ci/after-torch.lock: what needs torch, which is installed by version only.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras \
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
    --no-header --output-file ci/requirements.lock ci/requirements.in

# Its own requirements are in the first file, so it is installed without any.
version=1.15.0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --no-deps --dest "$folder" "accelerate==$version"
{
    echo "accelerate==$version \\"
    python3 -m pip hash "$folder"/*.whl | sed -n 's/^--hash/    --hash/p'
} >ci/after-torch.lock
