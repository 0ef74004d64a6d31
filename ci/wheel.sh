#!/usr/bin/env bash
# Builds the wheel into dist/ (or OUT) and prints its path as the last line.
# Builds from a copy of the files that git knows or would add, so that nothing an
# earlier build left behind gets in. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-dist}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo "$PWD/.venv/bin/python" || echo python3)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree" "$work/wheel"

git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
        # Removed, but not yet for git.
        if [[ -e $file ]]; then printf '%s\0' "$file"; fi
    done | tar --create --null --files-from - | tar --extract --directory "$work/tree"

# The same commit gives the same wheel.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
"$python" -m build --wheel --no-isolation --outdir "$work/wheel" "$work/tree" >&2

wheel=$(find "$work/wheel" -name '*.whl')
case $wheel in
    *-cp311-abi3-*.whl) ;;
    *) echo "wheel.sh: not a cp311-abi3 wheel: ${wheel##*/}" >&2; exit 1 ;;
esac
if "$python" -m auditwheel --version >/dev/null 2>&1; then
    mkdir "$work/repaired"
    "$python" -m auditwheel repair --wheel-dir "$work/repaired" "$wheel" >&2
    wheel=$(find "$work/repaired" -name '*.whl')
fi
cp "$wheel" "$out/"
echo "$out/${wheel##*/}"
