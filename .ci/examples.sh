#!/usr/bin/env bash
# The example plugins, installed as packages and tested, in a new virtual environment built on the one of $1, without network;
# then the example server.
set -euo pipefail
base="$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
cd "$(dirname "$0")/../examples/plugins"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$base" -m venv --without-pip "$work/venv"
python="$work/venv/bin/python"
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
echo "import site; site.addsitedir('$(packages "$base")')" >"$(packages "$python")/base.pth"
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation ./*/
for plugin in */; do
    echo "$plugin"
    # From a copy of the tests: what is imported is what was installed.
    cp -r "$plugin/tests" "$plugin/pyproject.toml" "$(mkdir -p "$work/$plugin" && echo "$work/$plugin")"
    (cd "$work/$plugin" && OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest -q)
done
echo server
cp -r ../server "$work"
(cd "$work/server" && OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest -q -ra)
