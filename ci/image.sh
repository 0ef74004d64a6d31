#!/usr/bin/env bash
# Builds the worker image; with PUSH=1 also pushes it. The tag comes from git.
#   OWNER        account in the registry (default: GITHUB_REPOSITORY_OWNER)
#   TAG          instead of the one from git
#   TORCH_INDEX  package index with CPU builds of torch (default: pip's own)
#   GHCR_USER, GHCR_TOKEN   log in before the push; the token is never an argument
# Exits 3 where no container engine works.
set -euo pipefail
cd "$(dirname "$0")/.."

engine=
for candidate in ${ENGINE:-docker podman}; do
    if "$candidate" info >/dev/null 2>&1; then
        engine=$candidate
        break
    fi
done
if [[ -z $engine ]]; then
    echo "image.sh: no container engine works here (tried: ${ENGINE:-docker podman})" >&2
    exit 3
fi

registry=ghcr.io
owner=${OWNER:-${GITHUB_REPOSITORY_OWNER:-bitnet-fleet}}
version=$(git describe --tags --always --dirty)
tag=${TAG:-${version#v}}
# A registry takes lower-case names only.
image=$registry/${owner,,}/bitnet-worker:$tag

"$engine" build --file Dockerfile.worker --tag "$image" \
    --build-arg TORCH_INDEX="${TORCH_INDEX:-}" \
    --build-arg VERSION="$tag" \
    --build-arg REVISION="$(git rev-parse HEAD)" .

if [[ ${PUSH:-0} == 1 ]]; then
    if [[ -n ${GHCR_TOKEN:-} ]]; then
        "$engine" login "$registry" --username "${GHCR_USER:?}" --password-stdin \
            <<<"$GHCR_TOKEN"
    fi
    "$engine" push "$image"
fi
echo "$image"
