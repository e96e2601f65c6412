# shellcheck shell=bash
# What lab/run, lab/fetch and lab/setup share.

export PATH="$PATH:/usr/sbin:/sbin"
debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# Commands, each with the Debian package that has it.
needs=(qemu-system-x86_64:qemu-system-x86 cpio:cpio modprobe:kmod depmod:kmod xz:xz-utils
    zstd:zstd apt-get:apt dpkg-deb:dpkg flock:util-linux timeout:coreutils)

# The emulated processor. QEMU has it since 8.1. Under QEMU 7.2, with its nearest processor, Linux 6.12
# died of a double fault in the middle of the tests, with impossible flags after a cmpxchg16b.
processor=EPYC-v4

# Prints the packages that have to be installed, one a line.
missing_packages() {
    local need
    for need in "${needs[@]}"; do
        command -v "${need%:*}" >/dev/null || echo "${need#*:}"
    done | sort -u
    [ -e "$debian_keyring" ] || echo debian-archive-keyring
}

qemu_is_too_old() {
    command -v qemu-system-x86_64 >/dev/null &&
        [[ $(qemu-system-x86_64 -cpu help) != *" $processor "* ]]
}

# The mirror that was asked for, or that the system's apt uses, or Debian's own.
debian_mirror() {
    local mirror=${PAGEFERRY_LAB_MIRROR-}
    if [ -z "$mirror" ]; then
        # shellcheck disable=SC2016 # apt's own variable
        mirror=$(apt-get indextargets --format '$(REPO_URI)' \
            'Created-By: Packages' 'Label: Debian' 'Origin: Debian' 2>/dev/null |
            awk 'NR == 1') || true
    fi
    mirror=${mirror:-http://deb.debian.org/debian}
    echo "${mirror%/}"
}

# unpack_modules KERNEL_DIR DIR MODULE...: puts the modules of an unpacked kernel, with what they depend
# on, into DIR, and prints their files' names in the order in which they have to be loaded.
unpack_modules() {
    local kernel_dir=$1 dir=$2 release list file name
    shift 2
    [ -d "$kernel_dir/lib/modules" ] || return 0
    release=$(cat "$kernel_dir/release")
    list=$(modprobe -d "$kernel_dir" -S "$release" --show-depends -a "$@") || {
        echo "lab: Linux $release does not have $*" >&2
        return 1
    }
    # Lines of `insmod FILE`, or `builtin NAME`; a module that two others need comes twice.
    while read -r _ file; do
        name=$(basename "$file")
        name=${name%%.*}.ko
        case $file in
            *.ko) cp "$file" "$dir/$name" ;;
            *.ko.xz) xz -dc "$file" >"$dir/$name" ;;
            *.ko.zst) zstd -qdc "$file" >"$dir/$name" ;;
            *)
                echo "lab: $file: not a form of module that is known" >&2
                return 1
                ;;
        esac
        echo "$name"
    done < <(awk '$1 == "insmod" && !seen[$2]++ { print $1, $2 }' <<<"$list")
}
