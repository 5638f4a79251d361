#!/usr/bin/env bash
# The example plugins, installed as packages and tested, in a new virtual environment built on the one of $1, without network;
# then the launcher of VLMEvalKit.
set -euo pipefail
base="$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
cd "$(dirname "$0")/../examples/plugins"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$base" -m venv --without-pip "$work/venv"
python="$work/venv/bin/python"
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
echo "import site; site.addsitedir('$(packages "$base")')" >"$(packages "$python")/base.pth"
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation "$@"; }
for plugin in */; do [ "$plugin" = tokenprune-lmms-eval/ ] || plugins+=("./$plugin"); done
install "${plugins[@]}"
install --no-deps ./tokenprune-lmms-eval/ # most of its tests are skipped without lmms-eval, which is large
for plugin in */; do
    echo "$plugin"
    # From a copy of the tests: what is imported is what was installed.
    cp -r "$plugin/tests" "$plugin/pyproject.toml" "$(mkdir -p "$work/$plugin" && echo "$work/$plugin")"
    (cd "$work/$plugin" && OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest -q -rs)
done
echo vlmevalkit
cp -r ../vlmevalkit "$work"
(cd "$work/vlmevalkit" && OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest -q -ra)
