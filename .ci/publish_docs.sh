#!/usr/bin/env bash
# Publishes the site with mike, in the branch gh-pages of `origin`: `.ci/publish_docs.sh` as the version `dev`,
# `.ci/publish_docs.sh v1.2.3` as `1.2`. The alias `latest` and the site's own address lead to the highest version that is
# published: a patch of an older version leaves them where they are, and a patch older than the published one is not published.
# Publishing may be repeated, and done for several tags at the same time.
set -euo pipefail
cd "$(dirname "$0")/.."
tag="${1:-}"

if [ -z "$tag" ]; then
    version=dev
elif [[ "$tag" =~ ^v([0-9]+\.[0-9]+)\.[0-9]+$ ]]; then
    version="${BASH_REMATCH[1]}"
elif [[ "$tag" =~ ^v[0-9]+\.[0-9]+\.[0-9]+(a|b|rc|\.dev)[0-9]+$ ]]; then
    echo "$tag is a pre-release: no site is published"
    exit 0
else
    echo "$tag: expected the tag of a release, such as v1.2.3, or no argument for the version dev" >&2
    exit 2
fi

for _ in 1 2 3; do
    git fetch --quiet origin
    published="$(mike list --json)"
    choice="$("${PYTHON:-python3}" .ci/site_alias.py "$tag" <<< "$published")"
    case "$choice" in
        dev)
            mike deploy dev
            ;;
        dev-default)
            mike deploy dev
            mike set-default dev
            ;;
        version)
            mike deploy --prop-set-string "release=${tag#v}" "$version"
            ;;
        latest)
            mike deploy --prop-set-string "release=${tag#v}" --update-aliases "$version" latest
            mike set-default latest
            ;;
        older)
            echo "$tag is older than the $version that is published: nothing is published"
            exit 0
            ;;
    esac
    if git push --quiet origin gh-pages; then exit 0; fi
    # if another job was faster, begin again with what it published
    git fetch --quiet origin
    there="$(git rev-parse --verify --quiet origin/gh-pages || true)"
    if [ -z "$there" ] || git merge-base --is-ancestor "$there" gh-pages; then break; fi
    git update-ref refs/heads/gh-pages "$there"
done
echo "gh-pages could not be pushed to origin: see git's message above" >&2
exit 1
