#!/usr/bin/env bash
# Checks what `python -m build` made: `.ci/check_release.sh TAG DIST`. There is one sdist and one wheel, both of the tag's
# version, and the wheel is complete when it is installed in an environment of its own.
set -euo pipefail
tag="$1"
dist="$(cd "$2" && pwd)"
root="$(cd "$(dirname "$0")/.." && pwd)"
version="${tag#v}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

expected="tokenprune_vlm-$version-py3-none-any.whl tokenprune_vlm-$version.tar.gz"
found="$(cd "$dist" && echo *)"
if [ "$found" != "$expected" ]; then
    echo "tag $tag: found $found in $dist, expected $expected; is __version__ in tokenprune/__init__.py that of the tag?"
    exit 1
fi

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints-cpu.txt" "$dist"/*.whl
installed="$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cd "$work" # what is imported is what was built, not the checkout
"$work/venv/bin/python" "$root/.ci/check_wheel.py" "$installed"
printed="$("$work/venv/bin/tokenprune" --version)"
echo "$printed"
[ "${printed##* }" = "$version" ]
