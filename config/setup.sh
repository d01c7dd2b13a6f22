#!/usr/bin/env bash
# Sets the machine up for working on Flushpoint. Called by the Makefile; running it again is quick.
#
#   config/setup.sh venv DIR     a virtual environment with exactly the packages of requirements.lock
#   config/setup.sh system       the programs that tests and the demo use, through apt where allowed, and the guest
#   config/setup.sh guest        what tests boot as a guest and run in it, unpacked in the user's cache and not installed
#   config/setup.sh bench        what the bench uses beside them
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

# program -> Debian and Ubuntu package that holds it, and others it wants
programs=(
    qemu-img:qemu-utils
    qemu-io:qemu-utils
    qemu-nbd:qemu-utils
    qemu-storage-daemon:qemu-system-common
    qemu-system-x86_64:qemu-system-x86
    nbdkit:nbdkit
    nbdcopy:libnbd-bin
    nbdinfo:libnbd-bin
    rabbitmq-server:rabbitmq-server
    mke2fs:e2fsprogs
    openssl:openssl
    certtool:gnutls-bin
    ip:iproute2
    nft:nftables
    spin:spin
    "gcc:gcc libc6-dev"
)

say() { printf '%s\n' "$*" >&2; }
die() { say "setup: $*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# "", "sudo -n" (needs no password) or "sudo" (asks for one on a terminal); fails where apt may not be used.
apt_prefix() {
    has apt-get || return 1
    if [ "$(id -u)" -eq 0 ]; then return 0; fi
    has sudo || return 1
    if sudo -n true 2>/dev/null; then echo "sudo -n"; return 0; fi
    if [ -t 0 ]; then echo sudo; return 0; fi
    return 1
}

# Installs packages without starting the services that some of them bring.
apt_install() {
    local prefix policy=/usr/sbin/policy-rc.d made_policy="" had_rabbit=""
    if ! prefix=$(apt_prefix); then
        say "setup: these packages are missing, and apt cannot be used here (it needs root or sudo, on Debian or Ubuntu):"
        say "    $*"
        say "install them (apt-get install $*), or what holds the same programs elsewhere, and run make again"
        return 1
    fi
    has rabbitmq-server && had_rabbit=yes
    if [ ! -e "$policy" ]; then
        # Exit code 101 forbids the packages' scripts to start a service (invoke-rc.d(8)): tests start
        # their own, and a container has nothing to start one with.
        printf '#!/bin/sh\nexit 101\n' | $prefix tee "$policy" >/dev/null
        $prefix chmod 755 "$policy"
        made_policy=yes
    fi
    local status=0
    { $prefix apt-get -qq update &&
        $prefix env DEBIAN_FRONTEND=noninteractive \
            apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 install "$@"; } </dev/null >&2 || status=$?
    [ -z "$made_policy" ] || $prefix rm -f "$policy"
    if [ "$status" -ne 0 ]; then
        say "setup: apt-get could not install: $*; see its messages above"
        return 1
    fi
    if [ -z "$had_rabbit" ] && has rabbitmq-server && [ -d /run/systemd/system ]; then
        # Brought by us for the tests: it shall not start at the next boot either.
        $prefix systemctl disable --quiet rabbitmq-server || say "setup: could not disable the service rabbitmq-server"
    fi
}

missing_packages() {
    local entry
    for entry in "${programs[@]}"; do
        has "${entry%%:*}" || echo "${entry#*:}"
    done | sort -u
}

install_programs() {
    local missing
    missing=$(missing_packages | tr '\n' ' ')
    [ -n "${missing// /}" ] || return 0
    say "setup: installing ${missing% }"
    # shellcheck disable=SC2086
    apt_install $missing || exit 1
    hash -r
    missing=$(missing_packages | tr '\n' ' ')
    [ -z "${missing// /}" ] || die "apt installed ${missing% }, but their programs are still not on the PATH"
}

# The kernel for virtual machines, under the names of Debian and Ubuntu, with its modules, and busybox.
guest_packages() {
    local meta kernel
    for meta in linux-image-cloud-amd64 linux-image-virtual; do
        kernel=$(depends_of "$meta" 'linux-image-[0-9]')
        [ -z "$kernel" ] || break
    done
    [ -n "$kernel" ] || return 1
    echo "$kernel" busybox-static "$(depends_of "$kernel" 'linux-modules-[0-9]')"
}

# QEMU's agent for guests, with the libraries it is linked to and those that they are.
agent_packages() {
    local libraries library
    libraries=$(depends_of qemu-guest-agent lib)
    [ -n "$libraries" ] || return 1
    { echo qemu-guest-agent && echo "$libraries" && for library in $libraries; do depends_of "$library" lib; done; } | sort -u
}

depends_of() { LC_ALL=C apt-cache depends "$1" 2>/dev/null | sed -n "s/^ *Depends: \\($2.*\\)/\\1/p"; }

# fetch DIRECTORY LISTING: the packages that the function LISTING names, unpacked there
fetch() {
    local packages package
    packages=$("$2") || return 1
    # shellcheck disable=SC2086
    (cd "$1" && apt-get -qq -o APT::Sandbox::User=root download $packages </dev/null >&2) || return 1
    for package in "$1"/*.deb; do
        dpkg-deb -x "$package" "$1" && rm "$package" || return 1
    done
}

# Fetched once: remove the directories to have a newer kernel and agent.
guest() {
    fetch_once guest guest_packages "a kernel (linux-image-cloud-amd64 or linux-image-virtual) and busybox-static" &&
        fetch_once guest-agent agent_packages "qemu-guest-agent and its libraries"
}

# fetch_once NAME LISTING WHAT
fetch_once() {
    local cache=${XDG_CACHE_HOME:-~/.cache}/flushpoint-tests part prefix
    [ ! -d "$cache/$1" ] || return 0
    if ! has apt-get || ! has dpkg-deb; then
        say "setup: the guest of the tests comes from Debian's or Ubuntu's packages, and apt is not here"
        return 1
    fi
    say "setup: fetching $3"
    mkdir -p "$cache" && part=$(mktemp -d "$cache/$1.XXXXXX") || return 1
    # The second try is for lists of packages that are old or not there.
    if ! fetch "$part" "$2" &&
        ! { prefix=$(apt_prefix) && $prefix apt-get -qq update </dev/null >&2 && fetch "$part" "$2"; }; then
        rm -rf "$part"
        say "setup: apt could not fetch $3"
        return 1
    fi
    mv -T "$part" "$cache/$1" 2>/dev/null || rm -rf "$part"  # somebody else was faster
}

system() {
    install_programs
    guest || say "setup: going on without a guest: tests that boot one are skipped, and fail in CI"
}

bench() {
    programs+=(rclone:rclone)
    install_programs
    programs+=(virtnbdbackup:virtnbdbackup virsh:libvirt-clients libvirtd:libvirt-daemon)
    (install_programs) || say "setup: going on without virtnbdbackup: the bench of groups skips it"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The interpreter to use: $PYTHON, else python3, else the newest of the named ones.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11 or newer"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if has "$candidate" && is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed, and python3 is $(python3 --version 2>&1 || echo 'not there'); install one, or name it: make PYTHON=/path/to/python3.11"
}

venv() {
    local dir=$1 python package
    if ! "$dir/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            # Debian splits both off: python3-venv for python3, python3.12-venv for python3.12
            package=$(basename "$python")-venv
            say "setup: $python has no venv module; it is in the package $package"
            apt_install "$package" || exit 1
        fi
        say "setup: making $dir with $("$python" --version)"
        "$python" -m venv --clear "$dir" || die "$python -m venv failed; see its message above"
    fi
    is_new_enough "$dir/bin/python" || die "$dir holds $("$dir/bin/python" --version); remove it and run make again"
    say "setup: installing the packages of requirements.lock in $dir"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
        -r "$root/requirements.lock" || die "pip could not install requirements.lock; see its message above"
    # setuptools warns that an editable installation is one.
    PYTHONWARNINGS=ignore "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --editable "$root" || die "pip could not install the project itself; see its message above"
}

case "${1:-}" in
    system) system ;;
    guest) guest ;;
    bench) bench ;;
    venv) venv "${2:?name the directory of the virtual environment}" ;;
    *) die "usage: config/setup.sh system | guest | bench | venv DIR" ;;
esac
