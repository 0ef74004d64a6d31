#!/usr/bin/env bash
# Fetches the page's libraries into webui/vendor/ at pinned versions; needs npm.
# Their modules import each other by bare name, which a browser can't resolve without
# an inline import map, and our CSP allows nothing inline: the names become paths here.
set -euo pipefail
cd "$(dirname "$0")/.."

preact=11.2.0
signals=2.11.4
signals_core=1.14.5
htm=3.1.1
uplot=1.6.32

out=webui/vendor
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() { # fetch PACKAGE VERSION: unpacks into $work/PACKAGE/
    local archive
    archive=$(cd "$work" && npm pack --silent "$1@$2")
    mkdir -p "$work/$1"
    tar --extract --gzip --file "$work/$archive" --directory "$work/$1" \
        --strip-components 1
}

row() { # row FILE PACKAGE VERSION SOURCE: one line of VERSIONS.md
    local licence sum
    licence=$(sed -n 's/^ *"license": *"\([^"]*\)".*/\1/p' "$work/$2/package.json")
    sum=$(sha256sum "$out/$1" | cut -d ' ' -f 1)
    echo "| $1 | $2 | $3 | $licence | $4 | $sum |" >>"$out/VERSIONS.md"
}

take() { # take PACKAGE VERSION SOURCE FILE: copies, with imports made relative
    sed -E \
        -e 's#from ?"preact/hooks"#from"./preact-hooks-'"$preact"'.js"#g' \
        -e 's#from ?"preact"#from"./preact-'"$preact"'.js"#g' \
        -e 's#from ?"@preact/signals-core"#from"./signals-core-'"$signals_core"'.js"#g' \
        -e 's#//\# sourceMappingURL=.*##' \
        "$work/$1/$3" >"$out/$4"
    row "$4" "$1" "$2" "$3"
}

licence() { # licence PACKAGE VERSION FILE
    cp "$work/$1/LICENSE" "$out/$3"
    row "$3" "$1" "$2" LICENSE
}

rm -rf "$out"
mkdir -p "$out"
cat >"$out/VERSIONS.md" <<'HEAD'
# Vendored libraries

Made by `ci/vendor.sh`; do not edit. The hash is of the file here, the source is the
file of the package that it was made from.

| file | package | version | licence | source | sha256 |
|---|---|---|---|---|---|
HEAD

fetch preact "$preact"
fetch @preact/signals "$signals"
fetch @preact/signals-core "$signals_core"
fetch htm "$htm"
fetch uplot "$uplot"

take preact "$preact" dist/preact.mjs "preact-$preact.js"
take preact "$preact" hooks/dist/hooks.mjs "preact-hooks-$preact.js"
licence preact "$preact" "preact-$preact.LICENSE"
take @preact/signals-core "$signals_core" dist/signals-core.mjs \
    "signals-core-$signals_core.js"
licence @preact/signals-core "$signals_core" "signals-core-$signals_core.LICENSE"
take @preact/signals "$signals" dist/signals.mjs "signals-$signals.js"
licence @preact/signals "$signals" "signals-$signals.LICENSE"
take htm "$htm" dist/htm.mjs "htm-$htm.js"
licence htm "$htm" "htm-$htm.LICENSE"
# The package's own ESM build is not minified and three times as large.
echo 'export default uPlot;' >>"$work/uplot/dist/uPlot.iife.min.js"
take uplot "$uplot" dist/uPlot.iife.min.js "uPlot-$uplot.js"
take uplot "$uplot" dist/uPlot.min.css "uPlot-$uplot.css"
licence uplot "$uplot" "uPlot-$uplot.LICENSE"

if left=$(grep -lE '(from|import) ?"[^./]' "$out"/*.js); then
    echo "vendor.sh: an import by bare name is left in $left" >&2
    exit 1
fi
