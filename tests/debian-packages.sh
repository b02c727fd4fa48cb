#!/bin/sh
# Install the named Debian packages that are missing, when we may; else say what goes without.
# usage: debian-packages.sh PACKAGE…
set -u

missing=""
for package in "$@"; do
    state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

skip() {
    echo "tests: $1; tests that need$missing are skipped" >&2
    exit 0
}

command -v apt-get >/dev/null || skip "this is not Debian"
[ "$(id -u)" = 0 ] || skip "not root (to have them: sudo apt-get install$missing)"
echo "tests: installing$missing (make test DEB_PACKAGES= goes without)"

# A freshly installed sshd must not start to listen on this machine: the tests run their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update </dev/null >&2 || skip "apt-get update failed"
# One that this release does not have (Ubuntu's chromium is no package) must not cost the others.
known=""
for package in $missing; do
    if apt-cache show "$package" >/dev/null 2>&1; then
        known="$known $package"
    else
        echo "tests: there is no package $package here; tests that need it are skipped" >&2
    fi
done
missing=$known
[ -n "$missing" ] || exit 0
# shellcheck disable=SC2086  # a list of names
apt-get -qq install -y --no-install-recommends $missing </dev/null >&2 || skip "apt-get failed"
