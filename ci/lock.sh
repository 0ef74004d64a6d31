#!/usr/bin/env bash
# Writes ci/requirements.lock: every package but torch, pinned with hashes.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras \
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
    --no-header --output-file ci/requirements.lock ci/requirements.in
