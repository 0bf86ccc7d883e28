#!/usr/bin/env bash
# Prepares .venv, and the system packages it needs: for "make demo" (setup.sh demo), for "make bench" (setup.sh bench) or for
# everything else (setup.sh dev).
set -euo pipefail
cd "$(dirname "$0")/.."

mode=$1
python=${PYTHON:-python3}

say() { printf '==> %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# ---- system packages

missing=()
root=() # sudo, where it is needed

need() { missing+=("$@"); }

is_debian_python() { [[ $("$python" -c 'import sys; print(sys.base_prefix)') == /usr ]]; }

# python3-dev for the distribution's default interpreter, python3.12-dev for another one it has.
debian_name() {
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [[ $(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) == "$version" ]]; then
        echo "python3-$1"
    else
        echo "python$version-$1"
    fi
}

check_python() {
    command -v "$python" >/dev/null || fail "$python not found; install Python 3.10 to 3.14, or choose one: make PYTHON=python3.12 ..."
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' ||
        fail "$("$python" -V) is too old; Skialith needs Python 3.10 or newer: make PYTHON=python3.12 ..."
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need_of_python venv
    [[ -e $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] || need_of_python dev
}

need_of_python() {
    is_debian_python || fail "$("$python" -V) at $(command -v "$python") lacks its $1 part (headers or ensurepip); install it or choose another Python: make PYTHON=python3.12 ..."
    need "$(debian_name "$1")"
}

check_compiler() {
    local probe
    probe=$(mktemp)
    echo 'int main(void) { return 0; }' | ${CC:-gcc} -x c - -o "$probe" 2>/dev/null || need gcc libc6-dev
    rm -f "$probe"
}

check_mariadb() {
    command -v pkg-config >/dev/null || need pkg-config
    pkg-config --exists libmariadb 2>/dev/null || pkg-config --exists mysqlclient 2>/dev/null || need libmariadb-dev
    PATH=$PATH:/usr/sbin command -v mariadbd >/dev/null || need mariadb-server
    # For the tests of a cluster; mariadb-server brings all of it.
    [[ -e /usr/lib/galera/libgalera_smm.so ]] || need galera-4
    command -v rsync >/dev/null || need rsync
    command -v ss >/dev/null || need iproute2
}

check_curl() {
    command -v curl >/dev/null || need curl
}

check_redis() {
    command -v redis-server >/dev/null || need redis-server
}

check_postgres() {
    command -v postgres >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || need postgresql
}

install_missing() {
    ((${#missing[@]})) || return 0
    local advice="install these packages, then run make again: ${missing[*]}"
    command -v apt-get >/dev/null || fail "not a Debian system; $advice"
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || fail "no root and no passwordless sudo; run: sudo apt-get install ${missing[*]}"
        root=(sudo -n)
    fi
    say "installing system packages: ${missing[*]}"
    hold_services
    "${root[@]}" apt-get update -qq || fail "apt-get update failed; $advice"
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" ||
        fail "apt-get failed; $advice"
    release_services
}

# The tests start servers of their own. Debian would also start the system's at installation; a policy-rc.d that says
# 101 ("not allowed") is Debian's way to prevent that.
held=
hold_services() {
    [[ -e /usr/sbin/policy-rc.d ]] && return
    held=yes
    trap release_services EXIT
    printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee /usr/sbin/policy-rc.d >/dev/null
    "${root[@]}" chmod 755 /usr/sbin/policy-rc.d
}

release_services() {
    [[ $held ]] || return 0
    held=
    "${root[@]}" rm -f /usr/sbin/policy-rc.d
}

# ---- the virtual environment

make_venv() {
    local wanted
    wanted=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [[ -x .venv/bin/python ]] && .venv/bin/python -c 'import pip' 2>/dev/null; then
        local there
        there=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        [[ $there == "$wanted" ]] || fail ".venv has Python $there, $python is $wanted; run make clean first"
        return
    fi
    say "making .venv with $("$python" -V)"
    rm -rf .venv
    "$python" -m venv .venv
    .venv/bin/python -m pip install -q --upgrade pip
}

install_skialith() {
    say "installing Skialith [$1] and compiling its Cython modules (the first time takes a minute or two)"
    PYTHONWARNINGS=ignore .venv/bin/python -m pip install -q --progress-bar off -e ".[$1]"
}

check_python
check_compiler
case $mode in
demo) ;;
dev)
    check_mariadb
    check_redis
    check_curl
    ;;
bench)
    check_mariadb
    check_redis
    check_curl
    check_postgres
    ;;
*) fail "usage: scripts/setup.sh demo|dev|bench" ;;
esac
install_missing
make_venv
case $mode in
demo)
    # What "dev" installed is more than the demo needs; only a changed source asks for another build.
    if [[ -e .venv/.ready-dev ]]; then install_skialith all,dev && touch .venv/.ready-dev; else install_skialith local,uvloop; fi
    ;;
dev)
    install_skialith all,dev
    touch .venv/.ready-demo
    ;;
bench)
    install_skialith all,dev,bench
    touch .venv/.ready-demo .venv/.ready-dev
    ;;
esac
touch ".venv/.ready-$mode"
say "ready"
